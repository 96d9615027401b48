"""Draw by seed the images that pruning sees, and those that it is measured on, from any loader.

Every image of the whole set has a random key, which belongs to its place in the set: the images
of the smallest keys are drawn, in the order of their keys (a reservoir of as many as are asked
for, in one pass). What is drawn depends neither on how the loader is split into batches, nor on
how many processes share it; and neither the first images nor the last are all of one class.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from tpvprune.passes.batches import UnlabeledBatches, private_randomness, unlabeled
from tpvprune.processes.membership import num_processes, rank
from tpvprune.processes.shares import handed_over, of_all, shard, share, total, unshared

NUM_IMAGES = 1024
_MOST_HELD_BACK = 128  # enough to tell repairs apart; every further image is missed by the fit


def hold_back(
    batches: Iterable[Any],
    *,
    num_images: int | None = None,
    seed: int = 0,
    held: Callable[[int], int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return batches (fit, held): a random tenth of the drawn inputs, 1 to 128, is held back.

    ``batches`` are iterated once, and never held whole: of a DataLoader over a larger dataset only
    what is drawn is loaded. ``num_images``: so many are drawn; None: all. ``held``: how many of so
    many are held back, if not :func:`num_held`. Inputs of other shapes are not mixed in a batch.
    """
    if num_images is not None and num_images < 2:
        raise ValueError(f"num_images: expected at least 2, found {num_images}")
    source = unlabeled(batches)
    if num_images is not None:
        source = replace(source, batches=_few(source.batches, num_images=num_images, seed=seed))
    drawn, size = _drawn(source, num_images, seed)
    num = int(total(len(drawn)))
    num_fit = num - (held or num_held)(num)
    if num_fit < num_processes():
        raise ValueError(
            f"batches: expected at least {num_processes() + 1} inputs, found {num}; a few hundred "
            "work well."
        )
    return _batched(drawn, 0, num_fit, size), _batched(drawn, num_fit, num, size)


def drawn_indices(
    num: int, *, num_images: int | None = None, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Return which images of a set :func:`hold_back` draws: the places of (fit, held), in order."""
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(num)]
    order = sorted(range(num), key=keys.__getitem__)[:num_images]
    num_fit = len(order) - num_held(len(order))
    return order[:num_fit], order[num_fit:]


def num_held(num: int) -> int:
    """Return how many of so many drawn images are held back."""
    return min(_MOST_HELD_BACK, max(1, num // 10))


def num_set_aside(num: int, *, num_images: int | None, wanted: int) -> int:
    """Return how many images of a set are kept from scores and repairs, which ask for num_images.

    All that are ``wanted`` where the set has them beside the others; else a quarter of the set, or
    what the others leave if that is more.
    """
    left = 0 if num_images is None else num - num_images
    return min(wanted, max(left, num // 4))


# ---- a large dataset: only what is drawn is loaded ----------------------------------------------


def _few(source: Iterable[Any], *, num_images: int, seed: int, own: bool = True) -> Iterable[Any]:
    """Return batches of what is drawn, where that is known without reading; else all of them.

    ``own``: the source is that of this process alone, which draws its share of it.
    """
    inside = unshared(source)
    if inside is not None:
        return shard(_few(inside, num_images=num_images, seed=seed, own=False))
    if isinstance(source, UnlabeledBatches):
        few = _few(source.batches, num_images=num_images, seed=seed, own=own)
        return replace(source, batches=few)
    if not isinstance(source, DataLoader) or source.batch_sampler is None:
        return source
    num = share(num_images) if own else num_images
    if isinstance(source.dataset, IterableDataset) or _length(source.dataset) <= num:
        return source
    known, size = _indices(source)
    if len(known) <= num:
        return source
    return DataLoader(
        Subset(source.dataset, sorted(random.Random(seed).sample(known, num))),
        batch_size=size,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        timeout=source.timeout,
        worker_init_fn=source.worker_init_fn,
        multiprocessing_context=source.multiprocessing_context,
    )


def _length(dataset: Any) -> int:
    """Return how many samples a dataset has; 0 where it does not tell."""
    return len(dataset) if hasattr(dataset, "__len__") else 0


def _indices(loader: DataLoader[Any]) -> tuple[Sequence[int], int]:
    """Return the indices that a loader reads, without reading, and the size of its batches."""
    batches = loader.batch_sampler
    if type(batches) is BatchSampler:
        sampler = batches.sampler
        shuffles = isinstance(sampler, RandomSampler) and not sampler.replacement
        num = _length(loader.dataset)
        if isinstance(sampler, SequentialSampler) or (shuffles and _length(sampler) == num):
            return range(num), batches.batch_size
    # It leaves some out, as half of a split does, or weighs them.
    listed = [list(batch) for batch in private_randomness(batches or ())]
    return list(dict.fromkeys(i for batch in listed for i in batch)), len(listed[0])


# ---- any other source: a reservoir --------------------------------------------------------------


def _drawn(
    batches: Iterable[Tensor], num_images: int | None, seed: int
) -> tuple[deque[Tensor], int]:
    """Return this process's part of the drawn inputs, in order, and the size of a whole batch."""
    generator = random.Random(seed)
    best: list[tuple[float, int]] = []  # a heap of (-key, place): of the largest key first
    rows: dict[int, Tensor] = {}  # place in the whole set -> input
    seen = size = 0
    for x in batches:
        size = size or len(x)
        for row in x:
            keys = [generator.random() for _ in range(num_processes())]
            entry = (-keys[rank()], seen * num_processes() + rank())
            seen += 1
            if num_images is None or len(best) < num_images:
                heapq.heappush(best, entry)
            elif entry > best[0]:
                del rows[heapq.heapreplace(best, entry)[1]]
            else:
                continue
            rows[entry[1]] = row.clone()  # a view would keep its batch alive
    drawn = sorted((entry for part in of_all(best) for entry in part), reverse=True)[:num_images]
    numbers = {place: number for number, (_, place) in enumerate(drawn)}
    numbered = {numbers[place]: rows.pop(place) for place in list(rows) if place in numbers}
    mine = handed_over(numbered)
    return deque(mine.pop(number) for number in sorted(mine)), int(total(size))


def _batched(rows: deque[Tensor], first: int, last: int, size: int) -> list[Tensor]:
    """Return the next rows, numbers ``first`` to ``last`` - 1 of the draw, in batches."""
    batches = []
    for start in range(first, last, size):
        num = share(min(start + size, last)) - share(start)
        part = [rows.popleft() for _ in range(num)]
        alike = groupby(part, key=lambda row: row.shape)
        batches += [torch.stack(list(some)) for _, some in alike]
    return batches
