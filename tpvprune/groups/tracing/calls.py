"""What the tracker notes of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One convolution or linear call: who reads what, what it costs.

    ``ordinal`` counts such calls within one forward; ``read`` holds the atoms along
    ``channel_dim`` of the input (``None`` for depthwise and grouped calls, which pass their
    channels on instead of mixing them); ``macs`` are those of one input, and scale with the
    kept fraction of every array in ``factors``.
    """

    ordinal: int | None
    module: str
    channel_dim: int
    read: Tensor | None
    macs: float
    factors: tuple[Tensor, ...]


@dataclass(frozen=True)
class ChannelPad:
    """Zero channels that module ``module`` puts before and after its input's channels."""

    module: str
    front: Tensor
    back: Tensor


def named(args: Any, kwargs: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return positional and keyword arguments by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
