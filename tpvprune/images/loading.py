"""Decode chosen images into batches."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from tpvprune.images.preprocessing import IMAGE_MODES, Preprocessing, in_colours
from tpvprune.images.sources import ImageSource
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import own_items

HELD_BYTES = 2 << 30
MAX_UNDECODABLE = 0.01


@dataclass(eq=False)
class ImageBatches:
    """Re-iterable batches: tensors [B, C, H, W], or (tensor, targets) if labelled.

    Every pass decodes the images again. Targets do not leave the reading thread unless `labelled`.
    Images that cannot be decoded are skipped, and `notice` is told once, after a whole pass; more
    than 1 % is a ValueError, but for a single one beside others. Of several processes each decodes
    its share of every batch.
    """

    source: ImageSource
    items: Callable[[], Iterable[Any]]
    preprocessing: Preprocessing
    total: int | None
    batch_size: int = 64
    workers: int = 4
    labelled: bool = False
    notice: Callable[[str], None] | None = None
    skipped: int = field(default=0, init=False)
    first_skipped: str = field(default="", init=False)
    seen: int | None = field(default=None, init=False)  # by all processes, in the last whole pass
    identity: bytes = field(default=b"", init=False)  # of which images in what manner, if known

    def __len__(self) -> int:
        """Return the number of batches; TypeError if it is a stream of unknown length."""
        if self.total is None:
            raise TypeError(f"{self.source.name}: a stream has no length")
        return math.ceil(self.total / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Decode the images anew; ValueError if there are none or too many of them are damaged."""
        self.skipped, seen = 0, 0
        for chunk in self._decoded():
            seen += len(chunk)
            done = [sample for sample in chunk if not isinstance(sample, str)]
            failed = [sample for sample in chunk if isinstance(sample, str)]
            if failed:
                self.first_skipped = self.first_skipped or failed[0]
                self.skipped += len(failed)
                if self.skipped > max(1, MAX_UNDECODABLE * (self.total or seen)):
                    self._refuse(self.total or seen)
            if done:
                inputs = torch.stack([image for image, _ in done])
                targets = [int(target) for _, target in done] if self.labelled else None
                yield inputs if targets is None else (inputs, torch.tensor(targets))
        if seen == 0:
            least = f"at least {num_processes()} " if num_processes() > 1 else ""
            raise ValueError(f"{self.source.name}: expected {least}images, found none")
        if self.skipped == seen:
            self._refuse(seen)
        if self.skipped and self.notice is not None:
            self.notice(
                f"note: {self.skipped} of {self.total or seen} images could not be decoded and "
                f"were skipped (first: {self.first_skipped}, in {self.source.name})"
            )
            self.notice = None

    def _refuse(self, total: int) -> NoReturn:
        raise ValueError(
            f"{self.source.name}: at least {self.skipped} of {total} images cannot be decoded, "
            f"more than 1 %: repair or remove them (first: {self.first_skipped})"
        )

    def _decoded(self) -> Iterator[list[Any]]:
        items, start = iter(self.items()), 0
        # One batch is decoded ahead while the model works on the present one.
        ahead: deque[list[Future[Any]]] = deque()
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            while chunk := list(itertools.islice(items, self.batch_size)):
                mine, start = own_items(chunk, start), start + len(chunk)
                ahead.append([pool.submit(self._decode, item) for item in mine])
                if len(ahead) > 1:
                    yield [future.result() for future in ahead.popleft()]
            self.seen = start
            while ahead:
                yield [future.result() for future in ahead.popleft()]

    def _decode(self, item: Any) -> tuple[Tensor, Any] | str:
        try:
            image, target = self.source.read(item)
            image = in_colours(image, IMAGE_MODES[self.preprocessing.input_size[0]])
        except MemoryError:
            raise
        except Exception as error:  # whatever a decoder makes of damaged bytes
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            where = self.source.where(item)
            return where if reason.startswith("cannot identify") else f"{where}: {reason}"
        return self.preprocessing.transform(image), target if self.labelled else None


def choose_images(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    num_images: int | None,
    skip: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    places: Sequence[int] | None = None,
    **options: Any,
) -> ImageBatches:
    """Choose images at random, the same ones for the same seed.

    The choice is positions skip .. skip + num_images of one permutation drawn from
    `seed`, so that two calls with neighbouring ranges are disjoint. A stream is
    read in its own order. ``num_images``: None for all, in the source's order. ``places``: those of
    the images to take instead. ``options``: of :class:`ImageBatches`.
    """
    if batch_size < 1 or (num_images is not None and num_images < 1):
        raise ValueError(
            f"expected a batch size and a number of images of at least 1, found "
            f"{batch_size} and {num_images}"
        )
    if places is not None:
        at = partial(_at_places, source, places)
        return ImageBatches(source, at, preprocessing, len(places), batch_size, **options)
    items, total = chosen_items(source, num_images=num_images, skip=skip, seed=seed)
    return ImageBatches(source, items, preprocessing, total, batch_size, **options)


def chosen_items(
    source: ImageSource,
    *,
    num_images: int | None,
    skip: int = 0,
    seed: int = 0,
    apart: Collection[int] = (),
) -> tuple[Callable[[], Iterable[Any]], int | None]:
    """Return what gives the items that ``choose_images`` takes, and their number if known.

    ``apart``: places of images that are left out, as if the permutation did not have them.
    """
    stop = None if num_images is None else skip + num_images
    if source.count is None:
        return lambda: itertools.islice(_without(source, apart), skip, stop), num_images
    order: Sequence[int] = range(source.count)
    if num_images is not None:
        order = permutation(source.count, seed)
    if apart:
        left_out = frozenset(apart)
        order = [place for place in order if place not in left_out]
    chosen = order[skip:stop]
    return lambda: chosen, len(chosen)


def _without(source: ImageSource, apart: Collection[int]) -> Iterator[Any]:
    """Yield the items of a stream, but those at some places."""
    return (item for place, item in enumerate(source.items()) if place not in apart)


def _at_places(source: ImageSource, places: Sequence[int]) -> Iterable[Any]:
    """Return the items at some places; of a stream a ValueError if it ends before the first."""
    return places if source.count is not None else _of_stream(source, frozenset(places))


def _of_stream(source: ImageSource, places: frozenset[int]) -> Iterator[Any]:
    first, last = min(places), max(places)
    place = -1
    for place, item in enumerate(itertools.islice(source.items(), last + 1)):
        if place in places:
            yield item
    if place < first:
        raise ValueError(
            f"{source.name}: expected images beyond the first {first}, which the model was fitted "
            f"to, found {place + 1} in all: pass other images"
        )


def permutation(count: int, seed: int) -> list[int]:
    """Return the order in which a seed takes the images of a set."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def in_memory(
    batches: ImageBatches,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Sequence[Any] | ImageBatches:
    """Decode once and list the batches where they take at most 2 GiB; else return the argument."""
    size = 4 * math.prod(batches.preprocessing.input_size)
    if batches.total is None or batches.total * size > HELD_BYTES:
        return batches
    return list(progress(batches) if progress else batches)
