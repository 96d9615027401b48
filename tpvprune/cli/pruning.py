"""`prune`: one size, several from one ranking, or the smallest that loses little enough."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tpvprune.cli import single_weights, sizes, training
from tpvprune.cli.comparing import show_runs
from tpvprune.cli.console import counted, say, stages
from tpvprune.cli.flag_values import AUTO
from tpvprune.cli.pruning_options import check_pruning_options, outputs_of, pruning_options
from tpvprune.cli.session import Outcome, Subject, ignored, open_subject
from tpvprune.cli.session_images import (
    EvalImages,
    Opened,
    calibration,
    choose_apart,
    fit_of_cut,
    labelled_images,
    num_eval_images,
    open_data,
    others,
    scored_until_known,
)
from tpvprune.cli.session_results import finished
from tpvprune.disk.atomic import write_text
from tpvprune.groups import find_groups
from tpvprune.images.fitted import Fit, Fits
from tpvprune.images.loading import in_memory
from tpvprune.images.sources import ImageSource
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.clock import Clock
from tpvprune.passes.loss import Losses, halves, num_measured
from tpvprune.pipeline import PruningResult, Sizes, prune
from tpvprune.pipeline.within import num_aside, smallest_within
from tpvprune.processes.shares import by_first
from tpvprune.reports.comparing import render_comparison
from tpvprune.reports.report import read_report
from tpvprune.scores.criterion_names import is_labelled
from tpvprune.widths.limits import Limits
from tpvprune.widths.ranking import Ranking

_FEWEST = 512  # images for a repair, where the scores would do with less


def run_prune(args: argparse.Namespace) -> Outcome:
    """Prune, save, measure, and show what it cost."""
    if single_weights.asked_for(args):
        return single_weights.run(args, _opened(args, labelled=False))
    check_pruning_options(args)
    training.recipe_of(args)
    folders = sizes.folders(args)
    done = [folder for keep, folder in folders.items() if sizes.is_done(args, keep, folder)]
    left = {keep: folder for keep, folder in folders.items() if folder not in done}
    ranked = args.ranking or next(iter(done), None)
    ranking = None if ranked is None else Ranking.load(ranked)
    codes: list[int] = []
    if left:
        opened = _opened(args, labelled=is_labelled(args.criterion))
        prune_to = _pruner(args, opened, ranking, num_sizes=len(left))
        for keep, folder in left.items():
            if len(folders) > 1:
                say(f"keep {keep:g}: {len(done) + len(codes) + 1} of {len(folders)}")
                by_first(folder.parent.mkdir, parents=True, exist_ok=True)
            code, document = _pruned(sizes.of_one(args, keep, folder), opened, prune_to)
            codes.append(code)
    if len(folders) == 1:
        return codes[0], document
    return _compared(args, folders, len(done))


def _compared(args: argparse.Namespace, folders: dict[float, Path], num_done: int) -> Outcome:
    """Return and show all sizes side by side."""
    if num_done:
        say(f"note: {num_done} of {len(folders)} sizes were there already, of the same command")
    runs = [(folder.name, read_report(folder)) for folder in folders.values()]
    show_runs(runs)
    page = Path(args.output) / sizes.COMPARISON
    by_first(write_text, page, render_comparison(runs))
    say(f"saved: {page}")
    reached = all(report.get("reached") for _, report in runs)
    document = {"runs": [report for _, report in runs], "output": str(args.output)}
    return (0 if reached else 3), document


def _opened(args: argparse.Namespace, *, labelled: bool) -> Opened:
    subject = open_subject(args)
    if args.repair == "distill":
        training.check_trainable(args, subject)
    layers = layers_that_stay(args, subject)
    images = open_data(args, labelled=labelled)
    apart = num_apart(args, images)
    if args.num_images == AUTO:
        groups = find_groups(subject.model, subject.example, ignore=layers, verify=False)
        scored = scored_until_known(args, subject, images, groups, apart=apart)
        args.num_images = max(_FEWEST, scored.num_samples)
    clock = Clock(None)
    with clock("reading images"):
        evaluated = labelled_images(args, subject, images)
        batches = calibration(args, subject, images, labelled=labelled, apart=apart)
        if evaluated is not None:
            eval_images = EvalImages(evaluated, "labelled")
        elif apart:
            measuring = in_memory(choose_apart(args, subject, images, apart))
            eval_images = EvalImages(measuring, "held-back")
        else:
            eval_images = others(args, subject, images, batches, num_eval_images(subject))
    opened = Opened(subject, layers, images, batches, evaluated, eval_images, clock.seconds, apart)
    if args.max_loss is None:
        return opened
    half, judging = halves(eval_images.batches)
    outputs = outputs_of(args)
    deciding = Losses(subject.model, half, labelled=evaluated is not None, outputs=outputs)
    deciding.prepare()  # a model without classes is refused before any work
    return replace(
        opened,
        deciding=deciding,
        labelled=None if evaluated is None else judging,
        eval_images=replace(eval_images, batches=judging),
    )


def layers_that_stay(args: argparse.Namespace, subject: Subject) -> tuple[str, ...]:
    """Return the layers whose width stays by the flags."""
    layers = ignored(args, subject)
    if args.granularity == "head":
        layers += single_weights.all_but_heads(subject, layers)
    return layers


def _pruner(
    args: argparse.Namespace, opened: Opened, ranking: Ranking | None, *, num_sizes: int
) -> Callable[..., PruningResult]:
    """Return what prunes to a size, called with ``keep``, ``state`` and ``progress``."""
    subject, batches = opened.subject, opened.batches
    options = {**pruning_options(args, batches, ignore=opened.layers), "ranking": ranking}
    del options["keep"]
    inputs = unlabeled(batches, device=subject.device)
    if num_sizes == 1 and opened.deciding is None:
        return partial(prune, subject.model, inputs, **options)
    with stages() as progress:
        return Sizes(subject.model, inputs, progress=progress, **options).prune


def num_apart(args: argparse.Namespace, images: ImageSource) -> int:
    """Return how many images ranking and repair may not see."""
    if args.repair == "distill":
        return training.num_held_back(images)
    if args.max_loss is None or args.eval_dir is not None:
        return 0
    wanted = num_measured(args.max_loss)
    if images.count is None:
        return wanted
    num = None if args.num_images == AUTO else args.num_images
    return num_aside(images.count, num_images=num, wanted=wanted, source=images.name)


def _pruned(
    args: argparse.Namespace, opened: Opened, prune_to: Callable[..., PruningResult]
) -> Outcome:
    """Prune to one size, save it, and show what it cost."""
    clock = Clock(None, dict(opened.seconds))
    state = training.state_file(args.output, "unfinished-pruning")
    try:
        result = _result(args, opened, prune_to, state)
    except Exception:  # the state outlasts a stop, but no error: that would come again
        state.unlink(missing_ok=True)
        raise
    _say_unrounded(args, result)
    further: list[Fit] = []
    if args.repair == "distill":
        with clock("training"):
            result, fit = _distilled(args, opened, result)
        further.append(fit)
    outcome = finished(args, opened, result, clock, further=further)
    for unfinished in (training.state_file(args.output), state):
        by_first(unfinished.unlink, missing_ok=True)
    return outcome


def _result(
    args: argparse.Namespace,
    opened: Opened,
    prune_to: Callable[..., PruningResult],
    state: Path,
) -> PruningResult:
    """Prune to the size that the flags ask for, or to the smallest that loses no more than that."""
    states = iter([state])  # of several sizes the first one ranks

    def prune_once(keep: float) -> PruningResult:
        with stages() as progress:
            return prune_to(keep=keep, state=next(states, None), progress=progress)

    if opened.deciding is None:
        return prune_once(args.keep)
    judging = Losses(
        opened.subject.model, opened.eval_images.batches, labelled=opened.deciding.labelled,
        outputs=outputs_of(args),
    )  # fmt: skip
    return smallest_within(
        prune_once, opened.deciding, judging, max_loss=args.max_loss, is_given=bool(args.ranking),
        notice=say,
    )  # fmt: skip


def _say_unrounded(args: argparse.Namespace, result: PruningResult) -> None:
    narrow = [
        g.name
        for g in result.groups
        if g.unit == "channel" and g.num_channels > 1 and Limits(args.round_to).step(g) == 1
    ]
    if args.round_to not in (1, AUTO) and narrow:
        say(
            f"note: --round-to {args.round_to} leaves {counted(len(narrow), 'group')} of at most "
            f"{args.round_to} channels unrounded (first: {narrow[0]})"
        )


def _distilled(
    args: argparse.Namespace, opened: Opened, result: PruningResult
) -> tuple[PruningResult, Fit]:
    """Return the result with its model trained on all images of the source, and on which it was."""
    small, images = replace(opened.subject, model=result.model), opened.images
    held_back = training.held_back_places(args, Fits(images, [fit_of_cut(args, opened)]))
    done = training.trained(
        args, small, opened.subject.model, images, num_images=None, held_back=held_back,
        scored=opened.labelled,
    )  # fmt: skip
    # What was said of the cut stays true, but for how good its outcome is.
    earlier = result.report["warnings"][result.report["held_back"]["broken"] :]
    report = {
        **result.report,
        **done.verdict,
        "repair_chosen": None,
        "training": done.facts,
        "warnings": [*done.verdict["warnings"], *earlier],
    }
    fit = Fit.beside(images, held_back, seed=args.seed, num=None)
    return replace(result, model=done.model, report=report), fit
