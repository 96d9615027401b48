"""Kronecker-factored preconditioner of a block's Gauss-Newton matrix.

For a layer with inputs a (in patch space, with a 1 for the intercept) and outputs s, the
Gauss-Newton matrix of its weights is close to E[a a^T] x E[g g^T], with g = J_s^T u for random
signs u at the block's output (Martens and Grosse 2015, section 3; KFC for convolutions, Grosse
and Martens 2016): two small matrices whose inverses are cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from tpvprune.passes.batch_norms import BatchNormCall
from tpvprune.passes.crossing import random_signs, sent
from tpvprune.passes.moments import in_single
from tpvprune.passes.operations import function_name
from tpvprune.passes.patches import count_positions, patches_of, window_of
from tpvprune.repairs.blocks import BlockCall
from tpvprune.repairs.branches import FITTED, arguments_first

_MOST_INPUTS = 128  # for the factors, which only speed up
_ROWS_PER_UNKNOWN = 8
_LARGEST_DOUBLE = 1024


@dataclass(frozen=True)
class FittedLayer:
    """One convolution or linear layer of a block: its weight, and the bias behind it.

    ``bias`` is its own, or that of the BatchNorm behind it, which then scales an intercept of the
    layer by ``scale`` [out].
    """

    weight: str
    bias: str | None
    scale: Tensor | None

    @property
    def names(self) -> list[str]:
        """Names of its parameters within the block."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def layers_in(module: nn.Module, call: BlockCall) -> list[FittedLayer]:
    """Return the layers of a block that run once in its forward."""
    names = {id(p): n for n, p in module.named_parameters()}
    with torch.no_grad(), _Calls(names) as calls:
        call.run(module)
    found = []
    for weight, seen in calls.seen.items():
        own, behind = seen[0].args[2], calls.norms.get(weight, (None, None))
        if len(seen) == 1:
            bias, scale = behind if own is None else (names.get(id(own)), None)
            found.append(FittedLayer(weight, bias, scale))
    biases = [layer.bias for layer in found]
    # A bias shared by two layers would be moved twice.
    return [layer for layer in found if layer.bias is None or biases.count(layer.bias) == 1]


@dataclass
class _Seen:
    """One call: its arguments, and its output, which may carry a graph."""

    args: Any
    kwargs: Any
    out: Tensor


class _Calls(TorchFunctionMode):
    """Notes the calls of the block's layers and the BatchNorms right behind them."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.seen: dict[str, list[_Seen]] = {}
        self.norms: dict[str, tuple[str, Tensor]] = {}
        self._outputs: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name == "batch_norm":
            self._note_norm(args, kwargs)
        out = func(*args, **kwargs)
        if name in FITTED:
            args, kwargs = arguments_first(args, kwargs)
            own = self._names.get(id(args[1]))
            if own is not None:
                self.seen.setdefault(own, []).append(_Seen(args, kwargs, out))
                self._outputs[id(out)] = own
        return out

    def _note_norm(self, args: Any, kwargs: Any) -> None:
        norm = BatchNormCall.of(args, kwargs)
        layer, bias = self._outputs.get(id(norm.input)), self._names.get(id(norm.bias))
        if layer is not None and bias is not None and norm.running_mean is not None:
            self.norms[layer] = (bias, norm.scale_and_shift()[0].detach())


@dataclass
class _Factor:
    """Inverses of the damped factors of one layer, [groups, n, n] each."""

    layer: FittedLayer
    inputs: Tensor
    outputs: Tensor
    ridge: float


class KroneckerFactors:
    """The preconditioner of one block at its present weights."""

    def __init__(self, factors: list[_Factor]) -> None:
        self._factors = factors
        self.ridge = {f.layer.bias: 0.0 for f in factors if f.layer.bias is not None}
        self.ridge |= {f.layer.weight: f.ridge for f in factors}

    @classmethod
    def measure(
        cls,
        module: nn.Module,
        layers: list[FittedLayer],
        data: list[BlockCall],
        damping: float,
        seed: int,
    ) -> KroneckerFactors:
        """Measure the factors on the first inputs of a block; ``seed``: of signs and positions."""
        generator = torch.Generator().manual_seed(seed)
        wanted = {layer.weight: layer for layer in layers}
        sums: dict[str, list[Any]] = {}
        looked, total = 0, sum(len(call.out) for call in data)
        for call in data:
            if looked >= _MOST_INPUTS:
                break
            looked += len(call.out)
            seen, out = _with_graph(module, list(wanted), call)
            signs = random_signs(out.shape, generator, out)
            outputs = [s.out for s in seen.values()]
            grads = torch.autograd.grad(out, outputs, signs, allow_unused=True)
            for (name, s), grad in zip(seen.items(), grads, strict=True):
                if grad is not None:
                    new = _moments(module.get_parameter(name), s, grad, generator)
                    sums[name] = list(map(add, sums[name], new)) if name in sums else new
        factors = [
            _invert(wanted[name], sum_a / rows, sum_g / count, count * total / looked, damping)
            for name, (sum_a, rows, sum_g, count) in sums.items()
        ]
        return cls(factors)

    def solve(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the preconditioned vector."""
        solved = {n: torch.zeros_like(t) for n, t in v.items()}
        for factor in self._factors:
            layer, weight = factor.layer, v[factor.layer.weight]
            groups, scale = len(factor.inputs), 1.0 if layer.scale is None else layer.scale
            x = weight.reshape(groups, len(weight) // groups, -1).double()
            if layer.bias is not None:
                bias = v[layer.bias].double() * scale
                x = torch.cat([x, bias.reshape(groups, -1, 1)], 2)
            x = factor.outputs @ x @ factor.inputs
            if layer.bias is not None:
                solved[layer.bias] = (x[..., -1].reshape(-1) * scale).to(weight)
                x = x[..., :-1]
            solved[layer.weight] = x.reshape(weight.shape).to(weight)
        return solved


def _with_graph(
    module: nn.Module, weights: list[str], call: BlockCall
) -> tuple[dict[str, _Seen], Tensor]:
    """Return (layer outputs, block output) of one run, joined by a graph."""
    leaves = {n: module.get_parameter(n).detach().requires_grad_() for n in weights}
    with torch.enable_grad(), _Calls({id(p): n for n, p in leaves.items()}) as calls:
        out = call.run(lambda *args, **kwargs: functional_call(module, leaves, args, kwargs))
    return {n: calls.seen[n][0] for n in weights}, out


def _moments(weight: Tensor, seen: _Seen, grad: Tensor, generator: torch.Generator) -> list[Any]:
    """Return sums over one part: a a^T, how many; g g^T, how many."""
    x, window = seen.args[0].detach(), window_of(seen.args, seen.kwargs)
    num = len(x)
    num_positions = count_positions(x, window, num)
    groups = 1 if window is None else x.shape[1] // weight.shape[1]
    rows = grad if window is None else grad.movedim(1, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    wanted = -(-_ROWS_PER_UNKNOWN * weight[0].numel() // num)
    per_input = min(num_positions, max(wanted, 64))
    noise = torch.rand(num, num_positions, generator=generator)
    positions = sent(noise.topk(per_input, 1).indices, x.device)
    patches = patches_of(x, window, positions, groups)
    patches = in_single(torch.cat([patches, torch.ones_like(patches[..., :1])], 2))
    g = in_single(rows).reshape(len(rows), groups, -1).transpose(0, 1)
    return [
        (patches.transpose(1, 2) @ patches).double(),
        patches.shape[1],
        (g.transpose(1, 2) @ g).double(),
        g.shape[1],
    ]


def _invert(
    layer: FittedLayer, inputs: Tensor, outputs: Tensor, count: float, damping: float
) -> _Factor:
    """Return the inverses; the ridge is that of count * (inputs x outputs)."""
    if layer.bias is None:
        inputs = inputs[:, :-1, :-1]
    size_a = float(inputs.diagonal(dim1=1, dim2=2).mean())
    size_g = float(outputs.diagonal(dim1=1, dim2=2).mean())
    inverse_a = _inverse(inputs, damping * size_a)
    inverse_g = _inverse(outputs, damping * size_g)
    return _Factor(layer, inverse_a / count, inverse_g, damping * size_a * size_g * count)


def _inverse(matrix: Tensor, ridge: float) -> Tensor:
    if matrix.shape[-1] > _LARGEST_DOUBLE:
        matrix = matrix.float()  # it only speeds up; this halves the time of wide layers
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, _ = torch.linalg.cholesky_ex(matrix + max(ridge, 1e-30) * eye)
    return torch.cholesky_inverse(factor).double()
