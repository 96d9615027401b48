"""Greedy selection: which channels to keep, given scores and a budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tpvprune.groups import ChannelGroup, ChannelGroups, Kept
from tpvprune.groups.budget import Budget, unit_costs
from tpvprune.scores.curves import Curve
from tpvprune.widths.limits import Limits
from tpvprune.widths.problem import WidthProblem


def select_channels(
    groups: ChannelGroups,
    scores: Mapping[str, Tensor],
    *,
    keep: float,
    of: Budget = "macs",
    per_cost: bool = True,
    refill: bool = True,
    limits: Limits | None = None,
) -> Kept:
    r"""Remove the channels that cost least accuracy per unit of budget until it is met.

    Greedy: within a group channels go in the order of their scores (equal scores: the later
    channel first); between groups the next to go is the one with the smallest

    .. math:: s_c / \Delta\mathrm{cost}_c

    where the saving is that of the present widths, re-computed as neighbours shrink. With
    ``limits.round_to`` channels go in blocks that leave multiples of it.

    Args:
        groups: Channel groups.
        scores: Group name -> Tensor [C], finite, bigger = keep.
        keep: Fraction of the dense cost that stays, in (0, 1].
        of: What the fraction is of: ``"macs"``, ``"params"``, or the milliseconds of a
            :class:`tpvprune.groups.budget.LatencyTable`.
        per_cost: Rank by score per saving; ``False`` ranks by score alone.
        refill: Where the last, expensive channels overshot the target, give back what still
            fits, so that criteria are compared at the same cost.
        limits: How far groups may shrink.

    Returns:
        Group name -> BoolTensor [C], True = stays. The cost is at most ``keep`` of the dense one
        wherever the limits allow it; :func:`tpvprune.groups.budget.reaches` tells.

    Raises:
        ValueError: If the budget is out of range or a score is missing or not finite.
    """
    ranked = ranked_by_scores(groups, scores, of=of, per_cost=per_cost)
    return greedy(
        groups, ranked, keep=keep, of=of, per_cost=per_cost, refill=refill,
        limits=limits or Limits(),
    )  # fmt: skip


def ranked_by_scores(
    groups: ChannelGroups,
    scores: Mapping[str, Tensor],
    *,
    of: Budget = "macs",
    per_cost: bool = True,
) -> dict[str, Curve]:
    """Return the order in which the channels of each group leave, and the sum of their scores.

    ValueError if a score is missing or not finite.
    """
    savings = unit_costs(groups, of)
    curves = {}
    for group in groups:
        score = _checked(scores, group)
        rank = score / savings[group.name].clamp_min(1e-12) if per_cost else score
        # Stable ascending order of the reversed vector: among equals the later channel goes first.
        order = group.num_channels - 1 - rank.flip(0).argsort(stable=True)
        damage = torch.cat([score.new_zeros(1), score[order[:-1]]]).cumsum(0)
        curves[group.name] = Curve(order, damage, score)
    return curves


def greedy(
    groups: ChannelGroups,
    curves: Mapping[str, Curve],
    *,
    keep: float,
    of: Budget,
    limits: Limits,
    per_cost: bool = True,
    refill: bool = True,
) -> Kept:
    """Return what stays when the least damage goes first; see :func:`select_channels`."""
    problem = WidthProblem(groups, curves, keep=keep, of=of, limits=limits)
    widths = problem.shrunk(problem.whole, per_cost=per_cost)
    return problem.kept(problem.filled(widths, per_cost=per_cost) if refill else widths)


def _checked(scores: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    if group.name not in scores:
        raise ValueError(f"scores: expected an entry for group {group.name!r}, found none.")
    score = scores[group.name].detach().double().cpu()
    finite = bool(score.isfinite().all())
    if score.shape != (group.num_channels,) or not finite:
        raise ValueError(
            f"scores[{group.name!r}]: expected {group.num_channels} finite values, "
            f"found shape {tuple(score.shape)}{'' if finite else ' with NaN or infinity'}."
        )
    return score
