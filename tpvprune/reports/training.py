"""The report's account of a training that followed the cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpvprune.reports.page import section, table_row
from tpvprune.reports.text import percent, significant, whole


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
    ):
        cells = ("" if side.get(key) is None else write(side[key]) for side in (before, after))
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
        f"<p>{teacher} Output variance and agreement on {whole(facts['num_held_back'])} images "
        "held back from training.</p>"
    )
    return section("Training", about, f"<table><tbody>{body}</tbody></table>")
