"""Rescaling that a ReLU network does not feel: channels up by alpha, their readers down by it.

A measure of the weights that this changes cannot, by itself, say anything of the function.

Reference:
    Dinh, Pascanu, Bengio, Bengio, Sharp minima can generalize for deep nets, ICML 2017,
    section 4, https://arxiv.org/abs/1703.04933
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.diagnostics.folding import Contraction, layers_of
from tpvprune.groups import ChannelGroup, ChannelGroups, ParamSlice
from tpvprune.passes.running import relative_gap

_TOLERANCE = 1e-9  # relative, float64; factors are powers of two, which round nothing
_LOUD = 64.0  # inputs so many times larger find activations that level off, such as ReLU6
_Pairs = list[tuple[ChannelGroup, Tensor]]


@dataclass(frozen=True)
class Rescaling:
    """A model with other weights and the same function.

    Attributes:
        model: The rescaled copy.
        factors: Group name -> alpha [C] of its channels, powers of two.
        left: Group name -> why its channels were not rescaled.
    """

    model: nn.Module
    factors: Mapping[str, Tensor]
    left: Mapping[str, str]


def rescale(
    model: nn.Module,
    groups: ChannelGroups,
    example_inputs: Tensor,
    *,
    per: Literal["channel", "layer"] = "channel",
    octaves: int = 2,
    seed: int = 0,
) -> Rescaling:
    """Multiply channels where they are written and divide them where they are read.

    Where a BatchNorm follows the writing layer, its weight and bias are multiplied. Factors are
    powers of two, so outputs stay the same bit for bit wherever nothing between writer and
    reader mixes channels; each group is tried in float64, also on inputs 64 times as large, and
    left alone if the outputs move.

    Args:
        model: The network; left as it is.
        groups: Its channel groups.
        example_inputs: One batch [B, ...] to verify on.
        per: ``"channel"``: each its own factor; ``"layer"``: one for all channels of a group.
        octaves: alpha lies between 2^-octaves and 2^octaves, >= 1.
        seed: Of the factors.

    Returns:
        The rescaled copy, with what was and what could not be rescaled.

    Raises:
        ValueError: If an argument is out of range.
    """
    if per not in {"channel", "layer"}:
        raise ValueError(f"per: expected 'channel' or 'layer', found {per!r}")
    if octaves < 1:
        raise ValueError(f"octaves: expected at least 1, found {octaves}")
    generator = torch.Generator().manual_seed(seed)
    normed = layers_of(model, example_inputs)
    passes = _trial(model, example_inputs, normed)
    factors, left = {}, {}
    for group in groups:
        alpha = _drawn(group, per, octaves, generator)
        if group.unit != "channel":
            left[group.name] = f"its units are {group.unit}s"
        elif not passes([(group, alpha)]):
            left[group.name] = "its channels do not pass positive factors on"
        else:
            factors[group.name] = alpha
    pairs = [(groups[name], alpha) for name, alpha in factors.items()]
    if not passes(pairs):
        pairs = _together(pairs, passes)
    together = {group.name: alpha for group, alpha in pairs}
    left |= {n: "passes alone, not with the others" for n in factors if n not in together}
    rescaled = copy.deepcopy(model)
    for group, alpha in pairs:
        _scale(rescaled, group, alpha, normed)
    return Rescaling(rescaled, together, left)


@torch.no_grad()
def _trial(
    model: nn.Module, example_inputs: Tensor, normed: Mapping[str, str | None]
) -> Callable[[_Pairs], bool]:
    """Return what tells whether rescaled groups leave the outputs as they are."""
    tried = copy.deepcopy(model).eval().cpu().double()
    x = example_inputs[:4].detach().cpu().double()
    inputs = torch.cat([x, _LOUD * x])
    wanted = tried(inputs)

    @torch.no_grad()
    def passes(pairs: _Pairs) -> bool:
        try:
            for group, alpha in pairs:
                _scale(tried, group, alpha, normed)
            found = tried(inputs)
        finally:
            for group, alpha in pairs:
                _scale(tried, group, 1 / alpha, normed)
        return bool(relative_gap(found, wanted) <= _TOLERANCE)

    return passes


def _together(pairs: _Pairs, passes: Callable[[_Pairs], bool]) -> _Pairs:
    """Return those, one after the other, that pass with all before them."""
    accepted: _Pairs = []
    for pair in pairs:
        if passes([*accepted, pair]):
            accepted.append(pair)
    return accepted


@torch.no_grad()
def _scale(
    model: nn.Module, group: ChannelGroup, alpha: Tensor, normed: Mapping[str, str | None]
) -> None:
    """Rescale one group in place."""
    modules = dict(model.named_modules())
    norms = {norm for norm in normed.values() if norm is not None}
    for part in group.slices:
        owner, _, kind = part.param.rpartition(".")
        power = _power(modules[owner], kind, part, owner in norms, normed.get(owner) is not None)
        if power == 0 or getattr(modules[owner], kind) is None:
            continue
        tensor = getattr(modules[owner], kind).movedim(part.dim, 0)
        index = part.index.to(tensor.device)
        factor = alpha.to(tensor)[part.channel.to(tensor.device)] ** power
        tensor[index] = tensor[index] * factor.reshape(-1, *[1] * (tensor.ndim - 1))


def _power(module: Any, kind: str, part: ParamSlice, writes_for_layer: bool, followed: bool) -> int:
    """Return 1, 0 or -1: how a slice follows its channels' factor."""
    if part.side == "consumer":
        return -1
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return int(writes_for_layer and kind in {"weight", "bias"})
    if not isinstance(module, Contraction):
        return 0
    passes_on = getattr(module, "groups", 1) > 1
    if followed:
        # The BatchNorm behind sets the scale; a depthwise layer undoes that of its input first.
        return -1 if passes_on and kind == "weight" else 0
    return int(kind == "bias") if passes_on else 1


def _drawn(group: ChannelGroup, per: str, octaves: int, generator: torch.Generator) -> Tensor:
    num = group.num_channels if per == "channel" else 1
    steps = torch.randint(1, octaves + 1, (num,), generator=generator)
    signs = torch.randint(0, 2, (num,), generator=generator) * 2 - 1
    return torch.pow(2.0, (steps * signs).double()).expand(group.num_channels).clone()
