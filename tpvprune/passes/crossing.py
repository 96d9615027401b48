"""From the host to a device and back, so that neither waits for the other more than it must.

A GPU works through what it is told while the host is already ahead of it. A number that the host
wants to know, or memory that it hands over piece by piece, stops both until all is done.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import own

_MANY = 1 << 16  # signs of one row from which they are drawn on the device that needs them


def sent(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device: to a GPU through pinned memory, and without waiting for it.

    What is pinned already must not be overwritten before it has arrived.
    """
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory().to(device, non_blocking=True)
    return t.to(device=device, dtype=dtype)


def fetched(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one type and device on the CPU: one transfer, and one wait, for all."""
    if all(t.device.type == "cpu" for t in tensors):
        return tensors
    parts = torch.cat([t.reshape(-1) for t in tensors]).cpu().split([t.numel() for t in tensors])
    return tuple(p.view(t.shape) for p, t in zip(parts, tensors, strict=True))


def random_signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw +1 or -1 [B, ...] for B samples of this process, the same however they are batched.

    The same whatever the device, too, but for samples of 65,536 signs or more: those are drawn
    where ``like`` is, each from a seed of its own.
    """
    num, rest = shape[0] * num_processes(), shape[1:]
    if like.device.type != "cpu" and math.prod(rest) >= _MANY:
        seeds = own(torch.randint(1 << 62, (num,), generator=generator)).tolist()
        return signs_of(seeds, rest, like.device).to(like.dtype)
    signs = torch.randint(0, 2, (num, *rest), generator=generator, dtype=torch.int8)
    return sent(own(signs) * 2 - 1, like.device, like.dtype)


def signs_of(seeds: list[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw the signs of each sample from a seed of its own, on a device: [seeds, *shape], int8."""
    there = torch.Generator(device)
    signs = torch.empty(len(seeds), *shape, dtype=torch.int8, device=device)
    for row, seed in zip(signs, seeds, strict=True):
        row.random_(0, 2, generator=there.manual_seed(seed))
    return signs.mul_(2).sub_(1)
