"""The dynamic programme behind every choice under a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choose_options(
    costs: Sequence[Tensor], damages: Sequence[Tensor], budget: float, *, num_buckets: int = 4000
) -> list[int]:
    """Choose one option of every item so that the summed damage is least within the budget.

    Costs are rounded up to budget / num_buckets, so the budget is kept; what rounding wastes may
    leave a slightly better choice unseen.

    ``costs``: per item the costs of its options [n], >= 0. ``damages``: likewise their damages,
    float64 [n]. ``budget``: what all costs together may come to; at least the sum of the least
    ones, or the cheapest options are returned.
    """
    best_of_all = [int(d.argmin()) for d in damages]
    if sum(float(c[i]) for c, i in zip(costs, best_of_all, strict=True)) <= budget:
        return best_of_all
    spare = budget - sum(float(c.min()) for c in costs)
    if spare <= 0:
        ties = zip(costs, damages, strict=True)
        return [int(d.where(c == c.min(), torch.inf).argmin()) for c, d in ties]
    unit = spare / num_buckets
    best = torch.zeros(num_buckets + 1, dtype=torch.float64)
    weights = [((c - c.min()) / unit).ceil().long().tolist() for c in costs]
    picks = []
    for weight, damage in zip(weights, damages, strict=True):
        options = torch.full((len(weight), num_buckets + 1), torch.inf, dtype=torch.float64)
        for i, w in enumerate(weight):
            if w <= num_buckets:
                options[i, w:] = best[: num_buckets + 1 - w] + damage[i]
        best, pick = options.min(0)
        picks.append(pick)
    bucket, chosen = num_buckets, []
    for weight, pick in zip(reversed(weights), reversed(picks), strict=True):
        chosen.append(int(pick[bucket]))
        bucket -= weight[chosen[-1]]
    return chosen[::-1]
