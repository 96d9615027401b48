"""Which images of a set a model was fitted to, so that later commands are judged by others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

from tpvprune.images.loading import permutation
from tpvprune.images.sources import ImageSource
from tpvprune.passes.drawing import drawn_indices


@dataclass(frozen=True)
class Fitted:
    """The first ``num`` images of the permutation of a set by a seed took part in a fit.

    ``source``: name of the set, without where it lies; it may be moved. ``count``: images of the
    set. ``held_back``: of these ``num`` a random tenth by the same seed
    was held back from the fit (:func:`tpvprune.passes.drawing.hold_back`). ``left``: so many
    images a later training has not seen either, the last of those; None if there was none.
    """

    source: str
    count: int
    seed: int
    num: int
    held_back: bool
    left: int | None = None

    @classmethod
    def to(
        cls, images: ImageSource, *, seed: int, num: int, held_back: bool = False
    ) -> Fitted | None:
        """Return a fit to the first images of a set by a seed; None of a stream."""
        if images.count is None:
            return None
        return cls(PurePath(images.name).name, images.count, seed, num, held_back)

    @classmethod
    def of_report(cls, report: Mapping[str, Any], images: ImageSource) -> Fitted | None:
        """Return what a saved model's report says of a set of images; None if nothing."""
        name = PurePath(images.name).name
        same = [x for x in _read(report) if (x.source, x.count) == (name, images.count)]
        return same[0] if same else None

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


def fitted_facts(
    fitted: Fitted | None, training: Mapping[str, Any] | None, report: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return what a report says of the sets that a model was fitted to, one entry each.

    ``fitted``: to the set of now; None of a stream. ``training``: what is reported of a training
    with it, if there was one. ``report``: of the model that this one was made from.
    """
    if fitted is None:
        return [asdict(x) for x in _read(report)]
    if training is not None:
        fitted = replace(fitted, left=training["num_held_back"])
    same = fitted.source, fitted.count
    others = [x for x in _read(report) if (x.source, x.count) != same]
    return [asdict(x) for x in (*others, fitted)]


def _read(report: Mapping[str, Any]) -> list[Fitted]:
    """Return what a report says of sets; what cannot be is left out."""
    entries = (report.get("images") or {}).get("fitted")
    return [x for entry in entries if (x := _entry(entry))] if isinstance(entries, list) else []


def _entry(facts: Any) -> Fitted | None:
    if not isinstance(facts, Mapping):
        return None
    source, left = facts.get("source"), facts.get("left")
    count, seed, num = (facts.get(key) for key in ("count", "seed", "num"))
    if type(count) is not int or type(seed) is not int or type(num) is not int:
        return None
    if not isinstance(source, str) or not 0 <= num <= count:
        return None
    if not (left is None or type(left) is int):
        return None
    return Fitted(source, count, seed, num, facts.get("held_back") is True, left)
