"""From an image to a model's input, as timm's `pretrained_cfg` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch import Tensor, nn

IMAGE_MODES = {1: "L", 3: "RGB"}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_MAX_SIDE = 2**16
_MAX_STRETCH = 100


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into a model input.

    Attributes:
        input_size: (channels, height, width).
        config: timm's data config (mean, std, crop_pct, interpolation, ...).
        transform: PIL image -> tensor [channels, height, width].
    """

    input_size: tuple[int, int, int]
    config: dict[str, Any]
    transform: Callable[[Any], Tensor]


def resolve_preprocessing(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> Preprocessing:
    """Take the evaluation preprocessing from a timm model's `pretrained_cfg`.

    Args:
        model: A timm model.
        input_size: (channels, height, width) instead of the model's.
        mean: One value, or one per channel, in [0, 1], instead of the model's.
        std: Likewise, above 0.
        crop_pct: Fraction of the resized image that is kept, 0.05 to 1.
        interpolation: nearest, bilinear, bicubic, lanczos, box or hamming.

    Returns:
        The preprocessing.

    Raises:
        ValueError: If an override does not fit the number of channels or its range.
    """
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, found {interpolation!r}"
        )
    # The image is first resized to the input size over crop_pct: a tiny one asks for all memory.
    if crop_pct is not None and not 0.05 <= crop_pct <= 1:
        raise ValueError(f"crop_pct: expected a value from 0.05 to 1, found {crop_pct}")
    overrides: dict[str, Any] = {"crop_pct": crop_pct, "interpolation": interpolation}
    if input_size is not None:
        if max(input_size) > _MAX_SIDE:
            raise ValueError(f"input_size: expected at most {_MAX_SIDE}, found {max(input_size)}")
        overrides["input_size"] = tuple(input_size)
    config = timm.data.resolve_model_data_config(model, args=overrides)
    channels = config["input_size"][0]
    if channels not in IMAGE_MODES:
        raise ValueError(
            f"input_size: expected 1 or 3 channels, found {channels}: only grey and "
            "RGB images are read"
        )
    for name, override in (("mean", mean), ("std", std)):
        config[name] = _per_channel(name, override or config[name], channels, override is not None)
    if not all(map(math.isfinite, config["mean"])):
        raise ValueError(f"mean: expected finite values, found {config['mean']}")
    if not all(0 < value < math.inf for value in config["std"]):
        raise ValueError(f"std: expected values above 0, found {config['std']}")
    transform = timm.data.create_transform(**config, is_training=False)
    return Preprocessing(tuple(config["input_size"]), config, transform)


def in_colours(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image and bring it to the colours of a model.

    Of 16 bits the upper 8 stay; transparency is left out, as in timm's datasets. ``mode``: "L" or
    "RGB". ValueError if its values have no known range, or it is so long and narrow that resizing
    its short side would take all memory.
    """
    if max(image.size) > _MAX_STRETCH * min(image.size):
        size = "x".join(map(str, image.size))
        raise ValueError(f"expected sides within a factor of {_MAX_STRETCH}, found {size}")
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits a channel, found floating-point pixels")
    if image.mode.startswith("I"):  # PIL itself would cut all above 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError("expected 8 or 16 bits a channel, found 32")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif isinstance(image.info.get("transparency"), bytes):  # PIL warns if not in two steps
        image = image.convert("RGBA")
    return image.convert(mode)


def _per_channel(
    name: str, values: Sequence[float], channels: int, strict: bool
) -> tuple[float, ...]:
    if strict and len(values) not in (1, channels):
        raise ValueError(f"{name}: expected 1 or {channels} values, found {len(values)}")
    # One grey channel under a model's colour config: the mean of the colours serves.
    if len(values) != channels:
        return (sum(values) / len(values),) * channels
    return tuple(values)
