"""Images for training: held as bytes, shuffled and augmented anew on every pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tpvprune.processes.shares import own


def crop_and_flip(images: Tensor, *, padding: int = 4) -> Tensor:
    """Shift every image by up to ``padding`` pixels and mirror every other one, at random.

    What enters at the border is 0. Draws from torch's global random state of the CPU,
    whatever the device of the images.

    Args:
        images: [B, C, H, W], of any type.
        padding: Largest shift in pixels, >= 0.

    Returns:
        Images of the same shape and type, in channels-last memory.

    Reference:
        He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385
    """
    num, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, num, 1))
    mirrored = torch.rand(num, 1) < 0.5
    columns = torch.arange(width)
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    which = torch.arange(num)[:, None, None]
    index = (i.to(images.device) for i in (which, rows[:, :, None], columns[:, None, :]))
    return padded[tuple(index)].permute(0, 3, 1, 2)


def mix(images: Tensor) -> Tensor:
    """Blend every image with another of the batch, or paste a part of that into it.

    By turns, at random: all are blended with one weight, or all get the same rectangle. A dense
    model that has learned its training images by heart says little about them; of mixtures it
    says more, and a label is not needed where the dense model teaches. Draws from torch's global
    random state of the CPU.

    Args:
        images: [B, C, H, W], uint8 or floating.

    Returns:
        Images of the same shape and type.

    Reference:
        Zhang et al. 2017, mixup, https://arxiv.org/abs/1710.09412; Yun et al. 2019, CutMix,
        https://arxiv.org/abs/1905.04899; Beyer et al. 2021, section 3, on mixtures in
        distillation, https://arxiv.org/abs/2106.05237
    """
    others = images[torch.randperm(len(images)).to(images.device)]
    blend, share = torch.rand(2).tolist()
    if blend < 0.5:
        mixed = share * images.float() + (1 - share) * others.float()
        return mixed.to(images.dtype) if images.is_floating_point() else mixed.round().byte()
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    top, bottom = _centred(side, height)
    left, right = _centred(side, width)
    pasted = images.clone()
    pasted[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return pasted


def _centred(share: float, size: int) -> tuple[int, int]:
    """Return the ends of a random interval of a share of the size, cut off at the borders."""
    centre, half = int(torch.randint(0, size + 1, ())), round(share * size) // 2
    return max(0, centre - half), min(size, centre + half)


def crop_flip_and_mix(images: Tensor) -> Tensor:
    """Apply ``crop_and_flip``, then ``mix``, to images [B, C, H, W] of any type."""
    return mix(crop_and_flip(images))


class HeldImages:
    """Re-iterable batches of images that are held in memory as bytes.

    Every pass shuffles, augments and normalises anew, by torch's global random state. A last
    batch that is not full is left out, if there is a full one.

    Args:
        images: [N, C, H, W], uint8; on the device where batches are wanted.
        mean: Per channel, of values in [0, 1].
        std: Likewise, above 0.
        batch_size: Images per batch, >= 1.
        augment: Of bytes [B, C, H, W]; None for none.
        labels: Class indices [N]; with them a batch is the pair (inputs, labels).
    """

    def __init__(
        self,
        images: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 128,
        augment: Callable[[Tensor], Tensor] | None = crop_and_flip,
        labels: Tensor | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"images: expected uint8 [N, C, H, W], found {images.dtype} "
                f"{tuple(images.shape)}: other inputs go to distill as a list of batches"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        self.images = images
        self.labels = labels
        self.batch_size = min(batch_size, len(images))
        self.augment = augment
        self.identity = b""  # of which images in what manner, if known
        shape = (1, images.shape[1], 1, 1)
        self._scale = 1 / (255 * torch.tensor(std, device=images.device).reshape(shape))
        self._shift = 255 * torch.tensor(mean, device=images.device).reshape(shape)

    def __len__(self) -> int:
        """Return the number of batches of one pass."""
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        """Shuffle and augment: inputs [B, C, H, W], float32; or (inputs, labels [B])."""
        order = torch.randperm(len(self.images)).to(self.images.device)
        for chosen in order.split(self.batch_size)[: len(self)]:
            images = self.images[chosen]
            # All processes draw for the whole batch, so that each draws the same.
            images = own(images if self.augment is None else self.augment(images))
            inputs = (images.float() - self._shift) * self._scale
            yield inputs if self.labels is None else (inputs, own(self.labels[chosen]))
