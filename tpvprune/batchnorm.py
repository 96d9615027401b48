"""Repair 2: re-estimate BatchNorm statistics on unlabeled images."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import unlabeled
from tpvprune.running import evaluating, on_device


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Return a copy whose BatchNorm statistics are those of the given inputs.

    The statistics are reset first; mean and variance are those of all inputs together (each
    batch weighs by its size, and the spread of the batch means is part of the variance), so the
    result does not depend on how the inputs are split, except through the layers above, which
    see batch statistics. A batch of one is fine; nothing else of the model moves.

    Args:
        model: Any model; returned as an unchanged copy if it has no BatchNorm with statistics.
        batches: Re-iterable of unlabeled inputs [B, ...].

    Returns:
        The copy, in the modes of the argument.

    Reference:
        Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3 (PreciseBN).
    """
    copied = copy.deepcopy(model)
    norms = [
        m
        for m in copied.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    sums: dict[nn.Module, list[Any]] = {m: [0, 0.0, 0.0] for m in norms}
    hooks = [m.register_forward_pre_hook(partial(_observe, sums[m])) for m in norms]
    with evaluating(copied), torch.no_grad():
        for x in unlabeled(batches) if norms else ():
            copied(on_device(x, copied))
    for hook in hooks:
        hook.remove()
    for m, (num, total, square) in sums.items():
        if num:
            mean = total / num
            _set(m, mean, (square / num - mean.square()).clamp_min(0))
    return copied


def _observe(sums: list[Any], norm: Any, args: tuple[Tensor]) -> None:
    """Add one batch, and let the layer normalise by its statistics, as in training."""
    x = args[0].detach()
    var, mean = torch.var_mean(
        x.double(), [d for d in range(x.ndim) if d != 1], correction=0
    )
    num = x.numel() // x.shape[1]
    sums[0] += num
    sums[1] = sums[1] + num * mean
    sums[2] = sums[2] + num * (var + mean.square())
    _set(norm, mean, var)


def _set(norm: Any, mean: Tensor, var: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
