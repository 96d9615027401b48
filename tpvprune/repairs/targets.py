"""What compensation fits the layers of a pruned network to: values of the dense one, sampled."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tpvprune.groups.tracing.fields import flatten
from tpvprune.passes.operations import ACTIVATIONS, function_name
from tpvprune.passes.patches import count_positions, gather, window_of
from tpvprune.passes.running import evaluating, fast_layout, on_device
from tpvprune.passes.unseen import unseen_forward
from tpvprune.repairs.activation_fit import Activation
from tpvprune.repairs.branches import (
    PASSING,
    Branch,
    BranchFollower,
    Layer,
    Plan,
    layers_by_weight,
    positions_first,
)


@dataclass
class Targets:
    """Sampled dense values by call: branch + shortcut sums, pre-activations where there is none.

    ``normed`` names the calls that nothing but a BatchNorm reads; ``activations`` what alone reads
    the value that a call ends in (output, BatchNorm of it, or sum with a shortcut). Behind call
    ``before_unseen`` the first module ran unseen.
    """

    outputs: dict[int, Tensor]
    sums: dict[int, Tensor]
    normed: set[int]
    activations: dict[int, Activation]
    before_unseen: int = sys.maxsize

    def shared(self) -> Targets:
        """Return the same values, of which either may be forgotten without the other."""
        copies = {n: getattr(self, n).copy() for n in ("outputs", "sums", "activations")}
        return replace(self, **copies)

    def forget(self, call: int) -> None:
        """Drop the values of a call that is fitted."""
        self.outputs.pop(call, None)
        self.sums.pop(call, None)


def dense_targets(
    dense: nn.Module, inputs: Iterable[Tensor], plan: Plan, *, without: Sequence[str] = ()
) -> Targets:
    """Run the dense network and keep what its layers should give.

    ``inputs``: batches, in the order in which the pruned model will see them. ``without``: modules
    whose layers do not matter.
    """
    run = _DenseRun(layers_by_weight(dense, without), plan)
    with evaluating(dense), torch.no_grad():
        for x in inputs:
            run.start_batch(len(x))
            moved = fast_layout(on_device(x, dense), dense)
            with run.watching(dense), run:
                dense(moved)
    return run.finish()


def plan_for(plan: Plan, dense: nn.Module, x: Tensor, max_bytes: int) -> Plan:
    """Return the plan that fits a network, of which ``x`` is one input [1, ...].

    Calls that see no input are left out of it, and layers that run several times: no one fit serves
    all of their calls. ``max_bytes``: memory for the targets of all layers, in all processes
    together; if they would take more there are fewer positions everywhere, one of every input at
    least.
    """
    calls, common, batch_dims = _calls(dense, x, plan)
    times = Counter(layer.name for layer, _ in calls.seen.values())
    repeated = {call for call, (layer, _) in calls.seen.items() if times[layer.name] > 1}
    plan = replace(plan, common=common | repeated, batch_dims=batch_dims)
    least = calls.target_bytes(plan.thinned(math.inf))
    while (taken := calls.target_bytes(plan)) > max(max_bytes, least):
        plan = plan.thinned(max(taken / max_bytes, 1.01))
    return plan


def blind_layers(model: nn.Module, x: Tensor) -> list[str]:
    """Return the layers that see no input [1, ...], such as those that make position tables."""
    calls, common, _ = _calls(model, x, Plan(1, 0, 0, 0))
    return list(dict.fromkeys(calls.seen[call][0].name for call in sorted(common)))


def _calls(
    model: nn.Module, x: Tensor, plan: Plan
) -> tuple[_Calls, frozenset[int], dict[int, int]]:
    """Return the calls on one input, those that are the same on two, and where inputs lie."""
    once, twice = (_Calls(layers_by_weight(model), plan) for _ in range(2))
    with evaluating(model), torch.no_grad():
        for run, inputs in ((once, x), (twice, torch.cat([x, x]))):
            with run:
                model(on_device(inputs, model))
    known = {call: num for call, (_, num) in twice.seen.items()}
    common = frozenset(c for c, (_, num) in once.seen.items() if known.get(c) == num)
    dims = {c: _doubled(shape, twice.shapes.get(c, shape)) for c, shape in once.shapes.items()}
    return once, common, {c: dim for c, dim in dims.items() if dim}


def _doubled(once: torch.Size, twice: torch.Size) -> int:
    """Return the one dimension that two inputs make twice as long; 0 if it is not one alone."""
    found = [d for d, sizes in enumerate(zip(once, twice, strict=False)) if sizes[0] != sizes[1]]
    one = len(once) == len(twice) and len(found) == 1 and found[0] < len(once) - 1
    return found[0] if one and once[found[0]] == 1 else 0


@dataclass(frozen=True)
class _Elementwise:
    """An activation, with the arguments it is called with; the same ones are equal."""

    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    func: Any = field(compare=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self.func(x, *self.args, **dict(self.kwargs))


def _activation(func: Any, args: Any, kwargs: Any) -> _Elementwise | None:
    """Return the activation that is called, if it is one of plain numbers."""
    name = function_name(func)
    others = [*args[1:], *kwargs.values()]
    if name not in ACTIVATIONS or any(isinstance(a, Tensor) for a in others):
        return None
    # Whether it overwrites its input is all that is told by a truth value.
    given = tuple(a for a in args[1:] if not isinstance(a, bool))
    named = tuple((k, v) for k, v in sorted(kwargs.items()) if k not in {"input", "inplace"})
    return _Elementwise(name, given, named, func)


class _DenseRun(BranchFollower):
    def __init__(self, layers: dict[int, Layer], plan: Plan) -> None:
        super().__init__(layers, plan)
        self._outputs: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._modules: dict[int, Any] = {}
        self._normed: set[int] = set()
        self._summed: set[int] = set()  # the calls whose target is a sum, as earlier batches showed
        self._start = self._size = 0
        self._ends = WeakIdKeyDictionary()  # tensor -> the call that ends in it
        self._sum: tuple[Tensor, int] | None = None
        self._activations: dict[int, Activation | None] = {}
        self._added = WeakIdKeyDictionary()  # by branches that run unseen
        self._before_unseen = sys.maxsize

    @contextmanager
    def watching(self, dense: nn.Module) -> Iterator[None]:
        """Know what goes on behind branches that run unseen: the pruned network has none."""
        with ExitStack() as stack:
            for module in dense.modules():
                if unseen_forward(module) is not None:
                    stack.callback(module.register_forward_hook(self._ran_unseen).remove)
            yield

    def _ran_unseen(self, module: nn.Module, args: Any, out: Any) -> None:
        forward = unseen_forward(module)
        self._before_unseen = min(self._before_unseen, max(self.call, 0))
        if forward is not None and forward.is_block:
            self._aim_behind(args[0], out)
        elif isinstance(out, Tensor):
            self._added[out] = True

    def _aim_behind(self, x: Tensor, out: Tensor) -> None:
        """Let the call that ends in ``x``, if any, aim at what ``out`` is in its place."""
        call = self._ends.pop(x, None) if isinstance(x, Tensor) else None
        if call is None:
            return
        module, branch = self._modules[call], self._branch(x)
        with self.paused():
            if call in self._sums:
                self._keep(self._sums, out, call, module)
            elif branch is not None and branch.call == call:
                self._keep(self._outputs, _before_norm(out, branch, module), call, module)
                self._follow(out, branch)
            self._ends[out] = call

    def start_batch(self, size: int) -> None:
        self._prefer_sums()
        self._start, self._size = self._start + self._size, size
        self._ends.clear()
        self._added.clear()
        self.reset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if not self._seeing:
            return out
        if out is None or any(isinstance(o, Tensor) for o in flatten(out)):
            self._note_readers(func, args, kwargs or {}, out)
        if self._sum is not None:  # only now: it may have been written into what was read
            total, call = self._sum
            self._ends[total], self._sum = call, None
        return out

    def _on_add(self, func: Any, args: Any) -> Any:
        unseen = [t in self._added for t in args]
        out = super()._on_add(func, args)
        if any(unseen):
            self._aim_behind(args[unseen.index(False)], out)
        return out

    def _note_readers(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what reads the value that a call ends in: an activation alone, or anything else."""
        for tensor in flatten((args, kwargs)):
            call = self._ends.get(tensor) if isinstance(tensor, Tensor) else None
            if call is None or (out is tensor and function_name(func) in PASSING):
                continue
            is_first = bool(args) and tensor is args[0]  # by keyword it counts as another reader
            found = _activation(func, args, kwargs) if is_first else None
            # Two readers that do the same are as good as one.
            if self._activations.setdefault(call, found) != found:
                self._activations[call] = None
            if out is tensor:  # overwritten
                del self._ends[tensor]

    def _follow(self, out: Tensor, branch: Branch) -> None:
        super()._follow(out, branch)
        if branch.passed:
            self._ends.pop(out, None)
        else:
            self._ends[out] = branch.call

    def on_layer(self, layer: Layer, func: Any, args: Any, kwargs: Any) -> Tensor:
        out = func(*args, **kwargs)
        if self.call not in self._summed:
            self._keep(self._outputs, out, self.call, layer.module)
        self._modules[self.call] = layer.module
        return out

    def on_add(self, func: Any, args: Any, branch: Branch, tensor: Tensor, other: Tensor) -> Any:
        out = func(*args)
        # A batch of one image meets an embedding in its own shape, as no other batch does.
        if branch.call in self._sums or not self._start:
            self._keep(self._sums, out, branch.call, self._modules[branch.call])
        self._ends.pop(tensor, None)
        self._sum = out, branch.call
        return out

    def on_norm(self, branch: Branch, args: Any, kwargs: Any) -> Branch | None:
        through = super().on_norm(branch, args, kwargs)
        if through is not None:
            self._normed.add(branch.call)
        return through

    def _keep(self, kept: dict[int, Tensor], out: Tensor, call: int, module: Any) -> None:
        rows = positions_first(self.plan.inputs_first(call, out), module, self._size)
        picked = self.plan.positions(call, module, rows.shape[1])
        if call not in kept:  # all at once: parts that are joined later need twice the memory
            kept[call] = rows.new_empty(*picked.shape, rows.shape[2])
        batch = slice(self._start, self._start + self._size)
        kept[call][batch] = gather(rows, picked[batch])

    def _prefer_sums(self) -> None:
        self._summed |= self._sums.keys() - self.shared
        for call in self._summed:
            self._outputs.pop(call, None)

    def finish(self) -> Targets:
        self._prefer_sums()
        no_target = (self.shared - self._summed) & self._sums.keys()
        sums = {call: kept for call, kept in self._sums.items() if call not in no_target}
        found = {c: f for c, f in self._activations.items() if f is not None and c not in no_target}
        normed = self._normed - self.shared
        return Targets(self._outputs, sums, normed, found, self._before_unseen)


def _before_norm(out: Tensor, branch: Branch, module: nn.Module) -> Tensor:
    """Return what the BatchNorm behind a layer, if there is one, turns into ``out``."""
    if branch.scale is None or branch.shift is None:
        return out
    shape = [-1] if isinstance(module, nn.Linear) else [-1] + [1] * (out.ndim - 2)
    dead = branch.scale.abs() < 1e-8  # what nobody sees
    scale = torch.where(dead, torch.inf, branch.scale)
    return (out - branch.shift.reshape(shape)) / scale.reshape(shape)


class _Calls(BranchFollower):
    """Sees, on one input, the calls of layers and how many positions they have."""

    def __init__(self, layers: dict[int, Layer], plan: Plan) -> None:
        super().__init__(layers, plan)
        self.seen: dict[int, tuple[Layer, int]] = {}
        self.shapes: dict[int, torch.Size] = {}

    def target_bytes(self, plan: Plan) -> int:
        """Return what the targets of all calls take on all inputs."""
        seen = (found for call, found in self.seen.items() if call not in plan.common)
        return sum(4 * len(r.module.weight) * plan.num_rows(r.module, num) for r, num in seen)

    def on_layer(self, layer: Layer, func: Any, args: Any, kwargs: Any) -> Tensor:
        self.seen[self.call] = (layer, count_positions(args[0], window_of(args, kwargs), 1))
        self.shapes[self.call] = args[0].shape
        return func(*args, **kwargs)
