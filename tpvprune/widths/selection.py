"""Choose which channels to keep, given scores and a budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, ChannelGroups, Kept
from tpvprune.groups.budget import Budget, CostModel, check_budget, unit_costs


class Floors(TypedDict):
    """How far one group may shrink; see :func:`select_channels`."""

    round_to: int
    min_channels: int
    max_removed: float


def select_channels(
    model: nn.Module | None,
    groups: ChannelGroups,
    scores: Mapping[str, Tensor],
    *,
    keep: float,
    of: Budget = "macs",
    per_cost: bool = True,
    refill: bool = True,
    round_to: int = 1,
    min_channels: int = 1,
    max_removed: float = 1.0,
) -> Kept:
    r"""Remove the channels that cost least accuracy per unit of budget until it is met.

    Greedy: within a group channels go in the order of their scores (equal scores: the later
    channel first); between groups the next to go is the one with the smallest

    .. math:: s_c / \Delta\mathrm{cost}_c

    where the saving is that of the present widths, re-computed as neighbours shrink. With
    ``round_to`` channels go in blocks that leave multiples of it.

    Args:
        model: Not used (kept for symmetry with the other stages); may be None.
        groups: Channel groups.
        scores: Group name -> Tensor [C], finite, bigger = keep.
        keep: Fraction of the dense cost that stays, in (0, 1].
        of: What the fraction is of: ``"macs"``, ``"params"``, or the milliseconds of a
            :class:`tpvprune.groups.budget.LatencyTable`.
        per_cost: Rank by score per saving; ``False`` ranks by score alone.
        refill: Where the last, expensive channels overshot the target, give back what still
            fits, so that criteria are compared at the same cost.
        round_to: Kept widths of groups of single channels are multiples of this, >= 1.
        min_channels: Units that every group keeps, >= 1.
        max_removed: Largest fraction of a group's units that may go, in [0, 1].

    Returns:
        Group name -> BoolTensor [C], True = stays. The cost is at most ``keep`` of the dense one
        wherever the floors allow it; :func:`tpvprune.groups.budget.reaches` tells.

    Raises:
        ValueError: If an argument is out of range or a score is missing or not finite.
    """
    del model
    check_budget(keep, of, round_to, min_channels, max_removed)
    order = {}
    savings = unit_costs(groups, of)
    for group in groups:
        score = _checked(scores, group)
        rank = score / savings[group.name].clamp_min(1e-12) if per_cost else score
        # Stable ascending order of the reversed vector: among equals the later channel goes first.
        reverse = rank.flip(0).argsort(stable=True)
        order[group.name] = (group.num_channels - 1 - reverse, score)
    floors = {g.name: floor_of(g, round_to, min_channels, max_removed) for g in groups}

    def gain(name: str, width: int, block: int) -> float:
        channels, score = order[name]
        start = groups[name].num_channels - width
        return float(score[channels[start : start + block]].sum())

    costs = CostModel(groups, of, {n: o for n, (o, _) in order.items()})
    target = keep * costs.total({g.name: g.num_channels for g in groups}) * (1 + 1e-12)
    widths, removed = _greedy(
        groups, costs, floors, gain, target=target, per_cost=per_cost, round_to=round_to
    )
    if refill:
        widths = _refill(costs, widths, removed, target)
    return {name: _keep_last(order[name][0], width) for name, width in widths.items()}


def floor_of(group: ChannelGroup, round_to: int, min_channels: int, max_removed: float) -> int:
    """Return the smallest number of units that a group may be left with."""
    size = group.num_channels
    least = max(min_channels, 1, size - int(max_removed * size + 1e-9))
    step = round_step(group, round_to)
    return min(size, -(-least // step) * step)


def round_step(group: ChannelGroup, round_to: int) -> int:
    """Return the multiple that a group's width is rounded to: units of several channels are not."""
    return round_to if group.unit == "channel" and group.num_channels > round_to else 1


def _greedy(
    groups: ChannelGroups,
    model: CostModel,
    floors: Mapping[str, int],
    gain: Callable[[str, int, int], float],
    *,
    target: float,
    per_cost: bool,
    round_to: int,
) -> tuple[dict[str, int], list[tuple[str, int]]]:
    widths = {g.name: g.num_channels for g in groups}
    total = model.total(widths)

    def block(name: str) -> int:
        step = round_step(groups[name], round_to)
        return (widths[name] - 1) % step + 1

    def priority(name: str) -> tuple[float, float]:
        size = block(name)
        saving = model.of_group(name, widths) - model.of_group(
            name, {**widths, name: widths[name] - size}
        )
        score = gain(name, widths[name], size)
        return (score / max(saving, 1e-12) if per_cost else score / size), saving

    heap = [(priority(g.name)[0], i, g.name) for i, g in enumerate(groups)]
    heap = [h for h in heap if widths[h[2]] - block(h[2]) >= floors[h[2]]]
    heapq.heapify(heap)
    removed: list[tuple[str, int]] = []
    while heap and total > target:
        old, i, name = heapq.heappop(heap)
        now, saving = priority(name)
        # Savings shrink as neighbours do, so a stale entry only ever looks too cheap.
        if heap and now > old and now > heap[0][0]:
            heapq.heappush(heap, (now, i, name))
            continue
        removed.append((name, block(name)))
        widths[name] -= block(name)
        total -= saving
        if widths[name] - block(name) >= floors[name]:
            heapq.heappush(heap, (priority(name)[0], i, name))
    return widths, removed


def _refill(
    model: CostModel, widths: dict[str, int], removed: list[tuple[str, int]], target: float
) -> dict[str, int]:
    """Return the widths after giving back, latest first, what still fits into the budget.

    The last channels of a greedy run can be expensive ones that overshoot the target.
    """
    for name, size in dict(reversed(removed)).items():
        grown = {**widths, name: widths[name] + size}
        if model.total(grown) <= target:
            widths = grown
    return widths


def _keep_last(order: Tensor, width: int) -> Tensor:
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[len(order) - width :]] = True
    return kept


def _checked(scores: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    if group.name not in scores:
        raise ValueError(f"scores: expected an entry for group {group.name!r}, found none.")
    score = scores[group.name].detach().double().cpu()
    if score.shape != (group.num_channels,) or not bool(score.isfinite().all()):
        raise ValueError(
            f"scores[{group.name!r}]: expected {group.num_channels} finite values, "
            f"found shape {tuple(score.shape)}"
            f"{'' if score.isfinite().all() else ' with NaN or infinity'}."
        )
    return score
