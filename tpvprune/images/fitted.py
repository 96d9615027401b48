"""Which images of a set a model was fitted to, so that later commands are judged by others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tpvprune.images.loading import permutation
from tpvprune.passes.drawing import drawn_indices


@dataclass(frozen=True)
class Fitted:
    """The first ``num`` images of the permutation of a set by a seed took part in a fit.

    ``count``: images of the set. ``held_back``: of these ``num`` a random tenth by the same seed
    was held back from the fit (:func:`tpvprune.passes.drawing.hold_back`). ``left``: so many
    images a later training has not seen either, the last of those; None if there was none.
    """

    count: int
    seed: int
    num: int
    held_back: bool
    left: int | None = None

    @classmethod
    def read(cls, facts: Any, count: int | None) -> Fitted | None:
        """Return what a report says of the same set; None if it says nothing, or of another."""
        if not isinstance(facts, Mapping):
            return None
        found, seed, num, left = (facts.get(key) for key in ("count", "seed", "num", "left"))
        if type(found) is not int or type(seed) is not int or type(num) is not int:
            return None
        if found != count or not 0 <= num <= count or not (left is None or type(left) is int):
            return None
        return cls(count, seed, num, facts.get("held_back") is True, left)

    @classmethod
    def of_report(cls, report: Mapping[str, Any], count: int | None) -> Fitted | None:
        """Return what a saved model's report says of a set of so many images, or None."""
        return cls.read((report.get("images") or {}).get("fitted"), count)

    def unseen(self, most: int) -> list[int]:
        """Return the places of at most so many images of the set that no fit has seen."""
        most = most if self.left is None else min(most, self.left)
        order = permutation(self.count, self.seed)
        beyond = order[self.num :]
        if len(beyond) < most and self.held_back:
            places = drawn_indices(self.num, seed=self.seed)[1]
            beyond = [*(order[i] for i in places), *beyond]
        return beyond[max(0, len(beyond) - most) :]

    def num_seen(self, places: Iterable[int]) -> int:
        """Return how many of some places of the set hold an image that took part."""
        unseen = set(self.unseen(self.count))
        return sum(place not in unseen for place in places)

    def facts(self, training: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what :meth:`read` reads, after a training that is reported so, if there was."""
        left = self.left if training is None else training["num_held_back"]
        return asdict(replace(self, left=left))
