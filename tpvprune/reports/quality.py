"""The report's account of what followed the cut: sizes under a limit of loss, and training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpvprune.reports.page import section, table, table_row
from tpvprune.reports.text import cell, minus, percent, short, significant, whole


def sizes_tried(data: Mapping[str, Any]) -> str:
    """Tabulate the sizes; nothing where no limit was set."""
    quality = data.get("quality")
    if not quality:
        return ""
    heads = ("Kept", "MACs", "Parameters", "Points lost", "Interval")
    rows = [_row(size, data.get("keep")) for size in quality["sizes"]]
    of = cell(quality["of"])
    about = (
        f"<p>The smallest size that loses at most {float(quality['max_loss']):g} points of {of}, "
        f"by bisection over one ranking; each size was repaired. The saved one stands out.</p>"
        f"<p>Promised, on the images that decided: {_loss(quality['promised'])}.</p>"
        f"<p>Measured, on images that took no part: {_loss(quality['measured'])}.</p>"
        f"<p>In brackets and in the table: {percent(quality['confidence'], 0)} intervals.</p>"
    )
    if quality["of"] == "top-1":
        about += "<p>Labels chose between these sizes alone: no score, width or repair saw one.</p>"
    return section("Sizes tried", about, table(heads, rows))


def _row(size: Mapping[str, Any], keep: Any) -> str:
    loss = size["loss"]
    values = (
        percent(size["share"]), short(size["macs"]), short(size["params"]), _points(loss["points"]),
        f"{_points(loss['low'])} to {_points(loss['high'])}",
    )  # fmt: skip
    return table_row(None, values, ours=size["keep"] == keep)


def _loss(loss: Mapping[str, Any]) -> str:
    return (
        f"{_points(loss['points'])} points ({_points(loss['low'])} to {_points(loss['high'])}) on "
        f"{whole(loss['num_images'])} images"
    )


def _points(number: float) -> str:
    return minus(f"{number:.2f}")


def training(data: Mapping[str, Any]) -> str:
    """State how the model was trained, and how much closer to the dense one that brought it."""
    facts = data.get("training")
    if not facts:
        return ""
    rows = [
        ("Epochs", whole(facts["epochs"]))
        if facts["epochs"] is not None
        else ("Minutes", f"{facts['minutes']:g}"),
        ("Peak learning rate", significant(facts["lr"])),
        ("Images", whole(facts["num_images"]) if facts.get("num_images") else "a stream"),
        ("Images per batch", whole(facts["batch_size"])),
    ]
    if facts.get("seconds") is not None:
        rows.append(("Time", f"{significant(facts['seconds'])}\u202fs"))
    before, after = facts["before"], facts["after"]
    for key, label, write in (
        ("output_variance", "Output variance E\u2016\u0394f\u2016\u00b2", significant),
        ("agreement", "Agreement with dense", lambda x: percent(x, 2)),
        ("top1", "Top-1 of labelled images", lambda x: percent(x, 2)),
    ):
        cells = [write(side[key]) for side in (before, after) if side.get(key) is not None]
        if cells[1:]:
            rows.append((label, " \u2192 ".join(cells)))
    if facts.get("fraction", 1.0) < 1:
        rows.append(("Of the way to the last weights", f"{facts['fraction']:g}"))
    body = "".join(table_row(label, [value]) for label, value in rows)
    teacher = (
        "With labels and cross-entropy."
        if facts.get("used_labels")
        else "Towards the dense model\u2019s outputs on the same augmented images, without labels."
    )
    about = (
        f"<p>{teacher} How close the outputs are to the dense ones on "
        f"{whole(facts['num_held_back'])} image{'' if facts['num_held_back'] == 1 else 's'} "
        "held back from training.</p>"
    )
    return section("Training", about, f"<table><tbody>{body}</tbody></table>")
