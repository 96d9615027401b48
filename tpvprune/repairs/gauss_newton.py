"""Damped Gauss-Newton for one block of layers: a nonlinear least-squares fit to given outputs.

Each linearisation is solved by conjugate gradients with products J^T u (reverse mode) and J v, and
a Kronecker-factored preconditioner. J v is a central difference, which takes two forwards (Knoll
and Keyes 2004, Jacobian-free Newton-Krylov methods). A tenth of the samples takes no part in the
fit: of the points that conjugate gradients pass through, that with the least error on those
samples is taken, which is early stopping as a regulariser (Hansen 1998, Rank-Deficient and
Discrete Ill-Posed Problems, chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from tpvprune.passes.batch_norms import affine_norms
from tpvprune.passes.crossing import fetched
from tpvprune.repairs.blocks import BlockCall
from tpvprune.repairs.preconditioner import KroneckerFactors, layers_in

Params = dict[str, Tensor]

_FEWEST_PARTS = 10  # the last tenth is held back
_PART_BYTES = 1 << 24  # of the outputs of one part
_EQUAL = 1e-10  # of ||y*||^2: what single precision leaves of two equal blocks


@dataclass(frozen=True)
class GaussNewton:
    """How blocks are fitted; see :func:`tpvprune.repairs.reconstruction.reconstruct_blocks`.

    ``num_inputs`` are those of the network; a block may see several samples of each.
    ``max_positions`` of the output are matched, ``max_bytes`` hold the graphs of all samples.
    ``fast``: feature maps run fastest in channels-last memory. About ``num_in_products`` of the
    inputs (None: all) are looked at for a product with the Gauss-Newton matrix, of which each
    iteration takes one; the gradient, of which each round takes one, is always that of all.
    """

    num_inputs: int
    rounds: int
    iterations: int
    damping: float
    max_positions: int
    max_bytes: int
    seed: int
    fast: bool = False
    num_in_products: int | None = None

    def parts(self, call: BlockCall, depth: int = 1) -> list[BlockCall]:
        """Return the call in parts of a few samples, fewer of a block that holds ``depth``."""
        per_input = max(1, call.out.numel() // self.num_inputs * call.out.element_size())
        most = max(1, min(64, _PART_BYTES // (per_input * depth)))
        num = min(self.num_inputs, max(-(-self.num_inputs // most), _FEWEST_PARTS))
        cuts = [round(i * self.num_inputs / num) / self.num_inputs for i in range(num + 1)]
        return [call.part(a, b) for a, b in pairwise(cuts)]

    def fit(self, module: nn.Module, call: BlockCall, depth: int = 1) -> None:
        """Move the weights of a block in eval mode, which holds ``depth``, to give ``call.out``."""
        data = self._enough(self.parts(call, depth))
        data = [c.changed(_fast, _fast(c.out)) for c in data] if self.fast else data
        data, held = data[: -len(data) // 10], data[-len(data) // 10 :]
        layers = layers_in(module, data[0]) if data else []
        if not layers:
            return
        params = {n: module.get_parameter(n).detach() for layer in layers for n in layer.names}
        params = {n: _fast(p) for n, p in params.items()} if self.fast else params
        loss = loss_of(module, params, held)
        size = sum(_numbers(c.out.square().sum(dtype=torch.float64) for c in held))
        for _ in range(self.rounds):
            if loss <= _EQUAL * size:
                break
            factors = KroneckerFactors.measure(module, layers, data, self.damping, self.seed)
            best = None
            for moved in _path(params, self.steps(module, params, data, factors)):
                new = loss_of(module, moved, held)
                if math.isfinite(new) and new < loss:
                    best, loss = moved, new
            if best is None:
                break
            params = best
            with torch.no_grad():
                for name, value in params.items():
                    module.get_parameter(name).copy_(value)

    def _enough(self, parts: list[BlockCall]) -> list[BlockCall]:
        """Return parts spread over all inputs: large maps need fewer inputs."""
        positions = sum(c.out.numel() // c.out.shape[1 if c.out.ndim == 4 else -1] for c in parts)
        return [parts[i] for i in _spread(len(parts), self.max_positions / positions)]

    def steps(
        self, module: nn.Module, params: Params, data: list[BlockCall], factors: KroneckerFactors
    ) -> Iterator[Params]:
        """Solve (J^T J + damping) d = J^T (target - F) by conjugate gradients.

        ``params``: the weights at which the block is linearised. Yields d after every iteration.
        """
        share = 1.0 if self.num_in_products is None else self.num_in_products / self.num_inputs
        few = _spread(len(data), share)
        jacobian = Linearised(module, params, data, self.max_bytes, few)
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
            yield step
            residual = {n: r - length * product[n] for n, r in residual.items()}
            z = factors.solve(residual)
            rho, last = _dot(residual, z), rho
            direction = {n: z[n] + rho / last * d for n, d in direction.items()}


class Linearised:
    """A block at its present weights: products with its Jacobian and the transpose of it.

    ``data`` are calls of a part of the samples each, whose graphs are kept while they fit into
    ``max_bytes``; products with the Gauss-Newton matrix are made of the parts ``few`` (None: all).
    """

    def __init__(
        self,
        module: nn.Module,
        params: Params,
        data: list[BlockCall],
        max_bytes: int = 4 << 30,
        few: Sequence[int] | None = None,
    ) -> None:
        self._module, self._params, self._data = module, params, data
        self._few = range(len(data)) if few is None else few
        self._leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        room = max_bytes // max(1, _graph_bytes(partial(self._run, data[0])))
        self._kept = {i: self._run(data[i]) for i in self._few[:room]}

    def pull_back(self) -> Params:
        """Return J^T (target - F), summed over all samples."""
        every = range(len(self._data))
        return self._transposed(every, lambda i, out: self._data[i].out - out.detach())

    def gauss_newton(self, v: Params) -> Params:
        """Return J^T J v, summed over all samples: that of ``few``, scaled to the number of all."""
        size = self._step(v)
        ahead = {n: p + size * v[n] for n, p in self._params.items()}
        behind = {n: p - size * v[n] for n, p in self._params.items()}

        def changed(i: int, _: Tensor) -> Tensor:
            with torch.no_grad():
                to, back = (_run(self._module, self._data[i], p) for p in (ahead, behind))
                return (to - back) / (2 * size)

        nums = [len(call.out) for call in self._data]
        share = sum(nums[i] for i in self._few) / sum(nums)
        return {n: p / share for n, p in self._transposed(self._few, changed).items()}

    def _step(self, v: Params) -> float:
        """Return how far along v to go: no weight tensor is changed by more than a small part."""
        sizes, moves = (_numbers(t[n].norm() for n in self._params) for t in (self._params, v))
        found = zip(self._params.values(), sizes, moves, strict=True)
        parts = [move / size for p, size, move in found if size and p.ndim > 1]
        small = max(torch.finfo(p.dtype).eps for p in self._params.values()) ** 0.4
        return small / max([p for p in parts if p > 0], default=1.0)

    def _run(self, call: BlockCall) -> Tensor:
        return _run(self._module, call, self._leaves)

    def _transposed(
        self, parts: Iterable[int], direction: Callable[[int, Tensor], Tensor]
    ) -> Params:
        """Return the sum over parts of J^T u, u = ``direction(number of the part, its output)``."""
        total = {n: torch.zeros_like(p) for n, p in self._params.items()}
        leaves = list(self._leaves.values())
        for i in parts:
            kept = self._kept.get(i)
            out = self._run(self._data[i]) if kept is None else kept
            u = direction(i, out)
            grads = torch.autograd.grad(
                out, leaves, u, retain_graph=kept is not None, allow_unused=True
            )
            for name, grad in zip(total, grads, strict=True):
                if grad is not None:
                    total[name] += grad
        return total


def _spread(num: int, share: float) -> list[int]:
    """Return about a share of the numbers below ``num``, at least one, at even distances."""
    every = max(1.0, 1 / share)
    return [int(i * every) for i in range(max(1, int(num / every)))]


def loss_of(module: nn.Module, params: Params, data: list[BlockCall]) -> float:
    """Return the squared error of a block with other weights, summed over all samples."""
    with torch.no_grad():
        errors = (_run(module, c, params) - c.out for c in data)
        return sum(_numbers(e.square().sum(dtype=torch.float64) for e in errors))


def _path(params: Params, steps: Iterator[Params]) -> Iterator[Params]:
    """Yield the weights after every step, then those after a half and a quarter of the last."""
    step: Params | None = None
    for step in steps:
        yield {n: p + step[n] for n, p in params.items()}
    if step is not None:
        for share in (0.5, 0.25):
            yield {n: p + share * step[n] for n, p in params.items()}


def _graph_bytes(run: Callable[[], Tensor]) -> int:
    """Return what autograd holds for the backward of ``run()``."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        held[tensor.data_ptr()] = max(tensor.nbytes, held.get(tensor.data_ptr(), 0))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()  # until here, so that no memory is freed and used again
    del out
    return sum(held.values())


def _fast(value: Any) -> Any:
    """Return a feature map or kernel in the layout in which convolutions run fastest."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return value
    return value.contiguous(memory_format=torch.channels_last)


def _run(module: nn.Module, call: BlockCall, params: Params) -> Tensor:
    with affine_norms():
        return call.run(lambda *args, **kwargs: functional_call(module, params, args, kwargs))


def _dot(a: Params, b: Params) -> float:
    return sum(_numbers((a[n].double() * b[n].double()).sum() for n in a))


def _numbers(scalars: Iterable[Tensor]) -> list[float]:
    """Return what the host wants to know, after one wait for all."""
    return [float(number) for number in fetched(*scalars)]
