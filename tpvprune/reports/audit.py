"""The page of an audit: what was measured, and what moved that should not have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tpvprune.reports.charts import scatter_chart
from tpvprune.reports.page import left_out, page, section, table, table_row, with_error
from tpvprune.reports.tables import making
from tpvprune.reports.text import cell, minus, percent, significant, whole

_STYLE = """
header { margin-bottom: 2.5rem; }
.wrap td, .wrap tbody th { white-space: normal; vertical-align: baseline; }
.wrap td:nth-child(2) { white-space: nowrap; }
.heat td { border-top: 0; padding: .42rem .6rem; text-align: center; min-width: 4.2rem;
  background: color-mix(in srgb, var(--gone) calc(.7 * var(--level, 0%)), transparent); }
.heat th { white-space: normal; padding-left: .6rem; text-align: center; line-height: 1.25; }
.heat tbody th { text-align: left; border-top: 0; vertical-align: middle; }
.heat table { border-collapse: separate; border-spacing: 2px; width: auto; }
svg[width] { width: auto; max-width: 100%; }
"""


def render_audit(data: Mapping[str, Any]) -> str:
    """Render an audit as one HTML page."""
    shown = [change for change in data["changes"] if change["neutral"]]
    parts = [
        _header(data),
        _measures(data),
        _moved(data, shown),
        _rankings(data, shown),
        _tpv(data),
        _changes(data),
        left_out(data["left_out"]),
        making({key: value for key, value in data.items() if key not in {"used_labels", "keep"}}),
    ]
    return page(f"{data['model']}: audit", parts, style=_STYLE)


def _header(data: Mapping[str, Any]) -> str:
    images = data["images"]
    classes = (
        "Labels were read where a measure needs a loss."
        if data["used_labels"]
        else "<strong>No label was read</strong>: where a measure needs a loss, the "
        "model\u2019s own classes stand in."
    )
    return (
        f"<header><h1>{cell(data['model'])}: how far its measures are to be trusted</h1>"
        f'<p class="lead">Measured on {whole(images["num_measured"])} of '
        f"{whole(images['num_images'])} images, then again after changes that leave the model as "
        f"good as it was. {classes}</p></header>"
    )


def _measures(data: Mapping[str, Any]) -> str:
    rows = []
    for measure in data["measures"].values():
        value = with_error(significant(measure["value"]), measure["stderr"])
        classes = "" if not measure["reads_classes"] else (
            "labels" if data["used_labels"] else "own classes"
        )  # fmt: skip
        texts = (classes, measure["cost"], measure["unmoved_by_rescaling"], measure["source"])
        rows.append(table_row(cell(measure["title"]), [value, *map(cell, texts)]))
    heads = ("Measure", "Value", "Reads", "Passes", "Same after rescaling", "Source")
    about = (
        "<p>A pass is one forward over the images; a backward counts two. The column before the "
        "last says what theory expects of a ReLU network whose channels or layers are rescaled.</p>"
    )
    return section("Measures", about, f'<div class="wrap">{_table(heads, rows)}</div>')


def _moved(data: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for measure in data["measures"].values():
        cells = []
        for change in changes:
            moved = measure["moved"].get(change["name"])
            # A tenth is a tint, a factor of two is full colour.
            level = 0.0 if moved is None else min(abs(_log_ratio(moved)) / math.log(2), 1.0)
            cells.append((_change_text(moved), level))
        rows.append((measure["title"], cells))
    about = (
        "<p>Relative change of each measure. The model classifies as before (within 0.2 points) in "
        "every column, so what is coloured says nothing of how good it is.</p>"
    )
    return section("How far measures move", about, _heat(changes, rows))


def _rankings(data: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, criterion in data["criteria"].items():
        cells = []
        for change in changes:
            tau = criterion["tau"].get(change["name"])
            if tau is None:
                cells.append(("", 0.0))
                continue
            same = percent(criterion["overlap"][change["name"]], 0)
            text = f'{tau:.2f}<br><span class="soft">{same}</span>'
            cells.append((text, min(max(1 - tau, 0.0), 1.0)))
        rows.append((name, cells))
    about = (
        "<p>Kendall\u2019s rank correlation of the channels\u2019 scores before and after; below "
        f"it, how many of the channels cut at {percent(data['keep'], 0)} of the MACs are the "
        "same.</p>"
    )
    return section("How far rankings move", about, _heat(changes, rows))


def _tpv(data: Mapping[str, Any]) -> str:
    found = data["tpv"]
    rows = []
    for form in found["rows"]:
        values = [
            with_error(significant(form[key]), form[f"{key}_stderr"])
            for key in ("train", "held_out")
        ]
        ratio = "" if form["ratio"] is None else f"{form['ratio']:.3f}"
        rows.append(table_row(cell(form["perturbation"]), [cell(form["form"]), *values, ratio]))
    heads = ("Perturbation", "Form", "Measured images", "Held out", "Ratio")
    points = [(name, tuple(a), tuple(b)) for name, a, b in found["parameters"]]
    chart = scatter_chart(points, "measured images", "held-out images")
    about = (
        "<p>Output variance under noise on the weights, E\u2016\u0394f\u2016\u00b2, by its trace "
        f"and by {whole(found['num_draws'])} draws, on the measured images and on "
        f"{cell(data['images']['held_out'])}. The picture: every parameter\u2019s share of the "
        "trace.</p>"
    )
    return section("TPV, measured and held out", about, _table(heads, rows) + chart)


def _changes(data: Mapping[str, Any]) -> str:
    rows = []
    for change in data["changes"]:
        moved = minus(f"{100 * change['moved']:+.2f}")
        text = "" if change["neutral"] else " (left out above)"
        rows.append(table_row(cell(change["name"]), [f"{moved}{text}", cell(change["note"])]))
    what = "accuracy" if data["used_labels"] else "agreement with itself"
    about = f"<p>What was changed, and by how many points {what} moved.</p>"
    changes = _table(("Change", "Points", "Note"), rows)
    return section("Changes", about, f'<div class="wrap">{changes}</div>')


def _heat(
    changes: Sequence[Mapping[str, Any]],
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]],
) -> str:
    body = [
        table_row(
            cell(name),
            (f'<td style="--level:{100 * level:.0f}%">{text}</td>' for text, level in levels),
        )
        for name, levels in rows
    ]
    heads = ("", *(change["name"] for change in changes))
    return f'<div class="heat">{_table(heads, body)}</div>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    return f'<div class="scroll">{table(map(cell, heads), rows)}</div>'


def _log_ratio(moved: float) -> float:
    return math.log(1 + moved) if moved > -1 else -math.inf


def _change_text(moved: float | None) -> str:
    if moved is None:
        return ""
    if abs(moved) < 5e-6:
        return "0"
    if moved >= 1:
        return f"\u00d7{significant(1 + moved, 2)}"
    sign = "+" if moved > 0 else ""
    return sign + percent(moved, 1 if abs(moved) >= 0.001 else 2)
