"""Watch, and replace, what convolution and linear layers read during one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpvprune.passes.operations import CONTRACTIONS, function_name


class Observer(TorchFunctionMode):
    """Show the inputs of the given convolution and linear calls to ``see``; it may replace them."""

    def __init__(
        self, calls: set[int], see: Callable[[int, Tensor], Tensor | None], *, start: int = 0
    ) -> None:
        super().__init__()
        self._calls, self._see, self._start = calls, see, start
        self.count = start

    def __enter__(self) -> Observer:
        self.count = self._start  # a segment may be computed again several times
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function_name(func) in CONTRACTIONS:
            call, self.count = self.count, self.count + 1
            if call in self._calls:
                replaced = self._see(call, args[0])
                if replaced is not None:
                    args = (replaced, *args[1:])
        elif function_name(func) == "batch_norm" and torch.is_grad_enabled():
            return _normalize(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _normalize(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # With fixed statistics it is one affine map, whose backward needs no input.
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "-", "eps")
    v = {"training": False, "eps": 1e-5, **dict(zip(names, args, strict=False)), **kwargs}
    x, mean, weight, bias = v["input"], v["running_mean"], v.get("weight"), v.get("bias")
    fixed = [t for t in (mean, v["running_var"], weight, bias) if t is not None]
    if v["training"] or mean is None or any(t.requires_grad or t.dtype != x.dtype for t in fixed):
        return func(*args, **kwargs)
    scale = (v["running_var"] + v["eps"]).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))
