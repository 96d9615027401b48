"""In which order branches go: least damage for what they save first, measured anew on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tpvprune.depth.records import Branch
from tpvprune.depth.scores import branch_scores

_ROUNDS = 3  # of scores: what a branch is worth depends on which are gone


def branch_order(
    model: nn.Module,
    branches: Sequence[Branch],
    inputs: Sequence[Tensor],
    savings: Mapping[str, float],
    *,
    most: int,
    **options: Any,
) -> tuple[list[Branch], dict[str, float]]:
    """Rank branches by what the outputs lose with them for each unit of cost.

    ``savings``: name of the branch -> what its removal saves. Returns those that may go, the first
    to go first; and the scores of all in the whole network.
    """
    order: list[Branch] = []
    first: dict[str, float] = {}
    while len(order) < most:
        left = [b for b in branches if b not in order]
        scores = branch_scores(model, left, inputs, gone=order, **options)
        first = first or scores
        left.sort(key=lambda b: scores[b.name] / max(savings[b.name], 1e-12))
        order += left[: min(most - len(order), -(-most // _ROUNDS))]
    return order, first
