"""In which order branches go, and how many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from tpvprune.depth.records import Branch
from tpvprune.depth.scores import branch_scores

_ROUNDS = 3  # of scores: what a branch is worth depends on which are gone
_PARTS = 4  # of the range, at whose ends the first trials are

Damage = tuple[float, float]  # how far beyond the budget, and the output variance


def branch_order(
    model: nn.Module,
    branches: Sequence[Branch],
    inputs: Sequence[Tensor],
    savings: Mapping[str, float],
    *,
    most: int,
    enough: float = float("inf"),
    **options: Any,
) -> tuple[list[Branch], dict[str, float]]:
    """Rank branches by what the outputs lose with them for each unit of cost, anew on the way.

    ``savings``: name of the branch -> what its removal saves. ``enough``: what is to be saved.
    Returns those that may go, the first to go first: as many as save enough, but not more than
    ``most``; and the scores of all in the whole network.
    """
    order: list[Branch] = []
    first: dict[str, float] = {}
    for rounds in range(_ROUNDS, 0, -1):
        if len(order) == most:
            break
        left = [b for b in branches if b not in order]
        scores = branch_scores(model, left, inputs, gone=order, **options)
        first = first or scores
        left.sort(key=lambda b: scores[b.name] / max(savings[b.name], 1e-12))
        saved = itertools.accumulate((savings[b.name] for b in (*order, *left)), initial=0.0)
        needed = sum(s < enough * (1 - 1e-9) for s in saved) - len(order)
        left = left[: min(needed, most - len(order))]
        order += left[: -(-len(left) // rounds)]
        if len(left) <= 1:
            break  # nothing to rank
    return order, first


def most_gone(share: float, branches: Sequence[Branch]) -> int:
    """Return how many branches are at most a share of them, in [0, 1]."""
    return int(share * len(branches) + 1e-9)  # 0.57 * 100 is 56.99...


def most_trials(most: int) -> int:
    """Return how many numbers of branches, up to ``most``, are tried at most."""
    return min(2 * _PARTS, most) + 1


def best_depth(damage: Callable[[int], Damage], most: int) -> int:
    """Return the number of branches whose removal leaves the least damage.

    It is tried, as what a repair makes up for is known only behind it: first a few numbers all over
    the range, then those between the best one and its neighbours.

    ``damage``: number of branches -> how far what is left exceeds the budget, which is then as
    small as it gets, and what is lost. Returns the number; where no trial meets the budget that
    which is closest to it.
    """
    known = cache(damage)
    tried = sorted({round(i * most / _PARTS) for i in range(_PARTS + 1)})
    while True:
        best = min(tried, key=known)
        at = tried.index(best)
        around = [
            (best + near) // 2 for near in tried[max(0, at - 1) : at + 2] if abs(best - near) > 1
        ]
        new = sorted({*tried, *around})
        if new == tried or len(new) > most_trials(most):
            return best
        tried = new
