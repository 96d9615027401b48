"""What surveys over many networks share: a process for each, agreement of outputs, the table."""

from __future__ import annotations

import csv
import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.running import tensors_of

Row = dict[str, Any]


def real_outputs(value: Any) -> list[Tensor]:
    """Return every tensor of real numbers that a model returns."""
    return [t for t in tensors_of(value) if t.is_floating_point()]


def relative_gap(found: Any, expected: Any) -> float:
    """Return the largest difference of two results, of each output relative to its own scale."""
    pairs = list(zip(real_outputs(found), real_outputs(expected), strict=True))
    gaps = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in pairs)
    return max(map(float, gaps), default=float("nan"))


def equal(first: Any, second: Any) -> bool:
    """Return whether two results are the same bit by bit."""
    pairs = zip(real_outputs(first), real_outputs(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def exported(small: nn.Module, dense: nn.Module, x: Tensor) -> str:
    """Return "True" if torch.export gives the outputs of the pruned model, else what it does."""
    try:
        program = torch.export.export(small, (x,))
        with torch.no_grad():
            return str(relative_gap(program.module()(x), small(x)) < 1e-4)
    except Exception as error:
        try:
            torch.export.export(dense, (x,))
        except Exception:
            return f"neither does the dense model: {type(error).__name__}"
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def bounded(survey: Callable[..., Row], limit: float, *args: Any) -> Row:
    """Run ``survey(*args)`` in a process of its own for at most ``limit`` seconds.

    Args:
        survey: What measures one network.
        limit: Seconds.
        args: Its arguments.

    Returns:
        Its row, or one with an "error".
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(send, survey, *args))
    process.start()
    send.close()
    row: Row = {"error": f"not finished in {limit:g} s"}
    if receive.poll(limit):
        try:
            row = receive.recv()
        except EOFError:
            process.join()
            row = {"error": f"process died with exit code {process.exitcode}"}
    process.kill()
    process.join()
    return row


def _work(pipe: Connection, survey: Callable[..., Row], *args: Any) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(survey(*args))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        pipe.send({"error": text.replace("\n", " ")[:400]})


def read_rows(path: Path, key: str) -> dict[str, Row]:
    """Return the rows that exist, by a column."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the whole table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
