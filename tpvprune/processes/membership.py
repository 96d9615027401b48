"""Who takes part: the processes of torchrun join, watch over each other, and leave.

:mod:`tpvprune.processes.shares` shares the work among them. Outside of ``joined()`` there is one.
"""

from __future__ import annotations

import _thread
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# A process may wait long for another that works; one that is gone is noticed by its silence.
_LONGEST_START, _LONGEST_WAIT = timedelta(seconds=60), timedelta(hours=24)
_BEAT, _SILENCE, _GRACE = 2.0, 40.0, 5.0  # seconds
_CPU = torch.device("cpu")


class OtherProcessError(RuntimeError):
    """Another process failed, and has said why."""


class LostProcessError(RuntimeError):
    """Another process ended or hangs, and nobody knows why."""


@dataclass(frozen=True)
class Team:
    """The processes that share the work, and which of them this one is."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU  # what collectives on plain values use


_ALONE = Team()


@dataclass
class Present:
    """The team of now."""

    team: Team = _ALONE


present = Present()


def rank() -> int:
    """Return the number of this process, from 0."""
    return present.team.rank


def num_processes() -> int:
    """Return how many processes share the work."""
    return present.team.size


def is_first() -> bool:
    """Return whether this is the process that writes and prints."""
    return present.team.rank == 0


def started() -> bool:
    """Return whether torchrun has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def device_here(name: str) -> str:
    """Return the device of this process: ``cuda`` is each one's own GPU of its machine."""
    if started() and name == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Join the processes that torchrun has started; without others, do nothing.

    The first error of any process is raised there, and :class:`OtherProcessError` elsewhere. A
    process that ends without a word, or does not answer for 40 s, is a
    :class:`LostProcessError` for the others. ValueError if they cannot reach each other.

    ``device``: where the models run; collectives use NCCL on CUDA and gloo on the CPU.
    """
    if not started() or num_processes() > 1:
        yield
        return
    _import_group_holders()
    here = torch.device(device_here(device))
    store, number, size = _rendezvous()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo",
        store=store,
        rank=number,
        world_size=size,
        timeout=_LONGEST_WAIT,
    )
    # A connection of its own, where this torch has that: one that waits would keep beats back.
    watch = _Watch(store.clone() if hasattr(store, "clone") else store, number, size)
    present.team = Team(number, size, here if here.type == "cuda" else _CPU)
    with _ending_in_order():
        try:
            watch.start()
            yield
            dist.barrier()
        except (Exception, KeyboardInterrupt) as error:
            told = _told(store, watch, error)
            if here.type == "cpu":  # so that the others hear of it; NCCL could wait for a lost one
                dist.destroy_process_group()
            if number == 0:
                watch.linger()
            if told is not None:
                raise told from None
            raise
        else:
            watch.leave()
            dist.destroy_process_group()
        finally:
            watch.stop()
            present.team = _ALONE


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work for itself: nothing is shared or summed meanwhile."""
    team, present.team = present.team, _ALONE
    try:
        yield
    finally:
        present.team = team


def _import_group_holders() -> None:
    """Import the modules of torch that hold the process group of their import in their defaults.

    A group that they hold outlives its end; its threads run into that of the interpreter and
    abort the process. Imported now, they hold none.
    """
    for name in ("torch.distributed.nn.functional", "torch.distributed.optim"):
        importlib.import_module(name)


def _rendezvous() -> tuple[Any, int, int]:
    try:
        store, number, size = next(iter(rendezvous("env://", timeout=_LONGEST_START)))
        store.set(f"here/{number}", "")
        store.wait([f"here/{r}" for r in range(size)], _LONGEST_START)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot reach the other processes ({reason[:120]}): start all of them with torchrun"
        ) from error
    return store, number, size


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let the end that torchrun orders run clean-ups."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _told(store: Any, watch: _Watch, error: BaseException) -> Exception | None:
    """Return what to raise here in the place of an error; None for itself, the first of all."""
    if isinstance(error, KeyboardInterrupt) and not watch.lost:
        return None
    watch.stop()
    if isinstance(error, OtherProcessError):  # it must not come before the one that can tell
        watch.leave()
        return None
    lost = watch.lost or isinstance(error, (LostProcessError, KeyboardInterrupt))
    if lost:
        time.sleep(0.5)  # a process that fails closes its connections: its words come first
    first = _first_to_fail(store)
    watch.leave()
    if not first:
        return OtherProcessError("another process failed and has said why")
    return LostProcessError(watch.lost) if watch.lost else None


def _first_to_fail(store: Any) -> bool:
    try:
        return bool(store.add("errors", 1) == 1)
    except RuntimeError:
        return True  # nobody can be asked any more


class _Watch(threading.Thread):
    """Beats for this process, and listens to the others, beside all work."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(daemon=True)
        self._store, self._rank = store, rank
        self._names = [f"beat/{r}" for r in range(size)]
        self._done = threading.Event()
        self.lost = ""
        self._store.set(self._names[rank], "0")

    def stop(self) -> None:
        """Listen no longer; a call of the store that Python leaves running at its end aborts."""
        self._done.set()
        if self.is_alive():
            self.join(_GRACE)

    def leave(self) -> None:
        """Tell the others that silence means nothing from now on."""
        self.stop()
        with suppress(RuntimeError):
            self._store.set(self._names[self._rank], "done")

    def linger(self) -> None:
        """Hold the store a little longer: the others ask there who speaks of a failure."""
        end = time.monotonic() + _GRACE
        with suppress(RuntimeError):
            while time.monotonic() < end:
                if all(beat == b"done" for beat in self._store.multi_get(self._names)):
                    return
                time.sleep(0.05)

    def run(self) -> None:
        last, since = [b""] * len(self._names), [time.monotonic()] * len(self._names)
        beats = 0
        while not self._done.wait(_BEAT):
            beats += 1
            try:
                self._store.set(self._names[self._rank], str(beats))
                heard = self._store.multi_get(self._names)
            except RuntimeError:
                self._end("the process that holds the others together ended")
                return
            for r, beat in enumerate(heard):
                if beat != last[r] or beat == b"done":
                    last[r], since[r] = beat, time.monotonic()
                elif time.monotonic() - since[r] > _SILENCE:
                    self._end(f"process {r} of {len(self._names)} does not answer any more")
                    return

    def _end(self, reason: str) -> None:
        if self._done.is_set():
            return
        self.lost = f"{reason}: the run ends, nothing was left half-written"
        _thread.interrupt_main()
        # A collective that waits for the lost process hears no interrupt.
        if not self._done.wait(_GRACE):
            if _first_to_fail(self._store):
                print(f"tpvprune: error: {self.lost}", file=sys.__stderr__, flush=True)
            if self._rank == 0:
                self.linger()
            os._exit(4)


def reached(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run a collective; LostProcessError if another process is gone."""
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:
        raise LostProcessError(
            "another process of this run ended: its own messages, if any, tell why; nothing was "
            "left half-written"
        ) from error
