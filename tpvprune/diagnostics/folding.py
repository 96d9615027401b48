"""Which BatchNorm belongs to which layer, and a copy of the model without any."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.running import evaluating, on_device, relative_gap

Contraction = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TOLERANCE = 1e-8  # relative, float64: folding only reorders products


@torch.no_grad()
def layers_of(model: nn.Module, example_inputs: Tensor) -> dict[str, str | None]:
    """Return the convolutions and linear layers that one forward calls, in that order.

    Name -> the BatchNorm that alone reads its output, if any.
    """
    order: dict[str, None] = {}
    written: dict[int, tuple[str, Any]] = {}  # with the outputs: no identity is given out twice
    pairs: dict[str, str] = {}

    def wrote(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        order[name] = None
        written[id(output)] = name, output

    def reads(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in written:
            pairs[written[id(args[0])][0]] = name

    with ExitStack() as hooks, evaluating(model):
        for name, module in model.named_modules():
            if isinstance(module, Contraction):
                hooks.callback(module.register_forward_hook(partial(wrote, name)).remove)
            elif _is_fixed_norm(module):
                hooks.callback(module.register_forward_pre_hook(partial(reads, name)).remove)
        model(on_device(example_inputs, model))
    return {name: pairs.get(name) for name in order}


@torch.no_grad()
def folded(model: nn.Module, example_inputs: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a float64 copy whose BatchNorms are folded into the layers before, and these in order.

    A measure of the weights means something only where nothing behind a layer undoes its scale. A
    BatchNorm that no layer writes for keeps its place; its statistics go into its weight and bias.
    ValueError if the copy gives other outputs, as with standardised weights.
    """
    layers = layers_of(model, example_inputs)
    # On the CPU: not every accelerator computes in float64.
    private = copy.deepcopy(model).eval().cpu().double()
    x = on_device(example_inputs, private)
    wanted = private(x)
    modules = dict(private.named_modules())
    for module in filter(_is_fixed_norm, modules.values()):
        _make_affine(module)
    for name, norm in layers.items():
        if norm is not None:
            _fold(modules[name], modules[norm])
    gap = relative_gap(private(x), wanted)
    if not bool(gap <= _TOLERANCE):
        raise ValueError(
            f"folding BatchNorm: expected the same outputs, found them apart by {float(gap):.1e} "
            "(relative): this measure needs plain convolutions and linear layers"
        )
    return private, tuple(layers)


def _is_fixed_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def _make_affine(norm: Any) -> None:
    """Put all that a BatchNorm does into its weight and bias."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    norm.bias = nn.Parameter(shift if norm.bias is None else shift + norm.bias)
    norm.weight = nn.Parameter(scale)
    norm.eps = 0.0
    norm.running_mean.zero_()
    norm.running_var.fill_(1)


def _fold(layer: Any, norm: Any) -> None:
    scale = norm.weight.reshape(-1, *[1] * (layer.weight.ndim - 1))
    bias = norm.bias if layer.bias is None else norm.bias + norm.weight * layer.bias
    layer.weight.copy_(layer.weight * scale)
    layer.bias = nn.Parameter(bias.clone())
    norm.weight.fill_(1)
    norm.bias.zero_()
