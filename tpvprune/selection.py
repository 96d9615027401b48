"""Choose which channels to keep, given scores and a budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from tpvprune.groups import Axis, ChannelGroup, ChannelGroups, Kept
from tpvprune.latency import LatencyTable, Term

Budget = Literal["macs", "params"] | LatencyTable
"""What is counted: multiply-accumulates, parameters, or milliseconds by a table."""


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
            :class:`tpvprune.latency.LatencyTable`.
        per_cost: Rank by score per saving; ``False`` ranks by score alone.
        refill: Where the last, expensive channels overshot the target, give back what still
            fits, so that criteria are compared at the same cost.
        round_to: Kept widths of groups of single channels are multiples of this, >= 1.
        min_channels: Units that every group keeps, >= 1.
        max_removed: Largest fraction of a group's units that may go, in [0, 1].

    Returns:
        Group name -> BoolTensor [C], True = stays. The cost is at most ``keep`` of the dense one
        wherever the floors allow it; :func:`reaches` tells.

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


def reaches(groups: ChannelGroups, kept: Kept, *, keep: float, of: Budget) -> bool:
    """Return whether ``kept`` fits the budget."""
    return cost(groups, kept, of) <= keep * cost(groups, {}, of) * (1 + 1e-9)


def cost(groups: ChannelGroups, kept: Mapping[str, Tensor], of: Budget) -> float:
    """Return the MACs of one input, the parameters, or the milliseconds, when ``kept`` stays."""
    if of == "macs":
        return groups.macs(kept)
    if of == "params":
        return float(groups.params(kept))
    return sum(
        term([float(axis.kept(kept).double().mean()) for axis in axes])
        for term, axes in _entries(groups, of)
    )


def unit_costs(groups: ChannelGroups, of: Budget) -> dict[str, Tensor]:
    """Return, per group, what removing each single unit from the dense model saves.

    Units of one group need not cost the same: in a padded residual stream some channels exist in
    every stage, others only in the last.

    Args:
        groups: Channel groups.
        of: What is counted.

    Returns:
        Group name -> Tensor [C], in units of the budget.
    """
    savings = {g.name: torch.zeros(g.num_channels, dtype=torch.float64) for g in groups}
    for term, axes in _entries(groups, of):
        for i, axis in enumerate(axes):
            # The mean slope down to half: one unit less may save nothing by itself.
            half = [0.5 if j == i else 1.0 for j in range(len(axes))]
            amount = 2 * (term([1.0] * len(axes)) - term(half)) if axis.members else 0.0
            for name, _, channel in axis.members:
                counts = torch.bincount(channel, minlength=len(savings[name]))
                savings[name] += amount * counts / axis.size
    return savings


def _entries(groups: ChannelGroups, of: Budget) -> list[tuple[Term, tuple[Axis, ...]]]:
    """Return what the cost is a sum of: functions of the shares that some axes keep."""
    if isinstance(of, LatencyTable):
        return of.terms(groups)
    if of == "macs":
        amounts = [(c.macs, c.axes) for c in groups.costs]
    else:
        amounts = [
            (float(size), tuple(a for _, a in groups.param_axes.get(name, ())))
            for name, size in groups.param_sizes.items()
        ]
    return [(partial(_product, amount), axes) for amount, axes in amounts]


def _product(amount: float, shares: Sequence[float]) -> float:
    return amount * math.prod(shares)


def check_budget(
    keep: float, of: object, round_to: int, min_channels: int, max_removed: float
) -> None:
    """Check the budget arguments.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a fraction in (0, 1], found {keep}; 0.5 keeps half.")
    if not isinstance(of, LatencyTable) and of not in {"macs", "params"}:
        raise ValueError(f"of: expected 'macs', 'params' or a latency table, found {of!r}.")
    if round_to < 1 or min_channels < 1:
        raise ValueError(
            f"round_to, min_channels: expected at least 1, found {round_to}, {min_channels}."
        )
    if not 0 <= max_removed <= 1:
        raise ValueError(f"max_removed: expected a fraction in [0, 1], found {max_removed}.")


def floor_of(group: ChannelGroup, round_to: int, min_channels: int, max_removed: float) -> int:
    """Return the smallest number of units that a group may be left with."""
    size = group.num_channels
    least = max(min_channels, 1, size - int(max_removed * size + 1e-9))
    step = round_step(group, round_to)
    return min(size, -(-least // step) * step)


def round_step(group: ChannelGroup, round_to: int) -> int:
    """Return the multiple that a group's width is rounded to: units of several channels are not."""
    return round_to if group.unit == "channel" and group.num_channels > round_to else 1


class CostModel:
    """Exact cost as a function of the widths, given the order in which channels leave.

    ``orders[g]`` lists the channels of a group, first to leave first; a width w keeps the last w.
    The cost of a call or parameter is a function of the share of positions that are left of each
    of its axes.
    """

    def __init__(self, groups: ChannelGroups, of: Budget, orders: Mapping[str, Tensor]) -> None:
        self.sizes = {g.name: g.num_channels for g in groups}
        self.constant = 0.0
        # (function of the shares, [(fixed share, {group: share left at each width})])
        self.terms: list[tuple[Term, list[tuple[float, dict[str, list[float]]]]]] = []
        self.by_group: dict[str, list[int]] = {name: [] for name in self.sizes}
        for function, axes in _entries(groups, of):
            factors = [_shares(axis, orders) for axis in axes]
            if not any(axis.members for axis in axes):
                self.constant += function([1.0] * len(axes))
                continue
            for name in {n for _, shares in factors for n in shares}:
                self.by_group[name].append(len(self.terms))
            self.terms.append((function, factors))

    def term(self, i: int, widths: Mapping[str, int]) -> float:
        """Return the cost of one call or parameter."""
        function, factors = self.terms[i]
        return function(
            [
                fixed + sum(share[widths[n]] for n, share in shares.items())
                for fixed, shares in factors
            ]
        )

    def total(self, widths: Mapping[str, int]) -> float:
        """Return the cost of the whole network."""
        return self.constant + sum(self.term(i, widths) for i in range(len(self.terms)))

    def of_group(self, name: str, widths: Mapping[str, int]) -> float:
        """Return the cost of everything that depends on one group."""
        return sum(self.term(i, widths) for i in self.by_group[name])


def _shares(axis: Axis, orders: Mapping[str, Tensor]) -> tuple[float, dict[str, list[float]]]:
    owned, shares = 0, {}
    for name, _, channel in axis.members:
        counts = torch.bincount(channel, minlength=len(orders[name]))
        left = counts[orders[name].flip(0)].cumsum(0)
        shares[name] = [0.0, *(left.double() / axis.size).tolist()]
        owned += len(channel)
    return 1 - owned / axis.size, shares


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
