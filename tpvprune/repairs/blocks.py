"""The blocks of a network that can be refitted as one: repeated modules with several layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpvprune.groups import ChannelGroups

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
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
    positions: int = 1
    dim: int | None = None
    kept: Tensor | None = None
    depth: int = 1
    macs: float = 0.0
    batch_dim: int = 0

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

    Args:
        dense: The dense network, in eval mode.
        pruned: The pruned one.
        x: Example inputs [B, ...].
        groups: Channel groups of ``dense``.
        kept: What stayed.

    Returns:
        The blocks, and the stages, in the order in which they run.
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
        positions = small.out.numel() // width // len(x)
        if wanted.shape == small.out.shape:
            found[name] = Block(name, size, positions, batch_dim=batch_dim)
            continue
        dim, axis = groups.output_axes.get(name, (None, None))
        if dim is None or axis is None or (batch_dim and dim % wanted.ndim <= batch_dim):
            continue
        rows = axis.kept(kept).nonzero().squeeze(1)
        block = Block(name, size, positions, dim, rows, batch_dim=batch_dim)
        if block.kept_of(wanted).shape == small.out.shape:
            found[name] = block
    blocks = [block for name, block in found.items() if name not in parents]
    depths = Counter(block.name.rpartition(".")[0] for block in blocks)
    stages = [replace(b, depth=depths[name]) for name, b in found.items() if depths[name] > 1]

    def with_macs(block: Block) -> Block:
        inside = (c.macs for c in groups.costs if f"{c.module}.".startswith(f"{block.name}."))
        return replace(block, macs=sum(inside))

    return [with_macs(b) for b in blocks], [with_macs(s) for s in stages]


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

    def run(self, forward: Callable[..., Tensor]) -> Tensor:
        """Call a block, or what computes it, with the arguments.

        Args:
            forward: What is called.

        Returns:
            Its output, samples first.
        """
        return forward(*self.args, **self.kwargs).movedim(self.batch_dim, 0)

    def part(self, start: float, stop: float) -> BlockCall:
        """Return a share of the samples, from ``start`` to ``stop`` in [0, 1]."""
        return self._cut(lambda num: slice(round(start * num), round(stop * num)))

    def picked(self, mask: Tensor) -> BlockCall:
        """Return the samples of some of the network's inputs.

        Args:
            mask: Which inputs [B]; a block may see several samples of each.

        Returns:
            The call with those.
        """
        return self._cut(lambda num: mask.repeat_interleave(num // len(mask)))

    def room_for(self, times: int, share: int) -> BlockCall:
        """Return a call with room for ``times / share`` as many samples, and without an output."""

        def room(value: Any) -> Any:
            if not self.is_of_samples(value):
                return value
            return room_for(value, value.shape[self.batch_dim] // share * times, self.batch_dim)

        args, kwargs = tuple(map(room, self.args)), {k: room(v) for k, v in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs, out=self.out[:0])

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

        Args:
            value: An argument.

        Returns:
            True if so.
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

        return replace(
            self,
            args=tuple(map(cut, self.args)),
            kwargs={k: cut(v) for k, v in self.kwargs.items()},
            out=self.out[chosen(len(self.out))],
        )


def room_for(some: Tensor, num: int, dim: int = 0) -> Tensor:
    """Return an empty tensor for ``num`` samples, in the memory layout of some of them.

    Args:
        some: A few samples.
        num: How many there will be.
        dim: Along which dimension.

    Returns:
        Uninitialised memory.
    """
    shape = list(some.shape)
    shape[dim] = num
    fast = some.ndim == 4 and some.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if fast else torch.contiguous_format
    return torch.empty(shape, dtype=some.dtype, device=some.device, memory_format=layout)


@dataclass
class Samples:
    """What a block is called with in all chunks, for the inputs that it is fitted to.

    Args:
        num: How many inputs.
    """

    num: int
    _whole: BlockCall | None = None
    _done: int = 0

    def add(self, call: BlockCall, mask: Tensor) -> None:
        """Copy those of one chunk to their place.

        Args:
            call: Of the chunk.
            mask: Which of its inputs [B].
        """
        chosen, num = call.picked(mask), int(mask.sum())
        if self._whole is None:  # all at once: parts that are joined later need twice the memory
            self._whole = chosen.room_for(self.num, num)
        start, self._done = self._done, self._done + num
        self._whole.part(start / self.num, self._done / self.num).fill(chosen)

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
        if sum(isinstance(m, _LAYERS) for m in module.modules()) > 1
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
    handles = []

    def note(_: nn.Module, call: BlockCall | None, name: str) -> None:
        found[name] = None if name in found else call

    for name in names:
        handles += on_call(model.get_submodule(name), partial(note, name=name))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def on_call(
    module: nn.Module, then: Callable[[nn.Module, BlockCall | None], Tensor | None]
) -> list[RemovableHandle]:
    """Call ``then(module, call)`` after each forward of a block; it may replace the output.

    Args:
        module: A block.
        then: What is called; the call is None where no first argument or no output is a tensor.
            It removes the handles before it runs the block again.

    Returns:
        Handles of the hooks.
    """
    held: list[Any] = []

    def clone(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        held[:] = [tuple(map(clone, args)), {k: clone(v) for k, v in kwargs.items()}]

    def after(module: nn.Module, _args: Any, _kwargs: Any, out: Any) -> Any:
        args, kwargs = held
        fits = args and isinstance(args[0], Tensor) and args[0].ndim and isinstance(out, Tensor)
        return then(module, BlockCall(args, kwargs, out) if fits else None)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
