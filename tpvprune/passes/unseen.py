"""Modules that run unseen: what follows the calls of a network does not see theirs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from tpvprune.passes.running import sharing_copy


class Unseen:
    """A forward that no mode sees.

    Attributes:
        is_block: Whether its output goes on where its first argument would without it; else it is
            added to something.
    """

    def __init__(self, forward: Any, *, is_block: bool) -> None:
        self._forward, self.is_block = forward, is_block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        with torch._C.DisableTorchFunction():
            return self._forward(*args, **kwargs)


def unseen_forward(module: nn.Module) -> Unseen | None:
    """Return the forward of a module that runs unseen, None where the module does not."""
    found = vars(module).get("forward")
    return found if isinstance(found, Unseen) else None


def with_unseen(model: nn.Module, blocks: Collection[str], modules: Collection[str]) -> nn.Module:
    """Return a copy, of the same parameters, some of whose blocks and modules run unseen."""
    copied = sharing_copy(model)
    for names, is_block in ((blocks, True), (modules, False)):
        for name in names:
            module = copied.get_submodule(name)
            module.forward = Unseen(module.forward, is_block=is_block)
    return copied
