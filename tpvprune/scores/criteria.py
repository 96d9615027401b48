"""Every criterion by the name that users type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import nn

from tpvprune.groups import ChannelGroups
from tpvprune.processes.membership import alone, num_processes
from tpvprune.processes.shares import gathered
from tpvprune.scores.baselines.activations import activation_variance_scores
from tpvprune.scores.baselines.filters import fpgm_scores, whc_scores
from tpvprune.scores.baselines.hessian import hessian_scores, lfh_scores
from tpvprune.scores.baselines.jacobian import jacobian_scores, jbr_scores
from tpvprune.scores.baselines.taylor import taylor_scores
from tpvprune.scores.baselines.weights import (
    bn_scale_scores,
    lamp_scores,
    magnitude_scores,
    random_scores,
)
from tpvprune.scores.criterion_names import NEEDS_LABELS
from tpvprune.scores.tpv import Scores, tpv_scores

__all__ = ["NEEDS_LABELS", "SCORERS", "Labelled", "Scorer", "scorer", "with_labels"]

Scorer = Callable[..., Scores]
"""Called as ``scorer(model, groups, batches, seed=0)``."""

SCORERS: dict[str, Scorer] = {
    "tpv": tpv_scores,
    "jbr": jbr_scores,
    "lfh": lfh_scores,
    "magnitude": magnitude_scores,
    "magnitude_l1": partial(magnitude_scores, p=1),
    "lamp": lamp_scores,
    "bn_scale": bn_scale_scores,
    "fpgm": fpgm_scores,
    "whc": whc_scores,
    "random": random_scores,
    "activation_variance": activation_variance_scores,
    "taylor": taylor_scores,
    "taylor_torch_pruning": partial(taylor_scores, variant="torch_pruning"),
    "hessian": hessian_scores,
    "hessian_torch_pruning": partial(hessian_scores, variant="torch_pruning"),
    "obdc_torch_pruning": partial(hessian_scores, variant="obdc_torch_pruning"),
    "jacobian": jacobian_scores,
}
"""Criterion -> scorer, called as ``scorer(model, groups, batches, seed=0)``.

``batches`` are re-iterable: pairs of inputs [B, ...] and class indices [B] for criteria in
``NEEDS_LABELS``, inputs else, whose labels are dropped; criteria of the weights ignore them. Only
``random``, ``tpv`` and ``lfh`` draw from ``seed``. Those that read what the network returns take
``outputs``: of ``tpv`` and ``lfh`` the outputs that count (:func:`tpvprune.tpv_scores`), of the
others that whose first is the class logits. Each gives float64 [C] for every group.
"""

_SHARED = frozenset({"tpv"})  # these add up over processes; batches of the others hang together


def scorer(criterion: str) -> Scorer:
    """Return a scorer for processes that each have a share; ValueError if there is no such.

    Criteria other than ``"tpv"`` see the images of all processes, in each of them.
    """
    if criterion not in SCORERS:
        raise ValueError(f"criterion: expected one of {', '.join(SCORERS)}, found {criterion!r}.")
    found = SCORERS[criterion]
    if num_processes() == 1 or criterion in _SHARED:
        return found

    @wraps(found)
    def on_all_images(
        model: nn.Module, groups: ChannelGroups, batches: Iterable[Any], **options: Any
    ) -> Scores:
        whole = gathered(batches)
        with alone():
            return found(model, groups, whole, **options)

    return on_all_images


@dataclass(frozen=True)
class Labelled:
    """A criterion bound to labelled batches: :func:`tpvprune.prune` takes it, but sees no label.

    Attributes:
        name: A key of ``SCORERS``.
        batches: Re-iterable of (inputs [B, ...], class indices [B]).
    """

    name: str
    batches: Iterable[Any]

    def __call__(
        self, model: nn.Module, groups: ChannelGroups, batches: Iterable[Any], **options: Any
    ) -> Scores:
        """Score with the labelled batches in the place of those given."""
        del batches
        return scorer(self.name)(model, groups, self.batches, **options)


def with_labels(criterion: str, labelled_batches: Iterable[Any]) -> str | Labelled:
    """Return the criterion, bound to labelled batches if it needs labels.

    Args:
        criterion: A key of ``SCORERS``.
        labelled_batches: Re-iterable of (inputs [B, ...], class indices [B]); others are not read.

    Returns:
        What :func:`tpvprune.prune` takes.
    """
    return Labelled(criterion, labelled_batches) if criterion in NEEDS_LABELS else criterion
