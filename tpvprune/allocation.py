"""Widths under a budget from joint, compensated variance curves (one pass over the data).

For every cut and sample the matrix S(x)_jc = sum_p a_j(x, p) d_c(x, p), with
d = d(v^T f)/da, is all that is needed: when the channels R leave and the others take over with
the linear map B, the output of sample x changes, to first order, by
u_R(x) = sum_{c in R} (S_cc - sum_j B_cj S_jc). Eliminating channels one after the other inside a
group (as optimal brain surgeon does, updating the map) gives a curve width -> E[u^2] that
includes the interactions inside the cut; over groups the curves add to first order, so the
widths follow from a dynamic programme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, ChannelGroups, Kept, Reader
from tpvprune.scores import Metric, _passes, _reader_plan, input_covariances
from tpvprune.selection import Budget, CostModel, check_budget, floor_of, round_step, unit_costs


@dataclass(frozen=True)
class Curve:
    """How the output variance grows as one group shrinks.

    ``order`` [C] lists the channels in the order in which they leave; ``variance[k]`` is the
    joint variance E[u^2] (squared output units) once the first k have left, k = 0..C-1.
    """

    order: Tensor
    variance: Tensor


def variance_curves(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    metric: Metric = "logits",
    num_probes: int = 1,
    ridge: float = 1e-3,
    max_rows: int = 4096,
    max_bytes: int = 1 << 30,
    of: Budget = "macs",
    seed: int = 0,
) -> dict[str, Curve]:
    """Measure the curve of every group.

    Args:
        model: The network.
        groups: Its channel groups.
        inputs: Re-iterable of unlabeled batches [B, ...].
        metric: See :func:`tpvprune.scores.tpv_scores`.
        num_probes: Directions per sample.
        ridge: Relative ridge of the stand-in maps.
        max_rows: At most so many (sample, direction) pairs enter a curve.
        of: The budget: units of one group that save more of it leave earlier.
        max_bytes: Memory that the matrices S of one group may take; wide groups use fewer rows.
        seed: Of the directions.

    Returns:
        Group name -> :class:`Curve`.
    """
    covariances = input_covariances(model, groups, inputs)
    statistics = _collect(
        model, groups, inputs, covariances, metric, num_probes, max_rows, max_bytes, seed
    )
    savings = unit_costs(groups, of)
    return {
        g.name: _eliminate(
            g, statistics[g.name], covariances, ridge=ridge, savings=savings[g.name].float()
        )
        for g in groups
    }


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
        of: ``"macs"`` or ``"params"``.
        round_to: See :func:`tpvprune.selection.select_channels`.
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
        g.name: _choices(g, round_to, floor_of(g, round_to, min_channels, max_removed)) for g in groups
    }
    model = CostModel(groups, of, {n: c.order for n, c in curves.items()})
    target = keep * model.total(full) * (1 + 1e-12)
    widths, best = dict(full), None
    smallest = {n: c[-1] for n, c in choices.items()}
    if model.total(smallest) > target:
        return _kept(groups, curves, smallest)
    for _ in range(num_rounds):
        widths = _knapsack(model, curves, choices, widths, target, num_buckets)
        widths = _repair(curves, choices, model, widths, target)
        damage = sum(float(curves[n].variance[full[n] - w]) for n, w in widths.items())
        if best is not None and widths == best[1]:
            break
        if best is None or damage < best[0]:
            best = (damage, dict(widths))
    assert best is not None
    return _kept(groups, curves, best[1])


# ---- statistics -----------------------------------------------------------------------------

_Statistics = dict[int, tuple[Reader, Tensor]]  # call -> reader, S [rows, inputs, own inputs]


def _collect(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    covariances: Mapping[int, tuple[Tensor, Tensor]],
    metric: Metric,
    num_probes: int,
    max_rows: int,
    max_bytes: int,
    seed: int,
) -> dict[str, _Statistics]:
    plan = _reader_plan(groups)
    limits = {}
    for group in groups:
        size = sum(
            (len(covariances[r.call][0]) if r.call in covariances else 1) * len(r.index)
            for r in group.readers
        )
        limits[group.name] = max(64, min(max_rows, max_bytes // (4 * max(size, 1))))
    parts: dict[str, dict[int, list[Tensor]]] = {
        g.name: {r.call: [] for r in g.readers} for g in groups
    }
    filled = {g.name: 0 for g in groups}
    for x, directions, tap in _passes(model, plan, inputs, metric, num_probes, seed):
        room = {n: limits[n] - filled[n] for n in filled}
        if all(r <= 0 for r in room.values()):
            break

        def collect(call: int, a: Tensor, grad: Tensor, num: int = len(x)) -> None:
            dim = plan[call][0][1].channel_dim
            rows = _by_sample(a, dim, num)
            grads = _by_sample(grad, dim, num)
            for group, reader in plan[call]:
                if room[group.name] <= 0:
                    continue
                own = grads[:, :, reader.index.to(grads.device)]
                if call in covariances:
                    centred = rows - covariances[call][0].to(rows)
                    s = centred.transpose(1, 2) @ own
                else:
                    s = (rows[:, :, reader.index.to(rows.device)] * own).sum(1).unsqueeze(1)
                parts[group.name][call].append(s.float().cpu())

        for v in directions:
            tap.backward(v, collect)
        for name in filled:
            filled[name] += len(x) * len(directions)
    return {
        g.name: {r.call: (r, torch.cat(parts[g.name][r.call])) for r in g.readers} for g in groups
    }


def _by_sample(t: Tensor, dim: int, num: int) -> Tensor:
    moved = t.movedim(dim, -1)
    return moved.reshape(num, -1, moved.shape[-1])


# ---- elimination ----------------------------------------------------------------------------


class _Cut:
    """One reader of a group during elimination: the map of the present set and its S."""

    def __init__(
        self, reader: Reader, s: Tensor, covariance: Tensor | None, ridge: float, num_channels: int
    ) -> None:
        self.s = s
        self.own = reader.index
        self.columns: list[Tensor] = [
            (reader.channel == c).nonzero().squeeze(1) for c in range(num_channels)
        ]
        self.single = all(len(c) <= 1 for c in self.columns)
        self.precision: Tensor | None = None
        if covariance is not None:
            scale = covariance.diagonal().mean().clamp_min(1e-30)
            eye = torch.eye(len(covariance), dtype=torch.float64)
            self.precision = torch.linalg.inv(covariance + ridge * scale * eye)

    def changes(self, channels: Tensor) -> Tensor:
        """Return u [rows, len(channels)]: what leaving now would change, one channel at a time."""
        rows = len(self.s)
        if self.precision is None:
            out = torch.zeros(rows, len(channels))
            for i, c in enumerate(channels.tolist()):
                out[:, i] = self.s[:, 0, self.columns[c]].sum(1)
            return out
        if self.single:
            present = torch.tensor([len(self.columns[c]) > 0 for c in channels.tolist()])
            columns = torch.cat([self.columns[c] for c in channels.tolist()])
            weights = self._maps(self.own[columns])
            found = (self.s[:, :, columns] * weights).sum(1)
            if bool(present.all()):
                return found
            out = torch.zeros(rows, len(channels))
            out[:, present] = found
            return out
        out = torch.zeros(rows, len(channels))
        for i, c in enumerate(channels.tolist()):
            columns = self.columns[c]
            if len(columns):
                out[:, i] = (self.s[:, :, columns] * self._block_map(self.own[columns])).sum((1, 2))
        return out

    def _maps(self, inputs: Tensor) -> Tensor:
        assert self.precision is not None
        p = self.precision[:, inputs]
        return (p / self.precision[inputs, inputs]).float()

    def _block_map(self, inputs: Tensor) -> Tensor:
        assert self.precision is not None
        p = self.precision[:, inputs]
        return torch.linalg.solve(p[inputs], p.T).T.float()

    def remove(self, channels: Tensor) -> None:
        """Let the channels leave: those that stay take over their share of the outputs."""
        columns = torch.cat([self.columns[c] for c in channels.tolist()])
        if self.precision is None or not len(columns):
            return
        inputs = self.own[columns]
        p = self.precision[:, inputs]
        taken = torch.linalg.solve(p[inputs], p.T).T  # [n, |R|] = P[:, R] P_RR^-1
        # The inputs that stay predict those that leave: a_R ~ -P_RR^-1 P_RK a_K.
        share = -taken[self.own].float()  # [own, |R|]
        share[columns] = 0
        self.s += self.s[:, :, columns] @ share.T
        self.precision = self.precision - taken @ p.T
        self.precision[inputs, :] = 0
        self.precision[:, inputs] = 0
        eye = torch.arange(len(inputs))
        self.precision[inputs[eye], inputs[eye]] = 1  # harmless: these rows are never used again


def _eliminate(
    group: ChannelGroup,
    statistics: _Statistics,
    covariances: Mapping[int, tuple[Tensor, Tensor]],
    *,
    ridge: float,
    savings: Tensor,
) -> Curve:
    cuts = [
        _Cut(reader, s.clone(), covariances[call][1].cpu() if call in covariances else None, ridge,
             group.num_channels)
        for call, (reader, s) in statistics.items()
    ]
    num = group.num_channels
    block = max(1, num // 128)  # wide groups leave a few channels at a time
    left = torch.arange(num)
    total = torch.zeros(len(cuts[0].s))
    order: list[Tensor] = []
    variance = [0.0]
    while len(left) > 1:
        changes = sum(cut.changes(left) for cut in cuts)
        candidate = (total.unsqueeze(1) + changes).square().mean(0)
        # Where units save the same this is the order of the candidates themselves.
        growth = (candidate - total.square().mean()) / savings[left].clamp_min(1e-12)
        chosen = growth.argsort(stable=True)[: min(block, len(left) - 1)]
        step = torch.zeros_like(total)
        for c in left[chosen].tolist():
            single = torch.tensor([c])
            step = sum((cut.changes(single)[:, 0] for cut in cuts), torch.zeros_like(total))
            total = total + step
            for cut in cuts:
                cut.remove(single)
            variance.append(float(total.square().mean()))
        order.append(left[chosen])
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[chosen] = False
        left = left[stays]
    return Curve(
        torch.cat([*order, left]), torch.tensor(variance, dtype=torch.float64).cummax(0).values
    )


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
    target: float,
    num_buckets: int,
) -> dict[str, int]:
    """Minimise the summed variance with every group's cost linearised at the widths ``at``."""
    names = list(choices)
    costs, linear = {}, 0.0
    for name in names:
        values = torch.tensor([model.of_group(name, {**at, name: w}) for w in choices[name]])
        # Terms shared by several groups are counted once for each: keep only what varies.
        costs[name] = (values - values.min()).clamp_min(0)
        linear += float(costs[name][choices[name].index(at[name])])
    spare = target - (model.total(at) - linear)
    if spare <= 0:
        return {n: c[-1] for n, c in choices.items()}
    unit = spare / num_buckets
    best = torch.zeros(num_buckets + 1, dtype=torch.float64)
    picks = []
    for name in names:
        weight = (costs[name] / unit).ceil().long()
        damage = curves[name].variance[[model.sizes[name] - w for w in choices[name]]]
        options = torch.full((len(weight), num_buckets + 1), torch.inf, dtype=torch.float64)
        for i, w in enumerate(weight.tolist()):
            if w <= num_buckets:
                options[i, w:] = best[: num_buckets + 1 - w] + damage[i]
        best, pick = options.min(0)
        picks.append((weight, pick))
    bucket, widths = num_buckets, {}
    for name, (weight, pick) in reversed(list(zip(names, picks, strict=True))):
        i = int(pick[bucket])
        widths[name] = choices[name][i]
        bucket -= int(weight[i])
    return {name: widths[name] for name in names}


def _repair(
    curves: Mapping[str, Curve],
    choices: Mapping[str, list[int]],
    model: CostModel,
    widths: dict[str, int],
    target: float,
) -> dict[str, int]:
    """Shrink, then grow, one step at a time until the exact cost is just within the target."""
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
