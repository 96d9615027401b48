"""Milliseconds as a budget: what widths really cost on the user's device.

Every convolution and linear layer is timed by itself at a few widths of its input and output, on
the input that it gets in the model; what the whole model takes beyond their sum grows with the
number of values that they write. Widths between are interpolated. The table picks widths; that
the pruned model is faster is measured on the model itself, by turns with the dense one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.disk.atomic import written_file
from tpvprune.groups import Axis, ChannelGroups
from tpvprune.groups.budget import LatencyTable, LayerTime
from tpvprune.passes.costs import synchronize
from tpvprune.passes.running import evaluating, on_device

_SHARES = (0.15, 0.4, 0.7, 1.0)
_SECONDS, _FEWEST, _MOST = 0.02, 4, 40  # for one number: at least so long, so many calls
_STEPS = (1, 2, 4, 8, 16, 32)
_NO_SLOWER = 1.02  # rounding up to a multiple that costs no more than this is worth it
_FORMAT = 1
_TRIES, _NEAR, _CAUTION = 6, 0.95, 0.985
_ENOUGH, _PATIENCE = 6, 20.0  # rounds that do where all would take longer than these seconds

T = TypeVar("T")

# ---- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Two models timed by turns: medians, and the ratio with its quartiles over the rounds."""

    dense_ms: float
    pruned_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    batch_size: int
    rounds: int


def compare_latency(dense: nn.Module, pruned: nn.Module, x: Tensor, *, rounds: int = 25) -> Speed:
    """Time two models by turns on one batch.

    Args:
        dense: The dense model.
        pruned: The pruned one.
        x: Inputs [B, ...].
        rounds: Timed calls of each, >= 4; slow models get fewer, but 6, within 20 seconds.

    Returns:
        The times, and how they compare within a round.

    Raises:
        ValueError: If there are too few rounds for a spread.
    """
    if rounds < 4:
        raise ValueError(f"rounds: expected at least 4, found {rounds}")
    times: tuple[list[float], list[float]] = ([], [])
    with evaluating(dense, pruned), torch.no_grad():
        inputs = on_device(x, dense)
        start = time.perf_counter()
        for i in range(rounds + 2):
            if i >= _ENOUGH + 2 and time.perf_counter() - start > _PATIENCE:
                break
            for model, found in zip((dense, pruned), times, strict=True):
                took = _once(partial(model, inputs), inputs.device)
                if i >= 2:
                    found.append(took)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    dense_ms, pruned_ms, ratio = map(statistics.median, (*times, ratios))
    return Speed(dense_ms, pruned_ms, ratio, low, high, len(x), len(ratios))


def as_fast_as(
    keep: float, aim: float, choose: Callable[[float], T], measure: Callable[[T], Speed]
) -> tuple[T, Speed]:
    """Find the largest choice that is measured to be fast enough.

    Args:
        keep: Fraction of the dense time that may stay.
        aim: What to ask of ``choose`` first.
        choose: Fraction of the time, as predicted -> a choice.
        measure: Choice -> how fast it is.

    Returns:
        The choice and its speed; the last one that was tried if none is fast enough.
    """
    best: tuple[T, Speed] | None = None
    fast, slow = 0.0, 1.0  # the largest aim known to be fast enough, the least known not to be
    for _ in range(_TRIES):
        chosen = choose(aim)
        speed = measure(chosen)
        if speed.ratio <= keep:
            fast = max(fast, aim)
            if best is None or speed.ratio > best[1].ratio:
                best = chosen, speed
        else:
            slow = min(slow, aim)
        if best is not None and best[1].ratio > _NEAR * keep:
            break
        # In proportion; between what is known where that leads astray: time is not proportional.
        aim *= _CAUTION * keep / speed.ratio
        if not fast < aim < slow:
            aim = (fast + slow) / 2
    return best or (chosen, speed)


def latency_table(
    model: nn.Module, groups: ChannelGroups, x: Tensor, *, cache: Path | None = None
) -> LatencyTable:
    """Time the layers of a model at several widths, or read what was measured before.

    Args:
        model: The dense model, on the device where it is to be fast.
        groups: Its channel groups.
        x: Inputs [B, ...] of the batch size that counts.
        cache: Folder of the tables, one JSON file each and safe to delete; None for the user's.

    Returns:
        The table.
    """
    path = (cache_folder() if cache is None else cache) / f"{_key(model, groups, x)}.json"
    known = _read(path)
    if known is not None:
        return known
    with evaluating(model), torch.no_grad():
        table = _measure(model, groups, on_device(x, model))
    with written_file(path) as unfinished:
        unfinished.write_text(json.dumps({"format": _FORMAT, **asdict(table)}), encoding="utf-8")
    return table


def cache_folder() -> Path:
    """Return where tables are kept for this user."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tpvprune" / "latency"


def device_name(device: torch.device) -> str:
    """Return what a time depends on besides the model: the processor and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((li.partition(":")[2].strip() for li in lines if "model name" in li), name)
    return f"{name}, {torch.get_num_threads()} threads"


def _key(model: nn.Module, groups: ChannelGroups, x: Tensor) -> str:
    facts = [
        _FORMAT, torch.__version__, device_name(next(model.parameters()).device),
        tuple(x.shape), [(g.name, g.num_channels) for g in groups], str(model),
    ]  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _read(path: Path) -> LatencyTable | None:
    """Return a table from the cache; None where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != _FORMAT:
            return None
        layers = {
            name: LayerTime(
                tuple(map(int, e["ins"])),
                tuple(map(int, e["outs"])),
                tuple(tuple(map(float, row)) for row in e["ms"]),
                int(e["values"]),
            )
            for name, e in found.pop("layers").items()
        }
        return LatencyTable(layers=layers, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class _Call:
    """One layer as it is called, but for its widths."""

    kind: str
    shape: tuple[int, ...]  # of the input, 0 in the place of the channels
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    depthwise: bool
    dtype: torch.dtype

    def run(self, num_in: int, num_out: int, device: torch.device) -> Callable[[], Tensor]:
        """Return a call with these widths; its time knows no values."""
        num_in = num_out if self.depthwise else num_in
        shape = [num_in if s == 0 else s for s in self.shape]
        x = torch.ones(shape, device=device, dtype=self.dtype)
        inner = 1 if self.depthwise else num_in
        weight = torch.ones(num_out, inner, *self.kernel, device=device, dtype=self.dtype)
        if self.kind == "linear":
            return lambda: F.linear(x, weight)
        convolve: Any = F.conv1d if self.kind == "conv1d" else F.conv2d
        groups = num_out if self.depthwise else 1
        return lambda: convolve(x, weight, None, self.stride, self.padding, self.dilation, groups)


def _measure(model: nn.Module, groups: ChannelGroups, x: Tensor) -> LatencyTable:
    device = x.device
    calls, values, total_ms = _calls(model, x)
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
            ms = tuple(tuple(_least(call.run(i, o, device), device) for o in outs) for i in ins)
            measured[key] = LayerTime(ins, outs, ms, values[name])
        layers[name] = measured[key]
    per_value, constant = _rest(model, x, layers, total_ms)
    step = _step([(calls[n], layers[n]) for n in layers if len(layers[n].outs) > 1], device)
    return LatencyTable(layers, per_value, constant, step, len(x), device_name(device))


def _calls(model: nn.Module, x: Tensor) -> tuple[dict[str, _Call], dict[str, int], float]:
    """Return how each layer that runs once is called, what it writes, and the model's time."""
    calls: dict[str, _Call | None] = {}
    values: dict[str, int] = {}
    handles = []

    def note(module: Any, args: Any, out: Tensor, name: str) -> None:
        values[name] = out.numel() // len(module.weight)
        calls[name] = None if name in calls else _call(module, args[0])

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(partial(note, name=name)))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: call for name, call in calls.items() if call is not None}
    return found, values, _least(partial(model, x), x.device, fewest=8)


def _call(module: Any, x: Tensor) -> _Call | None:
    if isinstance(module, nn.Linear):
        return _Call("linear", (*x.shape[:-1], 0), (), (), 0, (), False, x.dtype)
    depthwise = 1 < module.groups == module.in_channels == module.out_channels
    if module.groups > 1 and not depthwise:
        return None
    kind = "conv1d" if isinstance(module, nn.Conv1d) else "conv2d"
    return _Call(
        kind, (x.shape[0], 0, *x.shape[2:]), module.kernel_size, module.stride, module.padding,
        module.dilation, depthwise, x.dtype,
    )  # fmt: skip


def _widths(size: int, dim: Axis | None) -> tuple[int, ...]:
    """Return the widths to time: some multiples of 8 where the axis can shrink."""
    if dim is None or not dim.members:
        return (size,)
    unit = 8 if size >= 32 else 1
    return tuple(sorted({max(1, min(size, round(s * size / unit) * unit)) for s in _SHARES}))


def _rest(
    model: nn.Module, x: Tensor, layers: dict[str, LayerTime], total_ms: float
) -> tuple[float, float]:
    """Return what is not in the layers: milliseconds per value written, and a constant.

    Norms, activations and sums touch what layers write about twice more.
    """
    known = sum(layer.ms[-1][-1] for layer in layers.values())
    written = sum(layer.values * layer.outs[-1] for layer in layers.values())
    rest = max(0.0, total_ms - known)
    # Reading and writing a value once more, as norms and activations do, is timed by itself.
    sample = torch.ones(max(1, min(written, 1 << 22)), device=x.device, dtype=x.dtype)
    small = torch.ones(1, device=x.device, dtype=x.dtype)
    once = _least(lambda: sample * 2, x.device) - _least(lambda: small * 2, x.device)
    per_value = min(rest / max(written, 1), 2 * max(0.0, once) / len(sample))
    return per_value, max(0.0, total_ms - known - per_value * written)


def _step(layers: Sequence[tuple[_Call, LayerTime]], device: torch.device) -> int:
    """Return the largest multiple to which widths can be rounded up at no cost in time."""
    costly = sorted({*layers}, key=lambda pair: -pair[1].ms[-1][-1])[:3]
    slower: dict[int, list[float]] = {step: [] for step in _STEPS}
    for call, layer in costly:
        top = min(layer.outs[-1], 64)
        widths = range(max(1, top - 31), top + 1)
        ms = {w: _least(call.run(layer.ins[-1], w, device), device) for w in widths}
        for step, ratios in slower.items():
            rounded = [(w, -(-w // step) * step) for w in widths]
            ratios += [ms[up] / ms[w] for w, up in rounded if up in ms]
    fits = [s for s, r in slower.items() if r and statistics.mean(r) <= _NO_SLOWER]
    return max(fits, default=1)


def _least(call: Callable[[], Any], device: torch.device, *, fewest: int = _FEWEST) -> float:
    """Return the least milliseconds of several calls: whatever else runs only adds to it.

    On a CPU the time of this thread counts, from which a busy machine takes nothing.
    """
    threaded = device.type == "cpu" and sys.platform != "win32"  # too coarse there
    clock = time.thread_time if threaded else time.perf_counter
    _once(call, device)
    found: list[float] = []
    while len(found) < fewest or (sum(found) < 1e3 * _SECONDS and len(found) < _MOST):
        found.append(_once(call, device, clock))
    return min(found)


def _once(
    call: Callable[[], Any],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    synchronize(device)
    start = clock()
    call()
    synchronize(device)
    return 1e3 * (clock() - start)
