"""What the removal of a branch saves: multiply-accumulates, parameters, or milliseconds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.depth.records import Branch
from tpvprune.groups import ChannelGroups
from tpvprune.groups.budget import Budget, LatencyTable
from tpvprune.passes.running import evaluating

_CALLS = 7  # of which the median counts, behind one to warm up


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Tell whether a module, or parameter, is one of these modules or inside of one."""
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def modules_of(branch: Branch) -> tuple[str, ...]:
    """Return the names of the modules that leave with a branch."""
    is_block = branch.name == branch.block
    return (branch.name,) if is_block else branch.modules


def branch_savings(
    model: nn.Module, groups: ChannelGroups, branches: Sequence[Branch], of: Budget, x: Tensor
) -> dict[str, float]:
    """Return what leaves with each branch.

    ``x``: inputs [B, ...] to be timed on, where milliseconds do. Returns name of the branch -> MACs
    of one input, parameters, or milliseconds of a call.
    """
    if isinstance(of, LatencyTable):
        if of.runtime == "eager":
            return _milliseconds(model, branches, x)
        # Other runtimes fuse what modules do.
        return {b.name: sum(_layer_ms(of, name) for name in _layers_of(b, of)) for b in branches}
    if of == "macs":
        amounts = [(c.module, c.macs) for c in groups.costs]
    else:
        amounts = [(name, float(size)) for name, size in groups.param_sizes.items()]
    return {
        b.name: sum(amount for name, amount in amounts if is_inside(name, modules_of(b)))
        for b in branches
    }


def table_without(
    table: LatencyTable, branches: Sequence[Branch], milliseconds: Mapping[str, float]
) -> LatencyTable:
    """Return the times of the layers of a network without branches.

    Returns a table without their layers; what else they took is no longer in the constant.
    """
    layers, constant = dict(table.layers), table.constant_ms
    for branch in branches:
        own = _layers_of(branch, table)
        known = sum(_layer_ms(table, name) for name in own)
        for name in own:
            layers.pop(name, None)
        constant -= max(0.0, milliseconds[branch.name] - known)
    return replace(table, layers=layers, constant_ms=max(constant, 0.0))


def _layers_of(branch: Branch, table: LatencyTable) -> list[str]:
    return [name for name in table.layers if is_inside(name, modules_of(branch))]


def _layer_ms(table: LatencyTable, name: str) -> float:
    layer = table.layers[name]
    return layer.ms[-1][-1] + table.ms_per_value * layer.values * layer.outs[-1]


@torch.no_grad()
def _milliseconds(model: nn.Module, branches: Sequence[Branch], x: Tensor) -> dict[str, float]:
    """Time the modules of each branch in calls of the whole network.

    Returns name of the branch -> median.
    """
    took: dict[str, list[float]] = defaultdict(list)
    with evaluating(model), _timed(model, branches, took, x.device):
        for _ in range(_CALLS + 1):
            model(x)
    found = {}
    for b in branches:
        calls = zip(*(took[name][-_CALLS:] for name in modules_of(b) if took[name]), strict=True)
        found[b.name] = statistics.median(map(sum, calls))
    return found


@contextmanager
def _timed(
    model: nn.Module, branches: Sequence[Branch], took: dict[str, list[float]], device: torch.device
) -> Iterator[None]:
    started: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * time.perf_counter()

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def begin(*_: Any) -> None:
            started[name] = now()

        def end(*_: Any) -> None:
            took[name].append(now() - started[name])

        return begin, end

    with ExitStack() as stack:
        for name in {name for b in branches for name in modules_of(b)}:
            module = model.get_submodule(name)
            begin, end = hooks(name)
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        yield
