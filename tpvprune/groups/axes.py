"""Which channels own the positions of an axis of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Kept = dict[str, Tensor]
"""Group name -> BoolTensor [C]; True = the channel stays. Groups not named stay whole."""


@dataclass(frozen=True)
class Axis:
    """Which channels own the positions of one axis; positions without an owner always stay."""

    size: int
    members: tuple[tuple[str, Tensor, Tensor], ...]  # (group name, index [n], channel [n])

    def kept(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Return a BoolTensor [size]: which positions stay."""
        mask = torch.ones(self.size, dtype=torch.bool)
        for name, index, channel in self.members:
            if name in kept:
                mask[index] = kept[name].cpu()[channel]
        return mask
