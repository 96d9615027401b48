"""Several processes, one result: each sees its share of the images, sums are added up.

``torchrun --nproc-per-node N -m tpvprune ...`` starts them; in Python, inside
``membership.joined()``, pass every function ``shard(batches)``. Image number i of the whole set
belongs to process i mod N, and random draws belong to images, so that nothing but rounding depends
on N. All processes go through the same steps and end with the same model; the first one writes and
prints.

Outside of ``membership.joined()`` there is one process, and every function here is a no-op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpvprune.disk.digest import digest_of
from tpvprune.processes.membership import (
    OtherProcessError,
    alone,
    is_first,
    num_processes,
    present,
    rank,
    reached,
)

T = TypeVar("T")
_AT_A_TIME = 64  # samples on their way from one process to the others


def own(rows: Any) -> Any:
    """Return the rows of this process, of rows [n, ...] for all processes together."""
    return rows if num_processes() == 1 else rows[rank() :: num_processes()]


def share(num: int) -> int:
    """Return how many of the first ``num`` samples of the whole set are this process's."""
    return len(range(rank(), num, num_processes()))


def global_indices(first: int, num: int, device: torch.device | None = None) -> Tensor:
    """Return where in the whole set the samples first, ..., first + num - 1 of here stand."""
    return torch.arange(first, first + num, device=device) * num_processes() + rank()


class _Shard:
    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return every(self._batches, rank(), num_processes())


def every(batches: Iterable[Any], first: int, step: int) -> Iterator[Any]:
    """Take every so many samples of batches, wherever one batch ends and the next begins.

    ``batches``: tensors [B, ...], or tuples of such. ``first``: which of the first ``step``
    samples. Of a batch where there is none nothing is yielded.
    """
    start = 0
    for batch in batches:
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        begin = (first - start) % step
        start += len(parts[0])
        mine = [part[begin::step] for part in parts]
        if len(mine[0]):
            yield mine[0] if isinstance(batch, Tensor) else tuple(mine)


def shard(batches: Iterable[Any]) -> Iterable[Any]:
    """Return this process's share of batches that every process has in the same order.

    ``batches``: re-iterable of tensors [B, ...], or of tuples of such; see :func:`every`.
    """
    return batches if num_processes() == 1 else _Shard(batches)


def unshared(batches: Iterable[Any]) -> Iterable[Any] | None:
    """Return the batches of all processes that :func:`shard` was given, if it made these."""
    return batches._batches if isinstance(batches, _Shard) else None


def own_items(items: Sequence[T], start: int) -> list[T]:
    """Return the items of this process of one batch that starts at ``start`` of the whole set."""
    return list(items)[(rank() - start) % num_processes() :: num_processes()]


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Add up tensors over all processes: one collective, in float64.

    Returns sums equal bit for bit everywhere; with one process the arguments themselves.
    """
    if num_processes() == 1:
        return tensors
    device = next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu"))
    flat = reduced(torch.cat([t.detach().to(device, torch.float64).reshape(-1) for t in tensors]))
    parts = flat.split([t.numel() for t in tensors])
    return tuple(p.view(t.shape).to(t.device) for p, t in zip(parts, tensors, strict=True))


def reduced(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor, added up over all processes in place and in its own type."""
    reached(dist.all_reduce, tensor)
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
    """Iterate together: as long as any process has a batch; None where this one has none."""
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
    reached(dist.broadcast, copied, 0)
    return copied


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers, bit for bit, in place."""
    if num_processes() == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(from_first(tensor))


def check_same(what: str, *parts: Any) -> None:
    """See that all processes have the same; ``*parts``: as of :func:`digest_of`."""
    if num_processes() == 1:
        return
    number = int.from_bytes(digest_of(*parts)[:6], "big")  # exact in float64
    ends = torch.tensor([number, -number], dtype=torch.float64)
    reached(dist.all_reduce, ends, dist.ReduceOp.MIN)
    if ends[0] != -ends[1]:
        raise ValueError(
            f"expected the same {what} in all {num_processes()} processes, found different ones: "
            "give each the same flags, files and package versions"
        )


def by_first(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Let the first process do something, such as writing, and all know what came of it.

    OtherProcessError if it failed there; there the error itself is raised.
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
    reached(dist.broadcast_object_list, outcome, 0, device=present.team.device)
    if failure is not None:
        raise failure
    if not outcome[0]:
        raise OtherProcessError("the first process failed and has said why")
    result: T = outcome[1]
    return result


def gathered(batches: Iterable[Any]) -> list[Any]:
    """Bring the shares of all processes together again.

    ``batches``: of this process: tensors [B, ...] or tuples of such; at least one.
    """
    here = list(batches)
    if num_processes() == 1:
        return here
    plain = isinstance(here[0], Tensor)
    columns = list(zip(*([(b,) for b in here] if plain else here), strict=True))
    lengths = of_all([len(b) for b in columns[0]])
    sizes = [sum(parts) for parts in zip_longest(*lengths, fillvalue=0)]
    whole = [_rows_of_all(torch.cat(column)).split(sizes) for column in columns]
    return list(whole[0]) if plain else list(zip(*whole, strict=True))


def handed_over(rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Hand samples to the processes that they belong to by their numbers in the whole set.

    ``rows``: number -> sample, here now. Returns those whose number modulo processes is this rank.
    """
    if num_processes() == 1:
        return dict(rows)
    device = next((row.device for row in rows.values()), torch.device("cpu"))
    here, found = list(rows), {}
    for source, count in enumerate(of_all(len(here))):
        for start in range(0, count, _AT_A_TIME):
            some = here[start : start + _AT_A_TIME] if source == rank() else []
            box = [{number: rows[number].cpu() for number in some}]
            reached(dist.broadcast_object_list, box, source, device=present.team.device)
            for number, row in box[0].items():
                if number % num_processes() == rank():
                    found[number] = row.to(device)
    return found


def of_all(value: T) -> list[T]:
    """Return the plain values of all processes, in order of their ranks."""
    if num_processes() == 1:
        return [value]
    found: list[Any] = [None] * num_processes()
    reached(dist.all_gather_object, found, value)
    return found


def _rows_of_all(rows: Tensor) -> Tensor:
    counts = of_all(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in counts]
    reached(dist.all_gather, found, padded)
    there = torch.arange(max(counts))[:, None] < torch.tensor(counts)
    return torch.stack(found, 1).flatten(0, 1)[there.flatten()]


def dealt(tasks: Sequence[T], work: Callable[[T], Iterable[Any]]) -> Iterator[Any]:
    """Do tasks that need no other process in turns; yield all results, in order and everywhere.

    ``work``: task -> results, plain values; it runs :func:`alone`.
    """
    if num_processes() == 1:
        for task in tasks:
            yield from work(task)
        return
    for start in range(0, len(tasks), num_processes()):
        mine = tasks[start + rank() : start + rank() + 1]
        with alone():
            results = [result for task in mine for result in work(task)]
        for found in of_all(results):
            yield from found
