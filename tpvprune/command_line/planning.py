"""`--dry-run`: what a command would do, and about how long it would take, without doing it."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

from tpvprune.atomic import check_folder
from tpvprune.checkpoint import read_config
from tpvprune.command_line.benchmark import plan_of
from tpvprune.command_line.console import blocked_lines, percent, say, short
from tpvprune.command_line.session import Subject, ignored, open_pruned, open_subject, provenance
from tpvprune.command_line.session_images import is_labelled, open_data
from tpvprune.command_line.session_results import blocked_facts, check_writable
from tpvprune.command_line.single_weights import asked_for
from tpvprune.command_line.training import num_held_back, recipe_of
from tpvprune.downloads import local_folder
from tpvprune.groups import ChannelGroups, find_groups
from tpvprune.running import evaluating, first_output, frozen
from tpvprune.weights.masks import pattern_of
from tpvprune.weights.scores import prunable_weights

_BATCH = 8
_REPEATS = 3


def plan_prune(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Say what `prune` would cut down to, with which images, and about how long it would take.

    Args:
        args: Parsed flags of `tpvprune prune`.

    Returns:
        Exit code (3: the budget cannot be reached) and JSON document.
    """
    if asked_for(args):
        return _plan_weights(args)
    check_writable(check_folder(args.output, overwrite=args.overwrite))
    recipe_of(args)
    used_labels = is_labelled(args.criterion)
    subject = open_subject(args)
    layers = ignored(args, subject)
    images = open_data(args, labelled=used_labels)
    groups = find_groups(subject.model, subject.example, ignore=layers)
    num = args.num_images if images.count is None else min(args.num_images, images.count)
    forward, backward = _seconds(subject)
    # Scores and curves each take both passes; repair and measuring about four forward ones.
    passes = 2 * (forward + backward) if args.criterion == "tpv" else forward + backward
    seconds = num * (args.steps * passes + 4 * forward)
    if args.repair == "distill":
        seconds += _training(args, images.count or 0, forward, backward)
    document = _document(args, subject, groups, seconds, num_images=num)
    _say_groups(document, groups)
    share = (
        document["smallest"][args.of] / document["dense"][args.of] if args.of != "latency" else 0
    )
    reached = share <= args.keep
    say(
        f"budget: {percent(args.keep)} of {args.of}, smallest possible {percent(share)}"
        + ("" if reached else ": it cannot be reached")
    )
    say(
        f"{num} images of {images.name}, criterion {args.criterion}, repair {args.repair}, "
        f"{args.steps} steps, {'LABELS WOULD BE USED' if used_labels else 'no label is read'}"
    )
    _say_time(seconds)
    return (0 if reached else 3), document


def _plan_weights(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    check_writable(check_folder(args.output, overwrite=args.overwrite))
    subject = open_subject(args)
    images = open_data(args, labelled=False)
    weights = prunable_weights(subject.model, ignore=ignored(args, subject))
    sizes = {name: weight.numel() for name, weight in weights.items()}
    left, whole = args.keep * sum(sizes.values()), []
    if args.granularity != "weight":
        n, m = pattern_of(args.granularity)
        whole = [name for name, weight in weights.items() if weight.shape[1] % m]
        left = sum(size * (1 if name in whole else n / m) for name, size in sizes.items())
    num = args.num_images if images.count is None else min(args.num_images, images.count)
    forward, backward = _seconds(subject)
    seconds = num * (2 * (forward + backward) + 4 * forward)
    document = {
        **provenance(args, subject),
        "dry_run": True,
        "granularity": args.granularity,
        "num_images": num,
        "dense": {"weights": sum(sizes.values())},
        "pruned": {"weights": round(left)},
        "blocked": [{"name": name, "num_channels": sizes[name], "reason": "inputs do not divide"}
                    for name in whole],
        "seconds": seconds,
    }  # fmt: skip
    say(
        f"{document['model']}: of {short(sum(sizes.values()))} weights in {len(sizes)} layers "
        f"{short(left)} stay, all others are set to zero"
    )
    blocked_lines(document["blocked"])
    say(f"{num} images of {images.name}, criterion {args.criterion}, repair {args.repair}")
    _say_time(seconds, more="reading images, and several times that for exact refits of rows")
    return 0, document


def plan_distill(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Say how `distill` would train, and about how long it would take.

    Args:
        args: Parsed flags of `tpvprune distill`.

    Returns:
        Exit code and JSON document.
    """
    return _plan_training(args, labelled=False)


def plan_finetune(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Say how `finetune` would train, and about how long it would take.

    Args:
        args: Parsed flags of `tpvprune finetune`.

    Returns:
        Exit code and JSON document.
    """
    return _plan_training(args, labelled=True)


def _plan_training(args: argparse.Namespace, *, labelled: bool) -> tuple[int, dict[str, Any]]:
    check_writable(check_folder(args.output, overwrite=args.overwrite))
    recipe = recipe_of(args)
    args.folder = local_folder(args.folder)
    config = read_config(args.folder)
    dense = args.dense or config["provenance"].get("weights")
    args.dense = None
    subject, _ = open_pruned(args)
    images = open_data(args, labelled=labelled)
    num = (images.count or 0) - num_held_back(images)
    num = num if args.num_images is None else min(num, args.num_images)
    seconds = _training(args, num, *_seconds(subject), teacher=not labelled)
    document = {
        **provenance(args, subject),
        "dry_run": True,
        "num_images": num,
        "epochs": recipe.epochs,
        "seconds": seconds,
    }
    teacher = "with labels" if labelled else f"towards the dense model ({dense}), without labels"
    say(f"{args.folder}: {recipe.epochs} epochs on {num} images of {images.name}, {teacher}")
    say(f"{recipe.opt}, {recipe.sched}, peak rate {recipe.lr:g}, batches of {_batch_of(args)}")
    _say_time(seconds)
    return 0, document


def plan_benchmark(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Say which rows `benchmark` would measure, and about how long it would take.

    Args:
        args: Parsed flags of `tpvprune benchmark`.

    Returns:
        Exit code and JSON document.
    """
    subject = open_subject(args)
    plan = plan_of(args, subject)
    images = open_data(args, labelled=plan.labelled)
    groups = find_groups(subject.model, subject.example)
    num = args.num_images if images.count is None else min(args.num_images, images.count)
    forward, backward = _seconds(subject)
    rows = len(plan.keys())
    seconds = len(plan.series()) * num * (forward + backward) + rows * num * 4 * forward
    document = _document(args, subject, groups, seconds, num_images=num)
    document["num_rows"] = rows
    _say_groups(document, groups)
    say(
        f"{rows} rows: {', '.join(plan.criteria)}; repair {', '.join(plan.repairs)}; keep "
        f"{', '.join(map(str, plan.keeps))}; {len(plan.seeds)} seeds; {num} images of {images.name}"
    )
    _say_time(seconds, more="measuring top-1 on --eval-dir")
    return 0, document


def _document(
    args: argparse.Namespace,
    subject: Subject,
    groups: ChannelGroups,
    seconds: float,
    *,
    num_images: int,
) -> dict[str, Any]:
    narrowest = {
        group.name: torch.arange(group.num_channels) < getattr(args, "min_channels", 1)
        for group in groups
    }
    return {
        **provenance(args, subject),
        "dry_run": True,
        "keep": args.keep,
        "num_images": num_images,
        "dense": {"macs": groups.macs(), "params": groups.params()},
        "smallest": {"macs": groups.macs(narrowest), "params": groups.params(narrowest)},
        "groups": [
            {"name": g.name, "unit": g.unit, "num_channels": g.num_channels} for g in groups
        ],
        "blocked": blocked_facts(groups),
        "seconds": seconds,
    }


def _say_groups(document: dict[str, Any], groups: ChannelGroups) -> None:
    channels = sum(group.num_channels for group in groups)
    say(
        f"{document['model']}: {short(document['dense']['macs'])} MACs, "
        f"{short(document['dense']['params'])} parameters; {len(groups)} groups with {channels} "
        "channels or heads can be cut"
    )
    blocked_lines(document["blocked"])


def _training(
    args: argparse.Namespace, num: int, forward: float, backward: float, *, teacher: bool = True
) -> float:
    # The gradient of the weights costs about as much as that of the activations.
    return float(args.epochs * num * ((2 if teacher else 1) * forward + 2 * backward))


def _batch_of(args: argparse.Namespace) -> int:
    return int(args.batch_size or 128)


def _say_time(seconds: float, more: str = "reading images, least squares") -> None:
    if seconds < 100:
        text = f"{seconds:.0f} s"
    else:
        text = f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
    say(f"about {text} of forward and backward passes on this device, besides {more}")
    say("dry run: nothing was done or written")


def _seconds(subject: Subject) -> tuple[float, float]:
    """Return the seconds of one image in a forward and in an activation-only backward pass."""
    inputs = subject.example[:1].expand(_BATCH, -1, -1, -1).contiguous()
    times = [_passes(subject.model, inputs) for _ in range(1 + _REPEATS)][1:]
    forward, backward = (min(column) / len(inputs) for column in zip(*times, strict=True))
    return forward, backward


def _passes(model: nn.Module, inputs: torch.Tensor) -> tuple[float, float]:
    with evaluating(model), frozen(model), torch.enable_grad():
        inputs = inputs.clone().requires_grad_(True)
        start = time.perf_counter()
        outputs = first_output(model(inputs)).sum().cpu()
        middle = time.perf_counter()
        torch.autograd.grad(outputs, inputs)[0].cpu()
        return middle - start, time.perf_counter() - middle
