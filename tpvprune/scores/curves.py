"""Joint variance curves: what each group costs at every width, in one pass.

For every cut and sample the matrix S(x)_jc = sum_p a_j(x, p) d_c(x, p), with
d = d(v^T f)/da, is all that is needed: when the channels R leave and the others take over with
the linear map B, the output of sample x changes, to first order, by
u_R(x) = sum_{c in R} (S_cc - sum_j B_cj S_jc). Eliminating channels one after the other inside a
group (as optimal brain surgeon does, updating the map) gives a curve width -> E[u^2] that
includes the interactions inside the cut. Where no repair will let the others take over, the
readers of a channel get its mean in its place, or nothing: u_R(x) = sum_{c in R} u_c(x).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, ChannelGroups, Reader
from tpvprune.groups.budget import Budget, unit_costs
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.clock import Progress
from tpvprune.passes.crossing import fetched
from tpvprune.passes.finite import NotFiniteError, retried_in_single
from tpvprune.passes.moments import in_single
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.processes.shares import global_indices, share, summed, total
from tpvprune.scores.residuals import (
    Covariances,
    Inputs,
    folded_covariances,
    is_held,
    merged,
    residual_map,
    ridge_inverse,
    shrunk_precision,
)
from tpvprune.scores.second_moments import (
    MEASURED,
    GradientMoments,
    fitted_curve,
    leaving_order,
    measured_at,
    measured_variance,
)
from tpvprune.scores.taps import Metric, Probing, passes, reader_plan
from tpvprune.scores.tpv import standard_error

StandIn = Literal["map", "mean", "zero"]

_MAX_STEPS = 96  # wide groups leave several channels at a time


@dataclass(frozen=True)
class Curve:
    """How the output variance grows as one group shrinks.

    ``order`` [C] lists the channels in the order in which they leave; ``variance[k]`` is the
    joint variance E[u^2] (squared output units) once the first k have left, k = 0..C-1. ``alone``
    [C] is what each channel changes by leaving alone, ``stderr`` [C] the standard error of that
    over samples where it is a mean over samples.
    """

    order: Tensor
    variance: Tensor
    alone: Tensor
    stderr: Tensor | None = None


def variance_curves(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Any],
    *,
    metric: Metric = "logits",
    stand_in: StandIn = "map",
    num_probes: int = 1,
    ridge: float = 1e-3,
    rows_per_channel: float = 12,
    max_rows: int = 4096,
    max_bytes: int = 1 << 28,
    max_bytes_held: int = 1 << 31,
    of: Budget = "macs",
    amp: torch.dtype | None = None,
    grad_checkpointing: bool = False,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
    progress: Progress | None = None,
) -> dict[str, Curve]:
    """Measure the curve of every group.

    Groups that are wide for the number of inputs, or for the memory, are measured by second moments
    instead of the matrices S (``rows_per_channel``): on few rows a joint change of many channels
    can look like none.

    Args:
        model: The network.
        groups: Its channel groups.
        inputs: Re-iterable of unlabeled batches [B, ...]; the labels of a labelled loader are
            dropped before anything sees them.
        metric: See :func:`tpvprune.scores.tpv.tpv_scores`.
        stand_in: What the readers of a channel get in its place: a linear map of those that stay
            (``"map"``), its mean, as after a recalibration of BatchNorm (``"mean"``), or
            nothing (``"zero"``).
        num_probes: Directions per sample.
        ridge: Relative ridge of the stand-in maps.
        rows_per_channel: Groups with fewer samples for each of their channels are wide: their
            order comes from second moments, and their variance from inputs that it was not fitted
            to (:mod:`tpvprune.scores.second_moments`).
        max_rows: At most so many (sample, direction) pairs enter a curve.
        max_bytes: Memory that the matrices S of one group may take; wide groups use fewer rows.
        max_bytes_held: Memory that those of all groups may take at one time (of one group: its
            own limit); what is beyond it is measured in further passes over the inputs.
        of: The budget: units of one group that save more of it leave earlier.
        amp: ``torch.bfloat16`` for mixed precision.
        grad_checkpointing: See :func:`tpvprune.scores.tpv.tpv_scores`.
        seed: Of the directions.
        outputs: See :func:`tpvprune.scores.tpv.tpv_scores`.
        progress: Called with ("elimination", done, total) after every group.

    Returns:
        Group name -> :class:`Curve`.

    Raises:
        ValueError: If ``stand_in`` is none of the three, or an activation or a curve is not finite
            (of a float16 model: in float32, either).
    """
    if stand_in not in get_args(StandIn):
        known = ", ".join(get_args(StandIn))
        raise ValueError(f"stand_in: expected one of {known}, found {stand_in!r}")
    savings = unit_costs(groups, of)
    source = unlabeled(inputs)
    probing = Probing(metric, num_probes, amp, grad_checkpointing, seed, outputs)

    def measured(model: nn.Module) -> dict[str, Curve]:
        num, fit, held = (
            (sum(map(len, source)), {}, {})
            if stand_in == "zero"
            else folded_covariances(model, groups, source)
        )
        moments = merged(fit, held)
        means = {call: mean for call, (mean, _) in moments.items()}
        most = min(max_rows, int(total(num)) * num_probes)
        widths = {c: len(m) for c, m in means.items()} if stand_in == "map" else {}
        # Other directions tell nothing new of how the inputs vary.
        needed = rows_per_channel * num_probes
        sizes = {g.name: _size(g, widths, most, max_bytes, needed) for g in groups}
        narrow = {name: size for name, size in sizes.items() if size is not None}
        calls = {r.call for g in groups if g.name in narrow for r in g.readers}
        precisions = {}
        if stand_in == "map":
            precisions = {c: ridge_inverse(moments[c][1], ridge) for c in calls & set(means)}
        del moments
        curves: dict[str, Curve] = {}

        def found(name: str, curve: Curve) -> None:
            curves[name] = curve
            if progress is not None:
                progress("elimination", len(curves), len(sizes))

        wide = [g for g in groups if g.name not in narrow]
        gradients = GradientMoments(model, wide, probing, mapped=widths.keys(), means=_means(fit))
        for names in list(_parts(narrow, max_bytes_held)) or [[]]:
            part = [groups[name] for name in names]
            cuts = _collect(
                model, part, source, probing,
                num_inputs=num, means=means, precisions=precisions, sizes=narrow,
                gradients=gradients if wide and not gradients.is_full else None,
            )  # fmt: skip
            for g in part:
                found(g.name, _eliminate(g, cuts.pop(g.name), savings[g.name].float()))
        for name, curve in _wide_curves(
            model, gradients, source, probing,
            fit=fit, held=held, widths=widths, savings=savings, max_bytes_held=max_bytes_held,
        ):  # fmt: skip
            found(name, curve)
        return {g.name: curves[g.name] for g in groups}

    return retried_in_single(model, measured)


# ---- wide groups ----------------------------------------------------------------------------


def _means(covariances: Covariances) -> dict[int, Tensor]:
    return {call: mean for call, (mean, _, _) in covariances.items()}


def _wide_curves(
    model: nn.Module,
    gradients: GradientMoments,
    inputs: Iterable[Tensor],
    probing: Probing,
    *,
    fit: Covariances,
    held: Covariances,
    widths: Mapping[int, int],
    savings: Mapping[str, Tensor],
    max_bytes_held: int,
) -> Iterator[tuple[str, Curve]]:
    """Yield the curves of groups with few rows for each channel (:mod:`.second_moments`)."""
    groups = {g.name: g for g in gradients.groups}
    if not groups:
        return
    stood_in = {
        r.call: _inputs(fit[r.call], held.get(r.call, fit[r.call]))
        for g in groups.values()
        for r in g.readers
        if r.call in widths
    }
    parts = gradients.parts(stood_in)
    found = {
        name: leaving_order(parts[name], g.num_channels, savings[name].double())
        for name, g in groups.items()
    }
    orders = {name: leaving.order for name, leaving in found.items()}
    # Other directions on inputs that took no part, where there are any.
    again = replace(probing, seed=probing.seed + 1)
    judges: Iterable[Tensor] = _Held(inputs)
    judges = judges if total(sum(map(len, judges))) else inputs
    sizes = {name: _map_bytes(g, widths) for name, g in groups.items()}
    for names in _parts(sizes, max_bytes_held):
        part = [groups[name] for name in names]
        measured = measured_variance(
            model, part, judges, again, orders=orders, parts=parts, means=_means(fit)
        )
        for g in part:
            leaving, counts = found[g.name], measured_at(g.num_channels)
            curve = fitted_curve(leaving.shape, counts, measured[g.name])
            unit = 1.0
            if any(part.inputs is not None for part in parts[g.name]):
                # In proportion to the shape: what was measured first says how much that is.
                unit = float(measured[g.name][0] / leaving.shape[counts[0]].clamp_min(1e-300))
            yield g.name, Curve(leaving.order, curve, leaving.alone * unit)


class _Held:
    """Re-iterable inputs that took no part in a fit."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        self._inputs = inputs

    def __iter__(self) -> Iterator[Tensor]:
        seen = 0
        for x in self._inputs:
            mask = is_held(seen, len(x))
            seen += len(x)
            if bool(mask.any()):
                yield x[mask]


def _map_bytes(group: ChannelGroup, widths: Mapping[int, int]) -> _Size:
    """Return what the maps of a wide group take while its variance is measured."""
    numbers = sum(widths.get(r.call, 1) * len(r.index) for r in group.readers)
    return _Size(0, 4 * len(MEASURED) * numbers)


def _inputs(fit: tuple[Tensor, Tensor, float], held: tuple[Tensor, Tensor, float]) -> Inputs:
    return Inputs(fit[0], shrunk_precision(fit[:2], held[:2]))


# ---- statistics -----------------------------------------------------------------------------


class _Cut:
    """One reader of a group: S [own, rows, n] (or u [own, rows, 1]), and the stand-in map.

    Both are where the network is; which columns are whose, and are left, the host keeps.
    """

    def __init__(
        self, reader: Reader, precision: Tensor | None, num_rows: int, device: torch.device
    ) -> None:
        self.index, self.channel = reader.index, reader.channel
        self.columns = _columns(reader.index, device)
        self.precision = precision
        # Filled batch by batch: joining thousands of parts would need twice the memory, and leave
        # it in pieces.
        width = 1 if precision is None else len(precision)
        self.s = torch.empty(len(reader.index), num_rows, width, device=device)
        self._filled = 0

    def add(self, rows: Tensor) -> None:
        """Take the next rows [rows, own, n]."""
        start, self._filled = self._filled, self._filled + len(rows)
        self.s[:, start : self._filled] = rows.transpose(0, 1)

    def changes(self, num_channels: int) -> Tensor:
        """Return u [C, rows]: what each channel's leaving now would change."""
        rows = self.s.shape[1]
        if not len(self.index):
            return self.s.new_zeros(num_channels, rows)
        if self.precision is None:
            per_column = self.s[:, :, 0]
        else:
            weights = residual_map(self.precision, [(self.index, self.channel)])[:, self.index]
            per_column = torch.bmm(self.s, weights.T.float().unsqueeze(2)).squeeze(2)
        changes = self.s.new_zeros(num_channels, rows)
        return changes.index_add_(0, self.channel.to(changes.device), per_column)

    def remove(self, channels: Tensor) -> Tensor:
        """Return the joint change [rows] of channels that leave now; the others take over."""
        gone = torch.isin(self.channel, channels)
        columns = gone.nonzero().squeeze(1)
        if not len(columns):
            return self.s.new_zeros(self.s.shape[1])
        leaving, inputs = self.s[columns], self.index[columns]
        self._drop(gone)
        if self.precision is None:
            return leaving.sum((0, 2))
        p = self.precision[:, inputs]
        taken = torch.linalg.solve(p[inputs], p.T).T  # [n, |R|] = P[:, R] P_RR^-1
        # The inputs that stay predict those that leave: a_R ~ -P_RR^-1 P_RK a_K.
        share = -taken[self.index].float()
        self.s.flatten(1).addmm_(share, leaving.flatten(1))
        self.precision = self.precision - taken @ p.T
        self.precision[inputs] = 0
        self.precision[:, inputs] = 0
        # Rows of inputs that left are never used again; one keeps the matrix invertible.
        self.precision[inputs, inputs] = 1
        return torch.einsum("crj,jc->r", leaving, taken.float())

    def _drop(self, gone: Tensor) -> None:
        """Let the last columns that stay fill the places of those that leave: S is not copied."""
        stays = len(gone) - int(gone.sum())
        order = torch.arange(stays)
        holes = gone[:stays].nonzero().squeeze(1)
        order[holes] = (~gone[stays:]).nonzero().squeeze(1) + stays
        self.s[holes] = self.s[order[holes]]
        self.s = self.s[:stays]
        self.index, self.channel = self.index[order], self.channel[order]


class _Size(NamedTuple):
    """How many rows of a group are measured, and their bytes."""

    rows: int
    num_bytes: int


def _size(
    group: ChannelGroup,
    widths: Mapping[int, int],
    most_rows: int,
    max_bytes: int,
    rows_per_channel: float,
) -> _Size | None:
    """Return the rows of a group; None where they are too few for its channels."""
    numbers = sum(widths.get(r.call, 1) * len(r.index) for r in group.readers)
    rows = min(most_rows, max_bytes // (4 * max(numbers, 1)))
    if rows < max(1.0, rows_per_channel * group.num_channels):
        return None
    return _Size(rows, 4 * rows * numbers)


def _parts(sizes: Mapping[str, _Size], max_bytes_held: int) -> Iterator[list[str]]:
    """Yield groups that are held together; those that want many inputs need few passes."""
    part: list[str] = []
    held = 0
    if not sizes:
        return
    for name in sorted(sizes, key=lambda name: -sizes[name].rows):
        if part and held + sizes[name].num_bytes > max_bytes_held:
            yield part
            part, held = [], 0
        part.append(name)
        held += sizes[name].num_bytes
    yield part


def _collect(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    inputs: Iterable[Tensor],
    probing: Probing,
    *,
    num_inputs: int,
    means: Mapping[int, Tensor],
    precisions: Mapping[int, Tensor],
    sizes: Mapping[str, _Size],
    gradients: GradientMoments | None = None,
) -> dict[str, list[_Cut]]:
    device = next(model.parameters()).device
    plan = reader_plan(groups)
    cuts: dict[tuple[str, int], _Cut] = {}
    # The first images of the whole set, with all of their directions.
    probes = probing.num_probes
    wanted = {g.name: min(num_inputs, share(-(-sizes[g.name].rows // probes))) for g in groups}
    for group in groups:
        for r in group.readers:
            precision = precisions.get(r.call)
            num_rows = wanted[group.name] * probes
            cuts[group.name, r.call] = _Cut(r, precision, num_rows, device)
    seen, most = 0, max(wanted.values(), default=0)
    if not groups and gradients is None:
        return {}
    read = [*groups, *(gradients.groups if gradients is not None else ())]
    for x, directions, tap in passes(model, read, inputs, probing):
        also = None if gradients is None or gradients.is_full else gradients
        if also is not None:
            also.begin(global_indices(seen, len(x)), ~is_held(seen, len(x)))

        def collect(
            call: int,
            a: Tensor,
            grad: Tensor,
            *,
            v: Tensor,
            num: int = len(x),
            seen: int = seen,
            also: GradientMoments | None = also,
        ) -> None:
            if also is not None and call in also.plan:
                also.add(call, a, grad, v)
            if call not in plan or seen >= most:
                return
            inputs, gradients = (_by_sample(plan[call][0][1], t, num) for t in (a, grad))
            for group, _ in plan[call]:
                take = max(0, wanted[group.name] - seen)
                rows, cut = in_single(inputs[:take]), cuts[group.name, call]
                own = in_single(gradients[:take, :, cut.columns])
                if cut.precision is not None:
                    s = own.transpose(1, 2) @ (rows - means[call].to(rows))  # [B, own, n]
                else:
                    gone = rows[:, :, cut.columns]
                    if call in means:
                        gone = gone - means[call][cut.columns].to(gone)
                    s = (gone * own).sum(1).unsqueeze(2)
                cut.add(s)

        for v in directions:
            tap.backward(v, partial(collect, v=v))
        seen += len(x)
        if seen >= most and (gradients is None or gradients.is_full):
            break
    found: dict[str, list[_Cut]] = {g.name: [] for g in groups}
    for (name, _), cut in cuts.items():
        if not bool(cut.s.isfinite().all()):
            raise NotFiniteError(
                f"group {name!r}: expected finite output changes, found NaN or infinity: check "
                "the inputs and the weights for non-finite values"
            )
        found[name].append(cut)
    return found


def _columns(index: Tensor, device: torch.device) -> slice | Tensor:
    """Return what selects these positions: those that follow one another need no copy."""
    num, first = len(index), int(index[0]) if len(index) else 0
    run = torch.equal(index, torch.arange(first, first + num))
    return slice(first, first + num) if run else index.to(device)


def _by_sample(reader: Reader, t: Tensor, num: int) -> Tensor:
    """Return [B, positions, n]."""
    rows = reader.by_channel(t, num).transpose(1, 2)
    return rows.reshape(num, -1, rows.shape[2])


# ---- elimination ----------------------------------------------------------------------------


def _eliminate(group: ChannelGroup, cuts: list[_Cut], savings: Tensor) -> Curve:
    num = group.num_channels
    block = -(-num // _MAX_STEPS)
    left = torch.ones(num, dtype=torch.bool)
    joint = cuts[0].s.new_zeros(cuts[0].s.shape[1])
    num_rows = total(len(joint))

    def mean_power(changes: Tensor, power: int = 2) -> Tensor:
        """Return the mean over the rows of all processes."""
        return summed(changes.pow(power).sum(-1, dtype=torch.float64))[0] / num_rows

    def each() -> Tensor:
        """Return u [C, rows] of every channel that would leave now."""
        return sum((cut.changes(num) for cut in cuts), torch.zeros(()))

    now = 0.0
    first = each()
    alone, fourth = fetched(mean_power(first), mean_power(first, 4))
    order: list[Tensor] = []
    variance = [0.0]
    while (num_left := int(left.sum())) > 1:
        (power,) = fetched(mean_power(joint + (each() if order else first)))
        growth = power - now
        # Where units save the same this is the order of the variances themselves. Ranked are those
        # that are left, and no others: then every step makes progress, whatever the numbers.
        candidates = left.nonzero().squeeze(1)
        growth = (growth / savings.clamp_min(1e-12))[candidates]
        chosen = candidates[growth.argsort(stable=True)[: min(block, num_left - 1)]]
        joint = joint + sum((cut.remove(chosen) for cut in cuts), torch.zeros(()))
        now = float(mean_power(joint))
        if not math.isfinite(now):
            raise NotFiniteError(
                f"group {group.name!r}: expected a finite curve, found {now} with {num_left} of "
                f"{num} channels left: the inputs of its readers are collinear, raise ridge or "
                "ignore the layer"
            )
        last, top = variance[-1], max(variance[-1], now)
        variance += [last + (top - last) * (i + 1) / len(chosen) for i in range(len(chosen))]
        order.append(chosen)
        left[chosen] = False
    return Curve(
        torch.cat([*order, left.nonzero().squeeze(1)]),
        torch.tensor(variance, dtype=torch.float64),
        alone,
        standard_error(alone, fourth, num_rows),
    )
