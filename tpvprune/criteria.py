"""Every criterion by the name that users type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tpvprune.baselines.activations import activation_variance_scores
from tpvprune.baselines.filters import fpgm_scores, whc_scores
from tpvprune.baselines.hessian import hessian_scores, lfh_scores
from tpvprune.baselines.jacobian import jacobian_scores, jbr_scores
from tpvprune.baselines.taylor import taylor_scores
from tpvprune.baselines.weights import (
    bn_scale_scores,
    lamp_scores,
    magnitude_scores,
    random_scores,
)
from tpvprune.scores import Scores, tpv_scores

SCORERS: dict[str, Callable[..., Scores]] = {
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
"""Criterion -> scorer, called as ``scorer(model, groups, batches, seed=0)``."""

NEEDS_LABELS: frozenset[str] = frozenset(
    {
        "taylor",
        "taylor_torch_pruning",
        "hessian",
        "hessian_torch_pruning",
        "obdc_torch_pruning",
        "jacobian",
    }
)
"""Criteria whose batches are pairs of inputs and class indices; the others read inputs only."""
