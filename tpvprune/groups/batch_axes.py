"""Where each reader's input holds the images of a batch: found by changing one of two at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tpvprune.groups.records import ChannelGroups, with_blocked
from tpvprune.passes.observer import Observer
from tpvprune.passes.positions import BatchAxis
from tpvprune.passes.running import evaluating

_MIXED = "reads several images at a time: it may fold or mix them"
_SMALL = 1e-4  # of the largest change: rounding, not what the image says

T = TypeVar("T")


@torch.no_grad()
def with_batch_axes(
    model: nn.Module, groups: ChannelGroups, inputs: tuple[Any, ...]
) -> ChannelGroups:
    """Return the groups whose readers know where their images lie, and the others blocked.

    A score is a sum over the positions of one image: there is none where a layer sees no image, or
    several mixed.
    """
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not inputs[0].ndim:
        return groups
    readers = {r.call: r for g in groups for r in g.readers}
    first, second, *others = _four(inputs[0])
    with evaluating(model):
        one = _read(model, set(readers), first, lambda _, a: a.shape)
        # Cloned: it may be overwritten.
        pair = _read(model, set(readers), torch.cat([first, second]), lambda _, a: a.clone())
        moved = [
            _read(model, set(readers), torch.cat(images), partial(_changes, pair))
            for images in ((others[0], second), (first, others[1]))
        ]
    axes: dict[int, BatchAxis] = {}
    reasons: dict[int, str] = {}
    for call, reader in readers.items():
        changes = [found.get(call) for found in moved]
        if call not in one or call not in pair:
            reasons[call] = "runs for some inputs only"
        elif one[call] == pair[call].shape:
            reasons[call] = "sees no input"
        elif changes[0] is None or changes[1] is None:
            reasons[call] = "reads as much as the values of its input say"
        else:
            found = BatchAxis.of(changes[0], changes[1], reader.channel_dim)
            if found is None:
                reasons[call] = _MIXED
            elif found.dim or 2 * found.inner != len(pair[call]):
                axes[call] = found
    if _MIXED in reasons.values():
        with evaluating(model):
            again = _read(model, set(readers), torch.cat([first, second]), partial(_differs, pair))
        random = (call for call, reason in reasons.items() if reason == _MIXED and again.get(call))
        reasons |= dict.fromkeys(random, "reads other numbers every time that the model runs")
    blocked = {
        g.name: f"is read by {readers[call].module}, which {reasons[call]}"
        for g in groups
        for call in sorted({r.call for r in g.readers} & reasons.keys(), reverse=True)
    }
    placed = tuple(
        replace(g, readers=tuple(replace(r, batch=axes.get(r.call)) for r in g.readers))
        for g in groups
    )
    return with_blocked(replace(groups, groups=placed), blocked)


def _changes(pair: dict[int, Tensor], call: int, a: Tensor) -> tuple[Tensor, ...] | None:
    """Return for each dimension which entries differ; None for another number of them, or none."""
    if call not in pair or a.shape != pair[call].shape or not a.numel():
        return None
    size = (a - pair[call]).abs()
    changed, dims = size > _SMALL * size.max(), range(a.ndim)
    return tuple(changed.any(tuple(d for d in dims if d != dim)) for dim in dims)


def _differs(pair: dict[int, Tensor], call: int, a: Tensor) -> bool:
    """Tell whether the same images gave other values, by more than rounding."""
    there = pair.get(call)
    if there is None or a.shape != there.shape:
        return True
    return bool(a.numel()) and bool((a - there).abs().max() > _SMALL * there.abs().max())


def _four(x: Tensor) -> list[Tensor]:
    """Return four different images [1, ...], as many as there are of the batch."""
    generator = torch.Generator().manual_seed(0)
    images = list(x[:2].split(1))
    while len(images) < 4:
        like = x[:1]
        if x.is_floating_point():
            noise = torch.randn(like.shape, generator=generator).to(like)
            images.append(like.mean() + (like.std() if like.numel() > 1 else 1.0) * noise)
        else:
            order = torch.randperm(like.numel(), generator=generator)
            images.append(like.flatten()[order].reshape(like.shape))
    return images


def _read(
    model: nn.Module, calls: set[int], x: Tensor, note: Callable[[int, Tensor], T]
) -> dict[int, T]:
    """Return what is noted of that which each call reads."""
    found: dict[int, T] = {}

    def see(call: int, a: Tensor) -> None:
        found[call] = note(call, a)

    with Observer(calls, see):
        model(x)
    return found
