"""Run a dense model as if channels had been removed, its shapes as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpvprune.groups.records import ChannelGroups
from tpvprune.passes.operations import CONTRACTIONS, MATMULS, MIXERS, NORMS, function_name


class MaskedChannels(TorchFunctionMode):
    """Run a dense model as if channels had been removed: zero them where they are read.

    LayerNorm-like calls over labelled channels are restricted to the kept ones, which is what
    removal does to them. Use as ``with MaskedChannels(groups, kept): model(x)``.
    """

    def __init__(self, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._gone: dict[int, tuple[int, list[Tensor]]] = {}
        for group in groups:
            for r in group.readers if group.name in kept else ():
                gone = r.index[~kept[group.name].cpu()[r.channel]]
                self._gone.setdefault(r.call, (r.channel_dim, []))[1].append(gone)
        self._norms = {i: m for i, a in groups.norms.items() if not (m := a.kept(kept)).all()}
        self._mixers = {
            i: found
            for i, noted in groups.mixers.items()
            if (found := [(d, m) for d, a in noted if not (m := a.kept(kept)).all()])
        }
        self._calls = self._num_norms = self._num_mixers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in CONTRACTIONS:
            call, self._calls = self._calls, self._calls + 1
            if call in self._gone:
                dim, parts = self._gone[call]
                gone = torch.cat(parts).to(args[0].device)
                args = (args[0].index_fill(dim, gone, 0), *args[1:])
        elif name in NORMS:
            call, self._num_norms = self._num_norms, self._num_norms + 1
            if call in self._norms:
                return _restricted_norm(func, self._norms[call], args, kwargs)
        elif name in MIXERS:
            call, self._num_mixers = self._num_mixers, self._num_mixers + 1
            if call in self._mixers:
                return _restricted_mixer(name, func, self._mixers[call], args, kwargs)
        return func(*args, **kwargs)


def _restricted_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Return the norm over the kept channels only; the others come out as zeros."""
    x, _, *rest = args
    mask = mask.to(x.device)

    def part(v: Any) -> Any:
        return v[mask] if isinstance(v, Tensor) else v

    kwargs = {k: part(v) for k, v in kwargs.items() if k != "normalized_shape"}
    out = torch.zeros_like(x)
    out[..., mask] = func(x[..., mask], [int(mask.sum())], *[part(r) for r in rest], **kwargs)
    return out


def _restricted_mixer(
    name: str, func: Any, parts: list[tuple[int, Tensor]], args: Any, kwargs: Any
) -> Any:
    """Return a mean, softmax, group norm or matrix product of the kept channels only."""
    if name in MATMULS:
        place = 1 if name == "einsum" else 0
        x = args[place]
        for dim, mask in parts:
            x = x.index_fill(dim, (~mask).nonzero().squeeze(1).to(x.device), 0)
        return func(*args[:place], x, *args[place + 1 :], **kwargs)
    x, *rest = args
    kept = [(dim, mask.nonzero().squeeze(1).to(x.device), len(mask)) for dim, mask in parts]
    for dim, index, _ in kept:
        x = x.index_select(dim, index)
        if name == "group_norm":
            rest = [r[index] if isinstance(r, Tensor) else r for r in rest]
            kwargs = {k: v[index] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    out = func(x, *rest, **kwargs)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        return out
    for dim, index, size in reversed(kept):
        shape = list(out.shape)
        shape[dim] = size
        out = out.new_zeros(shape).index_copy(dim, index, out)
    return out
