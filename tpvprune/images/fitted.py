"""Which images of a set a model was fitted to, so that later commands are judged by others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

from tpvprune.images.loading import permutation
from tpvprune.images.sources import ImageSource


@dataclass(frozen=True)
class Fit:
    """Of the first ``num`` images by a seed all took part in a fit, but those ``apart``.

    By a seed: in its permutation of the set; a stream has one order. ``source``: what the set is
    called. ``digest``: of what its images are called, see ``ImageSource.digest``. ``count``:
    images of the set, None of a stream. ``num``: None for the whole of a stream. ``apart``: places
    in the set.
    """

    source: str
    digest: str
    count: int | None
    seed: int
    num: int | None
    apart: tuple[int, ...] = ()

    @classmethod
    def to(
        cls, images: ImageSource, *, seed: int, num: int | None, apart: Collection[int] = ()
    ) -> Fit:
        """Return a fit to the first images by a seed, of which some took no part."""
        return cls(images.name, images.digest, images.count, seed, num, tuple(apart))

    @classmethod
    def beside(
        cls, images: ImageSource, held_back: Collection[int], *, seed: int, num: int | None
    ) -> Fit:
        """Return a fit to ``num`` images, None for all, beside those at some places."""
        if images.count is None and num is None:
            return cls.to(images, seed=seed, num=None, apart=held_back)
        apart = frozenset(held_back)
        order: Sequence[int] = range((num or 0) + len(held_back))
        if images.count is not None:
            order = permutation(images.count, seed)
        taken = [i for i, place in enumerate(order, 1) if place not in apart][:num]
        return cls.to(images, seed=seed, num=max(taken, default=0), apart=held_back)

    def seen(self, places: Iterable[int]) -> set[int]:
        """Return which of some places hold an image that took part."""
        if self.count is None:
            first = {place for place in places if self.num is None or place < self.num}
        else:
            first = set(permutation(self.count, self.seed)[: self.num]).intersection(places)
        return first - set(self.apart)


@dataclass(frozen=True)
class Fits:
    """All fits of a model to one set of images, as far as is known."""

    images: ImageSource
    fits: Sequence[Fit]

    @classmethod
    def of_report(cls, report: Mapping[str, Any], images: ImageSource) -> Fits:
        """Return those that the report of a saved model tells of."""
        known = _read(report)
        digest = images.digest if known else ""
        return cls(images, [x for x in known if (x.digest, x.count) == (digest, images.count)])

    def num_seen(self, places: Iterable[int]) -> int:
        """Return how many of some places hold an image that took part in any fit."""
        return len(self._times(list(places)))

    def unseen(self, most: int, *, seed: int) -> list[int]:
        """Return the places of at most so many images that no fit has seen.

        They are the last of the permutation by the seed, of a stream the first.
        """
        places = self._places(most, seed)
        times = self._times(places)
        return [place for place in places if not times[place]][-most:]

    def least_seen(self, most: int, *, seed: int) -> list[int]:
        """Return those that no fit has seen; if there are none, those that the fewest have seen."""
        places = self._places(most, seed)
        times = self._times(places)
        by_times = sorted(places, key=times.__getitem__, reverse=True)
        return self.unseen(most, seed=seed) or by_times[-most:]

    def _places(self, most: int, seed: int) -> list[int]:
        """Return the places that may be taken, of which the last are to be preferred."""
        if self.images.count is not None:
            return permutation(self.images.count, seed)
        end = max((fit.num or 0 for fit in self.fits), default=0)
        left_out = [place for fit in self.fits for place in fit.apart]
        return sorted({*left_out, *range(end, end + most)}, reverse=True)

    def _times(self, places: Sequence[int]) -> Counter[int]:
        """Return how many fits have seen an image; none that no fit has seen."""
        return Counter(place for fit in self.fits for place in fit.seen(places))


def said_of_seen(
    report: Mapping[str, Any], images: ImageSource, places: Iterable[int], which: str
) -> str:
    """Return how many images at some places a saved model may be fitted to; empty if none.

    ``which``: what the images are called in that.
    """
    known = Fits.of_report(report, images)
    if known.fits:
        num = known.num_seen(places)
        return f"{num} {which} took part in the cut or a training" if num else ""
    facts = report.get("images") or {}
    folders = {_last(images.name), images.path.name if images.path else ""}
    if _last(str(facts.get("source"))) not in folders:
        return ""
    return f"it was pruned with {facts.get('num_images')} images of a set of that name"


def _last(name: str) -> str:
    return PurePath(name).name


def fitted_facts(fits: Iterable[Fit], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a report says of all fits of a model.

    ``fits``: of now. ``report``: of the model that this one was made from.
    """
    return [{**asdict(x), "apart": list(x.apart)} for x in dict.fromkeys([*_read(report), *fits])]


def _read(report: Mapping[str, Any]) -> list[Fit]:
    """Return the fits that a report tells of; what cannot be is left out."""
    entries = (report.get("images") or {}).get("fitted")
    return [x for entry in entries if (x := _entry(entry))] if isinstance(entries, list) else []


def _entry(facts: Any) -> Fit | None:
    """Return a fit as a report tells of it, if it can be one."""
    if not isinstance(facts, Mapping):
        return None
    values: list[Any] = [facts.get(field.name) for field in fields(Fit)]
    source, digest, count, seed, num, apart = values
    named = isinstance(source, str) and isinstance(digest, str)
    drawn = _is_number(seed) and (_is_number(num) or (num is None and count is None))
    fits = count is None or (_is_number(count) and drawn and num <= count)
    if not (named and drawn and fits and isinstance(apart, list) and all(map(_is_number, apart))):
        return None
    return Fit(source, digest, count, seed, num, tuple(apart))


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
