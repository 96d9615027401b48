"""What one output position of a convolution or linear call sees of its input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def gather(rows: Tensor, positions: Tensor, order: Tensor | None = None) -> Tensor:
    """Return the rows [B, p, C] at positions [B, p] of rows [B, positions, C], inputs in order."""
    inputs, positions = _ordered(positions, order, rows.device)
    flat = rows.reshape(-1, rows.shape[-1])
    place = inputs[:, None] * rows.shape[1] + positions
    return flat.index_select(0, place.flatten()).view(*positions.shape, -1)


def _ordered(
    positions: Tensor, order: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the numbers of the inputs [B] and their positions [B, p] in an order."""
    if order is None:
        return torch.arange(len(positions), device=device), positions.to(device)
    order = order.to(device)
    return order, positions.to(device).index_select(0, order)


@dataclass(frozen=True)
class Window:
    """What a convolution call looks at, each as (vertical, horizontal); conv1d has height 1."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    def outputs(self, x: Tensor) -> tuple[int, int]:
        """Return (height, width) of the output."""
        sizes, taps = [1, *x.shape[2:]][-2:], (self.dilation, self.kernel)
        high, wide = (
            (sizes[i] + self.before[i] + self.after[i] - reach) // self.stride[i] + 1
            for i, reach in enumerate(d * (k - 1) + 1 for d, k in zip(*taps, strict=True))
        )
        return high, wide

    def stays_inside(self, i: int, j: int, x: Tensor) -> bool:
        """Tell whether entry (i, j) of the kernel meets no padding of x [B, C, (H,) W]."""
        sizes, outputs = [1, *x.shape[2:]][-2:], self.outputs(x)
        firsts = [k * d - b for k, d, b in zip((i, j), self.dilation, self.before, strict=True)]
        lasts = [f + (n - 1) * s for f, n, s in zip(firsts, outputs, self.stride, strict=True)]
        return min(firsts) >= 0 and all(at < n for at, n in zip(lasts, sizes, strict=True))


def window_of(args: Any, kwargs: Any) -> Window | None:
    """Return the window of a call with these arguments: None for a linear layer."""
    # Of the call, not of the module: modules that pad by themselves hold other values.
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    v = {"stride": 1, "padding": 0, "dilation": 1, **dict(zip(names, args, strict=False)), **kwargs}
    if v["weight"].ndim == 2:
        return None

    def pair(value: Any, first: int) -> tuple[int, int]:
        sizes = [value] if isinstance(value, int) else value  # one number holds for both directions
        return (first if v["weight"].ndim == 3 else sizes[0], sizes[-1])

    kernel, stride, dilation = (
        pair(value, 1) for value in (v["weight"].shape[2:], v["stride"], v["dilation"])
    )
    if v["padding"] == "same":
        high, wide = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        before = (high // 2, wide // 2)
        return Window(kernel, stride, dilation, before, (high - before[0], wide - before[1]))
    padding = pair(0 if v["padding"] == "valid" else v["padding"], 0)
    return Window(kernel, stride, dilation, padding, padding)


def count_positions(x: Tensor, window: Window | None, num_inputs: int) -> int:
    """Return how many output positions a call has for each input, all its rows together."""
    if window is None:
        return x.numel() // x.shape[-1] // num_inputs
    return math.prod(window.outputs(x)) * (len(x) // num_inputs)


def patches_of(
    x: Tensor,
    window: Window | None,
    positions: Tensor,
    groups: int = 1,
    order: Tensor | None = None,
) -> Tensor:
    """Return what these output positions see: [groups, rows, inputs per group * kernel].

    Of several groups rows lie side by side in memory, as if it were [groups, inputs, rows]: few
    numbers of each are multiplied with those of many rows.
    """
    num, per_input = positions.shape
    if window is None:
        rows = gather(x.reshape(num, -1, x.shape[-1]), positions, order)
        return rows.reshape(1, num * per_input, -1)
    high, wide = [1, *x.shape[2:]][-2:]
    maps = (x.unsqueeze(2) if x.ndim == 3 else x).movedim(1, -1).reshape(-1, x.shape[1])
    inputs, positions = _ordered(positions, order, x.device)
    height, width = window.outputs(x)
    # Maps that belong to one input, such as the frames of a film, follow each other in the batch.
    own, within = positions // (height * width), positions % (height * width)
    rows = within // width * window.stride[0] - window.before[0]
    columns = within % width * window.stride[1] - window.before[1]
    first = (inputs[:, None] * (len(x) // num) + own) * (high * wide)
    taps = []
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            at, across = rows + i * window.dilation[0], columns + j * window.dilation[1]
            place = first + at.clamp(0, high - 1) * wide + across.clamp(0, wide - 1)
            seen = maps.index_select(0, place.flatten())  # whole rows: channels lie side by side
            if not window.stays_inside(i, j, x):
                inside = (at >= 0) & (at < high) & (across >= 0) & (across < wide)
                seen = seen * inside.reshape(-1, 1)
            taps.append(seen)
    if groups > 1:
        patches = torch.stack([tap.t() for tap in taps], 1)  # [C, k, rows]
        return patches.reshape(groups, -1, num * per_input).mT
    if len(taps) == 1:
        return taps[0].unsqueeze(0)
    return torch.stack(taps, 2).reshape(1, num * per_input, -1)
