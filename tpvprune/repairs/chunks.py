"""Inputs in chunks: as many at a time as the memory takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.passes.running import evaluating, on_device

_CHUNK_BYTES = 1 << 28  # of the activations of one chunk
_MOST_CHUNKS = 64  # threads


def chunk_size(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Return how many inputs run at a time: few enough for the memory, not too many threads."""
    num = sum(map(len, inputs))
    fit = max(1, _CHUNK_BYTES // _bytes_per_input(model, inputs[0][:1]))
    return min(num, max(min(fit, 128), -(-num // _MOST_CHUNKS)))


def rechunked(inputs: Iterable[Tensor], size: int) -> list[Tensor]:
    """Return the same inputs in batches of ``size``; the last may be smaller."""
    chunks: list[Tensor] = []
    rest: list[Tensor] = []
    num = 0
    for x in inputs:
        rest.append(x)
        num += len(x)
        if num >= size:
            joined = rest[0] if len(rest) == 1 else torch.cat(rest)
            whole = num - num % size
            chunks += joined[:whole].split(size)
            rest, num = ([joined[whole:]] if num > whole else []), num - whole
    return [*chunks, torch.cat(rest)] if rest else chunks


def _bytes_per_input(model: nn.Module, x: Tensor) -> int:
    """Return what one input needs: a few activations of the largest size are alive at a time."""
    largest = _LargestOutput()
    with evaluating(model), torch.no_grad(), largest:
        model(on_device(x, model))
    return 6 * largest.num_bytes


class _LargestOutput(TorchFunctionMode):
    num_bytes = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.num_bytes = max(self.num_bytes, out.numel() * out.element_size())
        return out
