"""Where the images of a batch lie in an activation: not always along dimension 0, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchAxis:
    """The dimension that holds the images, possibly folded with others: [outer, batch, inner].

    [B, C] is ``BatchAxis(0)``, [T, B, C] is ``BatchAxis(1)``; frames folded behind their clip
    [B * T, ...] are ``BatchAxis(0, T)``; two halves concatenated along the batch [2 * B, ...] are
    ``BatchAxis(0)`` with twice as many entries as images.
    """

    dim: int
    inner: int = 1

    def leading(self, t: Tensor, num: int) -> Tensor:
        """Return the activation with its images first.

        ``t``: of ``num`` images. Returns [num, ...]: the other dimensions follow in their order,
        what was folded with the images in the place of their dimension. A view wherever the strides
        allow it.
        """
        parts = t.unflatten(self.dim, (-1, num, self.inner)).movedim(self.dim + 1, 0)
        return parts.flatten(self.dim + 1, self.dim + 2)

    def is_usual(self, size: int, num: int) -> bool:
        """Tell whether the images lie one after the other along dimension 0."""
        return self.dim == 0 and self.inner * num == size

    @classmethod
    def of(
        cls, first: Sequence[Tensor], second: Sequence[Tensor], channel_dim: int
    ) -> BatchAxis | None:
        """Find the axis from what changes in an activation of two images with each of them.

        ``first``: for each dimension, which of its entries change with the first image; BoolTensor.
        Returns the axis, of several possible ones the outermost; None if no dimension tells the
        images apart.
        """
        for dim, (one, other) in enumerate(zip(first, second, strict=True)):
            if dim == channel_dim % len(first):
                continue
            for inner in _folds(len(one)):
                is_second = (torch.arange(len(one)) // inner) % 2 == 1
                if not bool((one & is_second).any() or (other & ~is_second).any()):
                    return cls(dim, inner)
        return None


def _folds(size: int) -> Iterator[int]:
    """Yield how many entries of an image may lie side by side where two images have ``size``."""
    for inner in range(size // 2, 0, -1):
        if size % (2 * inner) == 0:
            yield inner
