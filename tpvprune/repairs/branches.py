"""Follow a layer's pre-activation to where it ends: a BatchNorm, an addition, or another reader.

Compensation runs the dense and the pruned network through the same recogniser, so that a layer
and its target meet at the same place in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from tpvprune.groups.tracing.fields import flatten
from tpvprune.passes.batch_norms import BatchNormCall
from tpvprune.passes.crossing import sent
from tpvprune.passes.operations import CONTRACTIONS, function_name
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import own

FITTED = frozenset({"linear", "conv1d", "conv2d"})
FITTED_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d)
FEWER_ROWS = 8  # so many times, at most, for layers of several groups that are refitted
PASSING = frozenset({"batch_norm", "dropout", "to", "contiguous"})


@dataclass(frozen=True)
class Layer:
    """A layer that can be refitted, and its qualified name."""

    name: str
    module: Any


def layers_by_weight(model: nn.Module, without: Sequence[str] = ()) -> dict[int, Layer]:
    """Return the layer that owns each weight: id(weight) -> layer."""
    inside = tuple(f"{name}." for name in without)
    return {
        id(m.weight): Layer(name, m)
        for name, m in model.named_modules()
        if isinstance(m, FITTED_MODULES)
        and isinstance(m.weight, nn.Parameter)
        and not name.startswith(inside)
    }


@dataclass
class Plan:
    """Which positions of this process's inputs are looked at: the same in both runs.

    ``all_inputs`` are those of all processes, by default these. ``num_views`` of every image follow
    one another among them, and are of one process. ``common`` are the calls that see
    no input, such as those that make a table of positions: their layers stay as they are.
    ``batch_dims`` has where the inputs lie in what a call reads and gives, if not in dimension 0.
    The positions are drawn on the CPU, and kept on ``device``.
    """

    num_inputs: int
    rows_per_input: float
    min_rows: float
    seed: int
    _: KW_ONLY
    all_inputs: int = 0
    num_views: int = 1
    fewer: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    common: frozenset[int] = frozenset()
    batch_dims: Mapping[int, int] = field(default_factory=dict)
    _positions: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.all_inputs = self.all_inputs or self.num_inputs

    def thinned(self, factor: float) -> Plan:
        """Return a plan with so many times fewer positions."""
        rows_per_input, min_rows = self.rows_per_input / factor, self.min_rows / factor
        return replace(self, rows_per_input=rows_per_input, min_rows=min_rows)

    def inputs_first(self, call: int, t: Tensor) -> Tensor:
        """Return what a call reads or gives with its inputs in dimension 0."""
        return t.movedim(self.batch_dims.get(call, 0), 0)

    def num_rows(self, layer: Any, num_positions: int) -> int:
        """Return how many positions of all inputs, each with so many, a layer is fitted to."""
        return self.all_inputs * self._per_input(layer, num_positions)

    def _per_input(self, layer: Any, num_positions: int) -> int:
        # Of a depthwise layer every channel sees all rows, for a few unknowns.
        least = self.min_rows / min(getattr(layer, "groups", 1), self.fewer)
        wanted = max(least, self.rows_per_input * layer.weight[0].numel())
        return min(num_positions, max(1, math.ceil(wanted / self.all_inputs)))

    def positions(self, call: int, layer: Any, num_positions: int) -> Tensor:
        """Return [num_inputs, p] sampled positions of one call (all of them where few)."""
        if call not in self._positions:
            per_input = self._per_input(layer, num_positions)
            if per_input == num_positions:
                every = torch.arange(num_positions, device=self.device)
                self._positions[call] = every.expand(self.num_inputs, -1)
            else:
                generator = torch.Generator().manual_seed(self.seed * 100003 + call)
                num = self.num_inputs * num_processes()
                noise = torch.rand(num, num_positions, generator=generator)
                noise = own(noise.unflatten(0, (-1, self.num_views))).flatten(0, 1)
                self._positions[call] = sent(noise.topk(per_input, 1).indices, self.device)
        return self._positions[call]


@dataclass
class Branch:
    """A tensor that is a layer's pre-activation up to a per-channel affine map."""

    call: int
    scale: Tensor | None = None
    shift: Tensor | None = None
    norm: Any = None
    raw: bool = True  # still the pre-activation itself
    passed: bool = False  # another tensor carries on the branch


class BranchFollower(TorchFunctionMode):
    """Recognises layers, the BatchNorm behind them, and the additions that end a branch."""

    def __init__(self, layers: dict[int, Layer], plan: Plan) -> None:
        super().__init__()
        self.layers, self.plan = layers, plan
        self._seeing = True
        self.reset()

    def reset(self) -> None:
        """Forget everything; a new forward begins."""
        self.call = -1
        self.shared: set[int] = set()  # calls whose pre-activation has several readers
        # Weakly: an activation of all inputs together must not outlive its use.
        self._branches = WeakIdKeyDictionary()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let what runs meanwhile (a hook that runs a module again) pass unseen."""
        self._seeing = False
        try:
            yield
        finally:
            self._seeing = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._seeing:
            return func(*args, **kwargs)
        name = function_name(func)
        if name in CONTRACTIONS:
            self.call += 1
        if name in FITTED:
            args, kwargs = arguments_first(args, kwargs)
            layer = self.layers.get(id(args[1]))
            if layer is not None and args[0].ndim >= 2 and self.call not in self.plan.common:
                self._use(args[0])
                out = self.on_layer(layer, func, args, kwargs)
                self._follow(out, Branch(self.call))
                return out
        elif name == "add" and len(args) == 2 and not kwargs:
            return self._on_add(func, args)
        before = branch = self._branch(args[0]) if name in PASSING and args else None
        if before is not None and name == "batch_norm":
            branch = self.on_norm(before, args, kwargs)
        out = func(*args, **kwargs)
        if before is not None and branch is not None and out is not args[0]:
            self._follow(args[0], replace(before, passed=True))
            self._follow(out, branch)
        elif branch is None and (out is None or any(isinstance(o, Tensor) for o in flatten(out))):
            for t in flatten((args, kwargs)):
                self._use(t)
        return out

    def _follow(self, out: Tensor, branch: Branch) -> None:
        self._branches[out] = branch

    def _branch(self, tensor: Any) -> Branch | None:
        branch = self._branches.get(tensor) if isinstance(tensor, Tensor) else None
        ends = branch is None or branch.passed or branch.call in self.shared
        return None if ends else branch

    def _use(self, tensor: Any) -> None:
        """Note that something that is not followed reads, or overwrites, a tensor."""
        branch = self._branches.pop(tensor, None) if isinstance(tensor, Tensor) else None
        if branch is not None and branch.raw:
            self.shared.add(branch.call)

    def _on_add(self, func: Any, args: Any) -> Any:
        found = []
        for tensor, other in (args, args[::-1]):
            branch = self._branch(tensor)
            if branch is not None and isinstance(other, Tensor) and tensor.shape == other.shape:
                found.append((branch, tensor, other))
        # Two layers meet: the later one corrects for the earlier one.
        best = max(found, key=lambda f: f[0].call, default=None)
        for t in args:
            if best is None or t is not best[1] or args[0] is args[1]:
                self._use(t)
        if best is None or args[0] is args[1]:
            return func(*args)
        del self._branches[best[1]]
        return self.on_add(func, args, *best)

    def on_norm(self, branch: Branch, args: Any, kwargs: Any) -> Branch | None:
        """Return the branch behind a BatchNorm, or None where it ends there."""
        norm = BatchNormCall.of(args, kwargs)
        if branch.scale is not None or norm.running_mean is None:
            return None
        scale, shift = norm.scale_and_shift()
        return Branch(branch.call, scale, shift, norm.running_mean, raw=False)

    def on_layer(self, layer: Layer, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Run a layer."""
        raise NotImplementedError

    def on_add(self, func: Any, args: Any, branch: Branch, tensor: Tensor, other: Tensor) -> Any:
        """Run the addition that ends ``tensor``'s branch."""
        return func(*args)


def arguments_first(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a layer's call, the first three (input, weight, bias) by position."""
    rest = dict(kwargs)
    given = [rest.pop(name, None) for name in ("input", "weight", "bias")[len(args) :]]
    return (*args, *given), rest


def positions_first(out: Tensor, module: Any, num: int) -> Tensor:
    """Return [B, positions, C] from a convolution's or linear layer's output."""
    if not isinstance(module, nn.Linear):
        out = out.movedim(1, -1)
    return out.reshape(num, -1, out.shape[-1])
