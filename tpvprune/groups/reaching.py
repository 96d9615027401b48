"""Which groups reach an output that counts: others would score zero, and be cut to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups.records import ChannelGroups
from tpvprune.passes.observer import Observer
from tpvprune.passes.outputs import is_of_images
from tpvprune.passes.running import evaluating, frozen, named_outputs


def unseen(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: tuple[Any, ...],
    names: Sequence[str] | None = None,
) -> dict[str, str]:
    """Return the groups of which nothing reaches an output that counts, with the reason.

    ``names``: of the outputs that count; None: all of real numbers with one entry for each image.
    """
    readers = sorted({r.call for g in groups for r in g.readers})
    read: dict[int, Tensor] = {}
    moving = tuple(
        i.clone().requires_grad_() if isinstance(i, Tensor) and i.is_floating_point() else i
        for i in inputs
    )
    sizes = {len(i) for i in moving if isinstance(i, Tensor) and i.ndim}
    try:
        observer = Observer(set(readers), read.__setitem__)
        with evaluating(model), frozen(model), torch.enable_grad(), observer:
            counted = [
                t.sum()
                for name, t in named_outputs(model(*moving))
                if any(is_of_images(t, size) for size in sizes) and (names is None or name in names)
            ]
            graph = [call for call in readers if call in read and read[call].requires_grad]
            grads = torch.autograd.grad(counted, [read[call] for call in graph], allow_unused=True)
    except (RuntimeError, IndexError):  # no graph, or no real outputs: others say so
        return {}
    reaches = {call for call, grad in zip(graph, grads, strict=True) if grad is not None}
    if names is None:
        reason = "reaches no output with one entry per image, and no other is scored"
    else:
        reason = f"reaches none of the outputs that count: {', '.join(names)}"
    return {
        g.name: reason
        for g in groups
        if all(r.call in graph and r.call not in reaches for r in g.readers)
    }
