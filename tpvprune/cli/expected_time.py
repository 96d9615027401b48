"""How long a run may take: from passes over one image, or a trial on noise where that is quick."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tpvprune.cli.console import say
from tpvprune.cli.session import Subject
from tpvprune.passes.running import evaluating, frozen, tensors_of

_BATCH = 8
_REPEATS = 3
# Images of noise that a run is tried on, if their passes take at most so many seconds; at least so
# many say anything.
_SAMPLE, _PATIENCE, _FEWEST = 64, 5.0, 8
# Seconds grow with this power of the images, within a factor of two: 64 to 1,000 images of
# cifar_resnet20 and test_resnet.
_GROWTH = 0.6
# A seventh to a quarter of the passes of mobilenetv2_100 and tf_efficientnet_lite0, less than those
# of a ViT-B/16 (1,000 images, and 256).
_CUTTING = (
    "reading images, variance curves and least squares, which may take as long again, or longer "
    "where layers have thousands of channels"
)


@dataclass(frozen=True)
class Expected:
    """How long a run may take; `num` images of noise took `took` seconds, if that was tried."""

    seconds: float
    num: int = 0
    took: float = 0.0


def expected_of(
    subject: Subject,
    whole: Callable[[list[torch.Tensor]], None],
    num: int,
    passes: float,
) -> Expected:
    """Return how long `num` images take, from a trial on a few of noise where that is quick."""
    # The work beside the passes (variance curves, least squares) grows more slowly than the number
    # of images: all of them are used, but of many each lends fewer positions.
    sample = min(num // 4, _SAMPLE)
    if passes * sample > _PATIENCE or sample < _FEWEST:
        return Expected(num * passes)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(sample, *subject.example.shape[1:], generator=generator)
    batches = list(noise.to(subject.device).split(_SAMPLE))
    start = time.perf_counter()
    whole(batches)
    took = time.perf_counter() - start
    return Expected(took * (num / sample) ** _GROWTH, sample, took)


def say_time(expected: Expected, more: str = "", *, beside: str = _CUTTING) -> None:
    """Print how long it may take, and what comes on top of that; ``beside``: that of passes."""
    about = f"about {_duration(expected.seconds)}"
    if expected.num:
        say(
            f"{about} on this device: {expected.num} images of noise took "
            f"{_duration(expected.took)}; besides {more}reading images and measuring"
        )
    else:
        say(f"{about} of forward and backward passes on this device, besides {more}{beside}")
    say("dry run: nothing was written")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def seconds_of(subject: Subject) -> tuple[float, float]:
    """Return the seconds of one image in a forward and in an activation-only backward pass."""
    inputs = subject.example[:1].expand(_BATCH, -1, -1, -1).contiguous()
    times = [_passes(subject.model, inputs) for _ in range(1 + _REPEATS)][1:]
    forward, backward = (min(column) / len(inputs) for column in zip(*times, strict=True))
    return forward, backward


def _passes(model: nn.Module, inputs: torch.Tensor) -> tuple[float, float]:
    with evaluating(model), frozen(model), torch.enable_grad():
        inputs = inputs.clone().requires_grad_(True)
        start = time.perf_counter()
        returned = tensors_of(model(inputs))
        outputs = torch.stack([t.sum().cpu() for t in returned if t.requires_grad]).sum()
        middle = time.perf_counter()
        torch.autograd.grad(outputs, inputs)[0].cpu()
        return middle - start, time.perf_counter() - middle
