"""Calls of ``batch_norm``: what they are given, and the affine map that they are in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpvprune.passes.operations import function_name

_OF_TORCH = (
    "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps",
    "cudnn_enabled",
)  # fmt: skip


@dataclass(frozen=True)
class BatchNormCall:
    """The arguments of one call, by name: those of ``torch.nn.functional.batch_norm``."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BatchNormCall:
        """Return what a function of that name is called with: torch's own has one more."""
        if len(args) + len(kwargs) < len(_OF_TORCH):
            return cls(*args, **kwargs)
        named = {**dict(zip(_OF_TORCH, args, strict=False)), **kwargs}
        return cls(**{name: named[name] for name in _OF_TORCH[:-1]})

    @property
    def given(self) -> list[Tensor]:
        """Statistics and parameters, those that there are."""
        given = (self.running_mean, self.running_var, self.weight, self.bias)
        return [t for t in given if t is not None]

    @property
    def is_affine(self) -> bool:
        """Whether it normalises by statistics that are given, of the type of its input."""
        alike = all(t.dtype == self.input.dtype for t in self.given)
        return not self.training and self.running_mean is not None and alike

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the affine map ([C], [C]) that a call with given statistics is."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = (self.running_var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.running_mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def as_affine(self) -> Tensor:
        """Return the output, as one multiplication and addition."""
        scale, shift = self.scale_and_shift()
        shape = (-1, *[1] * (self.input.ndim - 2))
        return torch.addcmul(shift.reshape(shape), self.input, scale.reshape(shape))


def affine_norms() -> ComputedNorms:
    """Return a context: every BatchNorm in eval mode runs as the affine map that it is.

    The backward of that reads no input, and it takes a fraction of the time.
    """
    return ComputedNorms(lambda norm: norm.as_affine() if norm.is_affine else None)


class ComputedNorms(TorchFunctionMode):
    """Lets ``compute`` return what a BatchNorm does; where that is None torch runs it."""

    def __init__(self, compute: Callable[[BatchNormCall], Tensor | None]) -> None:
        super().__init__()
        self._compute = compute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function_name(func) == "batch_norm":
            out = self._compute(BatchNormCall.of(args, kwargs))
            if out is not None:
                return out
        return func(*args, **kwargs)
