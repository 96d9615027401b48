"""The rows of a benchmark: one CSV line per pruned model, and what they come to over seeds."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpvprune.disk.atomic import written_file

KEY = ("model", "criterion", "allocation", "repair", "steps", "num_images", "keep", "seed")
COLUMNS = (
    *KEY, "labels", "macs_kept", "params_kept", "top1", "dense_top1", "agreement", "seconds",
    "ranking",
)  # fmt: skip
RANKINGS = {"curves": "curves", "per_cost": "rank", "plain": "plain"}
"""Ranking -> ``allocation`` of ``tpvprune.prune``."""
STOCK_RANKING = "torch_pruning"
_LINE = ("model", "criterion", "labels", "ranking", "repair", "num_images")

Row = dict[str, str]


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """Return what tells a row from all others."""
    return tuple(row[name] for name in KEY)


def read_rows(path: Path) -> list[Row]:
    """Read the finished rows of a file."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows, columns = list(table), table.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected the rows of a benchmark, found damage") from error
    missing = {*COLUMNS[:-1]} - {*columns}
    if missing:
        raise ValueError(
            f"{path}: expected the rows of a benchmark, found a table without the column "
            f"{min(missing)!r}: choose another --output"
        )
    if not all(set(columns) == row.keys() and None not in row.values() for row in rows):
        raise ValueError(f"{path}: expected the rows of a benchmark, found one that is cut short")
    names = {allocation: ranking for ranking, allocation in RANKINGS.items()}
    return [{"ranking": names.get(row["allocation"], STOCK_RANKING), **row} for row in rows]


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write a file of rows, whole or not at all."""
    with written_file(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, COLUMNS)
        table.writeheader()
        table.writerows(rows)


@dataclass(frozen=True)
class Summary:
    """The rows that differ only in their seed; accuracies in %, ``sd`` None for a single seed."""

    model: str
    criterion: str
    labels: str
    ranking: str
    repair: str
    num_images: str
    keep: float
    macs_kept: float
    top1: float
    sd: float | None
    dense_top1: float
    num_seeds: int

    @property
    def line(self) -> tuple[str, ...]:
        """What stays along a line of the table or the chart."""
        return tuple(getattr(self, name) for name in _LINE)

    @property
    def shown(self) -> str:
        """Mean ± sd, and what is left where that is not the budget."""
        text = f"{self.top1:.2f}" + ("" if self.sd is None else f" ± {self.sd:.2f}")
        # Budgets are met from below; a row that is off by more would not be a fair comparison.
        if abs(self.macs_kept - self.keep) > 0.02:
            text += f" (at {self.macs_kept:.2f})"
        return text


def summarise(rows: Iterable[Mapping[str, str]]) -> list[Summary]:
    """Take the mean and the standard deviation over seeds."""
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        groups[key_of(row)[:-1]].append(row)
    found = []
    for alike in groups.values():
        top1 = [float(row["top1"]) for row in alike]
        found.append(
            Summary(
                **{name: alike[0][name] for name in _LINE},
                keep=float(alike[0]["keep"]),
                macs_kept=statistics.mean(float(row["macs_kept"]) for row in alike),
                top1=statistics.mean(top1),
                sd=statistics.stdev(top1) if len(top1) > 1 else None,
                dense_top1=statistics.mean(float(row["dense_top1"]) for row in alike),
                num_seeds=len(alike),
            )
        )
    return found


def markdown(rows: Iterable[Mapping[str, str]]) -> str:
    """Return a table of top-1, mean ± standard deviation over seeds, with its caption.

    What is the same in all rows is said in the caption and left out of the table.
    """
    found = summarise(rows)
    heads = (*_LINE[:-1], "images")
    lines: dict[tuple[str, ...], list[Summary]] = defaultdict(list)
    for summary in found:
        lines[summary.line].append(summary)
    keeps = sorted({s.keep for s in found}, reverse=True)
    varying = [
        i for i, head in enumerate(heads) if head == "model" or len({k[i] for k in lines}) > 1
    ]
    most = max(s.num_seeds for s in found)
    top = [*(heads[i] for i in varying), "dense", *(f"{keep:g} of MACs" for keep in keeps)]
    table = ["| " + " | ".join(top) + " |", "|" + "---|" * len(top)]
    for line, summaries in lines.items():
        by_keep = {s.keep: s for s in summaries}
        cells = [line[i] for i in varying] + [f"{summaries[0].dense_top1:.2f}"]
        cells += [_cell(by_keep.get(keep), most) for keep in keeps]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join([_caption(heads, lines, varying, most), "", *table])


def _caption(
    heads: Sequence[str], lines: Iterable[tuple[str, ...]], varying: Sequence[int], num_seeds: int
) -> str:
    first = next(iter(lines))
    same = [f"{head} {first[i]}" for i, head in enumerate(heads) if i not in varying]
    seeds = f"mean ± sd over {num_seeds} seeds" if num_seeds > 1 else "one seed"
    return ", ".join([f"Top-1 in %, {seeds}", *same]) + "."


def _cell(summary: Summary | None, num_seeds: int) -> str:
    if summary is None:
        return ""
    text = summary.shown
    return text if summary.num_seeds == num_seeds else f"{text} ({summary.num_seeds} of them)"
