"""How fast a pruned model is beside the dense one, where both will run, and how to hit a time."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tpvprune.passes.costs import synchronize
from tpvprune.passes.running import evaluating, on_device
from tpvprune.runtimes.calls import Call, device_of, model_call, threads
from tpvprune.runtimes.names import TABLE, Runtime

_CAUTION = 0.985
# How near to the wanted time a choice must be: a missing hundredth of it may cost a point of top-1.
# After some tries the clock, or the steps of the widths, may not allow it.
_NEAR, _NEAR_ENOUGH, _PATIENT_TRIES, _TRIES = 0.98, 0.95, 5, 10
_ENOUGH, _PATIENCE = 6, 20.0  # rounds that do where all would take longer than these seconds

T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """Two models timed by turns: medians with quartiles, and the ratio within a round likewise.

    ``runtime`` and ``device`` say where. With 0 ``rounds`` nothing was timed: a table that was
    measured elsewhere says it.
    """

    dense_ms: float
    pruned_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    batch_size: int
    rounds: int
    dense_low_ms: float
    dense_high_ms: float
    pruned_low_ms: float
    pruned_high_ms: float
    runtime: str
    device: str

    @classmethod
    def predicted(cls, dense_ms: float, pruned_ms: float, *, batch_size: int, device: str) -> Speed:
        """Return what a table says, which knows of no spread."""
        ratio = pruned_ms / dense_ms
        return cls(
            dense_ms, pruned_ms, ratio, ratio, ratio, batch_size, 0,
            dense_ms, dense_ms, pruned_ms, pruned_ms, TABLE, device,
        )  # fmt: skip


@dataclass(frozen=True)
class Stopwatch:
    """Times pruned models by turns with one dense model, which must stay as it is.

    ``x``: inputs [B, ...] of one call. ``num_threads``: of one call on a CPU; None: as many as
    torch is set to.
    """

    dense: nn.Module
    x: Tensor
    runtime: Runtime = "eager"
    num_threads: int | None = None

    @cached_property
    def _dense_call(self) -> Call:
        # An export may take longer than all calls of the model.
        return model_call(self.runtime, self.dense, self.x)

    def compare(self, pruned: nn.Module, *, rounds: int = 25) -> Speed:
        """Time a pruned model beside the dense one.

        ``rounds``: timed calls of each, >= 4; slow models get fewer, but 6, within 20 seconds.
        ValueError if there are too few rounds for a spread, or the runtime does not take a model.
        """
        if rounds < 4:
            raise ValueError(f"rounds: expected at least 4, found {rounds}")
        device = on_device(self.x, self.dense).device
        with evaluating(self.dense, pruned), threads(self.num_threads), torch.no_grad():
            calls = self._dense_call, model_call(self.runtime, pruned, self.x)
            dense, small = _by_turns(calls, device, rounds)
            where = device_of(self.runtime, device)
        ratios = [b / a for a, b in zip(dense, small, strict=True)]
        (low, ratio, high), before, after = map(_quartiles, (ratios, dense, small))
        return Speed(
            before[1], after[1], ratio, low, high, len(self.x), len(ratios),
            before[0], before[2], after[0], after[2], self.runtime, where,
        )  # fmt: skip


def compare_latency(
    dense: nn.Module,
    pruned: nn.Module,
    x: Tensor,
    *,
    rounds: int = 25,
    runtime: Runtime = "eager",
    num_threads: int | None = None,
) -> Speed:
    """Time two models by turns on one batch; see :class:`Stopwatch`."""
    return Stopwatch(dense, x, runtime, num_threads).compare(pruned, rounds=rounds)


def _by_turns(
    calls: tuple[Call, Call], device: torch.device, rounds: int
) -> tuple[list[float], list[float]]:
    """Return the milliseconds of each round but the first two."""
    times: tuple[list[float], list[float]] = ([], [])
    start, clock = time.perf_counter(), clock_of(device)
    for i in range(rounds + 2):
        if i >= _ENOUGH + 2 and time.perf_counter() - start > _PATIENCE:
            break
        for call, found in zip(calls, times, strict=True):
            took = once(call, device, clock)
            if i >= 2:
                found.append(took)
    return times


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, statistics.median(values), high


def clock_of(device: torch.device, num_threads: int | None = None) -> Callable[[], float]:
    """Return what times calls on a device: on one thread of a CPU the time of this process.

    ``num_threads``: of a call; None: as many as torch is set to.

    From that a busy machine takes nothing: where others wait for the same core, the wall says how
    often one was interrupted.
    """
    alone = device.type == "cpu" and (num_threads or torch.get_num_threads()) == 1
    return time.process_time if alone and sys.platform != "win32" else time.perf_counter


def once(call: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    """Return the milliseconds of one call."""
    synchronize(device)
    start = clock()
    call()
    synchronize(device)
    return 1e3 * (clock() - start)


def as_fast_as(
    keep: float, aim: float, choose: Callable[[float], T], measure: Callable[[T], Speed]
) -> tuple[T, Speed]:
    """Find the largest choice that is measured to be fast enough.

    ``aim``: what to ask of ``choose`` first. ``choose``: fraction of the time, as predicted -> a
    choice. ``measure``: choice -> how fast it is. Returns the choice and its speed; the last one
    that was tried if none is fast enough.
    """
    best: tuple[T, Speed] | None = None
    fast, slow = 0.0, 1.0  # the largest aim known to be fast enough, the least known not to be
    for tried in range(1, _TRIES + 1):
        chosen = choose(aim)
        speed = measure(chosen)
        if speed.ratio <= keep:
            fast = max(fast, aim)
            if best is None or speed.ratio > best[1].ratio:
                best = chosen, speed
        else:
            slow = min(slow, aim)
        near = _NEAR if tried <= _PATIENT_TRIES else _NEAR_ENOUGH
        if best is not None and best[1].ratio > near * keep:
            break
        # In proportion; between what is known where that leads astray: time is not proportional.
        aim *= _CAUTION * keep / speed.ratio
        if not fast < aim < slow:
            aim = (fast + slow) / 2
    return best or (chosen, speed)
