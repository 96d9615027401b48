"""Watch, and replace, what convolution and linear layers read during one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpvprune.passes.batch_norms import BatchNormCall
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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function_name(func)
        if name in CONTRACTIONS:
            call, self.count = self.count, self.count + 1
            if call in self._calls:
                replaced = self._see(call, args[0])
                if replaced is not None:
                    args = (replaced, *args[1:])
        elif name == "batch_norm" and torch.is_grad_enabled():
            norm = BatchNormCall.of(args, kwargs)
            if norm.is_affine and not any(t.requires_grad for t in norm.given):
                return norm.as_affine()  # its backward needs no input
        return func(*args, **kwargs)
