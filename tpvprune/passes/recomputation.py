"""Gradient checkpointing of the passes: blocks keep their inputs, and are computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tpvprune.passes.observer import Observer

Entering = Callable[[nn.Module, tuple[Any, ...]], AbstractContextManager[tuple[Any, ...]]]


def segments_of(model: nn.Module) -> list[nn.Module]:
    """Return residual and transformer blocks, whose inside can be computed again.

    The innermost members of lists of modules that hold two convolutions or linear layers.
    """

    def is_large(module: nn.Module) -> bool:
        return sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in module.modules()) >= 2

    lists = [m for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]
    candidates = {child for each in lists for child in each if is_large(child)}
    return [
        m
        for m in candidates
        if not any(inner in candidates for inner in m.modules() if inner is not m)
    ]


@contextmanager
def called_through(run: Callable[..., Any], modules: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let calls of modules be ``run(value, forward, *args, **kwargs)``, each with its own value."""
    before = {module: module.__dict__.get("forward") for module in modules}
    for module, value in modules.items():
        module.forward = partial(run, value, module.forward)
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def recomputed(
    segments: Iterable[nn.Module], again: Callable[[], Observer], entering: Entering
) -> AbstractContextManager[None]:
    """Let segments keep only what ``entering`` gives, and run again, watched, in the backward."""

    def through(
        module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        observer = again()
        with entering(module, args) as entered:
            return checkpoint(
                forward,
                *entered,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), observer),
                **kwargs,
            )

    return called_through(through, {module: module for module in segments})
