"""Widths under a budget, from variance curves.

Over groups the curves add to first order, so the widths that lose least follow from a dynamic
programme: a knapsack in which every group offers its possible widths.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.budget import Budget
from tpvprune.scores.curves import Curve
from tpvprune.widths.knapsack import choose_options
from tpvprune.widths.limits import Limits
from tpvprune.widths.problem import WidthProblem, Widths


def allocate(
    groups: ChannelGroups,
    curves: Mapping[str, Curve],
    *,
    keep: float,
    of: Budget = "macs",
    limits: Limits | None = None,
    num_buckets: int = 4000,
    num_rounds: int = 8,
) -> Kept:
    """Choose the widths that minimise the summed variance under the budget.

    A knapsack over the curves, solved by dynamic programming. A group's saving depends on its
    neighbours' widths, so costs are taken at the present widths and the programme is repeated;
    of all widths met on the way the best that fit are returned.

    Args:
        groups: Channel groups.
        curves: As :func:`variance_curves` returns them.
        keep: Fraction of the dense cost that stays, in (0, 1].
        of: ``"macs"``, ``"params"``, or a :class:`tpvprune.groups.budget.LatencyTable`.
        limits: How far groups may shrink.
        num_buckets: Resolution of the budget axis.
        num_rounds: Repetitions at the widths last found.

    Returns:
        Group name -> BoolTensor [C].

    Raises:
        ValueError: If the budget is out of range.
    """
    problem = WidthProblem(groups, curves, keep=keep, of=of, limits=limits or Limits())
    if problem.costs.total(problem.least) > problem.target:
        return problem.kept(problem.least)
    widths, best, least = problem.whole, problem.least, float("inf")
    for _ in range(num_rounds):
        widths = problem.shrunk(_knapsack(problem, widths, num_buckets=num_buckets))
        widths = problem.filled(widths)
        if widths == best:
            break
        damage = sum(problem.damage(name, width) for name, width in widths.items())
        if damage < least:
            best, least = widths, damage
    return problem.kept(best)


def _knapsack(problem: WidthProblem, at: Widths, *, num_buckets: int) -> Widths:
    """Return the widths of least summed variance, costs linearised at the widths ``at``."""
    costs, damages, linear = [], [], 0.0
    for name, choices in problem.choices.items():
        values = torch.tensor([problem.costs.of_group(name, {**at, name: w}) for w in choices])
        # Terms shared by several groups are counted once for each: keep only what varies.
        costs.append((values - values.min()).clamp_min(0))
        linear += float(costs[-1][choices.index(at[name])])
        damages.append(problem.curves[name].variance[[choices[0] - w for w in choices]])
    spare = problem.target - (problem.costs.total(at) - linear)
    picks = choose_options(costs, damages, spare, num_buckets=num_buckets)
    return {
        name: choices[i] for (name, choices), i in zip(problem.choices.items(), picks, strict=True)
    }
