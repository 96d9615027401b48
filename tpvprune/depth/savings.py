"""What the removal of a branch saves: multiply-accumulates, parameters, or milliseconds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.depth.records import Branch
from tpvprune.groups import ChannelGroups
from tpvprune.groups.budget import Budget, LatencyTable
from tpvprune.passes.costs import synchronize
from tpvprune.passes.running import evaluating

_CALLS = 7  # of which the median counts, behind one to warm up


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
        b.name: sum(amount for name, amount in amounts if _leaves_with(b, name)) for b in branches
    }


def table_without(
    table: LatencyTable, branches: Sequence[Branch], milliseconds: Mapping[str, float]
) -> LatencyTable:
    """Return a table without the layers of branches, nor what else they took in the constant."""
    layers, constant = dict(table.layers), table.constant_ms
    for branch in branches:
        own = _layers_of(branch, table)
        known = sum(_layer_ms(table, name) for name in own)
        for name in own:
            layers.pop(name, None)
        constant -= max(0.0, milliseconds[branch.name] - known)
    return replace(table, layers=layers, constant_ms=max(constant, 0.0))


def _modules_of(branch: Branch) -> tuple[str, ...]:
    return (branch.name,) if branch.name == branch.block else branch.modules


def _leaves_with(branch: Branch, name: str) -> bool:
    """Tell whether a module, or parameter, is one of those of a branch or inside of one."""
    return any(name == m or name.startswith(f"{m}.") for m in _modules_of(branch))


def _layers_of(branch: Branch, table: LatencyTable) -> list[str]:
    return [name for name in table.layers if _leaves_with(branch, name)]


def _layer_ms(table: LatencyTable, name: str) -> float:
    layer = table.layers[name]
    return layer.ms[-1][-1] + table.ms_per_value * layer.values * layer.outs[-1]


@torch.no_grad()
def _milliseconds(model: nn.Module, branches: Sequence[Branch], x: Tensor) -> dict[str, float]:
    """Time the modules of each branch in calls of the whole network; return medians."""
    took: dict[str, list[float]] = defaultdict(list)
    with evaluating(model), _timed(model, branches, took, x.device):
        for _ in range(_CALLS + 1):
            model(x)
    found = {}
    for b in branches:
        calls = zip(*(took[name][-_CALLS:] for name in _modules_of(b) if took[name]), strict=True)
        found[b.name] = statistics.median(map(sum, calls))
    return found


@contextmanager
def _timed(
    model: nn.Module, branches: Sequence[Branch], took: dict[str, list[float]], device: torch.device
) -> Iterator[None]:
    started: dict[str, float] = {}

    def now() -> float:
        synchronize(device)
        return 1000 * time.perf_counter()

    def begin(name: str, *_: Any) -> None:
        started[name] = now()

    def end(name: str, *_: Any) -> None:
        took[name].append(now() - started[name])

    with ExitStack() as stack:
        for name in {name for b in branches for name in _modules_of(b)}:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(begin, name)).remove)
            stack.callback(module.register_forward_hook(partial(end, name)).remove)
        yield
