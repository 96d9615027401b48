"""From an image to a model's input, as timm's `pretrained_cfg` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm.data
from torch import Tensor, nn

IMAGE_MODES = {1: "L", 3: "RGB"}


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
        crop_pct: Fraction of the resized image that is kept, in (0, 1].
        interpolation: nearest, bilinear, bicubic, lanczos, box, hamming or random.

    Returns:
        The preprocessing.

    Raises:
        ValueError: If an override does not fit the number of channels or its range.
    """
    known = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
    if interpolation is not None and interpolation not in known:
        raise ValueError(
            f"interpolation: expected one of {', '.join(known)}, found {interpolation!r}"
        )
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: expected a value in (0, 1], found {crop_pct}")
    overrides: dict[str, Any] = {"crop_pct": crop_pct, "interpolation": interpolation}
    if input_size is not None:
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
    if min(config["std"]) <= 0:
        raise ValueError(f"std: expected values above 0, found {config['std']}")
    transform = timm.data.create_transform(**config, is_training=False)
    return Preprocessing(tuple(config["input_size"]), config, transform)


def _per_channel(
    name: str, values: Sequence[float], channels: int, strict: bool
) -> tuple[float, ...]:
    if strict and len(values) not in (1, channels):
        raise ValueError(f"{name}: expected 1 or {channels} values, found {len(values)}")
    # One grey channel under a model's colour config: the mean of the colours serves.
    if len(values) != channels:
        return (sum(values) / len(values),) * channels
    return tuple(values)
