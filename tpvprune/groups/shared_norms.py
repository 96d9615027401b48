"""BatchNorm over the batch of all processes together, in training.

``torch.nn.SyncBatchNorm`` does so on GPUs only, and by exchanging modules. Here the call itself is
taken over, so that any module that calls ``batch_norm`` takes part and the CPU does as well.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpvprune.passes.operations import function_name
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import reduced, total

_ARGUMENTS = (
    "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
)  # fmt: skip


def shared_norms() -> AbstractContextManager[Any]:
    """Return a context: BatchNorms in training normalise by the batch of all processes."""
    return _SharedNorms() if num_processes() > 1 else nullcontext()


class _SharedNorms(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function_name(func) == "batch_norm":
            given = dict(zip(_ARGUMENTS, args, strict=False))
            v = {"weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5, **given, **kwargs}
            if v.get("training"):
                return _batch_norm(v)
        return func(*args, **kwargs)


def _batch_norm(v: dict[str, Any]) -> Tensor:
    x = v["input"].float() if v["input"].dtype in {torch.float16, torch.bfloat16} else v["input"]
    dims = [d for d in range(x.ndim) if d != 1]
    shape = (1, -1, *[1] * (x.ndim - 2))
    num = total(x.numel() / x.shape[1])
    mean = _over_all(x.sum(dims)) / num
    centred = x - mean.reshape(shape)
    # Two rounds: the difference of two large sums would lose the variance to rounding.
    var = _over_all(centred.square().sum(dims)) / num
    if v["running_mean"] is not None:
        with torch.no_grad():
            v["running_mean"].lerp_(mean.to(v["running_mean"]), v["momentum"])
            v["running_var"].lerp_((var * num / (num - 1)).to(v["running_var"]), v["momentum"])
    scale = (var + v["eps"]).rsqrt()
    scale = scale if v["weight"] is None else scale * v["weight"]
    out = centred * scale.reshape(shape)
    out = out if v["bias"] is None else out + v["bias"].reshape(shape)
    return out.to(v["input"].dtype)


def _over_all(local: Tensor) -> Tensor:
    result: Tensor = _Sum.apply(local)
    return result


class _Sum(torch.autograd.Function):
    """The sum over all processes; gradients flow back to all of them."""

    @staticmethod
    def forward(_ctx: Any, local: Tensor) -> Tensor:
        return reduced(local.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return reduced(grad.clone(memory_format=torch.contiguous_format))
