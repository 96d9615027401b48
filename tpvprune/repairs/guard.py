"""See that a result holds on images that it was not fitted to, and say it where it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tpvprune.passes.evaluation import Difference

_CHEAPEST_FIRST = ("none", "bn", "compensate", "compensate+bn", "reconstruct")
_NEXT = {
    "none": "repair compensate",
    "bn": "repair compensate",
    "compensate": "repair reconstruct",
    "compensate+bn": "repair reconstruct",
    "weights": "distillation",
}
_TRAINED = ("distill", "finetune")
_FEWEST = 20  # images, a tenth of all, that tell anything
_FAR = 4.0  # times what was predicted: no longer a matter of the first order


def best_repair(found: Mapping[str, Difference], wanted: str) -> str:
    """Return the repair to take: that asked for, unless a cheaper one is closer to the dense."""
    order = [name for name in _CHEAPEST_FIRST if name in found]
    if wanted != "auto":
        order = order[: order.index(wanted) + 1][::-1]
    return min(order, key=lambda name: (math.isnan(found[name].share), found[name].share))


def cannot_be_true(now: Difference, predicted_variance: float) -> bool:
    """Tell whether widths were chosen by wrong numbers: the model is broken and far from them."""
    return now.is_broken and not now.output_variance <= _FAR * max(predicted_variance, 0.0)


def warnings_of(
    found: Mapping[str, Difference], wanted: str, best: str, *, keep: str = "a larger keep"
) -> list[str]:
    """Return what the user must know of the outcome, a line each; the worst first."""
    lines = []
    taken = found[best]
    tried = "compensate" if wanted == "auto" else wanted  # no use in advising it
    if taken.is_broken:
        advice = (
            f"a lower rate, more images or epochs, or {keep}"
            if tried in _TRAINED
            else f"{keep}, more images, or {_NEXT.get(tried, 'distillation')}"
        )
        lines.append(f"BROKEN: {_broken(taken)}: try {advice}")
    if taken.num_images < _FEWEST:
        what = "be sure of that" if taken.is_broken else "tell how good the result is"
        lines.append(
            f"{taken.num_images} of the images held back: too few to {what}: "
            f"give {10 * _FEWEST} images or more"
        )
    if wanted not in ("auto", best):
        lines.append(
            f"repair {best} was taken: on {taken.num_images} images held back {wanted} is further "
            f"from the dense model ({found[wanted].share:.4g} of its variance, {best} "
            f"{taken.share:.4g}): try more images"
        )
    return lines


def further(before: Difference, saved: Difference, *, decided_by: str | None) -> list[str]:
    """Return that what is saved is further from the dense model than before training, if it is.

    ``decided_by``: "labels", "divergence" (of the classes), or None. A broken model is said to be
    so elsewhere.
    """
    worse = []
    if saved.has_classes and saved.agreement < before.agreement:
        worse.append(f"agreement ({_percent(before.agreement)}, then {_percent(saved.agreement)})")
    if saved.output_variance > before.output_variance:
        numbers = f"{before.output_variance:.4g}, then {saved.output_variance:.4g}"
        worse.append(f"output variance ({numbers})")
    if not worse or saved.is_broken:
        return []
    why = ""
    if decided_by == "labels":
        why = ", as labels taught it, not the dense model"
    elif decided_by is not None:
        why = f", though closer by the {decided_by} of the classes, which decides"
    return [
        f"further from the dense model than before training, by {' and '.join(worse)}{why}: "
        "try more images or a lower rate"
    ]


def facts(found: Difference) -> dict[str, Any]:
    """Return a difference as the report holds it; of features without an agreement."""
    classes = found.has_classes
    return {
        "num_images": found.num_images,
        "agreement": found.agreement if classes else None,
        "chance_agreement": found.chance if classes else None,
        "output_variance": found.output_variance,
        "variance_share": found.share,
        "broken": found.is_broken,
        **({"variance_share_by_output": dict(by)} if len(by := found.by_output) > 1 else {}),
    }


def _broken(found: Difference) -> str:
    """Return how far a broken model is from the dense one."""
    images = f"{found.num_images} image{'' if found.num_images == 1 else 's'} held back"
    share = f"output variance {_share(found.share)} of the dense model's own{_worst(found)}"
    if not found.has_classes:
        return f"on {images} {share}"
    only = "only " if found.agreement < 0.5 else ""  # else it is the variance that is too large
    kept = f"of {images} {only}{_percent(found.agreement)} keep their class (by chance "
    kept += f"{_percent(found.chance)})"
    return f"{kept}, {share}" if found.num_images > 1 else kept


def _worst(found: Difference) -> str:
    """Return the name of the output that is furthest from the dense one, if there are several."""
    if len(found.by_output) < 2:
        return ""
    name = max(found.by_output, key=lambda name: found.by_output[name])
    return f" (of output {name!r} {_share(found.by_output[name])})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share(value: float) -> str:
    return f"{value:.2g}"
