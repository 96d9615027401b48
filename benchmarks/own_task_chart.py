"""The chart of own_task.py: top-1 of every way, a panel for each share of the MACs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rows import grouped, mean_of

from tpvprune.reports.text import cell

WIDTH, NAMES, NUMBERS, ROW, HEAD = 800, 270, 240, 26, 40
TOP1, MB, TIME = 126, 64, 12  # where the numbers end, from the right
OURS = "prune + distill"
DENSE = "dense"
STYLE = (
    "text { font: 13px system-ui, sans-serif; fill: #3d4248; } .title { font-weight: 600; } "
    ".soft { fill: #767b81; } .paper { fill: #fcfbf9; } .grid { stroke: #e3e0da; } "
    ".dense { stroke: #8a8f95; stroke-dasharray: 4 3; } .dot { fill: #8a8f95; } "
    ".labels .dot { fill: #c2792b; } .ours .dot, .tpv .dot { fill: #0e6f66; } "
    ".ours text { font-weight: 600; } .error { stroke: #55595e; }"
)
_APART = 0.02
Rows = Sequence[Mapping[str, str]]


class Scale(NamedTuple):
    """Percent along a panel, between two round numbers."""

    low: int
    high: int

    def x(self, percent: float) -> float:
        """Return where it stands."""
        share = (percent - self.low) / (self.high - self.low)
        return NAMES + (WIDTH - NAMES - NUMBERS) * share

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """Return the scale that all values are on."""
        return cls(10 * math.floor(min(values) / 10), 10 * math.floor(max(values) / 10 + 1))


def chart(path: Path) -> str:
    """Return an SVG picture."""
    found = grouped(path, ("keep", "way"))
    panels: dict[str, dict[str, Rows]] = {}
    for (keep, way), rows in sorted(found.items(), key=lambda f: -_top1(f[1])[0]):
        if way != DENSE:
            panels.setdefault(keep, {})[way] = rows
    lines = [rows for panel in panels.values() for rows in panel.values()]
    dense = statistics.mean(float(row["dense_top1"]) for row in lines[0])
    scale = Scale.of([dense, *(_top1(rows)[0] for rows in lines)])
    parts, y = [], 0
    for keep in sorted(panels, key=float, reverse=True):
        drawn = "".join(_panel(keep, panels[keep], scale, dense))
        parts.append(f'<g transform="translate(0 {y})">{drawn}</g>')
        y += HEAD + ROW * len(panels[keep]) + 34
    about = "top-1 on test images, size and time; dashed: the network that is made smaller"
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{about}">'
    ground = f'<style>{STYLE}</style><rect width="100%" height="100%" class="paper"/>'
    return f"{head}{ground}{''.join(parts)}</svg>\n"


def _panel(keep: str, lines: Mapping[str, Rows], scale: Scale, dense: float) -> list[str]:
    top, bottom = HEAD - 6, HEAD + ROW * len(lines)
    parts = [_text(12, 22, f"{100 * float(keep):g} % of the MACs", "title")]
    timed = any(row["ms_kept"] for rows in lines.values() for row in rows)
    for place, name in ((TOP1, "top-1"), (MB, "MB"), (TIME, "time" if timed else "")):
        parts.append(_text(WIDTH - place, 22, name, "soft", "end"))
    for tick in range(scale.low, scale.high + 1, 10):
        parts.append(_line("grid", (scale.x(tick), top), (scale.x(tick), bottom)))
        parts.append(_text(scale.x(tick), bottom + 16, str(tick), "soft", "middle"))
    parts.append(_line("dense", (scale.x(dense), top), (scale.x(dense), bottom)))
    parts += [
        _way(_name(way, rows, float(keep)), rows, scale, HEAD + ROW * (i + 0.5))
        for i, (way, rows) in enumerate(lines.items())
    ]
    return parts


def _name(way: str, rows: Rows, keep: float) -> str:
    """Return the name of a way, with its share of the MACs where that is not the panel's."""
    share = mean_of(rows, "macs_kept")
    more = f", {100 * share:.0f} %" if share - keep > _APART else ""
    return f"{way}{more}{' (labels)' if rows[0]['labels'] != 'no' else ''}"


def _way(name: str, rows: Rows, scale: Scale, y: float) -> str:
    way, labels = rows[0]["way"], rows[0]["labels"] != "no"
    top1, spread = _top1(rows)
    numbers = [
        (TOP1, f"{top1:.1f}" + (f" ± {spread:.1f}" if spread else "")),
        (MB, f"{mean_of(rows, 'mb'):.1f}"),
    ]
    if all(row["ms_kept"] for row in rows):
        numbers.append((TIME, f"{100 * mean_of(rows, 'ms_kept'):.0f} %"))
    drawn = [
        f'<circle class="dot" cx="{scale.x(top1):.1f}" cy="{y:.1f}" r="5"/>',
        _text(12, y + 4, name),
        *(_text(WIDTH - place, y + 4, text, "", "end") for place, text in numbers),
    ]
    if spread:
        ends = (scale.x(top1 - spread), y), (scale.x(top1 + spread), y)
        drawn.insert(0, _line("error", *ends))
    kind = "ours" if way == OURS else "tpv" if way.startswith("prune") else ""
    kind = "labels" if labels else kind
    return f'<g class="{kind}">{"".join(drawn)}</g>'


def _top1(rows: Rows) -> tuple[float, float | None]:
    values = [float(row["top1"]) for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _line(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{cell(text)}</text>'
