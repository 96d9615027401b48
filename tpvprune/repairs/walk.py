"""All chunks through the pruned network, in lockstep: a layer is refitted when all are there.

A chunk waits where it stands if the activations of all chunks fit into the memory; else it forgets
them, and runs the block that it was in again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from tpvprune.groups.tracing.fields import flatten
from tpvprune.passes.clock import Progress
from tpvprune.passes.crossing import sent
from tpvprune.passes.lockstep import Lockstep
from tpvprune.passes.memory import return_free_memory
from tpvprune.passes.patches import count_positions, gather, patches_of, window_of
from tpvprune.passes.recomputation import segments_of
from tpvprune.passes.running import evaluating, fast_layout, on_device
from tpvprune.processes.shares import global_indices
from tpvprune.repairs.blocks import BlockCall, Samples
from tpvprune.repairs.branches import (
    Branch,
    BranchFollower,
    Layer,
    layers_by_weight,
    positions_first,
)
from tpvprune.repairs.last_reads import last_reads
from tpvprune.repairs.refits import Pending, Refits, outputs_of
from tpvprune.repairs.views import Views

_HELD = 4  # every so manieth input judges the ridge


class _AgainError(BaseException):
    """A chunk has given its part to the fit of a layer, and runs its block again afterwards."""

    def __init__(self, call: Hashable) -> None:
        super().__init__()
        self.call = call


@dataclass(frozen=True)
class BlockFit:
    """A block that is fitted as a whole once its layers are.

    ``wanted`` are the inputs of the network that it is fitted on [inputs] (BoolTensor);
    ``fit(module, call)`` moves its weights; ``batch_dim``: see
    :class:`tpvprune.repairs.blocks.Block`.
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
        run = _RefitRun(
            layers_by_weight(self._model, self._fits.without),
            self._fits,
            slice(*self._starts[i : i + 2]),
            self._stop,
            copies=self._chunks.num_views,
        )
        self._running.run = run
        with torch.no_grad(), run:
            self._again(self._whole, (i,), {}, _Held([], None), last=False)

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
        """Wait for the others at a fit, here or, with too much to hold, before the block.

        _AgainError if the block is to be run again.
        """
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
        held: _Held,
        *,
        last: bool = True,
    ) -> Any:
        """Run a part of the network, anew after every fit at which it could not wait.

        Where not even its inputs can be held, a larger part is run again.

        ``last``: whether it will not run again: what it overwrote is read further on; ``held``:
        what is held of its arguments. _AgainError if a larger part is to be run again.
        """
        follower = self._running.run
        state = follower.state()
        is_large = self._is_large(flatten((args, kwargs)))
        while True:
            given, named = [_copied(a) for a in args], {k: _copied(v) for k, v in kwargs.items()}
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

    def _around(
        self, last: int | None, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run what holds blocks."""
        follower = getattr(self._running, "run", None)
        if follower is None:
            return forward(*args, **kwargs)
        with follower.holding(_Held(list(flatten((args, kwargs))), last)):
            return forward(*args, **kwargs)

    def _through(
        self,
        name: str,
        last: int | None,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run a block, and once more with its new weights where it is fitted as a whole."""
        follower = getattr(self._running, "run", None)
        if follower is None:  # the fit of the block itself
            return forward(*args, **kwargs)
        block = self._blocks.get(name)
        held = _Held(list(flatten((args, kwargs))), None if block else last, again=True)
        with follower.holding(held):
            if block is not None:
                self._gather(block, forward, args, kwargs, held)
                held.last = last
            return self._again(forward, args, kwargs, held)

    def _gather(
        self, block: BlockFit, forward: Callable[..., Any], args: Any, kwargs: Any, held: _Held
    ) -> None:
        """Refit the layers of a block, keep what it is called with, and wait for its own fit.

        _AgainError if its inputs cannot be held while others run.
        """
        follower = self._running.run
        state = follower.state()
        out = self._again(forward, args, kwargs, held, last=False)
        mask = block.wanted[follower.own]
        if bool(mask.any()):
            call = BlockCall(args, kwargs, out).along(block.batch_dim)
            self._calls.setdefault(block.name, Samples(int(block.wanted.sum()))).add(call, mask)
        del out
        held.copies = []
        if self._is_large(flatten((args, kwargs))):
            raise _AgainError(block.name)
        follower.go_back(state)
        self._meet(block.name)

    @contextmanager
    def _replaced(
        self, parts: Iterable[str], around: Iterable[str], last_read: Mapping[str, int]
    ) -> Iterator[None]:
        """Let each block of the network be what is run again, or fitted.

        ``parts``: the blocks; ``around``: what holds them.
        """
        runs = {name: partial(self._through, name, last_read.get(name)) for name in parts}
        runs |= {name: partial(self._around, last_read.get(name)) for name in around}
        modules = {self._model.get_submodule(name): run for name, run in runs.items()}
        before = {module: module.__dict__.get("forward") for module in modules}
        for module, run in modules.items():
            module.forward = partial(run, module.forward)
        try:
            yield
        finally:
            for module, forward in before.items():
                del module.forward
                if forward is not None:
                    module.forward = forward


@dataclass(eq=False)
class _Held:
    """What the call of a module holds: its arguments, and the copies that it runs on.

    They are read up to contraction ``last`` (None: nobody knows). ``again``: they are what its part
    of the network is run again from.
    """

    values: list[Any]
    last: int | None
    again: bool = False
    copies: list[Any] = field(default_factory=list)
    is_gone: bool = False

    def storages(self) -> dict[int, UntypedStorage]:
        return storages_of((*self.values, *self.copies))


def storages_of(values: Iterable[Any]) -> dict[int, UntypedStorage]:
    """Return the memory that activations take, by where it is."""
    tensors = (v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter))
    found = (t.untyped_storage() for t in tensors if t.layout == torch.strided)
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def _ancestors(name: str) -> list[str]:
    """Return the names of the modules that hold a module, the network ("") among them."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _copied(value: Any) -> Any:
    """Return a copy of a tensor, which a layer may overwrite; others as they are."""
    return value.clone() if isinstance(value, Tensor) else value


def _overwrite(values: Iterable[Any], copies: Iterable[Any]) -> None:
    """Give tensors what layers wrote into their copies."""
    for value, copied in zip(values, copies, strict=True):
        if isinstance(value, Tensor) and copied._version:
            value.copy_(copied)


def _unwritten(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return a tensor of the shape and layout of what a call gives, without running it."""
    x = args[0]
    shape = func(*(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs).shape
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


class _RefitRun(BranchFollower):
    """Follows one chunk through the pruned network, and gives its rows to the fit of each layer."""

    def __init__(
        self,
        layers: dict[int, Layer],
        fits: Refits,
        own: slice,
        stop: Callable[[int, Sequence[Tensor]], None],
        *,
        copies: int,
    ) -> None:
        super().__init__(layers, fits.plan)
        self._fits, self._stop, self.own = fits, stop, own
        self.num_inputs = own.stop - own.start
        held = global_indices(own.start, self.num_inputs) // copies % _HELD == _HELD - 1
        self._num_held = int(held.sum())
        # Rows are taken in this order, so that those of the inputs held back are the last.
        self._order = sent(held.to(torch.uint8).argsort(stable=True), fits.plan.device)
        self._pending: dict[int, Pending] = {}
        self._holding: list[_Held] = []

    @contextmanager
    def holding(self, held: _Held) -> Iterator[None]:
        """Note what the module that runs meanwhile holds."""
        self._holding.append(held)
        try:
            yield
        finally:
            self._holding.pop()

    def kept(self, waiting: Iterable[Tensor] = ()) -> dict[int, UntypedStorage]:
        """Return what is read again, or needed to run the innermost part again."""
        inner = next((h for h in reversed(self._holding) if h.again), None)
        kept = storages_of((*waiting, *(p.args[0] for p in self._pending.values())))
        for held in self._holding:
            if held is inner or held.last is None or held.last >= self.call:
                kept |= held.storages()
        return kept

    def forget(self, waiting: Iterable[Tensor] = ()) -> None:
        """Free the memory of arguments that nobody reads again."""
        kept = self.kept(waiting)
        for held in self._holding:
            for pointer, storage in held.storages().items():
                if pointer not in kept and storage.resizable():  # not what numpy owns
                    storage.resize_(0)
                    held.is_gone = True

    def state(self) -> tuple[int, set[int]]:
        """Return where the run is, to come back to."""
        return self.call, set(self.shared)

    def go_back(self, state: tuple[int, set[int]]) -> None:
        """Return to an earlier state."""
        self.call, self.shared = state[0], set(state[1])
        self._pending.clear()

    def on_layer(self, layer: Layer, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Refit a layer, or let it wait for the addition or norm behind it."""
        module, call, targets = layer.module, self.call, self._fits.targets
        if call < self._fits.first or call in self._fits.solved:
            return func(*args, **kwargs)
        x, window = self.plan.inputs_first(call, args[0]), window_of(args, kwargs)
        positions = self._positions(call, module, count_positions(x, window, self.num_inputs))
        patches = patches_of(x, window, positions, getattr(module, "groups", 1), order=self._order)
        pending = Pending(layer, func, args, kwargs, patches)
        if call in targets.sums or call in targets.normed:
            self._pending[call] = pending
            if call not in targets.sums:  # the norm alone reads it, and it is overwritten there
                return _unwritten(func, args, kwargs)
        else:
            self._refit(pending, self._wanted(targets.outputs, call, layer), Branch(call))
        return func(*args, **kwargs)

    def on_add(self, func: Any, args: Any, branch: Branch, tensor: Tensor, other: Tensor) -> Any:
        """Refit the layer whose branch ends here, towards dense sum - pruned shortcut."""
        pending = self._pending.pop(branch.call, None)
        if pending is None:
            return func(*args)
        module = pending.layer.module
        rows = self.plan.inputs_first(branch.call, other)
        rows = positions_first(rows, module, self.num_inputs)
        positions = self._positions(branch.call, module, rows.shape[1])
        shortcut = gather(rows, positions, order=self._order)
        target = self._wanted(self._fits.targets.sums, branch.call, pending.layer) - shortcut
        if branch.scale is not None and branch.shift is not None:
            dead = branch.scale.abs() < 1e-8
            target = (target - branch.shift) / torch.where(dead, 1.0, branch.scale)
            if bool(dead.any()):  # what nobody sees stays as it is
                present = outputs_of(pending.patches, module).transpose(0, 1)
                target[..., dead] = present.reshape(target.shape)[..., dead]
        offset = shortcut if branch.shift is None else shortcut + branch.shift
        self._refit(pending, target, branch, tensor, other, offset=offset)
        value = pending.func(*pending.args, **pending.kwargs)
        if branch.scale is not None:
            shape = [-1] + [1] * (value.ndim - 2) if not isinstance(module, nn.Linear) else [-1]
            scale, shift = branch.scale, self._shift(branch)
            value = value * scale.reshape(shape) + shift.reshape(shape)
        tensor.copy_(value)
        return func(*args)

    def on_norm(self, branch: Branch, args: Any, kwargs: Any) -> Branch | None:
        """Refit a layer that a norm reads: without a bias, its mean takes up the intercept."""
        through = super().on_norm(branch, args, kwargs)
        targets = self._fits.targets
        waits = branch.call in self._pending and branch.call not in targets.sums
        if through is None or not waits:
            return through
        pending = self._pending.pop(branch.call)
        wanted = self._wanted(targets.outputs, branch.call, pending.layer)
        self._refit(pending, wanted, through, args[0], offset=through.shift)
        args[0].copy_(pending.func(*pending.args, **pending.kwargs))
        return super().on_norm(branch, args, kwargs)

    def _positions(self, call: int, module: Any, num_positions: int) -> Tensor:
        return self.plan.positions(call, module, num_positions)[self.own]

    def _wanted(self, values: Mapping[int, Tensor], call: int, layer: Layer) -> Tensor:
        rows = self._fits.rows.get(layer.name)
        wanted = values[call][self.own].index_select(0, self._order)
        return wanted if rows is None else wanted[..., rows]

    def _shift(self, branch: Branch) -> Tensor:
        """Return the shift of the BatchNorm behind the layer after it took up the intercept."""
        assert branch.shift is not None and branch.scale is not None
        moved = self._fits.moved.get(branch.call)
        return branch.shift if moved is None else branch.shift + moved * branch.scale

    def _refit(
        self,
        pending: Pending,
        target: Tensor,
        branch: Branch,
        *alive: Tensor,
        offset: Tensor | None = None,
    ) -> None:
        offset = target.new_zeros(1) if offset is None else offset
        self._fits.feed(pending, target, branch, self._num_held, offset)
        pending.patches = pending.patches.new_empty(0)  # its rows are in the sums
        self._stop(branch.call, (pending.args[0], *alive))
