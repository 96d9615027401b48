"""What people must know of a result, in sentences; the numbers are in the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tpvprune.passes.loss import Loss, agreement_interval

_NOT_BLOCKS = ("selection", "repair", "layers")


def broken(document: Mapping[str, Any]) -> str | None:
    """Return that a model is broken and what to try; None if it is not."""
    lines = document.get("warnings") or [None]
    return lines[0] if (document.get("held_back") or {}).get("broken") else None


def warnings(document: Mapping[str, Any]) -> list[str]:
    """Return what else to know."""
    lines = list(document.get("warnings") or ())
    return [f"warning: {line}" for line in lines[broken(document) is not None :]]


def held_back(document: Mapping[str, Any]) -> str | None:
    """Return what was measured on images that nothing was fitted to."""
    facts = document.get("held_back")
    if not facts:
        return None
    varies = "output variance of one image: none"
    if facts["num_images"] > 1:
        varies = f"output variance {facts['variance_share']:.2g} of the dense model's own"
    agreement, num, sure = facts["agreement"], facts["num_images"], ""
    on = f"on {num} image{'' if num == 1 else 's'} held back"
    if agreement is None:
        return f"{on}: {varies}"
    if math.isfinite(agreement):
        sure = f"{agreement_interval(agreement, num)}, "
    return (
        f"{on}: agreement {_percent(agreement)} ({sure}by chance "
        f"{_percent(facts['chance_agreement'])}), {varies}"
    )


def quality(document: Mapping[str, Any]) -> list[str]:
    """Return what was promised of a limit of loss and what was measured, a line each."""
    facts = document.get("quality")
    if not facts:
        return []
    labelled = facts["of"] == "top-1"
    kept = "kept" if facts["met"] else "NOT KEPT: the largest size that was tried is saved"
    if facts["met"] and facts["measured"]["points"] > facts["max_loss"]:
        kept = "kept on the images that decided, not on those that judge: see the intervals"
    lines = [
        f"at most {facts['max_loss']:g} points of {facts['of']} lost: {kept}",
        f"promised: {Loss(**facts['promised'])}, on the images that decided",
        f"measured: {Loss(**facts['measured'])}, on images that took no part, as the table",
    ]
    if labelled:
        lines.append("labels chose between sizes alone: no score, width or repair has seen one")
    return lines


def branches(document: Mapping[str, Any]) -> str | None:
    """Return which branches left, where they could."""
    found = document.get("branches")
    if not found:
        return None
    gone = [branch["name"] for branch in found if branch["gone"]]
    names = f": {', '.join(gone)}" if gone else ""
    limited = any(line.startswith("max_depth_removed") for line in document.get("warnings") or ())
    if not gone and not limited and document.get("granularity") == "channel,branch":
        names = ": without some the outputs would be further from the dense model's"
    return f"branches removed: {len(gone)} of {len(found)}{names}"


def images_used(document: Mapping[str, Any]) -> str | None:
    """Return how many images each step used."""
    used = document.get("images_used")
    if not used:
        return None
    mirrored = " and their mirror images" if document.get("mirrored") else ""
    line = f"images used: selection {used['selection']}, repair {used['repair']}{mirrored}"
    counts = [num for name, num in used.items() if name not in _NOT_BLOCKS]
    if not counts:
        return line
    least, most = min(counts), max(counts)
    return f"{line}, each block " + (f"{least}" if least == most else f"{least} to {most}")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
