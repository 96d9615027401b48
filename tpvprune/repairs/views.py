"""Further views of the calibration images, for fits with more weights than few images determine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import overload

import torch
from torch import Tensor, nn

from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import own
from tpvprune.repairs.chunks import rechunked

_LEAST_AREA = 0.5  # of a part; smaller ones are no longer like what the network will see


class Views(Sequence[Tensor]):
    """Chunks of images in which every image is followed by further views of it.

    The first is its mirror image. Each other one is a part of it, of half to all of its area at
    a random place, enlarged to its size, every other one mirrored. They are made anew whenever a
    chunk is asked for, and are the same every time and however the images are cut into chunks.

    ``chunks``: batches [b, C, H, W]; with one view each, inputs of any kind [b, ...].
    """

    def __init__(self, chunks: Sequence[Tensor], num_views: int = 1, seed: int = 0) -> None:
        self._chunks, self.num_views = chunks, num_views
        self._starts = [0, *accumulate(map(len, chunks))]
        generator = torch.Generator().manual_seed(seed)
        num = (
            self.num_images * num_processes()
        )  # in the order of all images, of which some are here
        self._places = own(torch.rand(num, max(0, num_views - 2), 4, generator=generator))

    @property
    def num_images(self) -> int:
        """Different images in all chunks."""
        return self._starts[-1]

    @property
    def starts(self) -> list[int]:
        """Where each chunk begins among the views of all images, and where the last ends."""
        return [self.num_views * start for start in self._starts]

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self._chunks)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """Return a chunk [b * views, C, H, W]: all views of the first image, then of the second."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        x, start = self._chunks[index], self._starts[range(len(self))[index]]
        if self.num_views == 1:
            return x
        places = self._places[start : start + len(x)]
        parts = [
            torch.stack([_part(image, *place) for image, place in zip(x, own, strict=True)])
            for own in places.unbind(1)
        ]
        return torch.stack([x, x.flip(3), *parts], 1).flatten(0, 1)


def views_of(inputs: Sequence[Tensor], size: int, num_views: int, seed: int = 0) -> Views:
    """Return views of batches [b, C, H, W], in chunks of at most ``size``, or of one image.

    Inputs of other kinds [b, ...] have one view, themselves.
    """
    num_views = num_views if inputs[0].ndim == 4 else 1
    return Views(rechunked(inputs, max(1, size // num_views)), num_views, seed)


def _part(image: Tensor, area: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Return a part of an image [C, H, W] at its size; four numbers in [0, 1) say which."""
    height, width = image.shape[-2:]
    side = float(_LEAST_AREA + (1 - _LEAST_AREA) * area) ** 0.5
    h, w = max(1, round(side * height)), max(1, round(side * width))
    top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
    part = image[None, :, top : top + h, left : left + w]
    part = part.flip(3) if mirrored < 0.5 else part
    return nn.functional.interpolate(part, (height, width), mode="bilinear")[0]
