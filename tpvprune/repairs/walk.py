"""All chunks through the pruned network, in lockstep: a layer is refitted when all are there.

A chunk waits where it stands if the activations of all chunks fit into the memory; else it forgets
them, and runs the block that it was in again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups.tracing.fields import flatten
from tpvprune.passes.clock import Progress
from tpvprune.passes.lockstep import Lockstep
from tpvprune.passes.memory import return_free_memory
from tpvprune.passes.recomputation import called_through, segments_of
from tpvprune.passes.running import evaluating, fast_layout, on_device
from tpvprune.repairs.blocks import BlockCall, Samples, copied
from tpvprune.repairs.branches import layers_by_weight
from tpvprune.repairs.last_reads import last_reads
from tpvprune.repairs.refit_run import Held, RefitRun, storages_of
from tpvprune.repairs.refits import Refits
from tpvprune.repairs.views import Views


class _AgainError(BaseException):
    """A chunk has given its part to the fit of a layer, and runs its block again afterwards."""

    def __init__(self, call: Hashable) -> None:
        super().__init__()
        self.call = call


@dataclass(frozen=True)
class BlockFit:
    """A block that is fitted as a whole once its layers are.

    ``wanted`` are the inputs of the network that it is fitted on [inputs] (BoolTensor);
    ``fit(module, call)`` moves its weights; ``batch_dim``: see ``blocks.Block``.
    """

    name: str
    wanted: Tensor
    fit: Callable[[nn.Module, BlockCall], None]
    batch_dim: int = 0


class Walk:
    """One pass of all chunks through the pruned network, in which every layer is refitted.

    ``blocks``: what is fitted besides, each when all chunks are through it. ``progress``: called
    with ("compensation", done, total) after every layer.
    """

    def __init__(
        self,
        model: nn.Module,
        fits: Refits,
        chunks: Views,
        max_bytes: int,
        *,
        blocks: Sequence[BlockFit] = (),
        progress: Progress | None = None,
    ) -> None:
        self._model, self._fits, self._chunks = model, fits, chunks
        self._starts = chunks.starts
        self._room = max_bytes / max(1, self._starts[-1])
        self._blocks = {block.name: block for block in blocks}
        self._calls: dict[str, Samples] = {}
        self._progress, self._num_layers = progress, fits.num_layers
        self._running = threading.local()
        self._lockstep: Lockstep[None] = Lockstep(len(chunks), self._fit)

    def run(self) -> None:
        """Refit all layers, and the blocks."""
        first = self._chunks[0][:1]
        fast_layout(on_device(first, self._model), self._model)  # asks once
        again = set(segments_of(self._model))
        parts = {n for n, m in self._model.named_modules() if m in again or n in self._blocks}
        around = {name for part in parts for name in _ancestors(part)} - parts
        last_read = last_reads(self._model, {*around, *parts}, first)
        with evaluating(self._model), self._replaced(parts, around, last_read):
            self._lockstep.run(self._walk)

    def _walk(self, i: int) -> None:
        layers = layers_by_weight(self._model, self._fits.without)
        own = slice(*self._starts[i : i + 2])
        run = RefitRun(layers, self._fits, own, self._stop)
        self._running.run = run
        with torch.no_grad(), run:
            self._again(self._whole, (i,), {}, Held([], None), last=False)

    def _whole(self, i: int) -> None:
        """Run the network on a chunk: a copy that nobody else holds, and layers may overwrite."""
        self._model(self._input(i))

    def _input(self, i: int) -> Tensor:
        # Made in a call of its own: while a chunk waits, nothing but the network holds it.
        chunk = self._chunks[i]
        moved = fast_layout(on_device(chunk, self._model), self._model)
        return moved.clone() if moved is chunk else moved

    def _fit(self, key: Hashable) -> None:
        """Fit what all chunks have come to: the layer of a call, or a block."""
        return_free_memory()
        if not isinstance(key, str):
            self._fits.solve(key)
            if self._progress is not None:
                self._progress("compensation", len(self._fits.solved), self._num_layers)
            return
        block, calls = self._blocks.pop(key), self._calls.pop(key, None)
        if calls is not None:
            with torch.enable_grad():
                block.fit(self._model.get_submodule(key), calls.call())
            return_free_memory()

    def _stop(self, call: int, waiting: Sequence[Tensor]) -> None:
        """Wait for the others at a fit, here or, with too much to hold, before the block."""
        if self._is_large(waiting):
            raise _AgainError(call)
        self._meet(call, waiting)

    def _meet(self, key: Hashable, waiting: Iterable[Tensor] = ()) -> None:
        """Wait for the others, with nothing held that nobody reads again."""
        self._running.run.forget(waiting)
        self._lockstep.meet(key)

    def _again(
        self,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        held: Held,
        *,
        last: bool = True,
    ) -> Any:
        """Run a part of the network, anew after every fit at which it could not wait.

        Where not even its inputs can be held, _AgainError lets a larger part be run again.
        ``last``: it will not run again, and what it overwrote is read further on.
        """
        follower = self._running.run
        state = follower.state()
        is_large = self._is_large(flatten((args, kwargs)))
        while True:
            given, named = list(map(copied, args)), {k: copied(v) for k, v in kwargs.items()}
            held.copies = list(flatten((given, named)))
            try:
                out = run(*given, **named)
            except _AgainError as error:
                if is_large or held.is_gone:
                    raise
                call = error.call
            else:
                if last and not held.is_gone:
                    _overwrite([*args, *kwargs.values()], [*given, *named.values()])
                return out
            del given, named  # not held while others run
            held.copies = []
            follower.go_back(state)
            self._meet(call)

    def _is_large(self, values: Iterable[Any]) -> bool:
        """Return whether all chunks cannot hold such values, and what else a run holds here."""
        follower = self._running.run
        held = storages_of(values) | follower.kept()
        return sum(s.nbytes() for s in held.values()) / follower.num_inputs > self._room

    def _enter(
        self, name: str, held: Held, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a block, once more with its new weights where it is fitted, or what holds blocks."""
        with self._running.run.holding(held):
            if not held.again:
                return forward(*args, **kwargs)
            block, last = self._blocks.get(name), held.last
            if block is not None:
                held.last = None
                self._gather(block, forward, args, kwargs, held)
                held.last = last
            return self._again(forward, args, kwargs, held)

    def _gather(
        self, block: BlockFit, forward: Callable[..., Any], args: Any, kwargs: Any, held: Held
    ) -> None:
        """Refit the layers of a block, keep what it is called with, and wait for its own fit."""
        follower = self._running.run
        state = follower.state()
        out = self._again(forward, args, kwargs, held, last=False)
        mask = block.wanted[follower.own]
        if bool(mask.any()):
            calls = self._calls.setdefault(block.name, Samples(int(block.wanted.sum())))
            # In one expression: nothing of it is held while others run.
            calls.add(
                BlockCall(args, kwargs, out).along(block.batch_dim).picked(mask), int(mask.sum())
            )
        del out
        held.copies = []
        if self._is_large(flatten((args, kwargs))):
            raise _AgainError(block.name)
        follower.go_back(state)
        self._meet(block.name)

    def _replaced(
        self, parts: Collection[str], around: Collection[str], last_read: Mapping[str, int]
    ) -> AbstractContextManager[None]:
        """Let each block of the network be what is run again, or fitted.

        ``parts``: the blocks; ``around``: what holds them.
        """

        def run(name: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self._running, "run"):  # the fit of a block itself
                return forward(*args, **kwargs)
            held = Held(list(flatten((args, kwargs))), last_read.get(name), again=name in parts)
            return self._enter(name, held, forward, args, kwargs)

        modules = {self._model.get_submodule(name): name for name in (*parts, *around)}
        return called_through(run, modules)


def _ancestors(name: str) -> list[str]:
    """Return the names of the modules that hold a module, the network ("") among them."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _overwrite(values: Iterable[Any], copies: Iterable[Any]) -> None:
    """Give tensors what layers wrote into their copies."""
    for value, copy in zip(values, copies, strict=True):
        if isinstance(value, Tensor) and copy._version:
            value.copy_(copy)
