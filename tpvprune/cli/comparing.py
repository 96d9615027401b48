"""`compare`: several saved runs side by side."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpvprune.cli.console import say, table
from tpvprune.cli.session import Outcome
from tpvprune.disk.atomic import write_text
from tpvprune.reports.comparing import (
    Run,
    branches_gone,
    broken_runs,
    figures_of,
    figures_of_all,
    measured_on,
    render_comparison,
)
from tpvprune.reports.report import DAMAGE, read_report

_WIDTH, _SHORTEST_NAME = 80, 10


def run_compare(args: argparse.Namespace) -> Outcome:
    """Tabulate the runs, and write the page if one is asked for."""
    runs = [
        (name, _report(folder))
        for name, folder in zip(_names(args.folders), args.folders, strict=True)
    ]
    show_runs(runs)
    if args.output is not None:
        write_text(args.output, render_comparison(runs))
        say(f"saved: {args.output}")
    kept = ("model", "dense", "pruned", "criterion", "repair", "used_labels", "keep", "of", "seed")
    document = {
        "runs": [
            {
                "name": name,
                "folder": folder,
                **{key: report.get(key) for key in kept},
                "share": figures_of(report),
                "measured_on": measured_on(report),
            }
            for (name, report), folder in zip(runs, args.folders, strict=True)
        ],
        "output": None if args.output is None else str(args.output),
    }
    return 0, document


def _report(folder: str) -> dict[str, Any]:
    report = read_report(folder)
    try:
        render_comparison([(folder, report)])
    except DAMAGE as error:
        raise ValueError(f"{folder}: expected the report of a run, found damage") from error
    return report


def _names(folders: Sequence[str]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    common = os.path.commonpath(paths) if len(set(paths)) > 1 else paths[0].parent
    names = [path.relative_to(common).as_posix() for path in paths]
    last = [path.name for path in paths]
    return last if len(set(last)) == len(last) else names


def show_runs(runs: Sequence[Run]) -> None:
    """Tabulate them."""
    found = figures_of_all(runs)
    heads = {
        "macs": "MACs",
        "params": "params",
        "nonzero_params": "non-zero",
        "latency": "latency",
        "top1": "top-1",
        "top1_change": "change",
        "agreement": "agreement",
    }
    shown = [key for key in heads if any(row[key] is not None for row in found)]
    cells = [[heads[key] for key in shown]]
    cells += [[_cell(key, row[key]) for key in shown] for row in found]
    measured = [measured_on(report) for _, report in runs]
    on = [where["agreement"] for where in measured]
    if any(on):
        numbers = [(where or "-").partition(" ")[0] for where in on]
        cells = [[*row, num] for row, num in zip(cells, ["images", *numbers], strict=True)]
    longest = _WIDTH - sum(2 + max(map(len, column)) for column in zip(*cells, strict=True))
    names = ["run", *(_short(name, max(longest, _SHORTEST_NAME)) for name, _ in runs)]
    table([(name, *row) for name, row in zip(names, cells, strict=True)])
    if broken := broken_runs(runs):
        say(f"BROKEN, by the images held back: {', '.join(broken)}", indent="  ")
    if gone := branches_gone(runs):
        counts = (f"{len(left)} of {could} ({name})" for name, (left, could) in gone.items())
        say(f"branches removed: {', '.join(counts)}", indent="  ")
    models = {str(report.get("model")) for _, report in runs}
    own = "each run's own dense model" if len(models) > 1 else "the dense model"
    non_zero = ", non-zero parameters" if "nonzero_params" in shown else ""
    say(f"all in percent; MACs, parameters{non_zero}, latency: of {own}")
    _say_images("agreement", names[1:], on)
    top1 = [where["top1"] for where in measured]
    if top1 != on:
        _say_images("top-1", names[1:], top1)


def _say_images(what: str, names: Sequence[str], on: Sequence[str | None]) -> None:
    """Say on which images something was measured."""
    for kind in dict.fromkeys(filter(None, on)):
        where = ", ".join(name for name, seen in zip(names, on, strict=True) if seen == kind)
        say(f"{what} on {kind}" + (f": {where}" if len(set(on)) > 1 else ""), indent="  ")
    if len(set(filter(None, on))) > 1:
        say(f"{what} on different images: compare those runs with care")


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:{'+' if key == 'top1_change' else ''}.2f}"


def _short(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    half = (longest - 3) // 2
    return f"{name[:half]}...{name[-half:]}"
