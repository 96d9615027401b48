"""Repair 2: re-estimate BatchNorm statistics on unlabeled images."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.batches import unlabeled
from tpvprune.passes.moments import Moments
from tpvprune.passes.running import evaluating, on_device
from tpvprune.processes.shares import in_step, summed


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
    norms = batchnorms(copied)
    sums = {m: Moments(m.num_features, device=m.running_mean.device) for m in norms}
    called: list[Any] = []

    def observe(norm: Any, args: tuple[Tensor]) -> None:
        called.append(norm)
        _add(sums[norm], norm, args[0].detach())

    with ExitStack() as hooks, evaluating(copied), torch.no_grad():
        for m in norms:
            hooks.enter_context(m.register_forward_pre_hook(observe))
        for x in in_step(unlabeled(batches)) if norms else ():
            if x is None:  # another process has a batch, and needs us at every layer
                for m in list(called):
                    _add(sums[m], m, m.running_mean.new_zeros(1, m.num_features)[:0])
                continue
            called.clear()
            copied(on_device(x, copied))
    for m, found in sums.items():
        if found.count:
            _set(m, found.mean, found.spread / found.count)
    return copied


@torch.no_grad()
def rebase_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    r"""Make the statistics of BatchNorm those of the inputs without changing what the model does.

    Compensation leaves statistics behind that are no longer those of what comes in: as constants
    of an affine map they are right, but in training mode, where a batch's own statistics take
    their place, the model would be another one. With the true mean m and deviation s, and
    g (x - m0) / s0 + b the map as it is, the layer becomes

    .. math:: \frac{g s}{s_0} \cdot \frac{x - m}{s} + \left(b + g\,\frac{m - m_0}{s_0}\right)

    Layers without affine parameters, or without statistics, stay.

    ``model``: changed in place; its outputs in evaluation mode stay, up to rounding. ``batches``:
    unlabeled inputs [B, ...], iterated once.
    """
    norms = [m for m in batchnorms(model) if m.affine]
    sums = {m: Moments(m.num_features, device=m.weight.device) for m in norms}

    def collect(norm: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].movedim(1, -1)
        sums[norm].add(x.reshape(-1, x.shape[-1]).double())

    with ExitStack() as hooks, evaluating(model):
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(collect))
        for x in batches if norms else ():
            model(on_device(x, model))
    for norm in norms:
        num, mean, var = sums[norm].over_processes()
        if not num:
            continue
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        norm.bias += (scale * (mean - norm.running_mean)).to(norm.bias)
        norm.weight.copy_(scale * (var + norm.eps).sqrt())
        _set(norm, mean, var)


def batchnorms(model: nn.Module) -> list[Any]:
    """Return the BatchNorm layers of a model that hold statistics."""
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]


def _add(sums: Moments, norm: Any, x: Tensor) -> None:
    """Add one batch, and let the layer normalise by its statistics, as in training."""
    dims = [d for d in range(x.ndim) if d != 1]
    x = x.double()
    here = torch.tensor(x.numel() / x.shape[1], dtype=torch.float64)  # the host asks for it below
    num, total = summed(here, x.sum(dims))
    mean = total / num
    centred = x - mean.reshape(-1, *[1] * (x.ndim - 2))
    var = summed(centred.square().sum(dims))[0] / num
    sums.merge(float(num), mean, num * var)
    _set(norm, mean, var)


def _set(norm: Any, mean: Tensor, var: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
