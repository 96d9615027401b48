"""Images to train on: small ones held in memory, larger ones cropped as they are decoded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data.transforms import MaybeToTensor, str_to_pil_interp
from torch import Tensor

from tpvprune.disk.digest import digest_of
from tpvprune.images.augmentation import HeldImages, crop_and_flip, crop_flip_and_mix, mix
from tpvprune.images.loading import HELD_BYTES, ImageBatches, chosen_items
from tpvprune.images.preprocessing import IMAGE_MODES, Preprocessing, in_colours
from tpvprune.images.sources import ImageSource

LARGEST_SMALL = 64
_SCALE, _RATIO = (0.35, 1.0), (3 / 4, 4 / 3)
_NUM_DRAWS = 5


def training_images(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    num_images: int | None = None,
    apart: Collection[int] = (),
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 4,
    labelled: bool = False,
    mixed: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    notice: Callable[[str], None] | None = None,
) -> tuple[HeldImages | ImageBatches, Callable[[Tensor], Tensor] | None]:
    """Choose images, and how they are augmented: anew on every pass, by torch's random state.

    Inputs of at most 64 pixels are shifted by up to 4 and mirrored; they are decoded once and
    held as bytes where they take at most 2 GiB. Of larger ones a random part of 0.35 to 1 of the
    area is cut out (Szegedy et al. 2014, Going deeper with convolutions, section 6), resized and
    mirrored as they are decoded, on every pass.

    ``num_images``: None for all. ``apart``: places of images that are left out. Returns re-iterable
    batches, and what is left to do to each batch of inputs, or None. Their ``identity`` tells
    images and manner from others, as a run that goes on has to.
    """
    if source.count is not None:
        rest = source.count - len(apart)
        num_images = rest if num_images is None else min(num_images, rest)
    items, total = chosen_items(source, num_images=num_images, seed=seed, apart=apart)
    names = [source.name, *(() if source.count is None else map(source.where, items()))]
    manner = (preprocessing.config, batch_size, labelled, mixed, *sorted(apart), num_images)
    identity = digest_of("\n".join(map(str, names)), *map(repr, manner))
    options: dict[str, Any] = {"workers": workers, "labelled": labelled, "notice": notice}

    def batches(
        source: ImageSource,
        preprocessing: Preprocessing,
        arranged: Callable[[Iterable[Any]], Iterable[Any]],
    ) -> ImageBatches:
        # As in memory, a last batch that is not full is left out of a pass that is shuffled.
        full = None if total is None else total - (total % batch_size if total > batch_size else 0)
        found = ImageBatches(
            source, lambda: itertools.islice(arranged(items()), full), preprocessing, full,
            batch_size, **options,
        )  # fmt: skip
        found.identity = identity
        return found

    if max(preprocessing.input_size[1:]) > LARGEST_SMALL:
        size = preprocessing.input_size[1:]
        cropped = _cropped(source, size, preprocessing.config)
        return batches(cropped, _normalised(preprocessing), _drawn), mix if mixed else None
    augment = crop_flip_and_mix if mixed else crop_and_flip
    if total is None or total * math.prod(preprocessing.input_size) > HELD_BYTES:
        return batches(source, preprocessing, _shuffled), augment
    config = preprocessing.config
    to_bytes = timm.data.create_transform(**config, is_training=False, normalize=False)
    as_bytes = dataclasses.replace(preprocessing, transform=to_bytes)
    found = ImageBatches(source, items, as_bytes, total, batch_size, **options)
    held = list(progress(found) if progress else found)
    images = torch.cat([batch[0] if labelled else batch for batch in held])
    labels = torch.cat([batch[1] for batch in held]) if labelled else None
    kept = HeldImages(
        images, mean=config["mean"], std=config["std"], batch_size=batch_size, augment=augment,
        labels=labels,
    )  # fmt: skip
    kept.identity = identity
    return kept, None


def _normalised(preprocessing: Preprocessing) -> Preprocessing:
    to_tensor = MaybeToTensor()
    mean, std = (torch.tensor(preprocessing.config[key])[:, None, None] for key in ("mean", "std"))
    return dataclasses.replace(
        preprocessing, transform=lambda image: (to_tensor(image) - mean) / std
    )


def _shuffled(items: Iterable[Any]) -> Iterable[Any]:
    # A stream has its own order.
    if not isinstance(items, (list, range)):
        return items
    return [items[i] for i in torch.randperm(len(items)).tolist()]


def _drawn(items: Iterable[Any]) -> Iterator[tuple[Any, list[float]]]:
    # Here, and not where they are used: decoding threads end in any order.
    for item in _shuffled(items):
        yield item, torch.rand(_NUM_DRAWS, dtype=torch.float64).tolist()


def _cropped(source: ImageSource, size: tuple[int, int], config: dict[str, Any]) -> ImageSource:
    """Return a source of (item, random numbers) whose images are cropped to the size."""
    mode = IMAGE_MODES[config["input_size"][0]]
    interpolation = str_to_pil_interp(config["interpolation"])

    def read(drawn: tuple[Any, list[float]]) -> tuple[Image.Image, Any]:
        item, numbers = drawn
        image, target = source.read(item)
        # To the model's colours first: an indexed image cannot be interpolated.
        image = in_colours(image, mode)
        part = image.resize(size[::-1], interpolation, box=random_box(*image.size, numbers))
        if numbers[4] < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return part, target

    return dataclasses.replace(source, read=read, where=lambda drawn: source.where(drawn[0]))


def random_box(width: int, height: int, numbers: list[float]) -> tuple[float, float, float, float]:
    """Choose a part of an image: its area uniformly, its shape uniformly in the logarithm.

    ``numbers``: at least four numbers in [0, 1): area, shape, left, top.
    """
    area = width * height * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * numbers[0])
    shape = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** numbers[1]
    across = min(width, math.sqrt(area * shape))
    down = min(height, math.sqrt(area / shape))
    left, top = numbers[2] * (width - across), numbers[3] * (height - down)
    return left, top, left + across, top + down
