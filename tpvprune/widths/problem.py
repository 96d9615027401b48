"""Widths under a budget: what greedy selection and the dynamic programme have in common.

Channels of a group leave in a given order, and no layer may be left without one. So the channels
that some layer cannot do without are put last in that order, and a group's least width is at least
their number: whatever widths are then chosen can be cut.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.budget import Budget, CostModel, check_budget
from tpvprune.groups.removal import restore_empty
from tpvprune.scores.curves import Curve
from tpvprune.widths.limits import Limits

Widths = dict[str, int]


class WidthProblem:
    """The widths that groups may take, what each does to the outputs, and what all may cost.

    ``curves``: group name -> the order in which its channels leave, and the damage. ``keep``:
    fraction of the dense cost that stays, in (0, 1]. ``of``: what the fraction is of. ValueError if
    the budget is out of range.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        curves: Mapping[str, Curve],
        *,
        keep: float,
        of: Budget,
        limits: Limits,
    ) -> None:
        check_budget(keep, of)
        needed = _needed(groups, curves)
        self.curves = {name: _leaving_last(curves[name], mask) for name, mask in needed.items()}
        self.choices = {g.name: limits.widths(g, int(needed[g.name].sum())) for g in groups}
        self.costs = CostModel(groups, of, {n: c.order for n, c in self.curves.items()})
        self.target = keep * self.costs.total(self.whole) * (1 + 1e-12)

    @property
    def whole(self) -> Widths:
        """The widths of the dense network."""
        return {name: widths[0] for name, widths in self.choices.items()}

    @property
    def least(self) -> Widths:
        """The smallest widths."""
        return {name: widths[-1] for name, widths in self.choices.items()}

    def damage(self, name: str, width: int) -> float:
        """Return what is done to the outputs when a group is left with so many channels."""
        variance = self.curves[name].variance
        return float(variance[len(variance) - width])

    def kept(self, widths: Widths) -> Kept:
        """Return the channels that stay."""
        # A channel's place in the order says how many leave before it.
        orders = {name: self.curves[name].order for name in widths}
        return {n: order.argsort() >= len(order) - widths[n] for n, order in orders.items()}

    def shrunk(self, widths: Widths, *, per_cost: bool = True) -> Widths:
        """Return the widths after single steps down, least damage first, until they fit."""
        widths, total = dict(widths), self.costs.total(widths)
        at = {name: self.choices[name].index(width) for name, width in widths.items()}

        heap: list[tuple[float, int, str]] = []

        def step(name: str) -> tuple[float, float, int]:
            new = self.choices[name][at[name] + 1]
            damage, saving = self._step(widths, name, new)
            return damage / (max(saving, 1e-12) if per_cost else widths[name] - new), saving, new

        def push(i: int, name: str) -> None:
            if at[name] + 1 < len(self.choices[name]):
                heapq.heappush(heap, (step(name)[0], i, name))

        for i, name in enumerate(widths):
            push(i, name)
        while heap and total > self.target:
            old, i, name = heapq.heappop(heap)
            now, saving, new = step(name)
            # Savings shrink as neighbours do, so a stale entry only ever looks too cheap.
            if heap and now > old and now > heap[0][0]:
                heapq.heappush(heap, (now, i, name))
                continue
            widths[name], at[name] = new, at[name] + 1
            total -= saving
            push(i, name)
        return widths

    def filled(self, widths: Widths, *, per_cost: bool = True) -> Widths:
        """Return the widths after single steps up, most damage undone first, while they fit."""
        widths, total = dict(widths), self.costs.total(widths)
        while True:
            best: tuple[float, str, int, float] | None = None
            for name, width in widths.items():
                place = self.choices[name].index(width)
                if not place:
                    continue
                new = self.choices[name][place - 1]
                damage, saving = self._step({**widths, name: new}, name, width)
                gain = damage / (max(saving, 1e-12) if per_cost else new - width)
                if total + saving <= self.target and (best is None or gain > best[0]):
                    best = gain, name, new, saving
            if best is None:
                return widths
            widths[best[1]] = best[2]
            total += best[3]

    def _step(self, widths: Widths, name: str, new: int) -> tuple[float, float]:
        """Return the damage and the saving of a smaller width of one group."""
        smaller = {**widths, name: new}
        saving = self.costs.of_group(name, widths) - self.costs.of_group(name, smaller)
        return self.damage(name, new) - self.damage(name, widths[name]), saving


def _needed(groups: ChannelGroups, curves: Mapping[str, Curve]) -> Kept:
    """Return the channels without which some layer would have none: as few, and as late, as can."""
    nothing = {g.name: torch.zeros(g.num_channels, dtype=torch.bool) for g in groups}
    ranks = {g.name: curves[g.name].order.argsort() for g in groups}
    needed = restore_empty(groups, nothing, ranks)
    for group in groups:
        if not needed[group.name].any():
            needed[group.name][curves[group.name].order[-1]] = True
    return needed


def _leaving_last(curve: Curve, needed: Tensor) -> Curve:
    """Return the curve with these channels at the end of the order."""
    last = needed[curve.order]
    order = torch.cat([curve.order[~last], curve.order[last]])
    if torch.equal(order, curve.order):
        return curve
    steps = curve.variance.diff()
    # What the last channel would cost was not measured: at least as much as any other.
    steps = torch.cat([steps, steps.max()[None]])
    moved = torch.cat([steps[~last], steps[last]])[:-1]
    return replace(curve, order=order, variance=torch.cat([curve.variance[:1], moved]).cumsum(0))
