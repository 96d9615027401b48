"""Where images, channels and positions lie in one layer's input, and sums over the positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvprune.passes.moments import in_single

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill the unit interval evenly


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
        """Return an activation of ``num`` images with these first, [num, ...]: a view if possible.

        What was folded with the images stays in the place of their dimension.
        """
        parts = t.unflatten(self.dim, (-1, num, self.inner)).movedim(self.dim + 1, 0)
        return parts.flatten(self.dim + 1, self.dim + 2)

    @classmethod
    def of(
        cls, first: Sequence[Tensor], second: Sequence[Tensor], channel_dim: int
    ) -> BatchAxis | None:
        """Find the outermost axis that tells two images apart, if there is one.

        ``first``: for each dimension, which of its entries change with the first image; BoolTensor.
        """
        for dim, (one, other) in enumerate(zip(first, second, strict=True)):
            if dim == channel_dim % len(first):
                continue
            # How many entries of an image may lie side by side where two images have this size.
            half = len(one) // 2
            for inner in (i for i in range(half, 0, -1) if len(one) % (2 * i) == 0):
                is_second = (torch.arange(len(one)) // inner) % 2 == 1
                if not bool((one & is_second).any() or (other & ~is_second).any()):
                    return cls(dim, inner)
        return None


def by_channel(t: Tensor, dim: int, num_samples: int, batch: BatchAxis | None = None) -> Tensor:
    """View ``t`` as [L, n, P]: channels before positions; the L of one sample are adjacent.

    ``t``: input of a convolution [L, n, ...] (``dim`` 1) or of a linear layer [..., n] (-1).
    ``batch``: where the samples lie; None: along dimension 0, all of one sample adjacent.
    """
    if batch is not None:
        return batch.leading(t, num_samples).movedim(dim % t.ndim + 1, 1).flatten(2)
    if dim % t.ndim == t.ndim - 1:
        return t.reshape(num_samples, -1, t.shape[-1]).transpose(1, 2)
    if t.ndim > 3 and t.stride(dim) == 1:
        return t.movedim(dim, -1).flatten(1, -2).transpose(1, 2)
    return t.flatten(2)


def contract(
    a: Tensor, grad: Tensor, num_samples: int, stand_in: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return sum_p r_c d_c per sample: [B, n], with r = a, or r = (a - mean) M.

    ``a``: input [L, n, P], as :func:`by_channel` gives it. ``stand_in``: (mean [n], M [n, n]). In
    float32 at least: sums of half-precision numbers around a mean would be rounding.
    """
    if stand_in is None:
        sums = (in_single(a) * in_single(grad)).sum(2)
    else:
        a, grad = in_single(a), in_single(grad)
        mean, matrix = (t.to(a) for t in stand_in)
        total = grad.sum(2)
        if a.shape[2] > a.shape[1]:  # n^2 numbers, where r itself takes n P
            products = torch.bmm(a, grad.transpose(1, 2))
            products.addcmul_(mean[:, None], total[:, None], value=-1)
            sums = products.mul_(matrix).sum(1)
        else:
            sums = torch.matmul(matrix.T, a).mul_(grad).sum(2) - (mean @ matrix) * total
    return sums if len(sums) == num_samples else sums.reshape(num_samples, -1, a.shape[1]).sum(1)


def sampled_rows(a: Tensor, indices: Tensor, limit: int) -> Tensor:
    """Return inputs at no more than about ``limit`` positions per sample: [rows, n].

    The positions cover the map evenly, and depend on a sample's place in the whole set alone.
    ``a``: input [L, n, P]; ``indices``: these places [B], L a multiple of B.
    """
    num, inputs, positions = a.shape
    windows = num // len(indices)
    limit = -(-limit // windows)
    by_position = a.transpose(1, 2)
    if positions > limit:
        each = torch.arange(limit * windows, dtype=torch.float64, device=a.device)
        order = indices.to(a.device)[:, None] * (windows * limit) + each
        place = ((order * _GOLDEN) % 1 * positions).long().clamp_(max=positions - 1)
        rows = torch.arange(num, device=a.device)[:, None]
        by_position = by_position[rows, place.view(num, limit)]
    return by_position.reshape(-1, inputs)
