"""Result files: one CSV row per setting and seed, appended as soon as it is measured."""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

RESULTS = Path(__file__).parent / "results"


class Flags(Protocol):
    """A parser, or a section of one."""

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        """Add a flag."""


def add_output_folder(flags: Flags) -> None:
    """Add ``--output``, the folder of the result files."""
    flags.add_argument(
        "--output", type=Path, default=RESULTS, metavar="FOLDER",
        help="folder to write to (benchmarks/results)",
    )  # fmt: skip


def add_output_file(flags: Flags, name: str) -> None:
    """Add ``--output``, the result file."""
    flags.add_argument(
        "--output", type=Path, default=RESULTS / name, metavar="FILE",
        help=f"CSV file to write to (benchmarks/results/{name})",
    )  # fmt: skip


def read(path: Path, key: Sequence[str]) -> set[tuple[str, ...]]:
    """Return the keys of the rows that exist."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[k] for k in key) for row in csv.DictReader(file)}


def append(path: Path, row: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Write one finished row."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, columns)
        if new:
            table.writeheader()
        table.writerow(row)


def grouped(path: Path, key: Sequence[str]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Return the rows of a file by their key, in the order of the first of each."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            groups[tuple(row[k] for k in key)].append(row)
    return groups


def mean_of(rows: Iterable[Mapping[str, str]], column: str) -> float:
    """Return the mean of a column."""
    return statistics.mean(float(row[column]) for row in rows)


def mean_and_sd(rows: Iterable[Mapping[str, str]], column: str, *, sign: str = "") -> str:
    """Return the mean ± sd of a column, with a sign if that is "+"; of one row its value alone."""
    values = [float(row[column]) for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def interpolated(points: Iterable[tuple[float, float]], at: float) -> float | None:
    """Return the y at x = ``at`` on the line through points (x, y); None outside of it."""
    for (x, y), (x2, y2) in pairwise(sorted(points)):
        if x <= at <= x2 and x < x2:
            return y + (y2 - y) * (at - x) / (x2 - x)
    return None
