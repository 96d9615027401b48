"""Repair 1: refit every layer to the dense network, in network order, without a gradient step.

A layer of the pruned network sees fewer inputs, and inputs that earlier repairs have changed.
Ridge least squares, towards its present weights, makes its pre-activation that of the dense
network again. Where the pre-activation is added to a shortcut, the target is dense branch + dense
shortcut - pruned shortcut, so that errors made upstream are corrected too.

All calibration inputs advance together, in chunks (:mod:`tpvprune.passes.lockstep`): when all have
come to a layer, the sums over their positions are added up, the layer is refitted, and all go on
with the new weights, so one pass through the network does the whole sequential repair. A chunk
waits where it stands if the activations of all chunks fit into the memory; else it forgets them,
and runs the block that it was in again.
"""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.groups import ChannelGroups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.crossing import sent
from tpvprune.passes.lockstep import Lockstep
from tpvprune.passes.memory import (
    is_lack_of_memory,
    release_memory,
    return_free_memory,
    spare_bytes,
)
from tpvprune.passes.moments import in_single
from tpvprune.passes.patches import count_positions, gather, patches_of, window_of
from tpvprune.passes.recomputation import segments_of
from tpvprune.passes.running import evaluating, fast_layout, on_device
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import global_indices, spread_weights, total
from tpvprune.repairs.activation_fit import ActivationFit, rows_to_hold
from tpvprune.repairs.blocks import BlockCall
from tpvprune.repairs.branches import (
    FEWER_ROWS,
    Branch,
    BranchFollower,
    Layer,
    Plan,
    layers_by_weight,
    positions_first,
)
from tpvprune.repairs.least_squares import LeastSquares
from tpvprune.repairs.targets import Targets, dense_targets, plan_for
from tpvprune.repairs.views import Views

Constrain = Callable[[str, Tensor, Tensor], Tensor]
"""``constrain(layer, refitted weights, curvature)``; see :func:`refitted`."""

TARGET_BYTES = 2 << 30  # of the dense values that all layers are fitted to
_CHUNK_BYTES = 1 << 28  # of the activations of one chunk
_MOST_CHUNKS = 64  # threads
_HELD = 4  # every so manieth input judges the ridge


def compensate_weights(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    ridge: float | None = None,
    rows_per_input: int = 60,
    min_rows: int = 65536,
    nonlinear: bool = True,
    max_bytes: int | None = None,
    seed: int = 0,
) -> nn.Module:
    r"""Return a copy of the pruned model whose layers are refitted to the dense one.

    For each convolution or linear layer, in the order of execution,

    .. math:: \min_{W, b} \; E \| W x + b - y^* \|^2 + \lambda \| W - W_0 \|^2

    with x the inputs of the layer in the (already repaired) pruned network, W_0 its present
    weights, y* the dense pre-activation (residual-corrected, see the module). The intercept b
    goes into the layer's bias or the BatchNorm behind it; layers with neither get none. A layer
    that runs several times in one forward stays as it is.

    Args:
        pruned: ``remove_channels(dense, groups, kept)``, or a later stage of it.
        dense: The model it came from.
        batches: Re-iterable of unlabeled inputs; all of them are used.
        groups: Channel groups of ``dense``.
        kept: What stayed, as given to :func:`tpvprune.remove_channels`.
        ridge: lambda relative to the mean variance of the layer's inputs; None: of several, the
            one with the least error on a quarter of the inputs that is held back from that fit
            (:mod:`tpvprune.repairs.least_squares`).
        rows_per_input: Sampled positions per unknown of a row of W ...
        min_rows: ... but at least so many, where the inputs have them.
        nonlinear: Where nothing but an activation phi reads y, or y behind its BatchNorm and a
            shortcut, go on from there towards min E || phi(.) - phi(.*) ||^2, as far as that holds
            on the inputs held back (:mod:`tpvprune.repairs.activation_fit`).
        max_bytes: Memory for the activations of waiting inputs; None: a quarter of what is free,
            1 GiB at least. With less of it more is computed again; the result stays. The dense
            values that are fitted to may take 2 GiB besides: large models look at fewer positions
            of every input.
        seed: Of the sampled positions.

    Returns:
        The repaired copy.
    """
    return refitted(
        pruned,
        dense,
        batches,
        groups=groups,
        kept=kept,
        ridge=ridge,
        rows_per_input=rows_per_input,
        min_rows=min_rows,
        nonlinear=nonlinear,
        max_bytes=max_bytes,
        seed=seed,
    )


def refitted(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups | None,
    kept: Mapping[str, Tensor],
    ridge: float | None,
    rows_per_input: int,
    min_rows: int,
    seed: int,
    max_bytes: int | None = None,
    nonlinear: bool = False,
    constrain: Constrain | None = None,
    wanted: Wanted | None = None,
) -> nn.Module:
    """Return a copy of the pruned model, every layer refitted in one pass over the inputs.

    The arguments are those of :func:`compensate_weights`. ``constrain`` is called with a layer's
    name, its refitted weights [groups, outputs, unknowns] and the curvature of the fit
    [groups, unknowns, unknowns]; it returns the weights to take. Without ``groups`` every width is
    as it was. ``wanted`` are the dense values, where they are known: :func:`wanted_of` of the same
    inputs, positions and seed.
    """
    inputs = list(unlabeled(batches))
    chunk = chunk_size(dense, inputs)
    room = spare_bytes(next(dense.parameters()).device) if max_bytes is None else max_bytes

    def refit(chunk: int) -> nn.Module:
        repaired = copy.deepcopy(pruned)
        chunks = rechunked(inputs, chunk)
        known = wanted or wanted_of(dense, chunks, rows_per_input, min_rows, seed=seed)
        fits = refits_towards(
            dense, chunks, known.plan, groups=groups, kept=kept, ridge=ridge, constrain=constrain,
            nonlinear=nonlinear, targets=known.targets,
        )  # fmt: skip
        Walk(repaired, fits, Views(chunks), room).run()
        spread_weights(repaired)
        return repaired

    while True:
        try:
            return refit(chunk)
        except Exception as error:
            if not is_lack_of_memory(error) or chunk == 1 or num_processes() > 1:
                raise
        # Outside of the handler, where the error no longer holds what filled the memory.
        warnings.warn(
            f"out of memory: the weights are refitted with {chunk // 2} inputs at a time instead "
            f"of {chunk}",
            stacklevel=3,
        )
        chunk, room = chunk // 2, room // 2
        release_memory()


@dataclass(frozen=True)
class Wanted:
    """What the dense network gives at the sampled positions; it may serve several refits."""

    plan: Plan
    targets: Targets


def wanted_of(
    dense: nn.Module, inputs: Sequence[Tensor], rows_per_input: int, min_rows: int, *, seed: int
) -> Wanted:
    """Run the dense network."""
    num = sum(map(len, inputs))
    plan = Plan(
        num, rows_per_input, min_rows, seed, all_inputs=int(total(num)), fewer=FEWER_ROWS,
        device=next(dense.parameters()).device,
    )  # fmt: skip
    plan = plan_for(plan, dense, inputs[0][:1], TARGET_BYTES)
    return Wanted(plan, dense_targets(dense, inputs, plan))


def refits_towards(
    dense: nn.Module,
    chunks: Iterable[Tensor],
    plan: Plan,
    *,
    groups: ChannelGroups | None,
    kept: Mapping[str, Tensor],
    ridge: float | None = None,
    constrain: Constrain | None = None,
    nonlinear: bool = True,
    linear: Sequence[str] = (),
    without: Sequence[str] = (),
    targets: Targets | None = None,
) -> Refits:
    """Run the dense network, and return what the layers of the pruned one are fitted to.

    ``chunks``: its inputs, in the order in which the pruned one will see them. ``groups``: channel
    groups of ``dense``; None where every width is as it was. ``linear``: modules in which no layer
    is fitted through its activation.
    """
    layers = layers_by_weight(dense).values() if groups is not None else ()
    rows = {r.name: _kept_rows(groups, kept, r) for r in layers if groups is not None}
    targets = targets or dense_targets(dense, chunks, plan, without=without)
    if constrain is not None or not nonlinear:
        targets.activations.clear()
    first = 0 if groups is None else _first_changed(groups, kept)
    first = min(first, targets.before_unseen)
    return Refits(
        plan, targets, rows, ridge, constrain, linear=tuple(linear), without=tuple(without),
        first=first,
    )  # fmt: skip


def _first_changed(groups: ChannelGroups, kept: Mapping[str, Tensor]) -> int:
    """Return the first call that sees a change: all before it give what they gave."""
    # A mean or softmax over the channels changes what is read before any of them is.
    mixed = (axis for noted in groups.mixers.values() for _, axis in noted)
    if any(not bool(axis.kept(kept).all()) for axis in mixed):
        return 0
    cut = (g for g in groups if g.name in kept and not bool(kept[g.name].all()))
    return min((reader.call for g in cut for reader in g.readers), default=sys.maxsize)


# ---- chunks ---------------------------------------------------------------------------------


def chunk_size(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Return how many inputs run at a time: few enough for the memory, not too many threads."""
    num = sum(map(len, inputs))
    fit = max(1, _CHUNK_BYTES // _bytes_per_input(model, inputs[0][:1]))
    return min(num, max(min(fit, 128), -(-num // _MOST_CHUNKS)))


def rechunked(inputs: Iterable[Tensor], size: int) -> list[Tensor]:
    """Return the same inputs in batches of ``size``; the last may be smaller."""
    chunks: list[Tensor] = []
    rest: list[Tensor] = []
    num = 0
    for x in inputs:
        rest.append(x)
        num += len(x)
        if num >= size:
            joined = rest[0] if len(rest) == 1 else torch.cat(rest)
            whole = num - num % size
            chunks += joined[:whole].split(size)
            rest, num = ([joined[whole:]] if num > whole else []), num - whole
    return [*chunks, torch.cat(rest)] if rest else chunks


def _bytes_per_input(model: nn.Module, x: Tensor) -> int:
    """Return what one input needs: a few activations of the largest size are alive at a time."""
    largest = _LargestOutput()
    with evaluating(model), torch.no_grad(), largest:
        model(on_device(x, model))
    return 6 * largest.num_bytes


class _LargestOutput(TorchFunctionMode):
    num_bytes = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.num_bytes = max(self.num_bytes, out.numel() * out.element_size())
        return out


def _kept_rows(groups: ChannelGroups, kept: Mapping[str, Tensor], layer: Layer) -> Tensor | None:
    for dim, axis in groups.param_axes.get(f"{layer.name}.weight", ()):
        if dim == 0:
            return axis.kept(kept).nonzero().squeeze(1).to(layer.module.weight.device)
    return None


# ---- the walk -------------------------------------------------------------------------------


class _AgainError(BaseException):
    """A chunk has given its part to the fit of a layer, and runs its block again afterwards."""

    def __init__(self, call: Hashable) -> None:
        super().__init__()
        self.call = call


@dataclass
class _Pending:
    """A layer whose refit waits for the addition or the norm behind it."""

    layer: Layer
    func: Any
    args: Any
    kwargs: Any
    patches: Tensor


@dataclass
class _Fed:
    """The problem of a call: linear, and through the activation at some positions of each input."""

    pending: _Pending
    branch: Branch
    linear: LeastSquares
    through: ActivationFit | None = None
    positions: int = 0


@dataclass
class Refits:
    """What all chunks share: targets, the problem that is being fed, and what was solved.

    ``rows`` says which outputs of each layer stayed; ``moved`` what the norm behind a call took up;
    calls before ``first`` need no fit.
    """

    plan: Plan
    targets: Targets
    rows: Mapping[str, Tensor | None]
    ridge: float | None
    constrain: Constrain | None = None
    linear: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    first: int = 0
    solved: set[int] = field(default_factory=set)
    moved: dict[int, Tensor] = field(default_factory=dict)
    _fed: dict[int, _Fed] = field(default_factory=dict)

    def feed(
        self, pending: _Pending, target: Tensor, branch: Branch, held: Tensor, offset: Tensor
    ) -> None:
        """Add the rows of one chunk to the problem of a call.

        ``target``: pre-activations wanted [inputs, positions, outputs]. ``held``: which of the
        inputs judge the ridge [inputs]. ``offset``: what is added to the pre-activation, after the
        branch's scale, before it is read: a shortcut, or the shift of a BatchNorm [inputs,
        positions, outputs] or less.
        """
        module, patches = pending.layer.module, in_single(pending.patches)
        target, bias = in_single(target), pending.args[2]
        if bias is not None and bias is not module.bias:  # made elsewhere, as in Swin V2: it stays
            target = target - bias
            offset = offset + (bias if branch.scale is None else bias * branch.scale)
        groups, num_rows, _ = patches.shape
        target = target.reshape(num_rows, -1)
        present, per_input = _outputs(patches, module), num_rows // len(held)
        if branch.call not in self._fed:
            self._fed[branch.call] = self._problem(pending, branch, per_input)
        fed = self._fed[branch.call]

        def by_group(rows: Tensor) -> Tensor:
            return rows.reshape(len(rows), groups, -1).transpose(0, 1)

        rows_held = held.repeat_interleave(per_input)
        fed.linear.add(patches, by_group(target - present), rows_held)
        if fed.through is None:
            return
        some = (torch.arange(num_rows) % per_input < fed.positions).nonzero().squeeze(1)
        rows_held, some = rows_held[some], sent(some, patches.device)
        scale = 1.0 if branch.scale is None else in_single(branch.scale)
        offset = in_single(offset).expand(len(held), per_input, -1).reshape(num_rows, -1)[some]
        now, wanted = (by_group(scale * y[some] + offset) for y in (present, target))
        fed.through.add(patches[:, some], now, wanted, rows_held)

    def _problem(self, pending: _Pending, branch: Branch, per_input: int) -> _Fed:
        module, num = pending.layer.module, self.plan.all_inputs * per_input
        groups, _, unknowns = pending.patches.shape
        free = module.bias is not None or branch.norm is not None
        few = num <= unknowns and self.constrain is None
        fed = _Fed(pending, branch, LeastSquares(free=free, few_rows=few))
        activation = self.targets.activations.get(branch.call)
        if pending.layer.name.startswith(tuple(f"{name}." for name in self.linear)):
            activation = None
        num_outputs = len(module.weight) // groups
        most = rows_to_hold(num, groups, unknowns, num_outputs)
        fed.positions = most // self.plan.all_inputs
        if activation is not None and fed.positions:
            slope = module.weight.new_ones(len(module.weight))
            slope = in_single(slope if branch.scale is None else branch.scale)
            fed.through = ActivationFit(activation, slope.reshape(groups, 1, -1), free)
        return fed

    @torch.no_grad()
    def solve(self, call: Hashable) -> None:
        """Refit the layer of a call with the rows of all chunks."""
        assert isinstance(call, int)
        fed = self._fed.pop(call)
        module, branch, problem = fed.pending.layer.module, fed.branch, fed.linear
        if self.constrain is None:
            fit = problem.solve(self.ridge)
            if fed.through is not None:
                fit = fed.through.improved(fit, given=self.ridge is not None)
            change, intercept = fit.change, fit.intercept
        else:
            change, intercept = self._constrained(fed.pending.layer, problem)
        module.weight.add_(change.mT.reshape(module.weight.shape).to(module.weight))
        shift = intercept.reshape(-1).to(module.weight)
        if module.bias is not None:
            module.bias.add_(shift)
        elif branch.norm is not None:
            branch.norm.sub_(shift)  # BN(y + b): the running mean takes up -b
            self.moved[call] = shift
        self.solved.add(call)

    def _constrained(self, layer: Layer, problem: LeastSquares) -> tuple[Tensor, Tensor]:
        assert self.constrain is not None
        fit, held = problem.folds()
        both = fit + held
        found = problem.solve(self.ridge)
        unknowns = both.gram.shape[1]
        gram = both.gram / both.count
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        curvature = gram.clone()
        curvature.diagonal(dim1=1, dim2=2).add_((min(found.ridge, 10.0) * scale)[:, None])
        present = layer.module.weight.reshape(len(gram), -1, unknowns).double()
        weights = self.constrain(layer.name, present + found.change.mT, curvature)
        change = (weights - present).mT
        return change, both.e_mean - both.x_mean @ change


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

    ``blocks``: what is fitted besides, each when all chunks are through it.
    """

    def __init__(
        self,
        model: nn.Module,
        fits: Refits,
        chunks: Views,
        max_bytes: int,
        *,
        blocks: Sequence[BlockFit] = (),
    ) -> None:
        self._model, self._fits, self._chunks = model, fits, chunks
        self._starts = chunks.starts
        self._room = max_bytes / max(1, self._starts[-1])
        self._blocks = {block.name: block for block in blocks}
        self._calls: dict[str, list[BlockCall]] = {}
        self._running = threading.local()
        self._lockstep: Lockstep[None] = Lockstep(len(chunks), self._fit)

    def run(self) -> None:
        """Refit all layers, and the blocks."""
        fast_layout(on_device(self._chunks[0][:1], self._model), self._model)  # asks once
        with evaluating(self._model), self._replaced():
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
            self._again(self._whole, (i,), {}, last=False)

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
            return
        block, calls = self._blocks.pop(key), self._calls.pop(key, [])
        if calls:
            call = BlockCall.joined(calls)
            calls.clear()
            with torch.enable_grad():
                block.fit(self._model.get_submodule(key), call)
            return_free_memory()

    def _stop(self, call: int, waiting: Iterable[Tensor], num: int) -> None:
        """Wait for the others at a fit, here or, with too much to hold, before the block.

        _AgainError if the block is to be run again.
        """
        if self._is_large(waiting, num):
            raise _AgainError(call)
        self._lockstep.meet(call)

    def _again(self, run: Callable[..., Any], args: Any, kwargs: Any, *, last: bool = True) -> Any:
        """Run a part of the network, anew after every fit at which it could not wait.

        Where not even its inputs can be held, a larger part is run again.

        ``last``: whether it will not run again: what it overwrote is read further on. _AgainError
        if a larger part is to be run again.
        """
        follower = self._running.run
        state = follower.state()
        is_large = self._is_large((*args, *kwargs.values()), follower.num_inputs)
        while True:
            given, named = [_copied(a) for a in args], {k: _copied(v) for k, v in kwargs.items()}
            try:
                out = run(*given, **named)
            except _AgainError as error:
                if is_large:
                    raise
                call = error.call
            else:
                if last:
                    _overwrite([*args, *kwargs.values()], [*given, *named.values()])
                return out
            del given, named  # not held while others run
            follower.go_back(state)
            self._lockstep.meet(call)

    def _is_large(self, values: Iterable[Any], num: int) -> bool:
        """Return whether all chunks together cannot hold such tensors of ``num`` inputs."""
        found = {v.untyped_storage().data_ptr(): v for v in values if isinstance(v, Tensor)}
        return sum(v.numel() * v.element_size() for v in found.values()) / num > self._room

    def _through(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block, and once more with its new weights where it is fitted as a whole.

        _AgainError if its inputs cannot be held while others run.
        """
        follower = getattr(self._running, "run", None)
        if follower is None:  # the fit of the block itself
            return forward(*args, **kwargs)
        state = follower.state()
        block = self._blocks.get(name)
        out = self._again(forward, args, kwargs, last=block is None)
        if block is None:
            return out
        mask = block.wanted[follower.own]
        if bool(mask.any()):
            call = BlockCall(args, kwargs, out).along(block.batch_dim).picked(mask)
            self._calls.setdefault(name, []).append(call)
        del out
        if self._is_large((*args, *kwargs.values()), follower.num_inputs):
            raise _AgainError(name)
        follower.go_back(state)
        self._lockstep.meet(name)
        return self._again(forward, args, kwargs)

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Let each block of the network be what is run again, or fitted."""
        again = set(segments_of(self._model))
        names = {n: m for n, m in self._model.named_modules() if m in again or n in self._blocks}
        for name, module in names.items():
            module.forward = partial(self._through, name, module.forward)
        try:
            yield
        finally:
            for module in names.values():
                del module.forward


def _copied(value: Any) -> Any:
    """Return a copy of a tensor, which a layer may overwrite; others as they are."""
    return value.clone() if isinstance(value, Tensor) else value


def _overwrite(values: Iterable[Any], copies: Iterable[Any]) -> None:
    """Give tensors what layers wrote into their copies."""
    for value, copied in zip(values, copies, strict=True):
        if isinstance(value, Tensor) and copied._version:
            value.copy_(copied)


class _RefitRun(BranchFollower):
    """Follows one chunk through the pruned network, and gives its rows to the fit of each layer."""

    def __init__(
        self,
        layers: dict[int, Layer],
        fits: Refits,
        own: slice,
        stop: Callable[[int, Iterable[Tensor], int], None],
        *,
        copies: int,
    ) -> None:
        super().__init__(layers, fits.plan)
        self._fits, self._stop, self.own = fits, stop, own
        self.num_inputs = own.stop - own.start
        self._held = global_indices(own.start, self.num_inputs) // copies % _HELD == _HELD - 1
        self._pending: dict[int, _Pending] = {}

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
        patches = patches_of(x, window, positions, getattr(module, "groups", 1))
        pending = _Pending(layer, func, args, kwargs, patches)
        if call in targets.sums or call in targets.normed:
            self._pending[call] = pending
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
        shortcut = gather(rows, self._positions(branch.call, module, rows.shape[1]))
        target = self._wanted(self._fits.targets.sums, branch.call, pending.layer) - shortcut
        if branch.scale is not None and branch.shift is not None:
            dead = branch.scale.abs() < 1e-8
            target = (target - branch.shift) / torch.where(dead, 1.0, branch.scale)
            if bool(dead.any()):  # what nobody sees stays as it is
                target[..., dead] = _outputs(pending.patches, module).view_as(target)[..., dead]
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
        wanted = values[call][self.own]
        return wanted if rows is None else wanted[..., rows]

    def _shift(self, branch: Branch) -> Tensor:
        """Return the shift of the BatchNorm behind the layer after it took up the intercept."""
        assert branch.shift is not None and branch.scale is not None
        moved = self._fits.moved.get(branch.call)
        return branch.shift if moved is None else branch.shift + moved * branch.scale

    def _refit(
        self,
        pending: _Pending,
        target: Tensor,
        branch: Branch,
        *alive: Tensor,
        offset: Tensor | None = None,
    ) -> None:
        offset = target.new_zeros(1) if offset is None else offset
        self._fits.feed(pending, target, branch, self._held, offset)
        pending.patches = pending.patches.new_empty(0)  # its rows are in the sums
        self._stop(branch.call, (pending.args[0], *alive), self.num_inputs)


def _outputs(patches: Tensor, module: Any) -> Tensor:
    """Return the layer's outputs [rows, outputs] of patches [groups, rows, unknowns]."""
    groups, num_rows, unknowns = patches.shape
    weight = module.weight.reshape(groups, -1, unknowns).to(patches)
    outputs = torch.einsum("gru,gou->rgo", patches, weight).reshape(num_rows, -1)
    return outputs if module.bias is None else outputs + module.bias.to(patches)
