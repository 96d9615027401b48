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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, ChannelGroups
from tpvprune.groups.budget import Budget, unit_costs
from tpvprune.passes.batches import Again, unlabeled
from tpvprune.passes.clock import Progress
from tpvprune.passes.crossing import fetched
from tpvprune.passes.finite import NotFiniteError, retried_in_single
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.processes.shares import summed, total
from tpvprune.scores.cuts import Cut, Size, collected, numbers_of, parts_of, size_of
from tpvprune.scores.leaving import block_size, leaving_order, ranked
from tpvprune.scores.residuals import (
    Covariances,
    folded_covariances,
    inputs_of,
    is_held,
    merged,
    ridge_inverse,
)
from tpvprune.scores.second_moments import (
    MEASURED,
    GradientMoments,
    fitted_curve,
    measured_at,
    measured_variance,
)
from tpvprune.scores.taps import Metric, Probing
from tpvprune.scores.tpv import standard_error

StandIn = Literal["map", "mean", "zero"]


_NOTHING = 1e-6  # of the variance when nearly all has left: channels that say nothing


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
        sizes = {g.name: size_of(g, widths, most, max_bytes, needed) for g in groups}
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
        fitted = {call: mean for call, (mean, _, _) in fit.items()}
        gradients = GradientMoments(model, wide, probing, mapped=widths.keys(), means=fitted)
        for names in list(parts_of(narrow, max_bytes_held)) or [[]]:
            part = [groups[name] for name in names]
            cuts = collected(
                model, part, source, probing,
                num_inputs=num, means=means, precisions=precisions, sizes=narrow,
                gradients=gradients,
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
        r.call: inputs_of(r.call, fit, held)
        for g in groups.values()
        for r in g.readers
        if r.call in widths
    }
    parts = gradients.parts(stood_in)
    found = {
        name: leaving_order(
            parts[name], g.num_channels, savings[name].double(), measured_at(g.num_channels)
        )
        for name, g in groups.items()
    }
    # Other directions on inputs that took no part, where there are any.
    again = replace(probing, seed=probing.seed + 1)
    judges: Iterable[Tensor] = Again(_held, inputs)
    judges = judges if total(sum(map(len, judges))) else inputs
    # What the maps take while the variance is measured.
    sizes = {n: Size(0, 4 * len(MEASURED) * numbers_of(g, widths)) for n, g in groups.items()}
    for names in parts_of(sizes, max_bytes_held):
        part = [groups[name] for name in names]
        measured = measured_variance(
            model, part, judges, again, leaving=found, parts=parts, means=gradients.means
        )
        for g in part:
            leaving, counts = found[g.name], measured_at(g.num_channels)
            curve = fitted_curve(leaving.shape, counts, measured[g.name])
            unit = 1.0
            if any(part.inputs is not None for part in parts[g.name]):
                # In proportion to the shape: what was measured first says how much that is, once
                # more has left than channels that are zero for every input.
                shape = leaving.shape[counts]
                first = int((shape > _NOTHING * shape.max()).to(torch.uint8).argmax())
                unit = float(measured[g.name][first] / shape[first].clamp_min(1e-300))
            yield g.name, Curve(leaving.order, curve, leaving.alone * unit)


def _held(inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the inputs that took no part in a fit."""
    seen = 0
    for x in inputs:
        mask = is_held(seen, len(x))
        seen += len(x)
        if bool(mask.any()):
            yield x[mask]


# ---- elimination ----------------------------------------------------------------------------


def _eliminate(group: ChannelGroup, cuts: list[Cut], savings: Tensor) -> Curve:
    num = group.num_channels
    block = block_size(num)
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
        # Where units save the same this is the order of the variances themselves.
        chosen = ranked(left, power - now, savings)[: min(block, num_left - 1)]
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
