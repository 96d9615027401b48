"""What the repair behind a cut makes up for: early errors are corrected more often than late ones.

A curve (:mod:`tpvprune.scores.curves`) says what a cut does to the outputs when the layers that
read it stand in. Compensation does more: every later layer is refitted to the *dense* activations
on the inputs that it really gets, and so removes part of the error that arrives. How much depends
on how many layers are still to come. A dynamic programme over unscaled curves therefore spares
early layers too much; measuring a few factors puts that right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, ChannelGroups, Kept
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.clock import Progress
from tpvprune.passes.evaluation import Reference
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.processes.membership import alone, num_processes
from tpvprune.processes.shares import gathered
from tpvprune.repairs.compensation import refitted, wanted_of
from tpvprune.repairs.views import Views
from tpvprune.scores.curves import Curve

_RANGE = (0.05, 20.0)  # of the factors: beyond it they are noise
ROUGHLY: dict[str, Any] = {"rows_per_input": 12, "min_rows": 16384, "fewer": 32}
"""Rows of a compensation that is only measured: what all segments lose alike changes no width."""


def repair_factors(
    model: nn.Module,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    curves: Mapping[str, Curve],
    inputs: Sequence[Tensor],
    *,
    num_segments: int = 3,
    max_inputs: int = 1024,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Measure, for early, middle and late groups, how much variance is left after the repair.

    The groups are split by depth into segments of about equal predicted damage; those that are
    read all over the network (residual streams) are a segment of their own. Each segment is cut
    alone as in ``kept``, the model is compensated, and the output variance on inputs that it was
    not fitted to is compared with the sum of the segment's curves.

    ``curves``: as :func:`tpvprune.scores.curves.variance_curves` returns them. ``inputs``: batches
    of unlabeled inputs; a quarter of those used measures. ``outputs``: what counts of what the
    network returns; None: all. ``progress``: called with ("repair factors", done, total) after
    every segment. Returns group name -> measured / predicted variance. Groups of which nothing was
    cut get the average.
    """
    if num_processes() > 1:  # a few factors: all processes measure them on all inputs
        whole = list(gathered(inputs))
        with alone():
            return repair_factors(
                model, groups, kept, curves, whole,
                num_segments=num_segments, max_inputs=max_inputs, seed=seed, outputs=outputs,
                progress=progress,
            )  # fmt: skip
    fit, held = split_inputs(inputs, max_inputs)
    predicted, measured = 0.0, 0.0
    segment_of: dict[str, float] = {}
    wanted = wanted_of(model, Views(fit), **ROUGHLY, seed=seed)
    dense = Reference(model, held, outputs)
    segments = _segments(groups, kept, curves, num_segments)
    for number, segment in enumerate(segments, 1):
        expected = sum(_damage(g, kept, curves) for g in segment)
        if expected <= 0:
            continue
        cut: Kept = {g.name: kept[g.name] for g in segment if g.name in kept}
        smaller = remove_channels(model, groups, cut)
        repaired = refitted(
            smaller, model, fit, groups=groups, kept=cut, ridge=None, seed=seed, wanted=wanted,
            **ROUGHLY,
        )  # fmt: skip
        found = dense.difference(repaired).output_variance
        predicted, measured = predicted + expected, measured + found
        segment_of |= {g.name: found / expected for g in segment}
        if progress is not None:
            progress("repair factors", number, len(segments))
    average = measured / predicted if predicted else 1.0
    least, most = _RANGE
    return {g.name: min(most, max(least, segment_of.get(g.name, average))) for g in groups}


def scaled(curves: Mapping[str, Curve], factors: Mapping[str, float]) -> dict[str, Curve]:
    """Return the curves with every variance times the factor of its group."""
    return {n: replace(c, variance=c.variance * factors.get(n, 1.0)) for n, c in curves.items()}


def split_inputs(inputs: Sequence[Tensor], max_inputs: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return inputs to fit with and inputs to measure on; the same where there is only one.

    ``inputs``: batches [B, ...].
    """
    whole, size = torch.cat(list(inputs))[:max_inputs], max(1, len(inputs[0]))
    fit, held = whole.tensor_split([len(whole) - len(whole) // 4])
    return list(fit.split(size)), list((held if len(held) else fit).split(size))


def _segments(
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    curves: Mapping[str, Curve],
    num_segments: int,
) -> list[list[ChannelGroup]]:
    first = {g.name: min((r.call for r in g.readers), default=0) for g in groups}
    last = {g.name: max((r.call for r in g.readers), default=0) for g in groups}
    far = (1 + max(last.values(), default=0)) / num_segments
    streams = [g for g in groups if last[g.name] - first[g.name] >= far]
    rest = [g for g in groups if last[g.name] - first[g.name] < far]
    rest.sort(key=lambda g: first[g.name])
    total = sum(_damage(g, kept, curves) for g in rest)
    segments: list[list[ChannelGroup]] = [[] for _ in range(num_segments)]
    so_far = 0.0
    for group in rest:
        damage = _damage(group, kept, curves)
        middle = (so_far + damage / 2) / total if total > 0 else 0.0
        segments[min(num_segments - 1, int(middle * num_segments))].append(group)
        so_far += damage
    return [segment for segment in (streams, *segments) if segment]


def _damage(group: ChannelGroup, kept: Mapping[str, Tensor], curves: Mapping[str, Curve]) -> float:
    gone = int((~kept[group.name]).sum()) if group.name in kept else 0
    variance = curves[group.name].variance
    return float(variance[min(gone, len(variance) - 1)])
