"""Real ImageNet weights, real photographs: every criterion at equal images, budgets and repairs.

    python benchmarks/photographs.py --model tf_efficientnet_lite0 --checkpoint FILE \
        --calib-dir photos --calib-labels labels.tsv --class-map classes.txt \
        --test-dir imagenet-val.tar:0.987 photos-test.tar --keep 0.9 0.8 0.7 0.6 0.5 --seeds 3
    python benchmarks/photographs.py --summary benchmarks/results/photographs-*.csv

A seed draws the unlabeled images and all that is random. One CSV row per (model, criterion,
ranking, repair, images, keep, seed), appended as soon as it is measured; rows that exist are
skipped, so a run that was stopped goes on. Ends with a Markdown table, mean ± sd over the seeds,
and in brackets the difference to the dense model in points. Exit code 2: bad input, in one line.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import processor, write_environment
from errors import in_one_line
from photograph_flags import (
    input_size_of,
    options_of,
    parse,
    plan_of,
    ranking_file,
    settings_of,
    with_crop,
)
from photograph_tables import photographs_table
from rows import RESULTS, append
from torch import Tensor, nn

from tpvprune import keep_freed_memory, prune
from tpvprune.benchmark.plan import Series, Target, needs_labels
from tpvprune.benchmark.rows import COLUMNS as COMMON
from tpvprune.benchmark.rows import RANKINGS, Row, key_of, read_rows
from tpvprune.groups import find_groups
from tpvprune.images.loading import choose_images, in_memory
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import ImageSource, open_images
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.costs import count_macs, count_params
from tpvprune.passes.drawing import hold_back
from tpvprune.passes.evaluation import evaluate, model_outputs
from tpvprune.passes.running import on_device
from tpvprune.pipeline.setup import stand_in
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.repairs.compensation import compensate_weights
from tpvprune.repairs.reconstruction import reconstruct_blocks
from tpvprune.saved.models import load_model
from tpvprune.scores.baselines.stock import STOCK, stock_prune
from tpvprune.scores.criteria import with_labels
from tpvprune.widths.ranking import Ranking

SETTINGS = ("weights", "calibration", "test_sets", "arguments")
"""Columns in which all rows of a file must agree."""
COLUMNS = (
    *COMMON, "top1_by_set", "dense_by_set", "variance_ratio", "latency_kept", "branches_removed",
    "repair_used", "images_used", "timings", "warnings", *SETTINGS, "versions", "hardware",
)  # fmt: skip


@dataclass(frozen=True)
class TestSet:
    """Labelled batches, and what the dense model says to them."""

    __test__ = False  # no test of pytest's

    name: str
    batches: Any
    outputs: list[dict[str, Tensor]]
    top1: float


@dataclass(frozen=True)
class Subject:
    """The dense model and all that it is measured on; what is known of the seed's images."""

    model: nn.Module
    tests: list[TestSet]
    rankings: dict[Any, Ranking] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    kept_at: Callable[..., Path | None] = lambda *_: None

    @cached_property
    def dense_variance(self) -> float:
        """E‖f - E f‖² of the dense outputs over all test images."""
        outputs = torch.cat(
            [next(iter(found.values())) for test in self.tests for found in test.outputs]
        )
        return float(outputs.var(0, correction=0).sum())


class Cut(NamedTuple):
    """A repaired model: what was done to it, and what is known of that."""

    model: nn.Module
    repair: str
    images: Mapping[str, Any]
    warnings: Sequence[str]
    timings: Mapping[str, float] = {}
    latency: str = ""
    branches: str = ""


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table."""
    args = parse(argv)
    rows = [row for path in args.summary for row in finished(path)] if args.summary else run(args)
    if not rows:
        raise ValueError(f"{args.summary[0]}: expected rows of photographs.py, found none")
    print(photographs_table(rows))
    return 0


def run(args: argparse.Namespace) -> list[Row]:
    """Measure what is missing, row after row; return all rows of the file."""
    path = args.output or RESULTS / f"photographs-{args.model.partition('.')[0]}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = finished(path)
    for row in measured(args, done):
        append(path, row, COLUMNS)
        what = f"{row['criterion']}, {row['ranking']}, {row['repair']}, seed {row['seed']}"
        print(f"{row['keep']} of {args.of}, {what}: {row['top1']}", file=sys.stderr, flush=True)
    if path.exists():
        write_environment(path.with_suffix(".json"), args)
    return read_rows(path)


def finished(path: Path) -> list[Row]:
    """Return the rows of a file; a ValueError if it is another kind of file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        if next(csv.reader(file), None) != list(COLUMNS):
            raise ValueError(f"{path}: expected rows of photographs.py: choose another --output")
    return read_rows(path)


def measured(
    args: argparse.Namespace, done: Sequence[Row] = (), subject: Subject | None = None
) -> Iterator[Row]:
    """Measure the rows that are not done; ``subject`` is what :func:`opened` gives, if known.

    Raises:
        ValueError: If what is done was measured on something else, or nothing can be measured.
    """
    plan = plan_of(args)
    settings = settings_of(args)
    _check_settings(done, settings)
    finished_keys = {key_of(row) for row in done}
    missing = [
        (series, target, repair)
        for series in plan.series()
        for target in plan.targets()
        for repair in plan.repairs
        if key_of(plan.row(series, target, repair)) not in finished_keys
    ]
    if not missing:
        return
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    subject = subject or opened(args)
    drawn: tuple[int, list[Any]] | None = None
    left_out: dict[str, str] = {}
    num_measured = 0
    for series, target, repair in missing:
        if drawn is None or drawn[0] != series.seed:
            drawn = series.seed, calibration(args, subject.model, series.seed, plan.labelled)
            subject.rankings.clear()
        what = f"{series.criterion}, {series.ranking}, {repair}"
        if what in left_out:
            continue
        try:
            found = measure(subject, drawn[1], series, target, repair)
        except ValueError as error:
            # Some criteria do not fit some models; the others can still be compared.
            left_out[what] = " ".join(str(error).split())
            print(f"left out: {what}: {left_out[what]}", file=sys.stderr, flush=True)
            continue
        num_measured += 1
        yield plan.row(series, target, repair) | found | settings | surroundings(args)
    if not num_measured and not done:
        raise ValueError(f"nothing could be measured: {next(iter(left_out.values()))}")


# ---- what is measured, and on what ----------------------------------------------------------


def surroundings(args: argparse.Namespace) -> Row:
    """Return versions and hardware."""
    names = ("tpvprune", "torch", "timm", "torch-pruning")
    on = args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    return {
        "versions": "; ".join(f"{name} {version(name)}" for name in names),
        "hardware": f"{processor()}; {torch.get_num_threads()} threads; {on}",
    }


def _check_settings(rows: Sequence[Row], settings: Row) -> None:
    for row in rows:
        for name, value in settings.items():
            if row[name] != value:
                raise ValueError(
                    f"--output: its rows were measured with {name} {row[name]!r}, found {value!r}: "
                    "choose another file"
                )


def opened(args: argparse.Namespace) -> Subject:
    """Load the model and the test sets, and measure it on them."""
    model, _ = load_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        num_classes=args.num_classes,
        input_size=input_size_of(args),
        model_kwargs=dict(args.model_kwargs),
    )
    model = model.to(args.device)
    tests = []
    for path, crop in map(with_crop, args.test_dir):
        source = open_images(path, split="validation", class_map=args.class_map, labelled=True)
        batches = images(args, model, source, num=args.num_test, labelled=True, crop_pct=crop)
        outputs = model_outputs(model, batches)
        labels = torch.cat([y for _, y in batches])
        classes = torch.cat([next(iter(found.values())) for found in outputs]).argmax(1).cpu()
        top1 = (classes == labels).double().mean().item()
        tests.append(TestSet(Path(path).stem, batches, outputs, top1))
    return Subject(model, tests, options=options_of(args), kept_at=partial(ranking_file, args))


def calibration(args: argparse.Namespace, model: nn.Module, seed: int, labelled: bool) -> list[Any]:
    """Return what a seed draws: inputs, or pairs with class indices if these are asked for."""
    if not labelled:
        source = open_images(args.calib_dir)
    elif args.calib_labels is None:
        source = open_images(args.calib_dir, class_map=args.class_map, labelled=True)
    else:
        source = labelled_by(open_images(args.calib_dir), args.calib_labels)
    drawn = images(args, model, source, num=args.num_images, seed=seed, labelled=labelled)
    return list(drawn)


def images(
    args: argparse.Namespace,
    model: nn.Module,
    source: ImageSource,
    *,
    labelled: bool,
    num: int | None = None,
    seed: int = 0,
    crop_pct: float | None = None,
) -> Any:
    """Return batches, held in memory where they fit; ``num`` of them, or all."""
    how = resolve_preprocessing(
        model,
        input_size=input_size_of(args),
        mean=args.mean,
        std=args.std,
        crop_pct=crop_pct or args.crop_pct,
        interpolation=args.interpolation,
    )
    chosen = choose_images(
        source,
        how,
        num_images=num,
        seed=seed,
        batch_size=args.batch_size,
        workers=args.threads,
        labelled=labelled,
    )
    return in_memory(chosen)


def labelled_by(source: ImageSource, path: Path) -> ImageSource:
    """Return a source whose images have the classes that a file gives to their names.

    Args:
        source: Images without labels, that can be read by position.
        path: One line an image: its file name, a tab, its class index.

    Raises:
        ValueError: If the file is something else, or an image is not in it.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
        labels = {name: int(number) for name, number in (line.split("\t") for line in lines)}
    except ValueError as error:
        raise ValueError(f"{path}: expected a file name, a tab and a class index a line") from error

    def label(item: Any) -> int:
        return labels[Path(source.where(item)).name]

    unknown = [item for item in source.items() if Path(source.where(item)).name not in labels]
    if unknown:
        raise ValueError(f"{path}: expected a line for {source.where(unknown[0])}, found none")
    return replace(source, read=lambda item: (source.read(item)[0], label(item)))


# ---- one row --------------------------------------------------------------------------------


def measure(
    subject: Subject,
    batches: Sequence[Any],
    series: Series,
    target: Target,
    repair: str,
) -> Row:
    """Prune once and return what came of it.

    Rankings do not depend on the budget: ``seconds`` and ``timings`` of the first row of a series
    have their time.

    Raises:
        ValueError: If the criterion does not fit the model.
    """
    start = time.perf_counter()
    if series.criterion in STOCK:
        cut = _stock(subject.model, batches, series, target.keep, repair)
    else:
        cut = _ours(subject, batches, series, target.keep, repair)
    seconds = time.perf_counter() - start
    return quality(subject, cut) | {"seconds": f"{seconds:.1f}"}


def quality(subject: Subject, cut: Cut) -> Row:
    """Measure a pruned model on every test set; each image counts the same."""
    found = [evaluate(cut.model, test.batches, dense=test.outputs) for test in subject.tests]
    num = sum(one.num_images for one in found)

    def mean(values: Sequence[Any]) -> float:
        pairs = zip(found, values, strict=True)
        return sum(one.num_images * float(value) for one, value in pairs) / num

    example = next(iter(unlabeled(subject.tests[0].batches)))[:1]
    variance = mean([one.output_variance for one in found]) / subject.dense_variance
    return {
        "macs_kept": f"{found[0].macs / count_macs(subject.model, example):.4f}",
        "params_kept": f"{found[0].params / count_params(subject.model):.4f}",
        "top1": f"{100 * mean([one.top1 for one in found]):.2f}",
        "dense_top1": f"{100 * mean([test.top1 for test in subject.tests]):.2f}",
        "agreement": f"{100 * mean([one.agreement for one in found]):.2f}",
        "variance_ratio": f"{variance:.4g}",
        "top1_by_set": _by_set(subject, [one.top1 for one in found]),
        "dense_by_set": _by_set(subject, [test.top1 for test in subject.tests]),
        "latency_kept": cut.latency,
        "branches_removed": cut.branches,
        "repair_used": cut.repair,
        "images_used": "; ".join(f"{stage} {num}" for stage, num in cut.images.items()),
        "timings": "; ".join(f"{stage} {time:.1f}" for stage, time in cut.timings.items()),
        "warnings": " ".join("; ".join(map(str, cut.warnings)).split()),
    }


def _by_set(subject: Subject, fractions: Sequence[float]) -> str:
    pairs = zip(subject.tests, fractions, strict=True)
    return "; ".join(f"{test.name} {100 * value:.2f}" for test, value in pairs)


def _ours(
    subject: Subject, batches: Sequence[Any], series: Series, keep: float, repair: Any
) -> Cut:
    """Prune by one of our scorers."""
    key = series, stand_in(repair)
    file = subject.kept_at(*key)
    if file is not None and file.exists() and key not in subject.rankings:
        subject.rankings[key] = Ranking.load(file)
    allocation: Any = RANKINGS[series.ranking]
    result = prune(
        subject.model,
        batches,
        keep=keep,
        criterion=with_labels(series.criterion, batches),
        ranking=subject.rankings.get(key),
        allocation=allocation,
        repair=repair,
        seed=series.seed,
        **subject.options,
    )
    subject.rankings[key] = result.ranking
    if file is not None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        result.ranking.save(file)
    report = result.report
    fit, held = report.get("num_images", ""), report.get("num_held_back", "")
    used = report.get("images_used") or {"fit": fit, "held back": held}
    chosen = str(report.get("repair_chosen", repair))
    branches, speed = report.get("branches"), report.get("speed")
    gone = f"{sum(b['gone'] for b in branches)} of {len(branches)}" if branches else ""
    latency = (
        f"{speed['ratio']:.3f} ({speed['ratio_low']:.3f} to {speed['ratio_high']:.3f})"
        if speed
        else ""
    )
    warnings, timings = report["warnings"], report["timings"]
    return Cut(result.model, chosen, used, warnings, timings, latency, gone)


def _stock(
    model: nn.Module, batches: Sequence[Any], series: Series, keep: float, repair: str
) -> Cut:
    """Prune with torch-pruning's pruner, then repair as after ours."""
    fit = list(hold_back(batches)[0])
    example = on_device(fit[0][:1], model)
    groups = find_groups(model, example)
    labelled = batches if needs_labels(series.criterion) else ()
    found = stock_prune(
        model, groups, example, series.criterion, labelled, keep=keep, seed=series.seed
    )
    used = {"repair": sum(map(len, fit))}
    if repair == "none":
        return Cut(found.model, repair, {}, ())
    if repair == "bn":
        return Cut(recalibrate_batchnorm(found.model, fit), repair, used, ())
    if found.kept is None:
        raise ValueError(
            "torch-pruning narrowed heads or convolution groups, which tpvprune removes as a whole "
            "or not at all"
        )
    refit = reconstruct_blocks if repair == "reconstruct" else compensate_weights
    refitted = refit(found.model, model, fit, groups=groups, kept=found.kept, seed=series.seed)
    return Cut(refitted, repair, used, ())


if __name__ == "__main__":
    raise SystemExit(main())
