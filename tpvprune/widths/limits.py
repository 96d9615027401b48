"""How far channel groups may shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tpvprune.groups import ChannelGroup

_AUTO_STEPS = (16, 8, 4, 2)
_LEAST_PARTS = 6  # of a group whose widths are rounded by themselves: a step is a sixth at most


@dataclass(frozen=True)
class Limits:
    """What a selection must respect whatever the budget asks for.

    Attributes:
        round_to: Kept widths are multiples of this, in groups of more than that many single
            channels, >= 1; 1: any width. ``"auto"``: of 16 in groups of at least 96 single
            channels, of 8, 4 and 2 in those of at least 48, 24 and 12, as processors compute 8 or
            16 channels at once.
        min_channels: Units that every group keeps, >= 1.
        max_removed: Largest fraction of a group's units that may go, in [0, 1].
        ignore: Modules whose outputs stay whole.

    Raises:
        ValueError: If a number is out of range.
    """

    round_to: int | Literal["auto"] = "auto"
    min_channels: int = 1
    max_removed: float = 1.0
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.round_to != "auto" and self.round_to < 1) or self.min_channels < 1:
            raise ValueError(
                "round_to, min_channels: expected at least 1 (round_to: or 'auto'), found "
                f"{self.round_to}, {self.min_channels}."
            )
        if not 0 <= self.max_removed <= 1:
            raise ValueError(
                f"max_removed: expected a fraction in [0, 1], found {self.max_removed}."
            )

    def step(self, group: ChannelGroup) -> int:
        """Return the multiple that a group's width is rounded to; heads are never rounded."""
        if group.unit != "channel":
            return 1
        if self.round_to == "auto":
            fitting = (n for n in _AUTO_STEPS if n * _LEAST_PARTS <= group.num_channels)
            return next(fitting, 1)
        return self.round_to if group.num_channels > self.round_to else 1

    def least(self, group: ChannelGroup, needed: int = 1) -> int:
        """Return the smallest width of a group, of which the network needs so many units."""
        size, step = group.num_channels, self.step(group)
        most_removed = int(self.max_removed * size + 1e-9)
        return min(size, -(-max(self.min_channels, needed, size - most_removed) // step) * step)

    def widths(self, group: ChannelGroup, needed: int = 1) -> list[int]:
        """Return the widths that a group may take, from the whole down to the least."""
        step, size = self.step(group), group.num_channels
        inner = range(size - 1, self.least(group, needed) - 1, -1)
        return [size, *(w for w in inner if w % step == 0)]
