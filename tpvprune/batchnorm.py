"""Repair 2: re-estimate BatchNorm statistics on unlabeled images."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tpvprune.batches import unlabeled
from tpvprune.scores import evaluating, on_device


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Return a copy whose BatchNorm statistics are those of the given inputs.

    The statistics are reset first; mean and variance are those of all inputs together (each
    batch weighs by its number of samples, and the spread of the batch means is part of the
    variance), so the result does not depend on how the inputs are split, except through the
    layers above, which see batch statistics.

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
    if not norms:
        return copied
    sums = {m: [0.0, 0.0, 0.0] for m in norms}
    momenta = {m: m.momentum for m in norms}
    with evaluating(copied), torch.no_grad():
        for m in norms:
            m.train()
            m.momentum = 1.0  # after a forward the buffers hold this batch's own statistics
        for x in unlabeled(batches):
            copied(on_device(x, copied))
            for m in norms:
                _accumulate(sums[m], m, len(x))
        for m in norms:
            weight, mean, square = sums[m]
            m.running_mean = mean / weight
            m.running_var = (square / weight - m.running_mean.square()).clamp_min(0)
            m.momentum = momenta[m]
    return copied


def _accumulate(sums: list[Any], norm: Any, num_samples: int) -> None:
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    sums[0] += num_samples
    sums[1] = sums[1] + num_samples * mean
    sums[2] = sums[2] + num_samples * (var + mean.square())
