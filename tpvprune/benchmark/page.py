"""The page of a benchmark: one chart per repair, and all numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpvprune.benchmark.rows import RANKINGS, STOCK_RANKING, Summary, summarise
from tpvprune.reports.charts import Curve, curve_chart
from tpvprune.reports.page import left_out, page, section, table, table_row
from tpvprune.reports.style import hues
from tpvprune.reports.tables import making
from tpvprune.reports.text import cell, percent

_DASHES = {"curves": "none", "per_cost": "none", "plain": "5 4", STOCK_RANKING: "1.5 4"}
_REPAIRS = {
    "none": "No repair",
    "bn": "BatchNorm recalibrated",
    "compensate": "Weights compensated",
    "reconstruct": "Blocks reconstructed",
}
_RANKED = {
    "curves": "joint curves",
    "per_cost": "score per MAC",
    "plain": "score alone",
    STOCK_RANKING: "torch-pruning\u2019s own ranking",
}


def render_benchmark(data: Mapping[str, Any]) -> str:
    """Render the results of a benchmark as one HTML page."""
    found = summarise(data["rows"])
    names = list(dict.fromkeys(s.criterion for s in found))
    parts = [_header(found)]
    for repair in dict.fromkeys(s.repair for s in found):
        parts.append(_chart(repair, [s for s in found if s.repair == repair], names))
    parts += [_table(found), left_out(data.get("left_out") or {}), making(data)]
    return page(f"{found[0].model}: criteria compared", parts, style=_style(len(names)))


def _header(found: Sequence[Summary]) -> str:
    first, seeds = found[0], max(s.num_seeds for s in found)
    over = f"Mean and standard deviation over {seeds} seeds. " if seeds > 1 else "One seed. "
    return (
        f"<header><h1>{cell(first.model)}: criteria compared</h1>"
        f'<p class="lead">{over}The same {cell(first.num_images)} images, budgets and repairs '
        f"for all. The dense model has <strong>{percent(first.dense_top1 / 100, 2)}</strong>.</p>"
        "</header>"
    )


def _chart(repair: str, found: Sequence[Summary], names: Sequence[str]) -> str:
    curves = []
    for criterion, ranking in dict.fromkeys((s.criterion, s.ranking) for s in found):
        mine = [s for s in found if (s.criterion, s.ranking) == (criterion, ranking)]
        points = [(s.macs_kept, s.top1 / 100, s.sd and s.sd / 100) for s in mine]
        points = [(1.0, mine[0].dense_top1 / 100, None), *sorted(points, reverse=True)]
        style = f"c{names.index(criterion)} r-{ranking}"
        curves.append(Curve(f"{criterion}, {_RANKED[ranking]}", style, points))
    curves.sort(key=lambda curve: -curve.points[-1][1])
    keys = "".join(f'<li class="{c.style}">{cell(c.label)}</li>' for c in curves)
    about = (
        "<p>Top-1 against the share of MACs that is left, best at the smallest budget first.</p>"
        f'<ul class="legend">{keys}</ul>'
    )
    title = _REPAIRS.get(repair, cell(repair))
    return section(title, about, curve_chart(curves, f"Top-1 against MACs: {title}"))


def _table(found: Sequence[Summary]) -> str:
    keeps = sorted({s.keep for s in found}, reverse=True)
    heads = ("Criterion", "Labels", "Ranking", "Repair", *(percent(keep, 0) for keep in keeps))
    lines: dict[tuple[str, ...], dict[float, Summary]] = {}
    for s in found:
        lines.setdefault((s.criterion, s.labels, s.ranking, s.repair), {})[s.keep] = s
    rows = []
    for line, by_keep in lines.items():
        values = [*map(cell, line[1:]), *(_cell(by_keep.get(keep)) for keep in keeps)]
        rows.append(table_row(cell(line[0]), values, ours=line[0] == "tpv"))
    about = "<p>Top-1 in %, by the share of MACs that stays.</p>"
    return section("All rows", about, f'<div class="scroll">{table(heads, rows)}</div>')


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return ""
    sd = "" if summary.sd is None else f' <span class="soft">\u00b1 {summary.sd:.2f}</span>'
    return f"{summary.top1:.2f}{sd}"


def _style(num_criteria: int) -> str:
    rules = [
        ".curve, .error { stroke: var(--c); stroke-width: 1.75; stroke-linecap: round; }",
        ".error { stroke-width: 1; } svg g circle { fill: var(--c); }",
        "svg g:hover .curve { stroke-width: 3.5; }",
        ".legend { list-style: none; margin: 0; padding: 0; font-size: .8125rem; }",
        ".legend li::before { content: ''; display: inline-block; width: 1.6em; margin-right: .6em;"
        " vertical-align: .25em; border-top: 2px solid var(--c); }",
        ".legend .r-plain::before { border-top-style: dashed; }",
        f".legend .r-{STOCK_RANKING}::before {{ border-top-style: dotted; }}",
        *(
            f".r-{r} .curve {{ stroke-dasharray: {_DASHES[r]}; }}"
            for r in (*RANKINGS, STOCK_RANKING)
        ),
    ]
    return "\n".join([*rules, hues(num_criteria)])
