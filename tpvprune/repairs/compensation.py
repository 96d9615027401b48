"""Repair 1: refit every layer to the dense network, in network order, without a gradient step.

A layer of the pruned network sees fewer inputs, and inputs that earlier repairs have changed.
Ridge least squares, towards its present weights, makes its pre-activation that of the dense
network again. Where the pre-activation is added to a shortcut, the target is dense branch + dense
shortcut - pruned shortcut, so that errors made upstream are corrected too.

All calibration inputs advance together, in chunks (:mod:`tpvprune.repairs.walk`): when all have
come to a layer, the sums over their positions are added up, the layer is refitted
(:mod:`tpvprune.repairs.refits`), and all go on with the new weights, so one pass through the
network does the whole sequential repair.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpvprune.groups import ChannelGroups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.clock import Progress
from tpvprune.passes.memory import is_lack_of_memory, release_memory, spare_bytes
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import spread_weights, total
from tpvprune.repairs.branches import FEWER_ROWS, Layer, Plan, layers_by_weight
from tpvprune.repairs.chunks import chunk_size
from tpvprune.repairs.refits import Constrain, Refits
from tpvprune.repairs.targets import Targets, dense_targets, plan_for
from tpvprune.repairs.views import Views, views_of
from tpvprune.repairs.walk import Walk

TARGET_BYTES = 2 << 30  # of the dense values that all layers are fitted to


def compensate_weights(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    ridge: float | None = None,
    rows_per_input: int = 60,
    min_rows: int = 65536,
    nonlinear: bool = True,
    num_views: int = 1,
    max_bytes: int | None = None,
    seed: int = 0,
    wanted: Wanted | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    r"""Return a copy of the pruned model whose layers are refitted to the dense one.

    For each convolution or linear layer, in the order of execution,

    .. math:: \min_{W, b} \; E \| W x + b - y^* \|^2 + \lambda \| W - W_0 \|^2

    with x the inputs of the layer in the (already repaired) pruned network, W_0 its present
    weights, y* the dense pre-activation (residual-corrected, see the module). The intercept b
    goes into the layer's bias or the BatchNorm behind it; layers with neither get none. A layer
    that runs several times in one forward stays as it is.

    Args:
        pruned: ``remove_channels(dense, groups, kept)``, or a later stage of it.
        dense: The model it came from.
        batches: Re-iterable of unlabeled inputs; all of them are used.
        groups: Channel groups of ``dense``.
        kept: What stayed, as given to :func:`tpvprune.remove_channels`.
        ridge: lambda relative to the mean variance of the layer's inputs; None: of several, the
            one with the least error on a quarter of the inputs that is held back from that fit
            (:mod:`tpvprune.repairs.least_squares`).
        rows_per_input: Sampled positions per unknown of a row of W ...
        min_rows: ... but at least so many, where the inputs have them.
        nonlinear: Where nothing but an activation phi reads y, or y behind its BatchNorm and a
            shortcut, go on from there towards min E || phi(.) - phi(.*) ||^2, as far as that holds
            on the inputs held back (:mod:`tpvprune.repairs.activation_fit`).
        num_views: Views of every image of a batch [B, C, H, W] that are shown: 1 itself, 2 its
            mirror image, too, more: parts of it besides, enlarged. Inputs of other kinds are shown
            as they are. For few more rows in all, but as many more forwards.
        max_bytes: Memory for the activations of waiting inputs; None: a quarter of what is free,
            1 GiB at least. With less of it more is computed again; the result stays. The dense
            values that are fitted to may take 2 GiB besides: large models look at fewer positions
            of every input.
        seed: Of the sampled positions.
        wanted: The dense values, where several sizes are repaired: :func:`wanted_by` of the same
            arguments.
        progress: Called with ("compensation", layers done, layers) after every layer.

    Returns:
        The repaired copy.
    """
    return refitted(
        pruned, dense, batches, groups=groups, kept=kept, ridge=ridge, seed=seed,
        rows_per_input=rows_per_input, min_rows=min_rows, nonlinear=nonlinear, num_views=num_views,
        max_bytes=max_bytes, wanted=wanted, progress=progress,
    )  # fmt: skip


def wanted_by(
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    rows_per_input: int = 60,
    min_rows: int = 65536,
    num_views: int = 1,
    seed: int = 0,
) -> Wanted:
    """Return the dense values that :func:`compensate_weights` fits the layers of any size to.

    The arguments are those of it. They take 2 GiB at most.
    """
    inputs = list(unlabeled(batches))
    views = views_of(inputs, chunk_size(dense, inputs), num_views, seed)
    return wanted_of(dense, views, rows_per_input, min_rows, seed=seed)


def refitted(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups | None,
    kept: Mapping[str, Tensor],
    ridge: float | None,
    rows_per_input: int,
    min_rows: int,
    seed: int,
    fewer: int = FEWER_ROWS,
    num_views: int = 1,
    max_bytes: int | None = None,
    nonlinear: bool = False,
    constrain: Constrain | None = None,
    wanted: Wanted | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Return a copy of the pruned model, every layer refitted in one pass over the inputs.

    The arguments are those of :func:`compensate_weights`. ``constrain`` is called with a layer's
    name, its refitted weights [groups, outputs, unknowns] and the curvature of the fit
    [groups, unknowns, unknowns]; it returns the weights to take. Without ``groups`` every width is
    as it was. ``wanted`` are the dense values, where they are known: :func:`wanted_of` of the same
    inputs, positions and seed.
    """
    inputs = list(unlabeled(batches))
    chunk = chunk_size(dense, inputs)
    room = spare_bytes(next(dense.parameters()).device) if max_bytes is None else max_bytes

    def refit(chunk: int) -> nn.Module:
        repaired = copy.deepcopy(pruned)
        views = views_of(inputs, chunk, num_views, seed)
        known = wanted or wanted_of(dense, views, rows_per_input, min_rows, fewer=fewer, seed=seed)
        fits = refits_towards(
            dense, views, known.plan, groups=groups, kept=kept, ridge=ridge, constrain=constrain,
            nonlinear=nonlinear, targets=known.targets,
        )  # fmt: skip
        del known  # what is fitted can go
        Walk(repaired, fits, views, room, progress=progress).run()
        spread_weights(repaired)
        return repaired

    while True:
        try:
            return refit(chunk)
        except Exception as error:
            if not is_lack_of_memory(error) or chunk == 1 or num_processes() > 1:
                raise
        # Outside of the handler, where the error no longer holds what filled the memory.
        warnings.warn(
            f"out of memory: the weights are refitted with {chunk // 2} inputs at a time instead "
            f"of {chunk}",
            stacklevel=3,
        )
        chunk, room = chunk // 2, room // 2
        release_memory()


@dataclass(frozen=True)
class Wanted:
    """What the dense network gives at the sampled positions; it may serve several refits."""

    plan: Plan
    targets: Targets


def wanted_of(
    dense: nn.Module,
    views: Views,
    rows_per_input: int,
    min_rows: int,
    *,
    fewer: int = FEWER_ROWS,
    seed: int,
) -> Wanted:
    """Run the dense network.

    ``fewer``: layers of several groups are fitted to so many times fewer rows, at most.
    """
    num = views.starts[-1]
    plan = Plan(
        num, rows_per_input, min_rows, seed, all_inputs=int(total(num)),
        num_views=views.num_views, fewer=fewer, device=next(dense.parameters()).device,
    )  # fmt: skip
    plan = plan_for(plan, dense, views[0][:1], TARGET_BYTES)
    return Wanted(plan, dense_targets(dense, views, plan))


def refits_towards(
    dense: nn.Module,
    chunks: Iterable[Tensor],
    plan: Plan,
    *,
    groups: ChannelGroups | None,
    kept: Mapping[str, Tensor],
    ridge: float | None = None,
    constrain: Constrain | None = None,
    nonlinear: bool = True,
    linear: Sequence[str] = (),
    without: Sequence[str] = (),
    targets: Targets | None = None,
) -> Refits:
    """Run the dense network, and return what the layers of the pruned one are fitted to.

    ``chunks``: its inputs, in the order in which the pruned one will see them. ``groups``: channel
    groups of ``dense``; None where every width is as it was. ``linear``: modules in which no layer
    is fitted through its activation.
    """
    rows, first = {}, 0
    if groups is not None:
        rows = {r.name: _kept_rows(groups, kept, r) for r in layers_by_weight(dense).values()}
        first = _first_changed(groups, kept)
    if targets is None:
        targets = dense_targets(dense, chunks, plan, without=without)
    else:  # they may serve several refits, and each forgets what it has fitted
        targets = targets.shared()
    if constrain is not None or not nonlinear:
        targets.activations.clear()
    return Refits(
        plan, targets, rows, ridge, constrain, linear=tuple(linear), without=tuple(without),
        first=min(first, targets.before_unseen),
    )  # fmt: skip


def _first_changed(groups: ChannelGroups, kept: Mapping[str, Tensor]) -> int:
    """Return the first call that sees a change: all before it give what they gave."""
    # A mean or softmax over the channels changes what is read before any of them is.
    mixed = (axis for noted in groups.mixers.values() for _, axis in noted)
    if any(not bool(axis.kept(kept).all()) for axis in mixed):
        return 0
    cut = (g for g in groups if g.name in kept and not bool(kept[g.name].all()))
    return min((reader.call for g in cut for reader in g.readers), default=sys.maxsize)


def _kept_rows(groups: ChannelGroups, kept: Mapping[str, Tensor], layer: Layer) -> Tensor | None:
    for dim, axis in groups.param_axes.get(f"{layer.name}.weight", ()):
        if dim == 0:
            return axis.kept(kept).nonzero().squeeze(1).to(layer.module.weight.device)
    return None
