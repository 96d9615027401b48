"""Which images of a set a model was fitted to, so that later commands are judged by others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpvprune.images.loading import permutation
from tpvprune.passes.drawing import drawn_indices


@dataclass(frozen=True)
class Fitted:
    """The first ``num`` images of the permutation of a set by a seed took part in a fit.

    ``count``: images of the set. ``held_back``: of these ``num`` a random tenth by the same seed
    was held back from the fit (:func:`tpvprune.passes.drawing.hold_back`).
    """

    count: int
    seed: int
    num: int
    held_back: bool

    @classmethod
    def read(cls, facts: Any, count: int | None) -> Fitted | None:
        """Return what a report says of the same set; None if it says nothing, or of another."""
        if not isinstance(facts, Mapping):
            return None
        numbers = [n for key in ("count", "seed", "num") if type(n := facts.get(key)) is int]
        if len(numbers) < 3 or numbers[0] != count or not 0 <= numbers[2] <= count:
            return None
        return cls(numbers[0], numbers[1], numbers[2], facts.get("held_back") is True)

    def unseen(self, most: int) -> list[int]:
        """Return the places of at most so many images of the set that no fit has seen."""
        order = permutation(self.count, self.seed)
        beyond = order[self.num :]
        if len(beyond) < most and self.held_back:
            places = drawn_indices(self.num, seed=self.seed)[1]
            beyond = [*(order[i] for i in places), *beyond]
        return beyond[max(0, len(beyond) - most) :]
