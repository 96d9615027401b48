"""Take branches out of a network."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.depth.records import Removal
from tpvprune.passes.running import sharing_copy

SEQUENCES = (nn.Sequential, nn.ModuleList)


class Zero(nn.Module):
    """In the place of the last module of a branch: zeros like its first argument."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros of the shape of ``x``."""
        return torch.zeros_like(x)


class Pass(nn.Module):
    """In the place of a module before that: its first argument."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``x``."""
        return x


def remove_branches(model: nn.Module, removal: Removal, *, share: bool = False) -> nn.Module:
    """Return a copy of a network without some of its branches.

    Members that leave a sequence leave a gap in its names: all other parameters are called as
    before.

    ``share``: whether the copy has the same parameters and buffers, not copies. ValueError if a
    module is not there, or a block is not a member of a sequence.
    """
    _check(model, removal)
    smaller = sharing_copy(model) if share else copy.deepcopy(model)
    for name in removal.blocks:
        parent, child = _parent(smaller, name)
        del parent._modules[child]
    for names, kind in ((removal.zeroed, Zero), (removal.passed, Pass)):
        for name in names:
            parent, child = _parent(smaller, name)
            parent._modules[child] = kind()
    return smaller


def _check(model: nn.Module, removal: Removal) -> None:
    modules = dict(model.named_modules())
    for name in removal.modules:
        if not name or name not in modules:
            raise ValueError(f"removed: expected modules of the model, found {name!r:.80}")
    for name in removal.blocks:
        if not isinstance(_parent(model, name)[0], SEQUENCES):
            raise ValueError(f"removed: expected members of nn.Sequential, found {name!r:.80}")
    twice = sorted(removal.modules)
    for name, after in itertools.pairwise(twice):
        if after == name or after.startswith(f"{name}."):
            raise ValueError(f"removed: expected {name!r:.80} once, found {after!r:.80} besides")


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child
