"""The page of several runs: what each cost, what it kept, and how they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpvprune.reports.charts import Curve, curve_chart
from tpvprune.reports.page import dots, page, section, table, table_row
from tpvprune.reports.style import hues
from tpvprune.reports.tables import both, branches_of, command_lines, share_of
from tpvprune.reports.text import (
    cell,
    cost_labels,
    head_of,
    minus,
    percent,
    short,
    significant,
    whole,
)

Run = tuple[str, Mapping[str, Any]]
"""The name of a run and its ``report.json``."""

_SETTINGS = (
    "model", "weights", "keep", "of", "granularity", "criterion", "allocation", "round_to",
    "repair", "num_images", "used_labels", "seed",
)  # fmt: skip
_STYLE = """
header { margin-bottom: 3rem; }
.legend { list-style: none; margin: 0; padding: 0; font-size: .8125rem; }
.legend li::before, .dot::before { content: ""; display: inline-block; width: .65em;
  height: .65em; border-radius: 50%; margin-right: .6em; background: var(--c); }
svg g circle { fill: var(--c); } .curve { stroke: var(--c); stroke-width: 1.75; opacity: .45; }
svg g circle { r: 4px; }
.cells td { min-width: 6.5rem; } .cells th { font-weight: 400; }
.cells .share { display: block; height: .3rem; margin-top: .2rem; border-radius: 2px;
  background: var(--fill); box-shadow: inset 0 0 0 1px var(--edge); }
.cells .share span { display: block; height: 100%; border-radius: 2px; background: var(--c); }
td.best { color: var(--kept); font-weight: 600; }
.runs th { white-space: normal; } .runs tbody th { overflow-wrap: anywhere; }
.runs td { vertical-align: top; } .runs tbody th { vertical-align: top; min-width: 7rem; }
.runs .on { display: block; color: var(--soft); font-weight: 400; font-size: .75rem;
  line-height: 1.35; white-space: normal; }
.wraps td, .wraps thead th { white-space: normal; overflow-wrap: anywhere; min-width: 4.5rem; }
.wraps tbody th { vertical-align: top; padding-right: .7rem; } .wraps td { vertical-align: top; }
@media (max-width: 40rem) {
  .runs thead { display: none; } .runs table, .runs tbody { display: block; }
  .runs tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem 1rem;
    border-top: 1px solid var(--line); padding: .7rem 0 1rem; }
  .runs tbody th { grid-column: 1 / -1; border: 0; padding: 0; }
  .runs td { display: block; text-align: left; border: 0; padding: 0; }
  .runs td:empty { display: none; }
  .runs td::before { content: attr(data-label); display: block; color: var(--soft);
    font-weight: 400; font-size: .75rem; white-space: normal; }
  .cells td { min-width: 4.5rem; } .cells .name { overflow-wrap: anywhere; }
}
"""


def figures_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of one run that runs are compared by."""
    dense, pruned = both(report)
    shown = cost_labels(dense, pruned)
    top1, before = pruned.get("top1"), dense.get("top1")
    return {
        **{
            key: share_of(pruned, dense, key) if key in shown else None
            for key in ("macs", "params", "nonzero_params")
        },
        "latency": share_of(pruned, dense, "latency_ms"),
        "top1": top1,
        "top1_change": None if top1 is None or before is None else top1 - before,
        "agreement": pruned.get("agreement"),
        "variance": (report.get("held_back") or {}).get("variance_share"),
    }


def figures_of_all(runs: Sequence[Run]) -> list[dict[str, float | None]]:
    """Return what :func:`figures_of` does of each run, non-zero parameters for all or for none."""
    found = [figures_of(report) for _, report in runs]
    if any(row["nonzero_params"] is not None for row in found):
        for row in found:
            if row["nonzero_params"] is None:
                row["nonzero_params"] = row["params"]
    return found


def render_comparison(runs: Sequence[Run]) -> str:
    """Render several runs as one HTML page, without any outside resource."""
    models = list(dict.fromkeys(str(report.get("model") or "a model") for _, report in runs))
    title = f"{len(runs)} runs of {', '.join(models[:3])}" + (" \u2026" if models[3:] else "")
    lead = (
        "Costs are fractions of each run\u2019s own dense model."
        if len(models) > 1
        else "Costs are fractions of the dense model."
    )
    head = f'<header><h1>{cell(title)}</h1><p class="lead">{lead}</p></header>'
    parts = [
        head,
        _numbers(runs),
        _chart(runs),
        _settings(runs),
        _branches(runs),
        _widths(runs),
        _commands(runs),
    ]
    return page(title, parts, style=_STYLE + hues(len(runs)))


def measured_on(report: Mapping[str, Any]) -> dict[str, str | None]:
    """Return which images accuracy and agreement of one run were measured on."""
    pruned, on = both(report)[1], (report.get("images") or {}).get("agreement_on")
    agreed = None if on is None or pruned.get("agreement") is None else str(on)
    labelled = agreed if str(agreed).endswith("labelled images") else None
    if pruned.get("num_images"):
        labelled = f"{int(pruned['num_images'])} labelled images"
    top1 = None if pruned.get("top1") is None else labelled
    held = (report.get("held_back") or {}).get("num_images")
    return {
        "top1": top1,
        "top1_change": top1,
        "agreement": agreed,
        "variance": f"{int(held)} held-back images" if held else None,
    }


def broken_runs(runs: Sequence[Run]) -> list[str]:
    """Return the names of runs whose model is no longer the same function as the dense one."""
    held = [(name, report.get("held_back")) for name, report in runs]
    return [name for name, facts in held if isinstance(facts, Mapping) and facts.get("broken")]


def _numbers(runs: Sequence[Run]) -> str:
    columns: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
        ("macs", "MACs", percent, False),
        ("params", "Parameters", percent, False),
        ("nonzero_params", "Non-zero parameters", percent, False),
        ("latency", "Latency", percent, False),
        ("top1", "Top-1", lambda x: percent(x, 2), True),
        ("top1_change", "Change", lambda x: minus(f"{100 * x:+.2f}"), True),
        ("agreement", "Agreement", lambda x: percent(x, 2), True),
        ("variance", "Output variance", lambda x: percent(x, 2), False),
    )
    found = figures_of_all(runs)
    images = [measured_on(report) for _, report in runs]
    shown = [c for c in columns if any(row[c[0]] is not None for row in found)]
    best = {key: _best(key, found, images, more=more) for key, _, _, more in shown}
    rows = []
    names = dots(enumerate(name for name, _ in runs))
    for name, row, on in zip(names, found, images, strict=True):
        values = "".join(
            _number(label, row[key], write, "" if key == "top1_change" else on.get(key), best[key])
            for key, label, write, _ in shown
        )
        rows.append(f"<tr>{name}{values}</tr>")
    heads = ("Run", *(label for _, label, _, _ in shown))
    about = "<p>The best of each column stands out"
    unlike = [label for key, label, _, _ in shown if _is_unlike(key, found, images)]
    if unlike:
        about += (
            f", but not of {cell(' and '.join(unlike).lower())}: it was not measured on equally "
            "many images of the same kind, or that is not known"
        )
    if any(key == "variance" for key, *_ in shown):
        about += (
            ". Output variance: E\u2016\u0394f\u2016\u00b2 as a share of the dense model\u2019s own"
        )
    if broken := broken_runs(runs):
        about += f".</p><p>Broken, by the images held back: {cell(', '.join(broken))}"
    body = f'<div class="runs">{table(heads, rows)}</div>'
    return section("Numbers", f"{about}.</p>", body, style="across")


def _number(
    label: str, value: float | None, write: Callable[[float], str], on: str | None, best: Any
) -> str:
    if value is None:
        return "<td></td>"
    below = f'<span class="on">{cell(_counted(on))}</span>' if on else ""
    mark = " class=best" if value == best else ""
    return f'<td data-label="{label}"{mark}>{write(value)}{below}</td>'


def _counted(on: str) -> str:
    num, space, kind = on.partition(" ")
    return f"{whole(int(num))}{space}{kind}" if num.isdecimal() else on


def _best(key: str, found: Sequence[Any], images: Sequence[Any], *, more: bool) -> float | None:
    values = [row[key] for row in found if row[key] is not None]
    if len(values) < 2 or _is_unlike(key, found, images):
        return None
    return (max if more else min)(values)


def _is_unlike(key: str, found: Sequence[Any], images: Sequence[Any]) -> bool:
    # True as well where it is not known which images the numbers of the column come from.
    if key not in images[0]:
        return False
    on = {where[key] for row, where in zip(found, images, strict=True) if row[key] is not None}
    return len(on) > 1 or None in on


def _chart(runs: Sequence[Run]) -> str:
    found = [figures_of(report) for _, report in runs]
    key = "top1" if all(row["top1"] is not None for row in found) else "agreement"
    label = "Top-1" if key == "top1" else "Agreement with the dense model"
    curves: list[tuple[float, Curve]] = []
    for i, ((name, report), row) in enumerate(zip(runs, found, strict=True)):
        macs, value = row["macs"], row[key]
        if macs is None or value is None:
            continue
        start = _larger(report, macs, key, runs)
        curves.append((macs, Curve(name, f"c{i}", [*start, (macs, value, None)])))
    if not curves:
        return ""
    keys = "".join(f'<li class="{c.style}">{cell(c.label)}</li>' for _, c in curves)
    about = (
        f"<p>{label}, against the share of MACs that is left; sizes of one model that was pruned "
        f'in the same way are joined, from the dense one on.</p><ul class="legend">{keys}</ul>'
    )
    # The smallest first: where two lines meet, the dot of the larger run covers the other's end.
    chart = curve_chart([c for _, c in sorted(curves, key=lambda x: x[0])], f"{label} against MACs")
    return section("Top-1 against MACs" if key == "top1" else "Agreement", about, chart)


def _larger(
    report: Mapping[str, Any], macs: float, key: str, runs: Sequence[Run]
) -> list[tuple[float, float, None]]:
    """Return where the line of a run starts: at the next larger of its kind, or the dense model."""
    points = []
    for other in (other for _, other in runs if _kind(other) == _kind(report)):
        row = figures_of(other)
        if (row["macs"] or 0.0) > macs and row[key] is not None:
            points.append((float(row["macs"] or 0.0), float(row[key] or 0.0), None))
    before = both(report)[0].get("top1") if key == "top1" else 1.0
    dense = [] if before is None else [(1.0, float(before), None)]
    return [min(points)] if points else dense


def _kind(report: Mapping[str, Any]) -> list[Any]:
    return [report.get(name) for name in _SETTINGS if name != "keep"]


def _settings(runs: Sequence[Run]) -> str:
    reports = [report for _, report in runs]
    rows = [(head_of(key), [report.get(key) for report in reports]) for key in _SETTINGS]
    packages = sorted({name for report in reports for name in report.get("versions") or {}})
    rows += [(name, [(r.get("versions") or {}).get(name) for r in reports]) for name in packages]
    shown = [(label, values) for label, values in rows if len(set(map(str, values))) > 1]
    if not shown:
        same = "<p>Model, images and settings are the same in all runs.</p>"
        return section("What differs", same, "") if len(runs) > 1 else ""
    heads = ["", *dots(enumerate(name for name, _ in runs))]
    lines = [table_row(cell(label), (cell(_text(v)) for v in values)) for label, values in shown]
    about = "<p>Settings and versions that are not the same in all runs.</p>"
    body = f'<div class="scroll wraps">{table(heads, lines)}</div>'
    return section("What differs", about, body)


def branches_gone(runs: Sequence[Run]) -> dict[str, tuple[list[str], int]]:
    """Return which branches left each run, and how many could have, where any could."""
    found = {name: branches_of(report) for name, report in runs}
    return {name: (gone, could) for name, (gone, could) in found.items() if could}


def _branches(runs: Sequence[Run]) -> str:
    gone = {i: set(branches_of(report)[0]) for i, (_, report) in enumerate(runs)}
    every = dict.fromkeys(name for _, report in runs for name in branches_of(report)[0])
    if not every:
        return ""
    heads = ["", *dots((i, name) for i, (name, _) in enumerate(runs))]
    rows = [
        table_row(
            f'<span class="name">{cell(branch)}</span>',
            ("gone" if branch in gone[i] else "" for i in gone),
        )
        for branch in every
    ]
    about = "<p>Branches that left as a whole, in any of the runs.</p>"
    return section("Branches", about, f'<div class="scroll wraps">{table(heads, rows)}</div>')


def _widths(runs: Sequence[Run]) -> str:
    # Runs that only set single weights to zero have no widths.
    kept = {
        i: {str(g["name"]): g for g in report["groups"]}
        for i, (_, report) in enumerate(runs)
        if report.get("groups")
    }
    names = list(dict.fromkeys(name for groups in kept.values() for name in groups))
    if not names:
        return ""
    heads = ["", *dots((i, runs[i][0]) for i in kept)]
    rows = [
        table_row(
            f'<span class="name">{cell(name)}</span>',
            (_width(groups.get(name), i) for i, groups in kept.items()),
        )
        for name in names
    ]
    about = "<p>Channels that stay, of those that the dense model has.</p>"
    body = f'<div class="scroll wraps">{table(heads, rows, style="cells")}</div>'
    return section("Kept width", about, body)


def _width(group: Mapping[str, Any] | None, i: int) -> str:
    if group is None:
        return ""
    kept, dense = int(group["kept"]), int(group["num_channels"])
    share = f"{100 * kept / max(dense, 1):.1f}"
    return (
        f'{kept}<span class="soft">\u202f/\u202f{dense}</span>'
        f'<span class="share c{i}"><span style="width:{share}%"></span></span>'
    )


def _commands(runs: Sequence[Run]) -> str:
    items = "".join(
        f'<p class="dot c{i}">{cell(name)}</p><pre>{cell(command_lines(report["command"]))}</pre>'
        for i, (name, report) in enumerate(runs)
        if report.get("command")
    )
    return section("Commands", "", items) if items else ""


def _text(value: Any) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value)
    return short(value) if isinstance(value, int) and value >= 10_000 else str(value)
