"""The blocks of a network that can be refitted as one: repeated modules with several layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups
from tpvprune.repairs.branches import FITTED_MODULES

_LISTS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Block:
    """A module that runs once and returns one tensor, of which the pruned one has ``kept``.

    ``dim`` is the channel dimension of its output; None: all of it stays. ``depth`` counts the
    blocks that a stage holds; ``positions`` are those of the output of one input, ``macs`` what the
    dense block takes for it. ``batch_dim`` is where samples lie in what it reads and returns: 1 in
    sequence-first networks [T, B, C].
    """

    name: str
    bytes_per_input: int
    positions: int
    macs: float
    batch_dim: int
    dim: int | None = None
    kept: Tensor | None = None
    depth: int = 1

    def kept_of(self, dense_output: Tensor) -> Tensor:
        """Return the part of the dense block's output, samples first, that the pruned one makes."""
        if self.dim is None or self.kept is None:
            return dense_output
        return dense_output.index_select(self.dim, self.kept.to(dense_output.device))


def find_blocks(
    dense: nn.Module,
    pruned: nn.Module,
    x: Tensor,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
) -> tuple[list[Block], list[Block]]:
    """Find the blocks, and the stages, whose outputs can be matched between the two networks.

    A block has at least two convolutions or linear layers and is an element of a ``Sequential``
    or ``ModuleList``, or one of several children of the same kind; where such modules lie in each
    other the innermost are taken. It runs once, and its output is one tensor of which the kept
    channels are known. A stage is a module that holds several blocks, and of which the same is
    true.

    Both networks are in eval mode; ``groups`` are those of the dense one. Returns the blocks, and
    the stages, in the order in which they run.
    """
    names = _candidates(dense)
    parents = {name.rpartition(".")[0] for name in names} - {""}
    before, after = (_calls(model, [*names, *parents], x) for model in (dense, pruned))
    alone = _calls(dense, [*names, *parents], x[:1])
    found: dict[str, Block] = {}
    for name in before:
        dense_call, small, one = before[name], after.get(name), alone.get(name)
        if dense_call is None or small is None or one is None:
            continue
        batch_dim = _batch_dim(dense_call, one, len(x))
        if batch_dim is None:
            continue
        small, wanted = small.along(batch_dim), dense_call.along(batch_dim).out
        if not _splits(pruned.get_submodule(name), small, len(x)):
            continue
        size = small.out.numel() * small.out.element_size() // len(x)
        width = small.out.shape[1 if small.out.ndim == 4 else -1]
        macs = sum(c.macs for c in groups.costs if f"{c.module}.".startswith(f"{name}."))
        block = Block(name, size, small.out.numel() // width // len(x), macs, batch_dim)
        if wanted.shape != small.out.shape:
            dim, axis = groups.output_axes.get(name, (None, None))
            if dim is None or axis is None or (batch_dim and dim % wanted.ndim <= batch_dim):
                continue
            block = replace(block, dim=dim, kept=axis.kept(kept).nonzero().squeeze(1))
        if block.kept_of(wanted).shape == small.out.shape:
            found[name] = block
    blocks = [block for name, block in found.items() if name not in parents]
    depths = Counter(block.name.rpartition(".")[0] for block in blocks)
    return blocks, [replace(b, depth=depths[name]) for name, b in found.items() if depths[name] > 1]


@dataclass(frozen=True)
class BlockCall:
    """Arguments (from before the call, which may write into them) and output of one block.

    The arguments hold their samples in dimension ``batch_dim``, the output always comes first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    batch_dim: int = 0

    def along(self, batch_dim: int) -> BlockCall:
        """Return a call, as it was made, of a block that holds its samples in another dimension."""
        return replace(self, out=self.out.movedim(batch_dim, 0), batch_dim=batch_dim)

    def changed(self, change: Callable[[Any], Any], out: Tensor) -> BlockCall:
        """Return the call with what ``change`` makes of each argument, and another output."""
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return replace(self, args=tuple(map(change, self.args)), kwargs=kwargs, out=out)

    def run(self, forward: Callable[..., Tensor]) -> Tensor:
        """Call a block, or what computes it, and return its output, samples first."""
        return forward(*self.args, **self.kwargs).movedim(self.batch_dim, 0)

    def part(self, start: float, stop: float) -> BlockCall:
        """Return a share of the samples, from ``start`` to ``stop`` in [0, 1]."""
        return self._cut(lambda num: slice(round(start * num), round(stop * num)))

    def picked(self, mask: Tensor) -> BlockCall:
        """Return the samples, of which there may be several for each, of some inputs [B]."""
        return self._cut(lambda num: mask.repeat_interleave(num // len(mask)))

    def room_for(self, times: int, share: int) -> BlockCall:
        """Return a call with room for ``times / share`` as many samples, and without an output."""

        def room(value: Any) -> Any:
            if not self.is_of_samples(value):
                return value
            shape = list(value.shape)
            shape[self.batch_dim] = shape[self.batch_dim] // share * times
            return empty_as(value, shape)

        return self.changed(room, self.out[:0])

    def fill(self, other: BlockCall) -> None:
        """Copy the samples of another call, as many, to where those of this one are."""
        for own, given in zip(
            (*self.args, *self.kwargs.values()), (*other.args, *other.kwargs.values()), strict=True
        ):
            if other.is_of_samples(given):
                own.copy_(given)

    def is_of_samples(self, value: Any) -> bool:
        """Tell whether an argument holds samples.

        What has as many samples as the first argument and as many dimensions does; other arguments
        (position tables, sizes) are common to all.
        """
        first, dim = self.args[0], self.batch_dim
        return (
            isinstance(value, Tensor)
            and value.ndim == first.ndim
            and value.shape[dim] == first.shape[dim]
        )

    def _cut(self, chosen: Callable[[int], Any]) -> BlockCall:
        def cut(value: Any) -> Any:
            if not self.is_of_samples(value):
                return value
            which = chosen(value.shape[self.batch_dim])
            return value[(slice(None),) * self.batch_dim + (which,)]

        return self.changed(cut, self.out[chosen(len(self.out))])


def empty_as(some: Tensor, shape: Sequence[int]) -> Tensor:
    """Return uninitialised memory of a shape, in the type and layout of a tensor."""
    fast = some.ndim == 4 and some.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if fast else torch.contiguous_format
    return torch.empty(shape, dtype=some.dtype, device=some.device, memory_format=layout)


@dataclass
class Samples:
    """What a block is called with in all chunks, for the ``num`` inputs that it is fitted to."""

    num: int
    _whole: BlockCall | None = None
    _done: int = 0

    def add(self, call: BlockCall, num: int) -> None:
        """Copy the samples of the next inputs, so many, to their place."""
        if self._whole is None:  # all at once: parts that are joined later need twice the memory
            self._whole = call.room_for(self.num, num)
        start, self._done = self._done, self._done + num
        self._whole.part(start / self.num, self._done / self.num).fill(call)

    def call(self) -> BlockCall:
        """Return one call with all samples, and no output."""
        assert self._whole is not None
        return self._whole


def _batch_dim(call: BlockCall, one: BlockCall, num: int) -> int | None:
    """Return along which dimension what the first of ``num`` inputs makes of a call comes first.

    None where neither does: views of an image may come before images.
    """
    whole = [(call.args[0], one.args[0]), (call.out, one.out)]
    dims = (0, 1) if all(a.ndim == 3 for a, _ in whole) else (0,)
    return next((dim for dim in dims if all(_starts_with(*pair, num, dim) for pair in whole)), None)


def _starts_with(many: Tensor, one: Tensor, num: int, dim: int) -> bool:
    if one.ndim != many.ndim:
        return False
    many, one = many.movedim(dim, 0), one.movedim(dim, 0)
    if many.shape != (len(one) * num, *one.shape[1:]):
        return False
    size = float(one.detach().abs().max())
    return torch.allclose(many[: len(one)], one, rtol=1e-2, atol=1e-2 * size)


def _splits(module: nn.Module, call: BlockCall, num: int) -> bool:
    """Return whether a block treats its samples one by one, so that it can be run in parts."""
    samples = call.args[0].shape[call.batch_dim]
    if samples % num or len(call.out) % num or call.out.is_complex():
        return False
    half = call.part(0.5, 1.0)
    first = half.args[0].clone()
    try:
        with torch.no_grad():
            out = half.run(module)
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False  # an argument of another form belongs to the samples, too
    if not torch.equal(first, half.args[0]):
        return False  # it writes into its input, so it cannot be run twice on the same
    return out.shape == half.out.shape and torch.allclose(out, half.out, rtol=1e-2, atol=1e-4)


def _candidates(model: nn.Module) -> list[str]:
    """Return the names of the innermost modules of repeated kinds that have several layers."""
    wide = {
        name: module
        for name, module in model.named_modules()
        if sum(isinstance(m, FITTED_MODULES) for m in module.modules()) > 1
    }
    listed: set[str] = set()
    for name, parent in wide.items():
        children = {
            f"{name}.{child}" if name else child: type(module)
            for child, module in parent.named_children()
        }
        kinds = [kind for child, kind in children.items() if child in wide]
        alike = isinstance(parent, _LISTS) or (len(kinds) > 1 and len(set(kinds)) < len(kinds))
        listed |= {child for child in children if alike and child in wide}
    # A stage with a single block is none the less made of blocks.
    kinds = [type(wide[name]) for name in listed if not isinstance(wide[name], _LISTS)]
    names = [n for n, module in wide.items() if n in listed or type(module) in kinds]
    return [n for n in names if not any(other.startswith(n + ".") for other in names)]


def _calls(model: nn.Module, names: list[str], x: Tensor) -> dict[str, BlockCall | None]:
    """Return how each module is called, in order; None where it cannot be a block."""
    found: dict[str, BlockCall | None] = {}
    given: dict[str, BlockCall] = {}

    def before(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        given[name] = BlockCall(args, kwargs, x).changed(copied, x)

    def after(name: str, _module: nn.Module, _args: Any, _kwargs: Any, out: Any) -> None:
        call = given[name]
        first = next(iter(call.args), None)
        fits = isinstance(first, Tensor) and first.ndim and isinstance(out, Tensor)
        found[name] = replace(call, out=out) if fits and name not in found else None

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            start, end = partial(before, name), partial(after, name)
            hooks.enter_context(module.register_forward_pre_hook(start, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(end, with_kwargs=True))
        model(x)
    return found


def copied(value: Any) -> Any:
    """Return a copy of a tensor, which a layer may overwrite; others as they are."""
    return value.clone() if isinstance(value, Tensor) else value
