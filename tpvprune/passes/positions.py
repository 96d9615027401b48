"""Sums over the positions or tokens of one layer's input, without a copy of it."""

from __future__ import annotations

import torch
from torch import Tensor

from tpvprune.passes.batch_axis import BatchAxis
from tpvprune.passes.moments import in_single

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill the unit interval evenly


def by_channel(t: Tensor, dim: int, num_samples: int, batch: BatchAxis | None = None) -> Tensor:
    """View ``t`` as [L, n, P]: channels before positions; the L of one sample are adjacent.

    ``t``: input of a convolution [L, n, ...] (``dim`` 1) or of a linear layer [..., n] (-1).
    ``batch``: where the samples lie; None: along dimension 0, windows or tokens of one sample
    adjacent. Returns a view wherever the strides allow it, channels-last included.
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

    With more positions than inputs the products S_jc = sum_p a_j d_c come first: they take
    n^2 numbers and one pass over both tensors, where r itself takes n P.

    ``a``: input [L, n, P], as :func:`by_channel` gives it. ``stand_in``: (mean [n], M [n, n]); None
    for r = a. Returns one number per sample and input, in float32 at least: sums of half-precision
    numbers around a mean would be rounding.
    """
    if stand_in is None:
        sums = (in_single(a) * in_single(grad)).sum(2)
    else:
        a, grad = in_single(a), in_single(grad)
        mean, matrix = (t.to(a) for t in stand_in)
        total = grad.sum(2)
        if a.shape[2] > a.shape[1]:
            products = torch.bmm(a, grad.transpose(1, 2))
            products.addcmul_(mean[:, None], total[:, None], value=-1)
            sums = products.mul_(matrix).sum(1)
        else:
            sums = torch.matmul(matrix.T, a).mul_(grad).sum(2) - (mean @ matrix) * total
    return sums if len(sums) == num_samples else sums.reshape(num_samples, -1, a.shape[1]).sum(1)


def sampled_rows(a: Tensor, indices: Tensor, limit: int) -> Tensor:
    """Return inputs at no more than about ``limit`` positions per sample: [rows, n].

    The positions differ from sample to sample and cover the map evenly. They depend on a sample's
    place in the whole set alone, not on how the set is split into batches.

    ``a``: input [L, n, P], as :func:`by_channel` gives it. ``indices``: where in the whole set each
    sample of the batch stands [B]; L is a multiple of B.
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
