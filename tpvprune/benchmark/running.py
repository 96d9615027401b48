"""Compare criteria: the same images, budgets and repairs for all, over several seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tpvprune.benchmark.plan import Plan, Series, Target, needs_labels
from tpvprune.benchmark.rows import KEY, RANKINGS, Row, key_of, read_rows, write_rows
from tpvprune.groups import ChannelGroups, Kept, find_groups
from tpvprune.passes.costs import count_macs, count_params
from tpvprune.passes.drawing import drawn_indices, hold_back
from tpvprune.passes.evaluation import evaluate, model_outputs
from tpvprune.passes.running import on_device
from tpvprune.pipeline import PruningResult, prune
from tpvprune.pipeline.choices import Repair
from tpvprune.pipeline.run import compose
from tpvprune.pipeline.setup import stand_in
from tpvprune.processes.shares import by_first, dealt
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.repairs.compensation import compensate_weights
from tpvprune.repairs.reconstruction import reconstruct_blocks
from tpvprune.scores.baselines.stock import STOCK, stock_prune
from tpvprune.scores.criteria import with_labels
from tpvprune.widths.ranking import Allocation

_WITHOUT_GROUPS = frozenset({"none", "bn"})


class LeftOut(NamedTuple):
    """Rows that cannot be measured, and why."""

    what: str
    reason: str


class Task(NamedTuple):
    """The rows of one series that are yet to be measured: target -> repairs."""

    plan: Plan
    series: Series
    missing: Mapping[Target, Sequence[str]]


@dataclass(frozen=True)
class Material:
    """The dense model, and what one seed draws: batches, and the inputs of scores and repairs."""

    dense: nn.Module
    batches: list[Any]
    fit: list[Tensor]
    seed: int

    def labelled_for(self, criterion: str) -> list[tuple[Tensor, Tensor]]:
        """Return the inputs with their class indices, if the criterion reads those."""
        if not needs_labels(criterion):
            return []
        labels = torch.cat([y for _, y in self.batches])
        labels = labels[drawn_indices(len(labels), seed=self.seed)[0]]
        return list(zip(self.fit, labels.split([len(x) for x in self.fit]), strict=True))

    @cached_property
    def dense_macs(self) -> int:
        """The MACs of the dense model."""
        return count_macs(self.dense, self.fit[0][:1])


@dataclass(frozen=True)
class Cut:
    """A pruned model before any repair; ``kept`` is None where our groups cannot express it."""

    model: nn.Module
    groups: ChannelGroups
    kept: Kept | None
    seconds: float


def run_benchmark(
    plan: Plan,
    model: nn.Module,
    images: Callable[[int], Sequence[Any]],
    test: Any,
    path: Path,
    *,
    report: Callable[[Row, int, int], None],
) -> tuple[list[Row], dict[str, str]]:
    """Measure the rows that are missing; each is on disk as soon as it is finished.

    All criteria and repairs see the same inputs: all but those that ``tpvprune.prune`` holds
    back, so that its rows are what it returns.
    """
    wanted = plan.keys()
    rows = {key_of(row): row for row in by_first(read_rows, path)}
    _check_superset(path, rows, wanted)
    left_out: dict[str, str] = {}

    @lru_cache(1)
    def drawn(seed: int) -> Material:
        batches = list(images(seed))
        return Material(model, batches, hold_back(batches, seed=seed)[0], seed)

    @lru_cache(1)
    def answers() -> tuple[str, list[dict[str, Tensor]]]:
        return f"{100 * evaluate(model, test).top1:.2f}", model_outputs(model, test)

    def measured(task: Task) -> Iterator[Row | LeftOut]:
        seed, criterion, _ = task.series
        if criterion in left_out:
            return
        material, (top1, outputs) = drawn(seed), answers()
        try:
            for found in _measured(task, material, test, outputs):
                yield found if isinstance(found, LeftOut) else found | {"dense_top1": top1}
        except ValueError as error:
            # Some criteria do not fit some models; the others can still be compared.
            yield LeftOut(criterion, " ".join(str(error).split()))

    tasks = [Task(plan, series, _missing(plan, series, rows)) for series in plan.series()]
    for found in dealt([task for task in tasks if task.missing], measured):
        if isinstance(found, LeftOut):
            left_out[found.what] = found.reason
            continue
        rows[key_of(found)] = found
        by_first(write_rows, path, _in_order(rows, wanted))
        report(found, len(rows), len(wanted))
    if not rows:
        raise ValueError(f"nothing could be measured: {'; '.join(left_out.values())}")
    return _in_order(rows, wanted), left_out


def _check_superset(
    path: Path, rows: Mapping[tuple[str, ...], Row], wanted: Sequence[tuple[str, ...]]
) -> None:
    extra = next(iter(rows.keys() - {*wanted}), None)
    if extra is not None:
        found = ", ".join(f"{name} {value}" for name, value in zip(KEY, extra, strict=True))
        raise ValueError(
            f"{path}: holds a row that is not asked for ({found}): ask for what it holds too, "
            "or choose another --output"
        )


def _missing(
    plan: Plan, series: Series, rows: Mapping[tuple[str, ...], Row]
) -> dict[Target, list[str]]:
    """Return the repairs yet to be measured at each target; targets without any are left out."""
    return {
        target: repairs
        for target in plan.targets()
        if (repairs := [r for r in plan.repairs if key_of(plan.row(series, target, r)) not in rows])
    }


def _in_order(rows: Mapping[tuple[str, ...], Row], wanted: Sequence[tuple[str, ...]]) -> list[Row]:
    return [rows[key] for key in wanted if key in rows]


def _measured(
    task: Task, material: Material, test: Any, answers: list[dict[str, Tensor]]
) -> Iterator[Row | LeftOut]:
    """Yield the rows of a task, but for the dense accuracy."""
    plan, series, _ = task
    cuts = _stock_cuts if series.criterion in STOCK else _cuts
    for target, repairs, cut in cuts(task, material):
        for repair in repairs:
            if cut.kept is None and repair not in _WITHOUT_GROUPS:
                yield LeftOut(
                    f"{series.criterion}, {repair}",
                    "torch-pruning narrowed heads or convolution groups, which tpvprune removes "
                    "as a whole or not at all",
                )
                continue
            start = time.perf_counter()
            repaired = _repaired(cut, material, repair, series.seed)
            seconds = cut.seconds + time.perf_counter() - start
            found = evaluate(repaired, test, dense=answers)
            assert found.agreement is not None
            yield plan.row(series, target, repair) | {
                "macs_kept": f"{found.macs / material.dense_macs:.4f}",
                "params_kept": f"{found.params / count_params(material.dense):.4f}",
                "top1": f"{100 * found.top1:.2f}",
                "agreement": f"{100 * found.agreement:.2f}",
                "seconds": f"{seconds:.1f}",
            }


def _cuts(task: Task, material: Material) -> Iterator[tuple[Target, Sequence[str], Cut]]:
    # By one of our scorers: each time from the dense model, or step after step.
    plan, series, missing = task
    for repairs in _alike(series, plan.repairs):
        wanted = {
            target: alike
            for target, found in missing.items()
            if (alike := [r for r in found if r in repairs])
        }
        if wanted:
            cut = partial(_prune, series, material, planned_repair=repairs[0])
            if plan.steps > 1:
                made = _iterative_cuts(plan.targets(), material, cut)
            else:
                made = _single_cuts(wanted, material, cut)
            yield from ((target, wanted[target], one) for target, one in made if target in wanted)


def _alike(series: Series, repairs: Sequence[str]) -> list[list[str]]:
    """Return the repairs, those together for which ``prune`` chooses the same channels."""
    kinds: dict[object, list[str]] = {}
    for repair in repairs:
        place = stand_in(repair)
        kind = place if series.ranking == "curves" else place == "zero"
        kinds.setdefault(kind if series.criterion == "tpv" else None, []).append(repair)
    return list(kinds.values())


def _single_cuts(
    targets: Iterable[Target], material: Material, cut: Callable[..., PruningResult]
) -> Iterator[tuple[Target, Cut]]:
    for target in targets:
        start = time.perf_counter()
        found = cut(material.dense, target.keep)
        yield target, Cut(found.model, found.groups, found.kept, time.perf_counter() - start)


def _iterative_cuts(
    targets: Iterable[Target], material: Material, cut: Callable[..., PruningResult]
) -> Iterator[tuple[Target, Cut]]:
    pruned, groups, kept, start = material.dense, None, cast(Kept, {}), time.perf_counter()
    for target in targets:
        share = count_macs(pruned, material.fit[0][:1]) / material.dense_macs
        found = cut(pruned, min(1.0, target.keep / share), repair_factors=False)
        groups = groups or found.groups
        pruned, kept = found.model, compose(kept, found.kept) if kept else found.kept
        yield target, Cut(pruned, groups, kept, time.perf_counter() - start)


def _prune(
    series: Series,
    material: Material,
    model: nn.Module,
    keep: float,
    *,
    planned_repair: str,
    repair_factors: bool | None = None,
) -> PruningResult:
    return prune(
        model,
        material.batches,
        num_images=None,
        keep=keep,
        criterion=with_labels(series.criterion, material.labelled_for(series.criterion)),
        allocation=cast(Allocation, RANKINGS[series.ranking]),
        repair="none",
        planned_repair=cast(Repair, planned_repair),
        repair_factors=repair_factors,
        seed=series.seed,
    )


def _stock_cuts(task: Task, material: Material) -> Iterator[tuple[Target, Sequence[str], Cut]]:
    _, (seed, criterion, _), missing = task
    example = on_device(material.fit[0][:1], material.dense)
    groups = find_groups(material.dense, example)
    labelled = material.labelled_for(criterion)
    for target in missing:
        start = time.perf_counter()
        found = stock_prune(
            material.dense, groups, example, criterion, labelled, keep=target.keep, seed=seed
        )
        seconds = time.perf_counter() - start
        yield target, missing[target], Cut(found.model, groups, found.kept, seconds)


def _repaired(cut: Cut, material: Material, repair: str, seed: int) -> nn.Module:
    if repair == "none":
        return cut.model
    if repair == "bn":
        return recalibrate_batchnorm(cut.model, material.fit)
    assert cut.kept is not None
    dense, fit, groups, kept = material.dense, material.fit, cut.groups, cut.kept
    refit = reconstruct_blocks if repair == "reconstruct" else compensate_weights
    return refit(cut.model, dense, fit, groups=groups, kept=kept, seed=seed)
