"""The table and the chart of paper_pruning.py: top-1 by the share of channels that is left."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rows import grouped, mean_and_sd
from titles import NAMES, markdown

from tpvprune.reports.charts import Curve, curve_chart
from tpvprune.reports.text import cell

TITLES = NAMES | {"tpv": "TPV, ranked", "tpv_curves": "TPV, curves"}
REPAIRS = {"none": "nothing repaired", "bn": "BatchNorm recalibrated"}
# Ours stand out; the others are told apart by hue and dash.
INK = {"tpv_curves": "#0e6f66", "tpv": "#3aa596", "jbr": "#c2792b", "jacobian": "#9a4f9e"}
OTHERS = ("#4a6fb5", "#8a8f95", "#b5544a", "#7a8b3a", "#6b5b95", "#2f7f9e", "#a08a4a")
WIDTH, HEIGHT, LEGEND = 440, 344, 190

Row = dict[str, str]
Lines = dict[tuple[str, str], dict[float, list[Row]]]


def lines_of(path: Path) -> Lines:
    """Return the rows by (repair, criterion) and by the share of the channels that is left."""
    found: Lines = {}
    for (repair, criterion, share), rows in grouped(
        path, ("repair", "criterion", "channels_kept")
    ).items():
        found.setdefault((repair, criterion), {})[float(share)] = rows
    return dict(sorted(found.items(), key=lambda line: _place(*line)))


def _place(key: tuple[str, str], shares: Mapping[float, Sequence[Row]]) -> tuple[int, float]:
    """No repair first, and the best on the way down first."""
    return list(REPAIRS).index(key[0]), -statistics.mean(map(_mean, shares.values()))


def _mean(rows: Sequence[Row]) -> float:
    return statistics.mean(float(row["top1"]) for row in rows)


def table(path: Path) -> str:
    """Return top-1, mean ± sd over the repeats, a column per measured step."""
    lines = lines_of(path)
    shares = sorted({share for line in lines.values() for share in line}, reverse=True)
    return markdown(
        ["repair", "criterion", "labels", *(f"{share:.2f}" for share in shares), "repeats"],
        [
            [
                repair,
                TITLES.get(criterion, criterion),
                next(iter(line.values()))[0]["labels"],
                *(mean_and_sd(line[s], "top1") if s in line else "" for s in shares),
                str(max(map(len, line.values()))),
            ]
            for (repair, criterion), line in lines.items()
        ],
    )


def chart(path: Path) -> str:
    """Return an SVG picture: a panel for each repair, a curve for each criterion."""
    lines = lines_of(path)
    repairs = [repair for repair in REPAIRS if any(key[0] == repair for key in lines)]
    criteria = list(dict.fromkeys(criterion for _, criterion in lines))
    width = len(repairs) * WIDTH + LEGEND
    parts = [
        f"<style>{_style(criteria)}</style>",
        '<rect width="100%" height="100%" class="paper"/>',
    ]
    for i, repair in enumerate(repairs):
        mine = {c: line for (r, c), line in lines.items() if r == repair}
        drawn = curve_chart([_curve(c, line) for c, line in mine.items()], REPAIRS[repair])
        parts.append(f'<text x="{i * WIDTH + 12}" y="20" class="title">{REPAIRS[repair]}</text>')
        place = f'<svg x="{i * WIDTH + 12}" y="30" width="{WIDTH - 24}" '
        parts.append(drawn.replace("<svg ", place, 1))
    for i, criterion in enumerate(criteria):
        x, y = len(repairs) * WIDTH + 8, 52 + 20 * i
        parts.append(
            f'<g class="{criterion}"><line class="curve" x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}"/>'
            f'<text x="{x + 34}" y="{y + 4}">{cell(TITLES.get(criterion, criterion))}</text></g>'
        )
    about = "top-1 by the share of the channels that is left"
    parts.append(f'<text x="12" y="{HEIGHT + 44}">{about}, mean ± sd</text>')
    size = f'width="{width}" height="{HEIGHT + 56}" viewBox="0 0 {width} {HEIGHT + 56}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{about}">'
    return f"{head}{''.join(parts)}</svg>\n"


def _curve(criterion: str, line: Mapping[float, Sequence[Row]]) -> Curve:
    first = next(iter(line.values()))[0]
    points: list[tuple[float, float, float | None]] = [
        (1.0, float(first["dense_top1"]) / 100, None)
    ]
    for share, rows in sorted(line.items(), reverse=True):
        values = [float(row["top1"]) / 100 for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else None
        points.append((share, statistics.mean(values), spread))
    return Curve(TITLES.get(criterion, criterion), criterion, points)


def _style(criteria: Sequence[str]) -> str:
    rules = [
        "text { font: 12px system-ui, sans-serif; fill: #55595e; } .title { font-weight: 600; }",
        ".paper { fill: #fcfbf9; } .grid { stroke: #e3e0da; }",
        ".curve { stroke-width: 1.75; } .error { stroke-width: 1; }",
    ]
    others = [criterion for criterion in criteria if criterion not in INK]
    for criterion in criteria:
        ink = INK.get(criterion) or OTHERS[others.index(criterion) % len(OTHERS)]
        dash = "" if criterion in INK else f".{criterion} .curve {{ stroke-dasharray: 5 3; }}"
        rules.append(f".{criterion} {{ stroke: {ink}; fill: {ink}; }} {dash}")
    return " ".join([*rules, "g text { stroke: none; }"])
