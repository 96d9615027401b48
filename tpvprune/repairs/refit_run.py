"""One chunk of inputs through the pruned network, its rows given to the fit of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from tpvprune.passes.crossing import sent
from tpvprune.passes.patches import count_positions, gather, patches_of, window_of
from tpvprune.processes.shares import global_indices
from tpvprune.repairs.blocks import empty_as
from tpvprune.repairs.branches import Branch, BranchFollower, Layer, positions_first
from tpvprune.repairs.refits import Pending, Refits, outputs_of

_HELD = 4  # every so manieth input judges the ridge


@dataclass(eq=False)
class Held:
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
        """Return the memory of it."""
        return storages_of((*self.values, *self.copies))


def storages_of(values: Iterable[Any]) -> dict[int, UntypedStorage]:
    """Return the memory that activations take, by where it is."""
    tensors = (v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter))
    found = (t.untyped_storage() for t in tensors if t.layout == torch.strided)
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def _unwritten(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return a tensor of the shape and layout of what a call gives, without running it."""
    shape = func(*(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs).shape
    return empty_as(args[0], shape)


class RefitRun(BranchFollower):
    """Follows one chunk through the pruned network, and gives its rows to the fit of each layer."""

    def __init__(
        self,
        layers: dict[int, Layer],
        fits: Refits,
        own: slice,
        stop: Callable[[int, Sequence[Tensor]], None],
    ) -> None:
        super().__init__(layers, fits.plan)
        self._fits, self._stop, self.own = fits, stop, own
        self.num_inputs = own.stop - own.start
        views = fits.plan.num_views
        images = global_indices(own.start // views, self.num_inputs // views)
        held = (images % _HELD == _HELD - 1).repeat_interleave(views)
        self._num_held = int(held.sum())
        # Rows are taken in this order, so that those of the inputs held back are the last.
        self._order = sent(held.to(torch.uint8).argsort(stable=True), fits.plan.device)
        self._pending: dict[int, Pending] = {}
        self._holding: list[Held] = []

    @contextmanager
    def holding(self, held: Held) -> Iterator[None]:
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
