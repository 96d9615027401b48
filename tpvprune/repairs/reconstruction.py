"""Repair 2: refit whole blocks to the dense network by damped Gauss-Newton, block after block.

Refitting one layer at a time (:mod:`tpvprune.repairs.compensation`) keeps each hidden channel what
it was. Letting all layers of a block move together, so that its *output* is that of the dense
block, lets the channels that stay take on new roles; letting all blocks of a stage move together,
in a second walk, lets later ones make up for earlier ones. Either is a nonlinear least-squares
problem (:mod:`tpvprune.repairs.gauss_newton`). No label is read, and no loss over the network's
outputs is descended.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpvprune.groups import ChannelGroups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.clock import Progress
from tpvprune.passes.running import evaluating, fast_layout, frozen, on_device, takes_channels_last
from tpvprune.processes.membership import alone, num_processes
from tpvprune.processes.shares import gathered, spread_weights
from tpvprune.repairs.blocks import Block, BlockCall, Samples, find_blocks
from tpvprune.repairs.branches import FEWER_ROWS, Plan
from tpvprune.repairs.chunks import chunk_size
from tpvprune.repairs.compensation import TARGET_BYTES, refits_towards
from tpvprune.repairs.gauss_newton import GaussNewton
from tpvprune.repairs.interpolation import mean_weights
from tpvprune.repairs.targets import plan_for
from tpvprune.repairs.views import Views, views_of
from tpvprune.repairs.walk import BlockFit, Walk

_FEWEST = 128  # inputs that a block sees however large it is
_LARGEST = 2e11  # MACs of a stage's forward for all of its inputs
_MORE_IN_GRADIENT = 8  # times the inputs of a product: a gradient is taken once in a linearisation
_MOST_WAITING = 1 << 30  # bytes of activations; beyond it running a block again costs less


def reconstruct_blocks(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    num_fits: int = 1,
    rounds: int = 2,
    iterations: int = 5,
    stage_iterations: int = 12,
    damping: float = 1e-3,
    num_views: int | None = None,
    max_positions: int = 1 << 18,
    max_macs: float = 1e10,
    rows_per_input: int = 12,
    min_rows: int = 16384,
    max_bytes: int = 2 << 30,
    seed: int = 0,
    used: dict[str, int] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    r"""Return a copy of the pruned model whose blocks are refitted to those of the dense one.

    For each block, in the order of execution,

    .. math:: \min_\theta \; E \| F_\theta(x) - y^* \|^2

    with x the inputs of the block in the (already repaired) pruned network, theta its weights and
    biases (each layer refitted first as by :func:`tpvprune.compensate_weights`), and y* the
    output of the dense block, kept channels only. Then the same for each stage, a module that
    holds several of the blocks (:func:`tpvprune.repairs.blocks.find_blocks`), and for each block
    outside of them, from where the blocks are; layers outside of blocks are refitted again.

    Args:
        pruned: ``remove_channels(dense, groups, kept)``, or a later stage of it.
        dense: The model it came from.
        batches: Re-iterable of unlabeled inputs.
        groups: Channel groups of ``dense``.
        kept: What stayed, as given to :func:`tpvprune.remove_channels`.
        num_fits: The batches are dealt to so many reconstructions, which take as long together as
            so many times one of that many images, and the mean of their weights is returned. One
            looks at no more than ``max_positions``, so that of thousands of images most are in
            vain; what is peculiar to the images of one averages out.
        rounds: Linearisations of every block, and of every stage.
        iterations: At most so many conjugate-gradient iterations for each of a block: those after
            which the error on held-back samples is least are taken.
        stage_iterations: Likewise of a stage; 0 leaves blocks as they are.
        damping: Relative to the mean diagonal of the Gauss-Newton matrix of each layer.
        num_views: Views of every image of a batch [B, C, H, W] that are shown: 1 itself, 2 its
            mirror image, too, more: parts of it besides, enlarged, which cost as much again in
            time and memory. None: 2 where some block can be fitted on all images and their mirror
            images, else 1. Inputs of other kinds are shown as they are.
        max_positions: Positions (pixels, tokens) of a block's output that an iteration of the
            conjugate gradients looks at, in as many inputs as have so many. The right-hand side
            that it solves for, and the error that decides when it ends, are those of eight times
            as many; a block with larger maps sees fewer inputs, others than its neighbours.
        max_macs: Likewise what a forward of the block may take for those inputs; but an iteration
            looks at 128. Of a stage each block may take as much; stages that take more than 2e11
            are left as their blocks are.
        rows_per_input: See :func:`tpvprune.compensate_weights`, which refits each layer first.
        min_rows: Likewise.
        max_bytes: Memory for the activations of waiting inputs, and as much again for graphs; what
            does not fit is computed anew, and the result stays. Targets take 2 GiB besides.
        seed: Of the random directions of the preconditioner.
        used: Filled with how many images each block was fitted on ("layers": the layers, all).
        progress: Called with ("reconstruction", done, total) after every block and every stage.

    Returns:
        The repaired copy. Layers outside of blocks, and in blocks that cannot be matched (see
        :func:`tpvprune.repairs.blocks.find_blocks`), are refitted as by ``compensate_weights``.

    Raises:
        ValueError: If there are more fits than batches.
    """
    told: dict[str, Any] = {
        "groups": groups, "kept": kept, "rounds": rounds, "iterations": iterations,
        "stage_iterations": stage_iterations, "damping": damping, "num_views": num_views,
        "max_positions": max_positions, "max_macs": max_macs, "rows_per_input": rows_per_input,
        "min_rows": min_rows, "max_bytes": max_bytes,
    }  # fmt: skip
    if num_processes() > 1:  # conjugate gradients would wait for each other at every step
        whole = gathered(unlabeled(batches))
        told |= {"num_fits": num_fits, "seed": seed, "used": used, "progress": progress}
        with alone():
            fitted = reconstruct_blocks(pruned, dense, whole, **told)
        spread_weights(fitted)
        return fitted
    inputs = list(unlabeled(batches))
    if not 1 <= num_fits <= len(inputs):
        raise ValueError(
            f"num_fits: expected 1 to {len(inputs)}, as many as there are batches, found {num_fits}"
        )
    fits, used = [], {} if used is None else used
    for i in range(num_fits):
        part, seen = inputs[i::num_fits], dict[str, int]()
        told |= {"seed": seed + i, "used": seen, "progress": _part_of(progress, i, num_fits)}
        fits.append(_reconstructed(pruned, dense, part, **told))
        used.update({name: used.get(name, 0) + num for name, num in seen.items()})
    return mean_weights(fits) if num_fits > 1 else fits[0]


def _part_of(progress: Progress | None, i: int, num: int) -> Progress | None:
    """Return what tells the progress of one of several runs as that of all."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(stage, i * total + done, num * total)


def _reconstructed(
    pruned: nn.Module,
    dense: nn.Module,
    inputs: list[Tensor],
    *,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    rounds: int,
    iterations: int,
    stage_iterations: int,
    damping: float,
    num_views: int | None,
    max_positions: int,
    max_macs: float,
    rows_per_input: int,
    min_rows: int,
    max_bytes: int,
    seed: int,
    used: dict[str, int],
    progress: Progress | None,
) -> nn.Module:
    """Reconstruct once; see :func:`reconstruct_blocks`."""
    repaired = copy.deepcopy(pruned)
    first = on_device(torch.cat([x[:2] for x in inputs[:2]])[:2], dense)
    with evaluating(dense, repaired), torch.no_grad():
        blocks, stages = find_blocks(dense, repaired, first, groups, kept)
    limits = _Limits(max_positions, max_macs)
    views = _views(dense, inputs, blocks, limits, num_views, seed=seed)
    copies, num = views.num_views, views.num_views * views.num_images
    stages = [s for s in stages if s.macs * limits.in_products(s, num) <= _LARGEST]
    plan = Plan(
        num, rows_per_input, min_rows, seed, num_views=copies, fewer=FEWER_ROWS,
        device=first.device,
    )  # fmt: skip
    plan = plan_for(plan, dense, first[:1], TARGET_BYTES)
    # The fit of a block sees the activations itself, and comes further from the linear fits.
    refits = partial(
        refits_towards, dense, plan=plan, groups=groups, kept=kept, linear=[b.name for b in blocks]
    )
    fast = first.ndim == 4 and takes_channels_last(dense, first)
    solver = GaussNewton(1, rounds, iterations, damping, max_positions, max_bytes, seed, fast)
    walks = [(blocks, solver, refits)]
    if stages and stage_iterations:
        inside = tuple(f"{stage.name}." for stage in stages)
        again = [*stages, *(b for b in blocks if not b.name.startswith(inside))]
        # What blocks have won stays; the layers before, between and behind them follow.
        then = partial(refits, without=[block.name for block in again])
        walks.append((again, replace(solver, iterations=stage_iterations), then))
    total = sum(len(found) for found, _, _ in walks)
    done = itertools.count(1)
    used["layers"] = views.num_images

    def note(block: Block, num_inputs: int) -> None:
        used[block.name] = num_inputs // copies
        if progress is not None:
            progress("reconstruction", next(done), total)

    with evaluating(dense, repaired), frozen(repaired), sdpa_kernel(SDPBackend.MATH):
        for found, how, run in walks:
            wanted = _wanted(found, views.num_images, copies, limits, seed=seed)
            targets = _dense_outputs(dense, found, views, wanted)
            fits = [
                _block_fit(b, wanted[b.name], limits.applied(how, b, wanted[b.name]), targets, note)
                for b in found
            ]
            Walk(
                repaired, run(views), views, min(max_bytes, _MOST_WAITING),
                blocks=fits,
            ).run()  # fmt: skip
    return repaired


def _block_fit(
    block: Block,
    wanted: Tensor,
    solver: GaussNewton,
    targets: dict[str, Tensor],
    note: Callable[[Block, int], None],
) -> BlockFit:
    """Return how a block is fitted to its target, which then goes; ``note`` is told of it."""

    def fit(module: nn.Module, call: BlockCall) -> None:
        solver.fit(module, replace(call, out=targets.pop(block.name)), block.depth)
        note(block, solver.num_inputs)

    return BlockFit(block.name, wanted, fit, block.batch_dim)


@dataclass(frozen=True)
class _Limits:
    """How many inputs a block is fitted on; see :func:`reconstruct_blocks`."""

    max_positions: int
    max_macs: float

    def in_products(self, block: Block, most: int) -> int:
        """Return how many inputs products with a Gauss-Newton matrix are of: 1 to ``most``."""
        by_macs = max(_FEWEST, int(self.max_macs * block.depth / max(block.macs, 1.0)))
        return max(1, min(most, self.max_positions // block.positions, by_macs))

    def in_gradients(self, block: Block, most: int = 1 << 48) -> int:
        """Return how many inputs a block sees in all."""
        return min(most, _MORE_IN_GRADIENT * self.in_products(block, most))

    def applied(self, solver: GaussNewton, block: Block, wanted: Tensor) -> GaussNewton:
        """Return the solver for a block that is fitted on the inputs ``wanted``."""
        num = int(wanted.sum())
        most = _MORE_IN_GRADIENT * self.max_positions
        products = self.in_products(block, num)
        return replace(solver, num_inputs=num, num_in_products=products, max_positions=most)


def _views(
    dense: nn.Module,
    inputs: Sequence[Tensor],
    blocks: Iterable[Block],
    limits: _Limits,
    num_views: int | None,
    *,
    seed: int,
) -> Views:
    """Return what the networks are shown, in chunks; see :func:`reconstruct_blocks`."""
    if num_views is None:
        many = 2 * sum(map(len, inputs))
        num_views = 2 if any(limits.in_gradients(block) >= many for block in blocks) else 1
    return views_of(inputs, chunk_size(dense, inputs), num_views, seed)


def _wanted(
    blocks: Sequence[Block], num: int, copies: int, limits: _Limits, *, seed: int
) -> dict[str, Tensor]:
    """Choose the inputs that each block is fitted on: others for each, all where there is room.

    Returns block -> BoolTensor [num * copies], all copies of an image together.
    """
    counts = {b.name: max(1, limits.in_gradients(b, copies * num) // copies) for b in blocks}
    taken = sum(counts[b.name] * copies * b.bytes_per_input for b in blocks)
    share = min(1.0, TARGET_BYTES / max(1, taken))
    wanted = {}
    for i, block in enumerate(blocks):
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed * 1009 + i))
        mask = torch.zeros(num, dtype=torch.bool)
        mask[order[: max(1, int(counts[block.name] * share))]] = True
        wanted[block.name] = mask.repeat_interleave(copies)
    return wanted


def _dense_outputs(
    dense: nn.Module,
    blocks: Sequence[Block],
    chunks: Iterable[Tensor],
    wanted: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return what the pruned blocks should give: the kept channels of the dense outputs."""
    found = {block.name: Samples(int(wanted[block.name].sum())) for block in blocks}
    own = slice(0, 0)

    def keep(block: Block, _: nn.Module, _args: Any, out: Tensor) -> None:
        mask = wanted[block.name][own]
        if bool(mask.any()):
            out = out.movedim(block.batch_dim, 0)
            chosen = block.kept_of(out[mask.repeat_interleave(len(out) // len(mask))])
            found[block.name].add(BlockCall((chosen,), {}, chosen), int(mask.sum()))

    with ExitStack() as hooks, torch.no_grad():
        for block in blocks:
            module = dense.get_submodule(block.name)
            hooks.enter_context(module.register_forward_hook(partial(keep, block)))
        for x in chunks:
            own = slice(own.stop, own.stop + len(x))
            dense(fast_layout(on_device(x, dense), dense))
    return {name: samples.call().args[0] for name, samples in found.items()}
