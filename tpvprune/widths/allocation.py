"""Widths under a budget, from variance curves.

Over groups the curves add to first order, so the widths that lose least follow from a dynamic
programme: a knapsack in which every group offers its possible widths.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tpvprune.groups import ChannelGroup, ChannelGroups, Kept
from tpvprune.groups.budget import Budget, CostModel, check_budget
from tpvprune.scores.curves import Curve
from tpvprune.widths.knapsack import choose_options
from tpvprune.widths.selection import floor_of, round_step


def allocate(
    groups: ChannelGroups,
    curves: Mapping[str, Curve],
    *,
    keep: float,
    of: Budget = "macs",
    round_to: int = 1,
    min_channels: int = 1,
    max_removed: float = 1.0,
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
        round_to: See :func:`tpvprune.widths.selection.select_channels`.
        min_channels: Likewise.
        max_removed: Likewise.
        num_buckets: Resolution of the budget axis.
        num_rounds: Repetitions at the widths last found.

    Returns:
        Group name -> BoolTensor [C].

    Raises:
        ValueError: If a budget argument is out of range.
    """
    check_budget(keep, of, round_to, min_channels, max_removed)
    full = {g.name: g.num_channels for g in groups}
    choices = {
        g.name: _choices(g, round_to, floor_of(g, round_to, min_channels, max_removed))
        for g in groups
    }
    model = CostModel(groups, of, {n: c.order for n, c in curves.items()})
    target = keep * model.total(full) * (1 + 1e-12)
    widths, best = dict(full), None
    smallest = {n: c[-1] for n, c in choices.items()}
    if model.total(smallest) > target:
        return _kept(groups, curves, smallest)
    for _ in range(num_rounds):
        widths = _knapsack(model, curves, choices, widths, target=target, num_buckets=num_buckets)
        widths = _repair(curves, choices, model, widths, target)
        damage = sum(float(curves[n].variance[full[n] - w]) for n, w in widths.items())
        if best is not None and widths == best[1]:
            break
        if best is None or damage < best[0]:
            best = (damage, dict(widths))
    assert best is not None
    return _kept(groups, curves, best[1])


# ---- dynamic programme ----------------------------------------------------------------------


def _choices(group: ChannelGroup, round_to: int, floor: int) -> list[int]:
    step = round_step(group, round_to)
    inner = [w for w in range(group.num_channels - 1, floor - 1, -1) if w % step == 0]
    return [group.num_channels, *inner]


def _kept(groups: ChannelGroups, curves: Mapping[str, Curve], widths: Mapping[str, int]) -> Kept:
    kept = {}
    for group in groups:
        mask = torch.zeros(group.num_channels, dtype=torch.bool)
        mask[curves[group.name].order[group.num_channels - widths[group.name] :]] = True
        kept[group.name] = mask
    return kept


def _knapsack(
    model: CostModel,
    curves: Mapping[str, Curve],
    choices: Mapping[str, list[int]],
    at: Mapping[str, int],
    *,
    target: float,
    num_buckets: int,
) -> dict[str, int]:
    """Return the widths of least summed variance, costs linearised at the widths ``at``."""
    names = list(choices)
    costs, linear = {}, 0.0
    for name in names:
        values = torch.tensor([model.of_group(name, {**at, name: w}) for w in choices[name]])
        # Terms shared by several groups are counted once for each: keep only what varies.
        costs[name] = (values - values.min()).clamp_min(0)
        linear += float(costs[name][choices[name].index(at[name])])
    damages = [curves[n].variance[[model.sizes[n] - w for w in choices[n]]] for n in names]
    spare = target - (model.total(at) - linear)
    picks = choose_options([costs[n] for n in names], damages, spare, num_buckets=num_buckets)
    return {name: choices[name][i] for name, i in zip(names, picks, strict=True)}


def _repair(
    curves: Mapping[str, Curve],
    choices: Mapping[str, list[int]],
    model: CostModel,
    widths: dict[str, int],
    target: float,
) -> dict[str, int]:
    """Return the widths after shrinking, then growing, to just within the target."""
    widths = dict(widths)

    def step(name: str, by: int) -> tuple[float, float] | None:
        """Return (variance gained or lost, cost saved or spent) of the neighbouring width."""
        i = choices[name].index(widths[name]) + by
        if not 0 <= i < len(choices[name]):
            return None
        new, size = choices[name][i], model.sizes[name]
        change = curves[name].variance[size - new] - curves[name].variance[size - widths[name]]
        saving = model.of_group(name, widths) - model.of_group(name, {**widths, name: new})
        return abs(float(change)), abs(saving)

    now = model.total(widths)
    while now > target:
        options = [(s[0] / max(s[1], 1e-9), n) for n in widths if (s := step(n, 1)) is not None]
        if not options:
            return widths
        name = min(options)[1]
        widths[name] = choices[name][choices[name].index(widths[name]) + 1]
        now = model.total(widths)
    blocked: set[str] = set()
    while True:
        options = [
            (-s[0] / max(s[1], 1e-9), n)
            for n in widths
            if n not in blocked and (s := step(n, -1)) is not None and now + s[1] <= target
        ]
        if not options:
            return widths
        name = min(options)[1]
        old = widths[name]
        widths[name] = choices[name][choices[name].index(old) - 1]
        after = model.total(widths)
        if after > target:
            widths[name] = old
            blocked.add(name)
        else:
            now = after
