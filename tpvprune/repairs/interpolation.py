"""Between where training began and where it ended: what is closest to the dense model there."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpvprune.passes.difference import Difference, Reference

FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
_CPU = torch.device("cpu")  # not every device has float64


@dataclass(frozen=True)
class Between:
    """A model on the line between two others, at 0 the start and at 1 the end.

    ``found`` is how far it is from the dense model, ``end`` how far the end is.
    """

    model: nn.Module
    fraction: float
    found: Difference
    end: Difference


@torch.no_grad()
def nearest_between(
    start: nn.Module, end: nn.Module, reference: Reference, before: Difference | None = None
) -> Between:
    """Choose the point between two models of one architecture that is closest to a third.

    A short training at a high rate goes past what is best, in directions that more images would
    average out: the middle is often closer to the dense model than either end, and the start is
    one of the points that are tried (:data:`FRACTIONS`). Closest is the least divergence of the
    classes for a classifier, else the least share of the variance of the outputs.

    ``start``, ``end``: models with the same parameters and buffers; left as they are.
    ``reference``: the dense model, on images that took no part in the training. ``before``: how far
    the start is, if that is known. Returns the point; that of a fraction 1 is ``end`` itself, of 0
    a copy of the start in the modes of the end.

    Reference: Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, section 3.
    """

    def distance(found: Difference) -> float:
        of = found.divergence if reference.classifies else found.share
        return of if math.isfinite(of) else math.inf

    ending = best = reference.difference(end)
    model, chosen = end, 1.0
    for fraction in FRACTIONS[1:]:
        point = _point(start, end, fraction)
        known = before if fraction == 0 else None
        found = reference.difference(point) if known is None else known
        if distance(found) < distance(best):
            model, chosen, best = point, fraction, found
    return Between(model, chosen, best, ending)


@torch.no_grad()
def mean_weights(models: Sequence[nn.Module]) -> nn.Module:
    """Return a copy of the first of some models, alike but for weights, with the mean of these.

    Floating parameters and buffers alone, in float64; others are the first's. Of fits from one
    start to different images what is peculiar to these averages out.

    Reference: Wortsman et al., Model soups, ICML 2022.
    """
    found = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, value in found.state_dict().items():
        if value.is_floating_point():
            parts = [state[name].to(_CPU, torch.float64) for state in states]
            value.copy_(torch.stack(parts).mean(0))
    return found


def _point(start: nn.Module, end: nn.Module, fraction: float) -> nn.Module:
    """Return a model whose floating weights and statistics lie between; others are the end's."""
    model = copy.deepcopy(end)
    first = start.state_dict()

    def between(name: str, last: Tensor) -> Tensor:
        if fraction == 0:
            return first[name].to(last)
        floating = last.is_floating_point()
        return torch.lerp(first[name].to(last), last, fraction) if floating else last

    model.load_state_dict({name: between(name, t) for name, t in end.state_dict().items()})
    return model
