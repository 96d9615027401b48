"""Repair 2: refit whole blocks to the dense network by damped Gauss-Newton, block after block.

Refitting one layer at a time (:mod:`tpvprune.compensation`) keeps each hidden channel what it
was. Letting all layers of a block move together, so that its *output* is that of the dense block,
lets the channels that stay take on new roles. That is a nonlinear least-squares problem over one
block at a time; Gauss-Newton turns it into a few linear ones, each solved by conjugate gradients
with products J v and J^T u and a Kronecker-factored preconditioner. A step counts only if it also
lowers the error on samples that it was not fitted to. No label is read, and no loss over the
network's outputs is descended.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from tpvprune.batches import unlabeled
from tpvprune.blocks import Block, BlockCall, find_blocks, on_call
from tpvprune.branches import Plan
from tpvprune.clock import Progress
from tpvprune.compensation import RefitRun, first_inputs, refit_run
from tpvprune.distributed import gathered, spread_weights
from tpvprune.groups import ChannelGroups
from tpvprune.membership import alone, num_processes
from tpvprune.preconditioner import KroneckerFactors, layers_in
from tpvprune.running import (
    evaluating,
    fast_layout,
    frozen,
    on_device,
    prepare_forward_mode,
    takes_channels_last,
)
from tpvprune.targets import within_memory

_FEWEST_PARTS = 10  # the last tenth is held back
_BATCH = 128
_EQUAL = 1e-10  # of ||y*||^2: what single precision leaves of two equal blocks

Params = dict[str, Tensor]


def reconstruct_blocks(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    rounds: int = 2,
    iterations: int = 5,
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
    output of the dense block, kept channels only.

    Args:
        pruned: ``remove_channels(dense, groups, kept)``, or a later stage of it.
        dense: The model it came from.
        batches: Re-iterable of unlabeled inputs.
        groups: Channel groups of ``dense``.
        kept: What stayed, as given to :func:`tpvprune.remove_channels`.
        rounds: Linearisations of every block.
        iterations: Conjugate-gradient iterations for each.
        damping: Relative to the mean diagonal of the Gauss-Newton matrix of each layer.
        mirror: Show image batches [B, C, H, W] also mirrored left to right.
        max_positions: Positions (pixels, tokens) of a block's output that are matched: blocks
            with large maps look at fewer inputs.
        rows_per_input: See :func:`tpvprune.compensate_weights`, which refits each layer first.
        min_rows: Likewise.
        max_bytes: Memory for activations and targets; the first inputs that fit are used.
        seed: Of the random directions of the preconditioner.
        progress: Called with ("reconstruction", done, total) after every block.

    Returns:
        The repaired copy. Layers outside of blocks, and in blocks that cannot be matched (see
        :func:`tpvprune.blocks.find_blocks`), are refitted as by ``compensate_weights``.
    """
    if num_processes() > 1:  # conjugate gradients would wait for each other at every step
        whole = gathered(unlabeled(batches))
        with alone():
            fitted = reconstruct_blocks(
                pruned, dense, whole, groups=groups, kept=kept, rounds=rounds,
                iterations=iterations, damping=damping, mirror=mirror,
                max_positions=max_positions, rows_per_input=rows_per_input, min_rows=min_rows,
                max_bytes=max_bytes, seed=seed, progress=progress,
            )  # fmt: skip
        spread_weights(fitted)
        return fitted
    repaired = copy.deepcopy(pruned)
    source = unlabeled(batches)
    first = on_device(next(iter(source))[:2], dense)
    with evaluating(dense, repaired), torch.no_grad():
        blocks = find_blocks(dense, repaired, first, groups, kept)
    # Half of the memory for the activations of one layer, half for the targets of all blocks; as
    # much as those for the targets of all layers.
    chosen = first_inputs(_mirrored(source) if mirror else source, dense, max_bytes // 2)
    room = max(1, max_bytes // 2 // sum((b.bytes_per_input for b in blocks), 1))
    x = fast_layout(on_device(torch.cat(chosen)[:room], dense), dense)
    plan = within_memory(Plan(len(x), rows_per_input, min_rows, seed), dense, x[:1], max_bytes // 2)
    run = refit_run(repaired, dense, x.split(_BATCH), groups=groups, kept=kept, plan=plan)
    fast = x.ndim == 4 and takes_channels_last(dense, x)
    solver = _Solver(len(x), rounds, iterations, damping, max_positions, seed, fast, progress)
    with evaluating(dense, repaired), frozen(repaired), sdpa_kernel(SDPBackend.MATH):
        targets = _dense_outputs(dense, blocks, x)
        _walk(repaired, targets, on_device(x, repaired), run, solver)
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
    targets: dict[str, Tensor],
    x: Tensor,
    run: RefitRun,
    solver: _Solver,
) -> None:
    """Run the pruned network once on all inputs; layers and blocks are refitted in their turn."""
    total = len(targets)
    handles: dict[str, list[RemovableHandle]] = {}

    def refit(module: nn.Module, call: BlockCall | None, name: str) -> Tensor:
        assert call is not None
        for handle in handles[name]:
            handle.remove()
        with run.paused():
            with torch.enable_grad():
                solver.fit(module, replace(call, out=targets.pop(name)))
            if solver.progress is not None:
                solver.progress("reconstruction", total - len(targets), total)
            return torch.cat([module(*c.args, **c.kwargs) for c in solver.chunks(call)])

    for name in targets:
        handles[name] = on_call(model.get_submodule(name), partial(refit, name=name))
    with torch.no_grad(), run:
        model(x)


# ---- one block ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Solver:
    """Damped Gauss-Newton for one block after the other."""

    num_inputs: int
    rounds: int
    iterations: int
    damping: float
    max_positions: int
    seed: int
    fast: bool = False  # in channels-last memory
    progress: Progress | None = None

    def chunks(self, call: BlockCall) -> list[BlockCall]:
        """Return the call in parts of a few samples."""
        per_input = max(1, call.out.numel() // self.num_inputs * call.out.element_size())
        num = -(-self.num_inputs // max(1, min(64, (1 << 24) // per_input)))
        num = min(self.num_inputs, max(num, _FEWEST_PARTS))
        cuts = [round(i * self.num_inputs / num) / self.num_inputs for i in range(num + 1)]
        return [call.part(a, b) for a, b in pairwise(cuts)]

    def fit(self, module: nn.Module, call: BlockCall) -> None:
        """Move the weights of a block so that it gives ``call.out``."""
        data = self._enough(self.chunks(call))
        data = [_channels_last(c) for c in data] if self.fast else data
        data, held = data[: -len(data) // 10], data[-len(data) // 10 :]
        if not data:
            return
        layers = layers_in(module, data[0])
        if not layers:
            return
        params = {n: module.get_parameter(n).detach() for layer in layers for n in layer.names}
        params = {n: _fast(p) for n, p in params.items()} if self.fast else params
        loss = _loss(module, params, held)
        size = sum(float(c.out.square().sum(dtype=torch.float64)) for c in held)
        for _ in range(self.rounds):
            if loss <= _EQUAL * size:
                break
            factors = KroneckerFactors.measure(module, layers, data, self.damping, self.seed)
            step = self._step(module, params, data, factors)
            new = _line_search(module, params, step, held, loss)
            if new is None:
                break
            params, loss = new
            with torch.no_grad():
                for name, value in params.items():
                    module.get_parameter(name).copy_(value)

    def _enough(self, parts: list[BlockCall]) -> list[BlockCall]:
        """Return parts spread over all inputs: large maps need fewer inputs."""
        positions = sum(c.out.numel() // c.out.shape[1 if c.out.ndim == 4 else -1] for c in parts)
        every = max(1.0, positions / self.max_positions)
        return [parts[int(i * every)] for i in range(max(1, int(len(parts) / every)))]

    def _step(
        self, module: nn.Module, params: Params, data: list[BlockCall], factors: KroneckerFactors
    ) -> Params:
        """Return d of (J^T J + damping) d = J^T (target - F), by conjugate gradients."""
        jacobian = _Linearised(module, params, data)
        residual = jacobian.pull_back()
        step = {n: torch.zeros_like(p) for n, p in params.items()}
        z = factors.solve(residual)
        direction, rho = z, _dot(residual, z)
        for _ in range(self.iterations):
            if not rho > 0:
                break
            product = jacobian.gauss_newton(direction)
            product = {n: p + factors.ridge[n] * direction[n] for n, p in product.items()}
            length = rho / _dot(direction, product)
            step = {n: s + length * direction[n] for n, s in step.items()}
            residual = {n: r - length * product[n] for n, r in residual.items()}
            z = factors.solve(residual)
            rho, last = _dot(residual, z), rho
            direction = {n: z[n] + rho / last * d for n, d in direction.items()}
        return step


def _fast(value: Any) -> Any:
    """Return a feature map or kernel in the layout in which convolutions run fastest."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return value
    return value.contiguous(memory_format=torch.channels_last)


def _channels_last(call: BlockCall) -> BlockCall:
    kwargs = {k: _fast(v) for k, v in call.kwargs.items()}
    return BlockCall(tuple(map(_fast, call.args)), kwargs, _fast(call.out))


def _line_search(
    module: nn.Module, params: Params, step: Params, data: list[BlockCall], loss: float
) -> tuple[Params, float] | None:
    """Return the first of step, step / 2, step / 4 that lowers the loss on held-back samples."""
    for share in (1.0, 0.5, 0.25):
        moved = {n: p + share * step[n] for n, p in params.items()}
        new = _loss(module, moved, data)
        if math.isfinite(new) and new < loss:
            return moved, new
    return None


def _loss(module: nn.Module, params: Params, data: list[BlockCall]) -> float:
    with torch.no_grad():
        errors = (_run(module, c, params) - c.out for c in data)
        return sum(float(e.square().sum(dtype=torch.float64)) for e in errors)


@dataclass
class _Linearised:
    """A block at its present weights: products with its Jacobian and the transpose of it.

    The graph of every chunk is kept for all iterations of one round.
    """

    module: nn.Module
    params: Params
    data: list[BlockCall]

    def __post_init__(self) -> None:
        self._leaves = {n: p.detach().requires_grad_() for n, p in self.params.items()}
        self._outputs = [_run(self.module, c, self._leaves) for c in self.data]

    def pull_back(self) -> Params:
        """Return J^T (target - F), summed over all samples."""
        pairs = zip(self._outputs, self.data, strict=True)
        return self._transposed([call.out - out.detach() for out, call in pairs])

    def gauss_newton(self, v: Params) -> Params:
        """Return J^T J v, summed over all samples."""
        changes = []
        prepare_forward_mode()
        with torch.no_grad():
            for call in self.data:
                run = partial(_run, self.module, call)
                changes.append(jvp(run, (self.params,), (v,))[1])
        return self._transposed(changes)

    def _transposed(self, directions: list[Tensor]) -> Params:
        total = {n: torch.zeros_like(p) for n, p in self.params.items()}
        leaves = list(self._leaves.values())
        for out, u in zip(self._outputs, directions, strict=True):
            grads = torch.autograd.grad(out, leaves, u, retain_graph=True, allow_unused=True)
            for name, grad in zip(total, grads, strict=True):
                if grad is not None:
                    total[name] += grad
        return total


def _run(module: nn.Module, call: BlockCall, params: Params) -> Tensor:
    out: Tensor = functional_call(module, params, call.args, call.kwargs)
    return out


def _dot(a: Params, b: Params) -> float:
    return sum(float((a[n].double() * b[n].double()).sum()) for n in a)
