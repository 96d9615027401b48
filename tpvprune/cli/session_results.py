"""What a command found, as plain data, and the files that it goes to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune.cli.console import show_pruned
from tpvprune.cli.pruning_options import outputs_of
from tpvprune.cli.session import Outcome, Subject, provenance
from tpvprune.cli.session_images import (
    EvalImages,
    Opened,
    Shown,
    class_names,
    fit_of_cut,
    num_images,
)
from tpvprune.disk.atomic import write_text
from tpvprune.disk.digest import file_digest
from tpvprune.groups import ChannelGroup, ChannelGroups
from tpvprune.images.fitted import Fit, fitted_facts
from tpvprune.images.sources import ImageSource
from tpvprune.passes.clock import Clock
from tpvprune.passes.costs import count_macs, count_nonzero_params, count_params
from tpvprune.passes.difference import has_classes
from tpvprune.passes.disagreement import disagreement
from tpvprune.passes.evaluation import agreement, evaluate
from tpvprune.pipeline import PruningResult
from tpvprune.processes.shares import by_first
from tpvprune.reports.report import read_report, report_data
from tpvprune.saved.checkpoint import save_pruned
from tpvprune.saved.models import is_factory, pretrained_config
from tpvprune.weights.pruning import WeightPruningResult
from tpvprune.widths.limits import Limits
from tpvprune.widths.narrowest import narrowest
from tpvprune.widths.speed import compare_latency

_FEWEST_ROUNDS = 4


def finished(
    args: argparse.Namespace,
    opened: Opened,
    result: PruningResult | WeightPruningResult,
    clock: Clock,
    *,
    further: Iterable[Fit] = (),
) -> Outcome:
    """Measure a pruned model beside the dense one, save it, and show what it cost.

    ``further``: what it was fitted to after the cut.
    """
    subject, eval_images = opened.subject, opened.eval_images
    speed = result.report.get("speed")
    models = subject.model, result.model
    dense, pruned = measured(args, subject, models, opened.labelled, clock, speed=speed)
    classes = has_classes(subject.model)
    dense["agreement"] = 1.0 if classes else None
    with clock("comparing"):
        seen = shown_changes(args, subject, result.model, subject.model, eval_images.batches)
        changes = seen.get("disagreement")
        pruned["agreement"] = (
            1 - changes["num_changed"] / changes["num_images"]
            if changes
            else agreement(result.model, subject.model, Shown(eval_images.batches, "agreement"))
            if classes
            else None
        )
    note_top1(result.report.get("training"), pruned)
    earlier = {} if subject.folder is None else read_report(subject.folder)
    document = {
        **provenance(args, subject),
        **result.report,
        "used_labels": result.report["used_labels"] or bool(earlier.get("used_labels")),
        "granularity": "head" if args.granularity == "head" else result.report["granularity"],
        "dense": {**result.report["dense"], **dense},
        "pruned": {**result.report["pruned"], **pruned},
        "images": {
            **image_facts(opened.images, opened.batches, eval_images),
            "fitted": fitted_facts([fit_of_cut(args, opened), *further], earlier),
        },
        "timings": {**result.report["timings"], **clock.seconds},
        "output": str(args.output),
    }
    if isinstance(result, PruningResult):
        slow = said_of_speed(dense, pruned, of=args.of)
        document["warnings"] = [*document["warnings"], *slow]
        how = {**saved_with(args, subject), "report": {**report_data(result), **document, **seen}}
        by_first(save_pruned, result, args.output, **how)
    else:  # zeros among the weights make nothing faster
        how = saved_with(args, subject, granularity=args.granularity)
        how |= {"report": {**document, **seen}, "masks": result.masks}
        save_pruned(result.model, args.output, **how)
    show_pruned(document)
    return (0 if document["reached"] else 3), document


def note_top1(training: dict[str, Any] | None, pruned: Mapping[str, Any]) -> None:
    """Put the top-1 of the saved model beside that before training, if that is what made it."""
    if training is not None and training["saved"] == "trained":
        training["after"]["top1"] = pruned["top1"]


def said_of_speed(dense: Mapping[str, Any], pruned: Mapping[str, Any], *, of: str) -> list[str]:
    """Return that a cut made nothing faster, and what to try; nothing if it did, or none timed.

    ``dense``, ``pruned``: facts with ``latency_ms`` and ``latency_range_ms``; ``of``: the budget.
    """
    before, after, spread = dense["latency_ms"], pruned["latency_ms"], dense["latency_range_ms"]
    if before is None or spread is None or after < spread[0]:
        return []
    hint = (
        "a smaller --keep, or another --latency-runtime"
        if of == "latency"
        else "--of latency aims at milliseconds, with --latency-runtime onnxruntime at those of an "
        "exported file"
    )
    fastest = (pruned["latency_range_ms"] or [after])[0]
    how = "no faster" if fastest > spread[1] else "not measurably faster"
    return [f"{how} on this device: {after:.2f} ms, {before:.2f} ms before: {hint}"]


def saved_with(args: argparse.Namespace, subject: Subject, **facts: Any) -> dict[str, Any]:
    """Return what :func:`tpvprune.save_pruned` is told about the dense model and the command."""
    weights: dict[str, Any] = {}
    if subject.folder is None:  # else those of what the folder came from
        digest = file_digest(args.checkpoint) if args.checkpoint else None
        weights = {"weights": subject.made.weights, "weights_sha256": digest}
    if is_factory(subject.made.name):  # which must be typed again: no name of a file is run
        weights["model"] = subject.made.name
    recipe = {"recipe": args.choices} if "choices" in args else {}
    return {
        "overwrite": args.overwrite,
        "origin": subject.folder,
        "dense": subject.model if subject.skeleton is None else subject.skeleton,
        "model_name": subject.made.name,
        "model_kwargs": subject.made.kwargs,
        "pretrained_cfg": {
            **pretrained_config(subject.model),
            **subject.preprocessing.config,
            "num_classes": getattr(subject.model, "num_classes", None),
        },
        "provenance": {
            "command": args.command_line,
            **weights,
            "seed": args.seed,
            **recipe,
            **facts,
        },
    }


def measured(
    args: argparse.Namespace,
    subject: Subject,
    models: Sequence[nn.Module],
    labelled: Any,
    clock: Clock | None = None,
    *,
    speed: Mapping[str, Any] | None = None,
    title: str = "top-1",
) -> list[dict[str, Any]]:
    """Return non-zero parameters, latency and accuracy of a dense and a pruned model, or of one.

    ``speed``: how fast they were where milliseconds were the budget.
    """
    clock = clock or Clock(None)
    with clock("latency"):
        # By one process: they would slow each other.
        speed = speed or by_first(_timed, args, subject, models)
        timings = [_latency(speed, side) for side in ("dense", "pruned")[: len(models)]]
    facts = [
        {"nonzero_params": count_nonzero_params(model), **timed, "top1": None, "top5": None}
        for model, timed in zip(models, timings, strict=True)
    ]
    if labelled is None:
        return facts
    with clock("top-1"):
        for model, fact in zip(models, facts, strict=True):
            scored = evaluate(model, Shown(labelled, title), outputs=outputs_of(args))
            fact |= {"top1": scored.top1, "top5": scored.top5, "num_images": scored.num_images}
    return facts


def costs(model: nn.Module, subject: Subject) -> dict[str, int]:
    """Return what a model costs on the inputs of a subject."""
    return {"macs": count_macs(model, subject.example), "params": count_params(model)}


def _latency(speed: Mapping[str, Any] | None, side: str) -> dict[str, Any]:
    """Return the milliseconds of one of two models, and how many of the dense one's those are."""
    if speed is None:
        return {"latency_ms": None, "latency_range_ms": None}
    return {
        "latency_ms": speed[f"{side}_ms"],
        "latency_range_ms": [speed[f"{side}_low_ms"], speed[f"{side}_high_ms"]],
        **{f"latency_{name}": speed[name] for name in ("batch_size", "runtime", "device")},
        **({"latency_ratio": speed["ratio"]} if side == "pruned" else {}),
    }


def _timed(
    args: argparse.Namespace, subject: Subject, models: Sequence[nn.Module]
) -> dict[str, Any] | None:
    """Time two models by turns, or one beside itself."""
    if args.latency_repeats <= 0:
        return None
    rounds = max(_FEWEST_ROUNDS, args.latency_repeats)
    flags = vars(args)  # few commands have these
    size, runtime = flags.get("latency_batch_size", 1), flags.get("latency_runtime", "eager")
    speed = compare_latency(
        models[0], models[-1], subject.example[:1].repeat_interleave(size, 0), rounds=rounds,
        runtime=runtime, num_threads=flags.get("latency_threads"),
    )  # fmt: skip
    return asdict(speed)


def shown_changes(
    args: argparse.Namespace, subject: Subject, model: nn.Module, dense: nn.Module, batches: Any
) -> dict[str, Any]:
    """Return what the report shows of images whose class changed; not for stdout."""
    if not has_classes(model):
        return {}
    config = subject.preprocessing.config
    found = disagreement(
        model, dense, Shown(batches, "comparing"), mean=config["mean"], std=config["std"],
        outputs=outputs_of(args),
    )  # fmt: skip
    return {"disagreement": found, "class_names": class_names(args)}


def group_facts(group: ChannelGroup) -> dict[str, Any]:
    """Return what a group is."""
    return {"name": group.name, "unit": group.unit, "num_channels": group.num_channels}


def smallest_facts(groups: ChannelGroups, limits: Limits | None = None) -> dict[str, float]:
    """Return the costs that are left where every group is as narrow as it may be."""
    return {
        "macs": groups.macs(narrowest(groups, "macs", limits=limits)),
        "params": groups.params(narrowest(groups, "params", limits=limits)),
    }


def blocked_facts(groups: ChannelGroups) -> list[dict[str, Any]]:
    """Return the groups that stay whole, each with its reason."""
    return [
        {"name": group.name, "num_channels": group.num_channels, "reason": group.blocked}
        for group in groups.blocked
    ]


def image_facts(
    images: ImageSource, batches: Any, eval_images: EvalImages | None = None
) -> dict[str, Any]:
    """Return where the images came from, how many, and what agreement was measured on."""
    facts: dict[str, Any] = {"source": images.name, "num_images": num_images(batches)}
    if eval_images is not None:
        facts["agreement_on"] = str(eval_images)
    return facts


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(document, indent=2) + "\n")
