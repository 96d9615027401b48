"""What a forward computes from what: one node a function, and the modules that it ran in."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.depth.additions import is_addition
from tpvprune.groups.tracing.fields import flatten
from tpvprune.passes.operations import function_name
from tpvprune.passes.running import evaluating


@dataclass(frozen=True)
class Node:
    """A call of a function, of those that see the input of the network.

    Attributes:
        name: Of the function.
        inputs: The nodes that it read.
        modules: Names of the modules that it ran in, the outermost first.
        shape: Of what it returned.
    """

    name: str
    inputs: frozenset[int]
    modules: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def channel_dim(self) -> int:
        """Of what a convolution or linear layer returned."""
        return len(self.shape) - 1 if self.name == "linear" else 1


@dataclass(frozen=True)
class Addition:
    """A sum of two tensors of one shape: the nodes of it and of its terms."""

    number: int  # of the additions of any two tensors in a forward
    node: int
    terms: tuple[int, int]


@dataclass
class Trace:
    """One forward. Node 0 is its input."""

    nodes: list[Node] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    def readers(self) -> list[set[int]]:
        """List, for each node, those that read it."""
        found: list[set[int]] = [set() for _ in self.nodes]
        for number, node in enumerate(self.nodes):
            for read in node.inputs:
                found[read].add(number)
        return found

    def ran(self) -> dict[str, set[int]]:
        """List, for each module, what ran in it."""
        found: dict[str, set[int]] = defaultdict(set)
        for number, node in enumerate(self.nodes):
            for name in node.modules:
                found[name].add(number)
        return found

    def is_narrow(self, number: int) -> bool:
        """Tell whether all that is computed after a node is computed from it alone."""
        return all(read >= number for node in self.nodes[number + 1 :] for read in node.inputs)

    def between(self, start: int, end: int) -> frozenset[int]:
        """Return what ``end`` is computed from behind ``start``, and ``end``.

        Empty where it is computed from anything before ``start`` besides, or not from ``start``.
        """
        inside: set[int] = set()
        waiting = [end]
        while waiting:
            number = waiting.pop()
            if number not in inside:
                inside.add(number)
                waiting += self.nodes[number].inputs if number > start else ()
        return frozenset(inside - {start}) if min(inside) == start else frozenset()


@torch.no_grad()
def traced(model: nn.Module, x: Tensor) -> Trace:
    """Follow a forward of a network on ``x`` [B, ...], in eval mode."""
    recorder = _Recorder(x)
    with evaluating(model), ExitStack() as hooks:
        model(x)  # what it computes once and keeps, such as a table of positions, is there then
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(partial(recorder.enter, name))
            leave = module.register_forward_hook(recorder.leave, always_call=True)
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        with recorder:
            model(x)
    return recorder.trace


class _Recorder(TorchFunctionMode):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.trace = Trace([Node("input", frozenset(), (), tuple(x.shape))])
        self._node_of: dict[int, int] = {id(x): 0}
        self._alive: list[Tensor] = [x]  # an id is that of one tensor as long as this lives
        self._modules: list[str] = []
        self._num_additions = 0

    def enter(self, name: str, *_: Any) -> None:
        self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
        self._modules.append(name)

    def leave(self, *_: Any) -> None:
        self._modules.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        nodes, read = self.trace.nodes, [self._node_of.get(id(t)) for t in flatten((args, kwargs))]
        out = func(*args, **kwargs)
        inputs = frozenset(n for n in read if n is not None)
        made = [t for t in flatten(out) if isinstance(t, Tensor)]
        if inputs and made:
            for t in made:
                self._alive.append(t)
                self._node_of[id(t)] = len(nodes)
            shape = tuple(made[0].shape)
            nodes.append(Node(function_name(func), inputs, tuple(self._modules), shape))
        if is_addition(func, args, kwargs):
            left, right = read
            is_one_shape = args[0].shape == args[1].shape
            if left is not None and right is not None and left != right and is_one_shape:
                addition = Addition(self._num_additions, len(nodes) - 1, (left, right))
                self.trace.additions.append(addition)
            self._num_additions += 1
        return out
