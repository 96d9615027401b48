"""The report's pictures; each is left out where its data is missing."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tpvprune.reports.charts import (
    MAX_SPREAD,
    scale_of,
    score_panel,
    step_chart,
    value_rows,
    width_rows,
)
from tpvprune.reports.page import reasons, section
from tpvprune.reports.tables import both, branches_of
from tpvprune.reports.text import cell, percent, power_of_ten, significant, whole

_MOST_CLASSES = 24
_FEWEST_IMAGES = 5
"""Of a class whose agreement is shown: of fewer it tells nothing."""
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def widths(data: Mapping[str, Any]) -> str:
    """Picture how much of each layer is left."""
    groups = data.get("groups")
    if not groups:
        return ""
    rows, stay = _kept(groups, "num_channels")
    dense = [row[1] for row in rows]
    scale = " Bars show shares." if max(dense) > MAX_SPREAD * min(dense) else ""
    left = " Those of branches that left are not counted." if branches_of(data)[0] else ""
    units = sorted({cell(g.get("unit") or "channel") for g in groups})
    about = (
        f"<p>{stay} {' and '.join(f'{unit}s' for unit in units)} stay, in "
        f"{len(rows)} groups, named after the first layer that writes them.{left}{scale}</p>"
        '<p><span class="key">kept</span><span class="key outline">dense</span></p>'
    )
    return section("Kept width", about, width_rows(rows))


def weights(data: Mapping[str, Any]) -> str:
    """Picture which share of the weights of each layer is left, where single ones went."""
    layers = data.get("layers")
    if not layers:
        return ""
    rows, stay = _kept(layers, "num_weights")
    about = (
        f"<p>{stay} weights stay, in {len(rows)} layers; the others are "
        "zero. Bars show shares of each layer.</p>"
        '<p><span class="key">stays</span><span class="key outline">zero</span></p>'
    )
    return section("Weights that stay", about, width_rows(rows, shares=True))


def _kept(parts: Sequence[Mapping[str, Any]], of: str) -> tuple[list[tuple[str, int, int]], str]:
    rows = [(str(part["name"]), int(part[of]), int(part["kept"])) for part in parts]
    return rows, f"{whole(sum(row[2] for row in rows))} of {whole(sum(row[1] for row in rows))}"


def steps(data: Mapping[str, Any]) -> str:
    """Draw agreement and accuracy against MACs."""
    dense, pruned = both(data)
    taken = [step for step in data.get("steps") or () if step.get("agreement") is not None]
    # One step has nothing between start and end, which are shown above.
    if len(taken) < 2 or not dense.get("macs"):
        return ""
    line = [(1.0, 1.0)] + [(step["macs"] / dense["macs"], step["agreement"]) for step in taken]
    series = [("Agreement", "kept", line)]
    key = '<span class="key">agreement with the dense model</span>'
    tops = [(s["macs"] / dense["macs"], s["top1"]) for s in taken if s.get("top1") is not None]
    if dense.get("top1") is not None:
        if not tops and pruned.get("top1") is not None:
            tops = [(pruned["macs"] / dense["macs"], pruned["top1"])]
        series.append(("Top-1", "gone", [(1.0, dense["top1"]), *tops]))
        key += ' <span class="key gone">top-1</span>'
    held_back = f"{cell(data['num_held_back'])} " if data.get("num_held_back") else ""
    about = (
        "<p>Share of images, against the share of MACs that is left. "
        f"Agreement is on {held_back}held-back unlabeled images.</p><p>{key}</p>"
    )
    return section("Along the steps", about, step_chart(series))


def scores(data: Mapping[str, Any]) -> str:
    """Draw the scores of every group."""
    known = {name: s for name, s in (data.get("scores") or {}).items() if s.get("values")}
    found = [v for s in known.values() for v in s["values"] if v is not None]
    scale = scale_of(found)
    if scale is None:
        return ""
    panels = ""
    for name, score in known.items():
        values = [value or 0.0 for value in score["values"]]
        stderr = score.get("stderr")
        errors = [error or 0.0 for error in stderr] if stderr else None
        panels += (
            f'<figure title="{cell(name)}"><figcaption><span class="name">'
            f"<bdi>{cell(name)}</bdi></span><span>{len(values)}</span></figcaption>"
            f"{score_panel(values, errors, score.get('kept'), scale)}</figure>"
        )
    about = (
        "<p>What removing each channel would change, sorted within its group"
        f"{_error_words(known)}.{_scale_words(scale)}</p>"
    )
    if any(score.get("kept") for score in known.values()):
        about += '<p><span class="key">stays</span><span class="key gone">removed</span></p>'
    return section("Scores", about, f'<div class="panels">{panels}</div>')


def classes(data: Mapping[str, Any]) -> str:
    """Draw the agreement of every class, worst first."""
    every = (data.get("disagreement") or {}).get("classes") or []
    found = [row for row in every if row["num_images"] >= _FEWEST_IMAGES]
    if len(found) < 2:
        return ""
    names = data.get("class_names")
    ordered = sorted(found, key=lambda row: (row["agreement"], -row["num_images"]))
    rows = [
        (
            _class_name(row["class"], names),
            row["agreement"],
            f'{percent(row["agreement"])}<span class="soft"> of {whole(row["num_images"])}</span>',
        )
        for row in ordered[:_MOST_CLASSES]
    ]
    about = "<p>Share of images with the same class as before, by the dense model\u2019s choice"
    if len(rows) < len(found):
        about += f"; the {len(rows)} lowest of {len(found)} classes"
    if few := len(every) - len(found):
        about += f"; {few} of fewer than {_FEWEST_IMAGES} images each are left out"
    about += ".</p>"
    return section("Agreement by class", about, f'<div class="wide">{value_rows(rows)}</div>')


def samples(data: Mapping[str, Any]) -> str:
    """Show images whose class changed."""
    found = data.get("disagreement") or {}
    names = data.get("class_names")
    pictures = "".join(
        f'<figure><img alt="" src="{sample["image"]}"><figcaption>'
        f"<span>{cell(_class_name(sample['dense'], names))} "
        f'<span class="soft">{percent(sample["dense_share"], 0)}</span></span>'
        f'<span class="now">{cell(_class_name(sample["pruned"], names))} '
        f'<span class="soft">{percent(sample["pruned_share"], 0)}</span></span>'
        "</figcaption></figure>"
        for sample in found.get("samples") or ()
        if _PICTURE.fullmatch(str(sample.get("image")))
    )
    if not pictures:
        return ""
    about = (
        f"<p>{whole(found['num_changed'])} of {whole(found['num_images'])} images have another "
        "class than before; none of them served the repair. Shown are those of which the dense "
        "model was most certain: its class above, the pruned model\u2019s below.</p>"
    )
    return section("Images that changed", about, f'<div class="pictures">{pictures}</div>')


def repairs(data: Mapping[str, Any]) -> str:
    """Show what each repair left of the output variance."""
    shares = {k: v for k, v in (data.get("variance_share") or {}).items() if v is not None}
    found = {k: v for k, v in (data.get("output_variance") or {}).items() if v is not None}
    found, second = (shares, 1.0) if shares else (found, data.get("output_second_moment"))
    if not found:
        return ""
    of = "Var f, a common shift of all outputs aside" if shares else "E\u2016f\u2016\u00b2"
    rows = [
        (name, value, percent(value / second, 2) if second else significant(value))
        for name, value in sorted(found.items(), key=lambda item: item[1])
    ]
    about = (
        "<p>Output variance E\u2016\u0394f\u2016\u00b2 on held-back unlabeled images"
        + (f", as a share of {of}" if second else "")
        + ". A repair is only taken if no cheaper one is smaller.</p>"
    )
    return section("Repair", about, value_rows(rows, data.get("repair_chosen")))


def blocked(data: Mapping[str, Any]) -> str:
    """List the groups that were left whole, by reason."""
    left = data.get("blocked")
    if not left:
        return ""
    by_reason: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for group in left:
        by_reason[str(group.get("reason") or "no reason given")].append(group)
    named = [
        (
            ", ".join(
                f"{g['name']} ({g['num_channels']})" if g.get("num_channels") else str(g["name"])
                for g in groups
            ),
            reason,
        )
        for reason, groups in by_reason.items()
    ]
    group, unit = ("layer", "weights") if data.get("of") == "weights" else ("group", "channels")
    about = f"<p>{len(left)} {group}s keep all their {unit}.</p>"
    if len(left) == 1:
        about = f"<p>One {group} keeps all its {unit}.</p>"
    return section("Layers left whole", about, reasons(named))


def _class_name(number: int, names: Sequence[str] | None) -> str:
    known = names is not None and 0 <= number < len(names)
    return str(names[number]) if known and names else f"class {number}"


def _error_words(scores: Mapping[str, Any]) -> str:
    relative = [
        error / value
        for score in scores.values()
        for value, error in zip(score["values"], score.get("stderr") or (), strict=False)
        if value and error is not None
    ]
    if not relative:
        return ""
    median = percent(statistics.median(relative), 0)
    return f", with one standard error up and down (in the median {median} of the score)"


def _scale_words(scale: tuple[float, float]) -> str:
    low, high = math.ceil(scale[0]), math.floor(scale[1])
    if low >= high:
        return ""
    return f" Lines lie a factor of ten apart, from {power_of_ten(low)} to {power_of_ten(high)}."
