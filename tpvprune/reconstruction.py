"""Repair 2: refit whole blocks to the dense network by damped Gauss-Newton, block after block.

Refitting one layer at a time (:mod:`tpvprune.compensation`) keeps each hidden channel what it
was. Letting all layers of a block move together, so that its *output* is that of the dense block,
lets the channels that stay take on new roles; letting all blocks of a stage move together, in a
second walk, lets later ones make up for earlier ones. Either is a nonlinear least-squares problem
(:mod:`tpvprune.gauss_newton`). No label is read, and no loss over the network's outputs is
descended.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from tpvprune.batches import unlabeled
from tpvprune.blocks import Block, BlockCall, find_blocks, on_call
from tpvprune.branches import Plan
from tpvprune.clock import Progress
from tpvprune.compensation import RefitRun, first_inputs, refit_run
from tpvprune.distributed import gathered, spread_weights
from tpvprune.gauss_newton import GaussNewton
from tpvprune.groups import ChannelGroups
from tpvprune.membership import alone, num_processes
from tpvprune.running import evaluating, fast_layout, frozen, on_device, takes_channels_last
from tpvprune.targets import plan_for

_BATCH = 128


def reconstruct_blocks(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    rounds: int = 2,
    iterations: int = 5,
    stage_iterations: int = 12,
    damping: float = 1e-3,
    mirror: bool = True,
    max_positions: int = 1 << 18,
    rows_per_input: int = 24,
    min_rows: int = 16384,
    max_bytes: int = 4 << 30,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    r"""Return a copy of the pruned model whose blocks are refitted to those of the dense one.

    For each block, in the order of execution,

    .. math:: \min_\theta \; E \| F_\theta(x) - y^* \|^2

    with x the inputs of the block in the (already repaired) pruned network, theta its weights and
    biases (each layer refitted first as by :func:`tpvprune.compensate_weights`), and y* the
    output of the dense block, kept channels only. Then the same for each stage, a module that
    holds several of the blocks (:func:`tpvprune.blocks.find_blocks`), from where the blocks are;
    layers outside of stages are refitted again.

    Args:
        pruned: ``remove_channels(dense, groups, kept)``, or a later stage of it.
        dense: The model it came from.
        batches: Re-iterable of unlabeled inputs.
        groups: Channel groups of ``dense``.
        kept: What stayed, as given to :func:`tpvprune.remove_channels`.
        rounds: Linearisations of every block, and of every stage.
        iterations: At most so many conjugate-gradient iterations for each of a block: those after
            which the error on held-back samples is least are taken.
        stage_iterations: Likewise of a stage; 0 leaves blocks as they are.
        damping: Relative to the mean diagonal of the Gauss-Newton matrix of each layer.
        mirror: Show image batches [B, C, H, W] also mirrored left to right.
        max_positions: Positions (pixels, tokens) of a block's output that are matched: blocks
            with large maps look at fewer inputs.
        rows_per_input: See :func:`tpvprune.compensate_weights`, which refits each layer first.
        min_rows: Likewise.
        max_bytes: Memory for activations and targets; the first inputs that fit are used. As much
            again for graphs, which are built anew where they do not fit.
        seed: Of the random directions of the preconditioner.
        progress: Called with ("reconstruction", done, total) after every block and every stage.

    Returns:
        The repaired copy. Layers outside of blocks, and in blocks that cannot be matched (see
        :func:`tpvprune.blocks.find_blocks`), are refitted as by ``compensate_weights``.
    """
    if num_processes() > 1:  # conjugate gradients would wait for each other at every step
        whole = gathered(unlabeled(batches))
        with alone():
            fitted = reconstruct_blocks(
                pruned, dense, whole, groups=groups, kept=kept, rounds=rounds,
                iterations=iterations, stage_iterations=stage_iterations, damping=damping,
                mirror=mirror, max_positions=max_positions, rows_per_input=rows_per_input,
                min_rows=min_rows, max_bytes=max_bytes, seed=seed, progress=progress,
            )  # fmt: skip
        spread_weights(fitted)
        return fitted
    repaired = copy.deepcopy(pruned)
    source = unlabeled(batches)
    first = on_device(next(iter(source))[:2], dense)
    with evaluating(dense, repaired), torch.no_grad():
        blocks, stages = find_blocks(dense, repaired, first, groups, kept)
    # Half of the memory for the activations of one layer, half for the targets of all blocks; as
    # much as those for the targets of all layers.
    chosen = first_inputs(_mirrored(source) if mirror else source, dense, max_bytes // 2)
    room = max(1, max_bytes // 2 // sum((b.bytes_per_input for b in blocks), 1))
    x = fast_layout(on_device(torch.cat(chosen)[:room], dense), dense)
    plan = plan_for(Plan(len(x), rows_per_input, min_rows, seed), dense, x[:1], max_bytes // 2)
    refits = partial(
        refit_run, repaired, dense, x.split(_BATCH), groups=groups, kept=kept, plan=plan
    )
    fast = x.ndim == 4 and takes_channels_last(dense, x)
    solver = GaussNewton(len(x), rounds, iterations, damping, max_positions, max_bytes, seed, fast)
    walks = [(blocks, solver, refits)]
    if stages and stage_iterations:
        # What blocks have won stays; the layers before, between and behind the stages follow them.
        others = partial(refits, without=[stage.name for stage in stages])
        walks.append((stages, replace(solver, iterations=stage_iterations), others))
    total = sum(len(found) for found, _, _ in walks)
    done = itertools.count(1)

    def tell() -> None:
        if progress is not None:
            progress("reconstruction", next(done), total)

    with evaluating(dense, repaired), frozen(repaired), sdpa_kernel(SDPBackend.MATH):
        for found, how, run in walks:
            targets, moved = _dense_outputs(dense, found, x), on_device(x, repaired)
            _walk(repaired, found, moved, targets=targets, solver=how, run=run(), tell=tell)
    return repaired


def _mirrored(inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield image batches, each image followed by its mirror image."""
    for x in inputs:
        yield torch.stack([x, x.flip(3)], 1).flatten(0, 1) if x.ndim == 4 else x


def _dense_outputs(dense: nn.Module, blocks: list[Block], x: Tensor) -> dict[str, Tensor]:
    """Return what the pruned blocks should give: the kept channels of the dense outputs."""
    found: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    handles = [
        dense.get_submodule(block.name).register_forward_hook(
            lambda _m, _a, out, block=block: found[block.name].append(block.kept_of(out).clone())
        )
        for block in blocks
    ]
    try:
        with torch.no_grad():
            for part in x.split(_BATCH):
                dense(part)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _walk(
    model: nn.Module,
    blocks: list[Block],
    x: Tensor,
    *,
    targets: dict[str, Tensor],
    solver: GaussNewton,
    run: RefitRun,
    tell: Callable[[], None],
) -> None:
    """Run the pruned network once on all inputs; layers and blocks are refitted in their turn."""
    handles: dict[str, list[RemovableHandle]] = {}

    def refit(module: nn.Module, call: BlockCall | None, block: Block) -> Tensor:
        assert call is not None
        for handle in handles[block.name]:
            handle.remove()
        with run.paused():
            with torch.enable_grad():
                solver.fit(module, replace(call, out=targets.pop(block.name)), block.depth)
            tell()
            parts = solver.parts(call, block.depth)
            return torch.cat([module(*c.args, **c.kwargs) for c in parts])

    for block in blocks:
        handles[block.name] = on_call(model.get_submodule(block.name), partial(refit, block=block))
    with torch.no_grad(), run:
        model(x)
