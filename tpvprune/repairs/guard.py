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
    "distill": "more epochs",
    "finetune": "more epochs",
    "weights": "distillation",
}
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
    varies = f", output variance {_share(taken.share)} of the dense model's own{_worst(taken)}"
    if taken.is_broken:
        lines.append(
            f"BROKEN: of {taken.num_images} images held back only {_percent(taken.agreement)} keep "
            f"their class (by chance {_percent(taken.chance)})"
            f"{varies if taken.num_images > 1 else ''}: try {keep}, more "
            f"images, or {_NEXT.get(tried, 'distillation')}"
        )
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


def facts(found: Difference) -> dict[str, Any]:
    """Return a difference as the report holds it."""
    return {
        "num_images": found.num_images,
        "agreement": found.agreement,
        "chance_agreement": found.chance,
        "output_variance": found.output_variance,
        "variance_share": found.share,
        "broken": found.is_broken,
        **({"variance_share_by_output": dict(by)} if len(by := found.by_output) > 1 else {}),
    }


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
