"""`benchmark`: criteria compared on one model, with a table, a page and a file of rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpvprune.benchmark import running as benchmarking
from tpvprune.benchmark.page import render_benchmark
from tpvprune.benchmark.plan import Plan
from tpvprune.benchmark.rows import Row, key_of, markdown
from tpvprune.cli.console import say
from tpvprune.cli.session import Outcome, Subject, open_subject, provenance
from tpvprune.cli.session_images import calibration, labelled_images, open_data
from tpvprune.cli.session_results import write_json
from tpvprune.disk.atomic import present_in, write_text
from tpvprune.disk.path_checks import check_writable
from tpvprune.images.sources import ImageSource
from tpvprune.passes.batches import unlabeled
from tpvprune.processes.membership import alone
from tpvprune.processes.shares import by_first

_ROWS, _SETTINGS, _TABLE, _PAGE = "results.csv", "settings.json", "results.md", "report.html"
_MISSED = 1e-3
_BROKEN = 50.0  # % agreement: below it, most images have another class


def run_benchmark(args: argparse.Namespace) -> Outcome:
    """Measure what is missing, and write the table and the page."""
    if args.eval_dir is None:
        raise ValueError("--eval-dir: expected labelled images to measure top-1 on, found none")
    subject = open_subject(args)
    plan = plan_of(args, subject)
    images = open_data(args, labelled=plan.labelled)
    if images.count is not None and images.count < args.num_images:
        args.num_images = images.count
        plan = plan_of(args, subject)
    settings = _settings(args, subject, images)
    by_first(_check_output, args.output, settings, overwrite=args.overwrite)
    with alone():  # every process measures series of its own, on all of the images
        test = labelled_images(args, subject, images)
    by_first(write_json, args.output / _SETTINGS, settings)

    def drawn(seed: int) -> Any:
        of_seed = argparse.Namespace(**{**vars(args), "seed": seed})
        chosen = calibration(of_seed, subject, images, labelled=plan.labelled)
        return chosen if plan.labelled else unlabeled(chosen, device=subject.device)

    rows, left_out = benchmarking.run_benchmark(
        plan, subject.model, drawn, test, args.output / _ROWS, report=_say_row
    )
    document = {
        **provenance(args, subject),
        "used_labels": plan.labelled,
        "images": {"source": images.name, "num_images": args.num_images},
        "rows": rows,
        "left_out": left_out,
        "output": str(args.output),
    }
    if line := broken_rows(rows):
        say(line)
    by_first(_write, args.output, document)
    for what, reason in left_out.items():
        say(f"left out: {what}: {reason}", indent="  ")
    missed = [row for row in rows if float(row["macs_kept"]) > float(row["keep"]) + _MISSED]
    for row in missed:
        which = ", ".join(key_of(row))
        say(f"budget not reached: {which}: {row['macs_kept']} of the MACs are left")
    say(f"saved: {args.output}")
    return (3 if missed else 0), document


def plan_of(args: argparse.Namespace, subject: Subject) -> Plan:
    """Return which rows the flags ask for; a ValueError tells what is not known."""
    return Plan(
        model=subject.made.name,
        criteria=tuple(args.criteria),
        keeps=tuple(args.keep),
        repairs=tuple(args.repair),
        rankings=tuple(args.ranking),
        seeds=tuple(range(args.seed, args.seed + args.seeds)),
        num_images=args.num_images,
        steps=args.iterative,
    )


def _settings(args: argparse.Namespace, subject: Subject, images: ImageSource) -> dict[str, Any]:
    """Return what decides the rows besides what they say themselves."""
    known = provenance(args, subject)
    settings = {
        **{name: known[name] for name in ("model", "model_kwargs", "weights", "preprocessing")},
        "images": images.name,
        "eval_dir": str(args.eval_dir),
        "class_map": args.class_map,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _check_output(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Find out whether the folder is new, or an unfinished run of the same settings."""
    present = present_in(folder)
    if present and _SETTINGS not in present:
        raise ValueError(
            f"{folder}: expected a benchmark to go on with, found other files "
            f"({min(present)!r}): choose another folder"
        )
    check_writable(folder / _ROWS)
    if overwrite:
        for name in (_ROWS, _SETTINGS, _TABLE, _PAGE):
            (folder / name).unlink(missing_ok=True)
    elif present:
        before = _earlier_settings(folder / _SETTINGS)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{folder}: its rows were measured with {name} {before.get(name)!r}, found "
                    f"{value!r}: choose another --output, or --overwrite"
                )


def _earlier_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected the settings of a benchmark, found damage: --overwrite starts anew"
        ) from error


def broken_rows(rows: Sequence[Row]) -> str | None:
    """Return which rows are of models that are no longer the same function, and what to try."""
    found = [row for row in rows if _is_broken(row)]
    if not found:
        return None
    first = max(found, key=lambda row: float(row["keep"]))
    return (
        f"BROKEN: {len(found)} of {len(rows)} rows agree with the dense model on less than half of "
        f"the images, at keep {first['keep']} {first['criterion']} with repair {first['repair']} "
        f"(agreement {first['agreement']} %): try a larger keep, more images, or another repair"
    )


def _is_broken(row: Row) -> bool:
    return bool(row["agreement"]) and not float(row["agreement"]) >= _BROKEN


def _say_row(row: Row, done: int, total: int) -> None:
    what = f"{row['criterion']}, {row['ranking']}, {row['repair']}, seed {row['seed']}"
    broken = f", BROKEN: agreement {row['agreement']} %" if _is_broken(row) else ""
    say(f"[{done}/{total}] {row['keep']} of MACs, {what}: top-1 {row['top1']} %{broken}")


def _write(folder: Path, document: dict[str, Any]) -> None:
    table = markdown(document["rows"])
    say()
    print(table, file=sys.stderr)
    say()
    write_text(folder / _TABLE, table + "\n")
    write_text(folder / _PAGE, render_benchmark(document))
