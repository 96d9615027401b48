"""BatchNorm over the batch of all processes together, in training.

``torch.nn.SyncBatchNorm`` does so on GPUs only, and by exchanging modules.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tpvprune.passes.batch_norms import BatchNormCall, ComputedNorms
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import reduced, total


def shared_norms() -> AbstractContextManager[Any]:
    """Return a context: BatchNorms in training normalise by the batch of all processes."""
    return ComputedNorms(_batch_norm) if num_processes() > 1 else nullcontext()


def _batch_norm(norm: BatchNormCall) -> Tensor | None:
    if not norm.training:
        return None
    half = norm.input.dtype in {torch.float16, torch.bfloat16}
    x = norm.input.float() if half else norm.input
    dims = [d for d in range(x.ndim) if d != 1]
    shape = (1, -1, *[1] * (x.ndim - 2))
    num = total(x.numel() / x.shape[1])
    mean: Tensor = _Sum.apply(x.sum(dims)) / num
    centred = x - mean.reshape(shape)
    # Two rounds: the difference of two large sums would lose the variance to rounding.
    var: Tensor = _Sum.apply(centred.square().sum(dims)) / num
    if norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
            norm.running_var.lerp_((var * num / (num - 1)).to(norm.running_var), norm.momentum)
    scale = (var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    out = centred * scale.reshape(shape)
    out = out if norm.bias is None else out + norm.bias.reshape(shape)
    return out.to(norm.input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; gradients flow back to all of them."""

    @staticmethod
    def forward(_ctx: Any, local: Tensor) -> Tensor:
        return reduced(local.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return reduced(grad.clone(memory_format=torch.contiguous_format))
