"""The report's account of what changed: agreement by class, and images of another class."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tpvprune.reports.charts import value_rows
from tpvprune.reports.page import section
from tpvprune.reports.text import cell, percent, whole

_MOST_CLASSES = 24
_FEWEST_IMAGES = 5
"""Of a class whose agreement is shown: of fewer it tells nothing."""
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


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
            _name(row["class"], names),
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
        f"<span>{cell(_name(sample['dense'], names))} "
        f'<span class="soft">{percent(sample["dense_share"], 0)}</span></span>'
        f'<span class="now">{cell(_name(sample["pruned"], names))} '
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


def _name(number: int, names: Sequence[str] | None) -> str:
    known = names is not None and 0 <= number < len(names)
    return str(names[number]) if known and names else f"class {number}"
