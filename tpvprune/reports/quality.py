"""The report's sizes that were tried under a limit of loss, and what was promised and measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpvprune.reports.page import section, table, table_row
from tpvprune.reports.text import cell, minus, percent, short, whole


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
