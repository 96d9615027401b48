"""What criteria are called and which of them read labels, known without importing any."""

from __future__ import annotations

import difflib

_LABELLED = (
    *("taylor", "taylor_torch_pruning", "hessian", "hessian_torch_pruning"),
    *("obdc_torch_pruning", "jacobian"),
)
NEEDS_LABELS: frozenset[str] = frozenset(_LABELLED)
"""Criteria whose batches are pairs of inputs and class indices; the others read inputs only."""

READS_CLASSES: frozenset[str] = NEEDS_LABELS | {"jbr"}
"""Criteria with a cross-entropy: of several outputs they read the first, as class logits."""

READS_OUTPUTS: frozenset[str] = READS_CLASSES | {"tpv", "lfh"}
"""Criteria that depend on what the network returns, and take ``outputs``."""

NAMES: tuple[str, ...] = (
    "tpv",
    "jbr",
    "lfh",
    "magnitude",
    "magnitude_l1",
    "lamp",
    "bn_scale",
    "fpgm",
    "whc",
    "random",
    "activation_variance",
    *_LABELLED,
)
"""The keys of ``tpvprune.scores.criteria.SCORERS``, in their order."""


def is_labelled(name: str) -> bool:
    """Tell whether a criterion reads labels; ValueError, with close matches, if there is none."""
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(NAMES)}"
        raise ValueError(f"unknown criterion {name!r}: {hint}")
    return name in NEEDS_LABELS
