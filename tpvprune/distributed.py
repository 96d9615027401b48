"""Several processes, one result: each sees its share of the images, sums are added up.

``torchrun --nproc-per-node N -m tpvprune ...`` starts them; in Python, inside ``joined()``, pass
every function ``shard(batches)``. Image number i of the whole set belongs to process i mod N, and
random draws belong to images, so that nothing but rounding depends on N. All processes go through
the same steps and end with the same model; the first one writes and prints.

Outside of ``joined()`` there is one process, and every function here is a no-op.
"""

from __future__ import annotations

import _thread
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

# A process may wait long for another that works; one that is gone is noticed by its silence.
_LONGEST_START, _LONGEST_WAIT = timedelta(seconds=60), timedelta(hours=24)
_BEAT, _SILENCE, _GRACE = 2.0, 40.0, 5.0  # seconds


class OtherProcessError(RuntimeError):
    """Another process failed, and has said why."""


class LostProcessError(RuntimeError):
    """Another process ended or hangs, and nobody knows why."""


@dataclass(frozen=True)
class _Team:
    rank: int = 0
    size: int = 1
    # What collectives on plain values use.
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


_ALONE = _Team()


@dataclass
class _Present:
    team: _Team = _ALONE


_present = _Present()


def rank() -> int:
    """Return the number of this process, from 0."""
    return _present.team.rank


def num_processes() -> int:
    """Return how many processes share the work."""
    return _present.team.size


def is_first() -> bool:
    """Return whether this is the process that writes and prints."""
    return _present.team.rank == 0


def started() -> bool:
    """Return whether torchrun has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def device_here(name: str) -> str:
    """Return the device of this process: ``cuda`` is each one's own GPU of its machine."""
    if started() and name == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


# ---- joining and leaving ----------------------------------------------------------------------


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Join the processes that torchrun has started; without others, do nothing.

    The first error of any process is raised there, and :class:`OtherProcessError` elsewhere. A
    process that ends without a word, or does not answer for 40 s, is a
    :class:`LostProcessError` for the others.

    Args:
        device: Where the models run; collectives use NCCL on CUDA and gloo on the CPU.

    Yields:
        Nothing.

    Raises:
        ValueError: If the processes cannot reach each other.
        OtherProcessError: If another process failed first.
        LostProcessError: If another process is gone.
        KeyboardInterrupt: As anywhere.
    """
    if not started() or num_processes() > 1:
        yield
        return
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
    watch = _Watch(store.clone(), number, size)
    _present.team = _Team(number, size, here if here.type == "cuda" else torch.device("cpu"))
    before = _ending_in_order()
    try:
        watch.start()
        yield
        dist.barrier()
    except (Exception, KeyboardInterrupt) as error:
        told = _told(store, watch, error)
        if here.type == "cpu":  # so that the others hear of it; NCCL could wait for the lost one
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
        _present.team = _ALONE
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work for itself: nothing is shared or summed meanwhile."""
    team, _present.team = _present.team, _ALONE
    try:
        yield
    finally:
        _present.team = team


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


def _ending_in_order() -> Any:
    """Let the end that torchrun orders run clean-ups.

    Returns:
        The handler before; None where it was not replaced.
    """
    if threading.current_thread() is not threading.main_thread():
        return None

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    return signal.signal(signal.SIGTERM, end)


def _told(store: Any, watch: _Watch, error: BaseException) -> Exception | None:
    """Return what to raise here in the place of an error; None for itself, the first of all."""
    if isinstance(error, KeyboardInterrupt) and not watch.lost:
        return None
    watch.stop()
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
        """Listen no longer."""
        self._done.set()

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


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            "another process of this run ended: its own messages, if any, tell why; nothing was "
            "left half-written"
        ) from error


# ---- shares -----------------------------------------------------------------------------------


def own(rows: Any) -> Any:
    """Return the rows of this process, of rows [n, ...] for all processes together."""
    return rows if num_processes() == 1 else rows[rank() :: num_processes()]


def share(num: int) -> int:
    """Return how many of the first ``num`` samples of the whole set are this process's."""
    return len(range(rank(), num, num_processes()))


def places(first: int, num: int) -> Tensor:
    """Return where in the whole set the samples first, ..., first + num - 1 of here stand."""
    return torch.arange(first, first + num) * num_processes() + rank()


class _Shard:
    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for batch in self._batches:
            parts = batch if isinstance(batch, (tuple, list)) else (batch,)
            first = (rank() - start) % num_processes()
            start += len(parts[0])
            mine = [part[first :: num_processes()] for part in parts]
            if len(mine[0]):
                yield mine[0] if isinstance(batch, Tensor) else tuple(mine)


def shard(batches: Iterable[Any]) -> Iterable[Any]:
    """Return this process's share of batches that every process has in the same order.

    Args:
        batches: Re-iterable of tensors [B, ...], or of tuples of such.

    Returns:
        Re-iterable of the same, of every batch the samples of this process; where there are none
        the batch is left out.
    """
    return batches if num_processes() == 1 else _Shard(batches)


def own_items(items: Sequence[T], start: int) -> list[T]:
    """Return the items of this process of one batch that starts at ``start`` of the whole set."""
    return list(items)[(rank() - start) % num_processes() :: num_processes()]


# ---- sums and agreements ----------------------------------------------------------------------


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Add up tensors over all processes: one collective, in float64.

    Args:
        *tensors: Of the same shapes everywhere.

    Returns:
        The sums, float64, on the devices of the arguments; equal bit for bit everywhere. With one
        process the arguments themselves.
    """
    if num_processes() == 1:
        return tensors
    device = next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu"))
    flat = reduced(torch.cat([t.detach().to(device, torch.float64).reshape(-1) for t in tensors]))
    parts = flat.split([t.numel() for t in tensors])
    return tuple(p.view(t.shape).to(t.device) for p, t in zip(parts, tensors, strict=True))


def reduced(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor, added up over all processes in place and in its own type."""
    with _reaching():
        dist.all_reduce(tensor)
    return tensor


def total(number: float) -> float:
    """Return the sum of a number over all processes."""
    return float(summed(torch.tensor(float(number), dtype=torch.float64))[0])


def part_of(weight: float | Tensor) -> float:
    """Return which part of the sum over all processes is here."""
    return 1.0 if num_processes() == 1 else float(weight) / total(float(weight))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place."""
    if num_processes() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = reduced(torch.cat([g.reshape(-1) for g in grads]))
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def in_step(batches: Iterable[T]) -> Iterator[T | None]:
    """Iterate together: as long as any process has a batch; None where this one has none.

    Args:
        batches: Of this process.

    Yields:
        A batch, or None.
    """
    if num_processes() == 1:
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if not total(batch is not None):
            return
        yield batch


def from_first(tensor: Tensor) -> Tensor:
    """Return the first process's tensor, which has the same shape everywhere."""
    if num_processes() == 1:
        return tensor
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    with _reaching():
        dist.broadcast(copied, 0)
    return copied


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers, bit for bit, in place."""
    if num_processes() == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(from_first(tensor))


def check_same(what: str, *parts: Any) -> None:
    """See that all processes have the same.

    Args:
        what: For the message.
        *parts: Tensors, modules, mappings of tensors, or values with a ``repr``.

    Raises:
        ValueError: If they have not; everywhere.
    """
    if num_processes() == 1:
        return
    number = int.from_bytes(_digest(parts)[:6], "big")  # exact in float64
    low, high = (torch.tensor(float(number), dtype=torch.float64) for _ in range(2))
    with _reaching():
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    if low != high:
        raise ValueError(
            f"expected the same {what} in all {num_processes()} processes, found different ones: "
            "give each the same flags, files and package versions"
        )


def _digest(parts: Iterable[Any]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        entries = part.state_dict() if isinstance(part, nn.Module) else part
        if isinstance(entries, Tensor):
            entries = {"": entries}
        if not hasattr(entries, "items"):
            digest.update(repr(entries).encode())
            continue
        for name, value in entries.items():
            digest.update(str(name).encode())
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(plain.numpy())
    return digest.digest()


def by_first(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Let the first process do something, such as writing, and all know what came of it.

    Args:
        call: What it calls; returns plain values.
        *args: For it.
        **kwargs: Likewise.

    Returns:
        What it returned.

    Raises:
        OtherProcessError: If it failed there; there the error itself is raised.
    """
    if num_processes() == 1:
        return call(*args, **kwargs)
    outcome: list[Any] = [False, None]
    failure: Exception | None = None
    if is_first():
        try:
            with alone():
                outcome = [True, call(*args, **kwargs)]
        except Exception as error:
            failure = error
    with _reaching():
        dist.broadcast_object_list(outcome, 0, device=_present.team.device)
    if failure is not None:
        raise failure
    if not outcome[0]:
        raise OtherProcessError("the first process failed and has said why")
    result: T = outcome[1]
    return result


def gathered(batches: Iterable[Any]) -> list[Any]:
    """Bring the shares of all processes together again.

    Args:
        batches: Of this process: tensors [B, ...] or tuples of such; at least one.

    Returns:
        The batches of the whole set, in order.
    """
    here = list(batches)
    if num_processes() == 1:
        return here
    plain = isinstance(here[0], Tensor)
    columns = list(zip(*([(b,) for b in here] if plain else here), strict=True))
    sizes = _batch_sizes([len(b) for b in columns[0]])
    whole = [_rows_of_all(torch.cat(column)).split(sizes) for column in columns]
    return list(whole[0]) if plain else list(zip(*whole, strict=True))


def _objects(value: T) -> list[T]:
    found: list[Any] = [None] * num_processes()
    with _reaching():
        dist.all_gather_object(found, value)
    return found


def _batch_sizes(here: list[int]) -> list[int]:
    return [sum(sizes) for sizes in zip_longest(*_objects(here), fillvalue=0)]


def _rows_of_all(rows: Tensor) -> Tensor:
    counts = _objects(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in counts]
    with _reaching():
        dist.all_gather(found, padded)
    there = torch.arange(max(counts))[:, None] < torch.tensor(counts)
    return torch.stack(found, 1).flatten(0, 1)[there.flatten()]


def dealt(tasks: Sequence[T], work: Callable[[T], Iterable[Any]]) -> Iterator[Any]:
    """Do tasks that need no other process, turn by turn one in each.

    Args:
        tasks: The same everywhere.
        work: Task -> results, plain values; it runs :func:`alone`.

    Yields:
        The results of all tasks, in order and everywhere; with one process as they come.
    """
    if num_processes() == 1:
        for task in tasks:
            yield from work(task)
        return
    for start in range(0, len(tasks), num_processes()):
        mine = tasks[start + rank() : start + rank() + 1]
        with alone():
            results = [result for task in mine for result in work(task)]
        for found in _objects(results):
            yield from found
