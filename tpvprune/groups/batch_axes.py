"""Where each reader's input holds the images of a batch: found by changing one of two at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups.records import ChannelGroups, with_blocked
from tpvprune.passes.observer import Observer
from tpvprune.passes.positions import BatchAxis
from tpvprune.passes.running import evaluating

_SMALL = 1e-4  # of the largest change: rounding, not what the image says


@torch.no_grad()
def with_batch_axes(
    model: nn.Module, groups: ChannelGroups, inputs: tuple[Any, ...]
) -> ChannelGroups:
    """Return the groups whose readers know where their images lie, and the others blocked.

    A score is a sum over the positions of one image. It can be taken neither where a layer sees no
    image (one that makes a table of positions), nor where the entries of an activation belong to
    several.
    """
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not inputs[0].ndim:
        return groups
    readers = {r.call: r for g in groups for r in g.readers}
    first, second, *others = _four(inputs[0])
    with evaluating(model):
        one = {call: a.shape for call, a in _read(model, set(readers), first).items()}
        pair = _read(model, set(readers), torch.cat([first, second]))
        moved = [
            _changes(model, pair, torch.cat(images))
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
                reasons[call] = "reads several images at a time: it may fold or mix them"
            elif not found.is_usual(pair[call].shape[found.dim], 2):
                axes[call] = found
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


def _changes(
    model: nn.Module, pair: dict[int, Tensor], x: Tensor
) -> dict[int, tuple[Tensor, ...] | None]:
    """Return for each call and dimension of what it reads which entries differ from ``pair``.

    None where there is another number of them, or none.
    """
    found: dict[int, tuple[Tensor, ...] | None] = {}

    def see(call: int, a: Tensor) -> None:
        if call not in pair or a.shape != pair[call].shape or not a.numel():
            found[call] = None
            return
        size = (a - pair[call]).abs()
        changed = size > _SMALL * size.max()
        dims = range(a.ndim)
        found[call] = tuple(changed.any(tuple(d for d in dims if d != dim)) for dim in dims)

    with Observer(set(pair), see):
        model(x)
    return found


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


def _read(model: nn.Module, calls: set[int], x: Tensor) -> dict[int, Tensor]:
    """Return what each call reads."""
    found: dict[int, Tensor] = {}

    def see(call: int, a: Tensor) -> None:
        found[call] = a.clone()  # it may be overwritten

    with Observer(calls, see):
        model(x)
    return found
