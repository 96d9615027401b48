"""The tables of what photographs.py measured: criteria and budgets, depth beside width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rows import RESULTS, mean_and_sd, mean_of
from titles import criterion_of, markdown

from tpvprune.benchmark.plan import REPAIRS
from tpvprune.benchmark.rows import Row, Summary, read_rows, summarise


def photographs() -> str:
    """Return top-1 on photographs by network, repair and budget: TPV with its default widths."""
    found = [s for s in summarise(_photograph_rows()) if criterion_of(s) == "TPV, curves"]
    return _by_budget(["network", "repair", "images", "dense"], found, _unranked)


def headline() -> str:
    """Return what stays on photographs at 0.8 of the MACs, with default and with free widths."""
    free, default = (
        {
            s.model: s
            for s in summarise(_photograph_rows(kind))
            if (criterion_of(s), s.repair, s.keep) == ("TPV, curves", "compensate", 0.8)
        }
        for kind in ("photographs", "default-widths")
    )

    def top1(s: Summary | None) -> str:
        if s is None:
            return ""
        return f"{s.top1:.1f}" + ("" if s.sd is None else f" ± {s.sd:.1f}")

    return markdown(
        ["network", "MACs that stay", "top-1 before", "after", "after, free widths"],
        [
            [f"`{m}`", f"{s.keep:g}", f"{s.dense_top1:.1f}", top1(default.get(m)), top1(s)]
            for m, s in free.items()
        ],
    )


def photographs_criteria() -> str:
    """Return how many points each criterion loses on photographs, by repair, at 0.8 and 0.6."""
    lines: dict[tuple[str, ...], dict[tuple[str, float], Summary]] = {}
    for s in summarise(_photograph_rows()):
        if s.keep in (0.8, 0.6):
            lines.setdefault((s.repair, *_of(s)), {})[s.model, s.keep] = s
    columns = sorted({c for cells in lines.values() for c in cells}, key=lambda c: (c[0], -c[1]))

    def place(line: tuple[tuple[str, ...], Mapping[Any, Summary]]) -> tuple[int, bool, float]:
        (repair, name, _), cells = line
        first = next(iter(cells.values()))
        return REPAIRS.index(repair), not name.startswith("TPV"), first.dense_top1 - first.top1

    return markdown(
        ["repair", "criterion", "labels", *(f"`{model}` {keep:g}" for model, keep in columns)],
        [
            [*line, *(_loss(cells[c]) if c in cells else "" for c in columns)]
            for line, cells in sorted(lines.items(), key=place)
        ],
    )


def photographs_table(rows: Iterable[Mapping[str, str]]) -> str:
    """Return top-1 of all rows of photographs.py: a line per network, repair and criterion."""
    head = ["network", "repair", "images", "dense", "criterion", "labels"]
    return _by_budget(head, summarise(rows), lambda s: (*_unranked(s), *_of(s)))


def _by_budget(
    head: Sequence[str], found: Iterable[Summary], line_of: Callable[[Summary], tuple[str, ...]]
) -> str:
    """Return top-1 and its difference to the dense one, a column per budget."""
    ordered = sorted(found, key=lambda s: (s.model, REPAIRS.index(s.repair)))
    keeps = sorted({s.keep for s in ordered}, reverse=True)
    lines: dict[tuple[str, ...], dict[float, str]] = {}
    for s in ordered:
        lines.setdefault(line_of(s), {})[s.keep] = f"{s.shown} ({s.top1 - s.dense_top1:+.1f})"
    return markdown(
        [*head, *(f"{keep:g} of MACs" for keep in keeps)],
        [[*line, *(cells.get(keep, "") for keep in keeps)] for line, cells in lines.items()],
    )


def depth() -> str:
    """Return what is left where branches may go, by model, budget and granularity; over seeds."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for path in sorted(RESULTS.glob("depth-*.csv")):
        for row in read_rows(path):
            found.setdefault(_depth_line(row), []).append(row)
    columns = ("branches gone", "of the time", "of the MACs", "top-1", "agreement")
    return markdown(
        ["model", "budget", "repair", "granularity", *columns],
        [
            [
                *line,
                _branches(rows),
                _share_of_time(rows),
                mean_and_sd(rows, "macs_kept"),
                f"{mean_and_sd(rows, 'top1')} ({_lost(rows):+.1f})",
                mean_and_sd(rows, "agreement"),
            ]
            for line, rows in sorted(found.items())
        ],
    )


def _depth_line(row: Row) -> tuple[str, str, str, str]:
    """Return what the rows of one line of the table of depth share."""
    told = dict(words.split(" ", 1) for words in row["arguments"].split("; ") if words)
    budget = f"{row['keep']} of MACs"
    if told.get("of") == "latency":
        images, (threads, _) = (
            told.get("latency_batch_size", "1"),
            row["hardware"].split("; ")[1].split(),
        )
        budget = f"{row['keep']} of ms: images {images}, threads {threads}"
    granularity = told.get("granularity", "channel")
    if "max_depth_removed" in told:
        granularity += f", up to {float(told['max_depth_removed']):.0%}"
    return f"`{row['model']}`", budget, row["repair"], granularity


def _branches(rows: Sequence[Row]) -> str:
    """Return how many branches went, of how many: the least and the most over the seeds."""
    found = [row["branches_removed"].split(" of ") for row in rows if row["branches_removed"]]
    gone = sorted({int(number) for number, _ in found})
    if not gone:
        return ""
    return f"{gone[0]}{f' to {gone[-1]}' if len(gone) > 1 else ''} of {found[0][1]}"


def _share_of_time(rows: Sequence[Row]) -> str:
    shares = [{"share": row["latency_kept"].split(" ")[0]} for row in rows if row["latency_kept"]]
    return mean_and_sd(shares, "share") if shares else ""


def _lost(rows: Sequence[Row]) -> float:
    return mean_of(rows, "top1") - mean_of(rows, "dense_top1")


def _photograph_rows(kind: str = "photographs") -> list[Row]:
    paths = sorted(RESULTS.glob(f"{kind}-*.csv"))
    return [row for path in paths for row in read_rows(path)]


def _of(s: Summary) -> tuple[str, str]:
    return criterion_of(s), s.labels


def _unranked(s: Summary) -> tuple[str, str, str, str]:
    return f"`{s.model}`", s.repair, s.num_images, f"{s.dense_top1:.2f}"


def _loss(s: Summary) -> str:
    sd = "" if s.sd is None else f" ± {s.sd:.1f}"
    return f"{s.top1 - s.dense_top1:+.1f}{sd}"
