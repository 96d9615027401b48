"""Milliseconds as a budget: what widths really cost where the model will run.

Every convolution and linear layer is timed by itself at a few widths of its input and output, on
the input that it gets in the model; what the whole model takes beyond their sum grows with the
number of values that they write. Widths between are interpolated. The table picks widths; that
the pruned model is faster is measured on the model itself, by turns with the dense one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tpvprune.groups import Axis, ChannelGroups
from tpvprune.groups.budget import LatencyTable, LayerTime, cost
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.running import evaluating, on_device
from tpvprune.runtimes.calls import (
    Call,
    device_of,
    graph_call,
    model_call,
    openvino_nodes_ms,
    runs_in_torch,
    threads,
)
from tpvprune.runtimes.layers import LayerCall
from tpvprune.runtimes.names import Runtime, check_runtime
from tpvprune.runtimes.onnx_files import onnx_node
from tpvprune.widths import latency_file
from tpvprune.widths.speed import Speed, Stopwatch, clock_of, once

_SHARES = (0.15, 0.4, 0.7, 1.0)
_SECONDS, _FEWEST, _MOST = 0.02, 4, 40  # for one number: at least so long, so many calls
_STEPS = (1, 2, 4, 8, 16, 32)
_NO_SLOWER = 1.02  # rounding up to a multiple that costs no more than this is worth it


def latency_table(
    model: nn.Module,
    groups: ChannelGroups,
    x: Tensor,
    *,
    runtime: Runtime = "eager",
    num_threads: int | None = None,
    cache: Path | None = None,
) -> LatencyTable:
    """Time the layers of a dense model at several widths, or read what was measured before.

    ``x``: inputs [B, ...] of the batch size that counts. ``runtime``: where the model will run; of
    ``"compile"`` only the whole network is compiled: convolutions and linear layers are the same
    there. ``num_threads``: of one call on a CPU; None: as many as torch is set to. ``cache``:
    folder of the tables, one JSON file each and safe to delete; None for the user's.
    """
    with threads(num_threads):
        key = _key(model, groups, x, runtime)
    path = (cache_folder() if cache is None else cache) / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        return latency_file.read_latency_table(path)
    table = measured_table(model, groups, x, runtime=runtime, num_threads=num_threads)
    latency_file.write_latency_table(path, table)
    return table


def measured_table(
    model: nn.Module,
    groups: ChannelGroups,
    x: Tensor,
    *,
    runtime: Runtime = "eager",
    num_threads: int | None = None,
) -> LatencyTable:
    """Time the layers of a model at several widths; arguments are those of :func:`latency_table`.

    ValueError if the runtime is not installed, or does not take the model.
    """
    check_runtime(runtime)
    x = on_device(x, model)
    with evaluating(model), threads(num_threads), torch.no_grad():
        return _measure(model, groups, x, _Timer(runtime, x))


def calibrated(
    table: LatencyTable, model: nn.Module, groups: ChannelGroups, x: Tensor
) -> tuple[LatencyTable, Speed]:
    """Let a table say what is measured of the whole network, dense and at half of every width.

    That is for a table that is read elsewhere, where nothing can put it right. What layers take is
    scaled, and the constant takes the rest. Returns the table, and what was measured.
    """
    half = {g.name: torch.arange(g.num_channels) < max(1, g.num_channels // 2) for g in groups}
    watch = Stopwatch(model, x, cast("Runtime", table.runtime), table.num_threads)
    speed = watch.compare(remove_channels(model, groups, half))
    dense, small = (cost(groups, kept, table) - table.constant_ms for kept in ({}, half))
    factor = (speed.dense_ms - speed.pruned_ms) / max(dense - small, 1e-9)
    factor = min(max(factor, 0.0), speed.dense_ms / max(dense, 1e-9))  # no constant below 0
    found = replace(
        table, layers=_scaled(table.layers, factor), ms_per_value=factor * table.ms_per_value,
        constant_ms=max(0.0, speed.dense_ms - factor * dense),
    )  # fmt: skip
    return found, speed


def cache_folder() -> Path:
    """Return where tables are kept for this user."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tpvprune" / "latency"


def _key(model: nn.Module, groups: ChannelGroups, x: Tensor, runtime: Runtime) -> str:
    facts = [
        latency_file.FORMAT, torch.__version__, device_of(runtime, next(model.parameters()).device),
        tuple(x.shape), [(g.name, g.num_channels) for g in groups], str(model),
    ]  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


class _Timer:
    """Times layers and whole models in a runtime.

    ``floor`` is what a call of a graph takes that hardly does anything, which in a whole network
    is paid once.
    """

    def __init__(self, runtime: Runtime, x: Tensor) -> None:
        self.runtime, self.device, self.dtype, self.floor = runtime, x.device, x.dtype, 0.0
        if not runs_in_torch(runtime):
            self.floor = self.least(self.scaling(1))

    def layer(self, call: LayerCall, num_in: int, num_out: int) -> float:
        """Return the milliseconds of a layer with these widths."""
        if runs_in_torch(self.runtime):
            return self.least(call.run(num_in, num_out, self.device))
        graph = call.graph(num_in, num_out)
        if self.runtime == "openvino":
            return _least(openvino_nodes_ms(*graph))
        return max(self.least(graph_call(self.runtime, *graph)) - self.floor, 1e-4)

    def model(self, model: nn.Module, x: Tensor) -> float:
        """Return the milliseconds of a model."""
        return self.least(model_call(self.runtime, model, x), fewest=8)

    def scaling(self, num: int) -> Call:
        """Return what reads and writes so many values."""
        if runs_in_torch(self.runtime):
            sample = torch.ones(num, device=self.device, dtype=self.dtype)
            return lambda: sample * 2
        return graph_call(self.runtime, onnx_node("Mul", ([num], [1])), torch.ones(num))

    def least(self, call: Call, *, fewest: int = _FEWEST) -> float:
        """Return the least milliseconds of several calls: whatever else runs only adds to it.

        In torch on a CPU the time of this thread counts, from which a busy machine takes nothing.
        """
        own = runs_in_torch(self.runtime) and self.device.type == "cpu"
        # Too coarse on Windows.
        clock = time.thread_time if own and sys.platform != "win32" else clock_of(self.device)
        return _least(partial(once, call, self.device, clock), fewest=fewest)


def _least(timed: Callable[[], float], *, fewest: int = _FEWEST) -> float:
    """Return the least of several times; the first, to warm up, does not count."""
    timed()
    found: list[float] = []
    while len(found) < fewest or (sum(found) < 1e3 * _SECONDS and len(found) < _MOST):
        found.append(timed())
    return min(found)


def _measure(model: nn.Module, groups: ChannelGroups, x: Tensor, timer: _Timer) -> LatencyTable:
    calls, values = _calls(model, x)
    measured: dict[Any, LayerTime] = {}
    layers = {}
    for name, call in calls.items():
        weight: Any = model.get_submodule(name).weight
        axes = dict(groups.param_axes.get(f"{name}.weight", ()))
        size_out, size_in = len(weight), 1 if call.depthwise else weight.shape[1]
        outs = _widths(size_out, dim=axes.get(0))
        ins = (size_in,) if call.depthwise else _widths(size_in, dim=axes.get(1))
        key = call, ins, outs, values[name]
        if key not in measured:
            ms = tuple(tuple(timer.layer(call, i, o) for o in outs) for i in ins)
            measured[key] = LayerTime(ins, outs, ms, values[name])
        layers[name] = measured[key]
    total_ms = timer.model(model, x)
    known = sum(layer.ms[-1][-1] for layer in layers.values())
    if known > total_ms:  # layers by themselves do what a runtime leaves out between layers
        layers = _scaled(layers, total_ms / known)
    per_value, constant = _rest(layers, total_ms, timer)
    step = _step([(calls[n], layers[n]) for n in layers if len(layers[n].outs) > 1], timer)
    return LatencyTable(
        layers, per_value, constant, step, len(x), device_of(timer.runtime, x.device),
        timer.runtime, torch.get_num_threads(), tuple(x.shape[1:]),
        latency_file.shapes_digest(model),
    )  # fmt: skip


def _calls(model: nn.Module, x: Tensor) -> tuple[dict[str, LayerCall], dict[str, int]]:
    """Return how each layer that runs once is called, and the values that a channel of it has."""
    calls: dict[str, LayerCall | None] = {}
    values: dict[str, int] = {}

    def note(name: str, module: Any, args: Any, out: Tensor) -> None:
        values[name] = out.numel() // len(module.weight)
        calls[name] = None if name in calls else LayerCall.of(module, args[0])

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                stack.callback(module.register_forward_hook(partial(note, name)).remove)
        model(x)
    return {name: call for name, call in calls.items() if call is not None}, values


def _widths(size: int, dim: Axis | None) -> tuple[int, ...]:
    """Return the widths to time: some multiples of 8 where the axis can shrink."""
    if dim is None or not dim.members:
        return (size,)
    unit = 8 if size >= 32 else 1
    return tuple(sorted({max(1, min(size, round(s * size / unit) * unit)) for s in _SHARES}))


def _scaled(layers: Mapping[str, LayerTime], factor: float) -> dict[str, LayerTime]:
    return {
        name: replace(layer, ms=tuple(tuple(factor * ms for ms in row) for row in layer.ms))
        for name, layer in layers.items()
    }


def _rest(layers: dict[str, LayerTime], total_ms: float, timer: _Timer) -> tuple[float, float]:
    """Return what is not in the layers: milliseconds per value written, and a constant."""
    known = sum(layer.ms[-1][-1] for layer in layers.values())
    written = sum(layer.values * layer.outs[-1] for layer in layers.values())
    rest = max(0.0, total_ms - known)
    # Norms, activations and sums touch what layers write about twice more: that is timed by itself.
    num = max(1, min(written, 1 << 22))
    once_more = max(0.0, timer.least(timer.scaling(num)) - timer.least(timer.scaling(1)))
    per_value = min(rest / max(written, 1), 2 * once_more / num)
    return per_value, max(0.0, total_ms - known - per_value * written)


def _step(layers: Sequence[tuple[LayerCall, LayerTime]], timer: _Timer) -> int:
    """Return the largest multiple to which widths can be rounded up at no cost in time."""
    costly = sorted({*layers}, key=lambda pair: -pair[1].ms[-1][-1])[:3]
    slower: dict[int, list[float]] = {step: [] for step in _STEPS}
    for call, layer in costly:
        top = min(layer.outs[-1], 64)
        widths = range(max(1, top - 31), top + 1)
        ms = {w: timer.layer(call, layer.ins[-1], w) for w in widths}
        for step, ratios in slower.items():
            rounded = [(w, -(-w // step) * step) for w in widths]
            ratios += [ms[up] / ms[w] for w, up in rounded if up in ms]
    fits = [s for s, r in slower.items() if r and statistics.mean(r) <= _NO_SLOWER]
    return max(fits, default=1)
