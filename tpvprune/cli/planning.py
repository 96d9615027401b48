"""`--dry-run`: what a command would do, and about how long it would take, without doing it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from tpvprune.cli.benchmark import plan_of
from tpvprune.cli.console import blocked_lines, counted, length_of, percent, say, short
from tpvprune.cli.expected_time import Expected, expected_of, say_time, seconds_of
from tpvprune.cli.flag_values import AUTO, STRUCTURES
from tpvprune.cli.pruning import layers_that_stay, num_apart
from tpvprune.cli.pruning_options import (
    check_pruning_options,
    limits_of,
    pruning_options,
)
from tpvprune.cli.session import Outcome, Subject, ignored, open_pruned, open_subject, provenance
from tpvprune.cli.session_images import open_data
from tpvprune.cli.session_results import blocked_facts, group_facts, smallest_facts
from tpvprune.cli.single_weights import asked_for
from tpvprune.cli.training import (
    check_trainable,
    dense_weights,
    held_back_places,
    recipe_of,
)
from tpvprune.depth import Removal, find_branches, remove_branches
from tpvprune.depth.choice import most_gone
from tpvprune.depth.savings import branch_savings
from tpvprune.groups import ChannelGroups, find_groups
from tpvprune.groups.budget import cost
from tpvprune.images.fitted import Fits
from tpvprune.images.sources import ImageSource
from tpvprune.passes.drawing import num_held
from tpvprune.pipeline import prune
from tpvprune.pipeline.choices import leaving
from tpvprune.pipeline.depth import NO_BRANCHES
from tpvprune.pipeline.within import NUM_SIZES
from tpvprune.reports.report import read_report
from tpvprune.saved.checkpoint import read_config
from tpvprune.saved.downloads import local_folder
from tpvprune.scores.criterion_names import is_labelled
from tpvprune.weights.masks import pattern_of
from tpvprune.weights.scores import prunable_weights

_GUESS = 1024  # images that --num-images auto may take


def plan_prune(args: argparse.Namespace) -> Outcome:
    """Say what `prune` would cut down to, with which images, and about how long it would take."""
    if asked_for(args):
        return _plan_weights(args)
    check_pruning_options(args)
    recipe_of(args)
    used_labels = is_labelled(args.criterion)
    subject = open_subject(args)
    if args.repair == "distill":
        check_trainable(args, subject)
    layers = layers_that_stay(args, subject)
    images = open_data(args, labelled=used_labels)
    groups = find_groups(subject.model, subject.example, ignore=layers)
    apart = num_apart(args, images)
    num = _num_images(args, images, apart)
    forward, backward = seconds_of(subject)

    # The clock is left alone, and so is what takes minutes on noise, too.
    quicker: dict[str, Any] = {
        "of": "macs", "latency_runtime": "eager", "latency_threads": None,
    }  # fmt: skip
    if "channel" in _may_go(args):
        quicker |= {"granularity": ("channel",), "max_depth_removed": 1.0}
    if args.repair == "reconstruct":
        quicker |= {"repair": "compensate", "reconstructions": 1}

    sizes = args.keeps if args.max_loss is None else [args.keep] * NUM_SIZES

    def whole(batches: list[torch.Tensor]) -> None:
        labelled, ranking = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches], None
        for keep in sizes:
            options = pruning_options(args, labelled, ignore=layers) | quicker | {"keep": keep}
            ranking = prune(subject.model, batches, **options, ranking=ranking).ranking

    # Scores and curves each take both passes; repair and measuring about four forward ones.
    passes = 2 * (forward + backward) if args.criterion == "tpv" else forward + backward
    expected = expected_of(subject, whole, num, args.steps * passes + len(sizes) * 4 * forward)
    if args.repair == "distill":
        training = _training(args, images.count or 0, forward, backward)
        expected = replace(expected, seconds=expected.seconds + len(sizes) * training)
    document = _document(args, subject, groups, expected.seconds, num_images=num)
    if args.max_loss is None and len(sizes) > 1:
        document["keep"] = sizes
    _say_groups(document, groups, channels="channel" in _may_go(args))
    document |= _branches(args, subject, groups, layers)
    reached = _say_budget(args, document, sizes, apart)
    labels = "LABELS WOULD BE USED" if used_labels else "no label is read"
    others = apart if args.repair == "distill" else 0
    say(
        f"{_images(num, images, others)}, criterion {args.criterion}, repair {args.repair}, "
        f"{counted(args.steps, 'step')}, {labels}"
    )
    trials = "trials of depth, " if {"channel", "branch"} <= {*_may_go(args)} else ""
    say_time(expected, trials + _reconstructing(args))
    return (0 if reached else 3), document


def _say_budget(
    args: argparse.Namespace, document: Mapping[str, Any], sizes: Sequence[float], apart: int
) -> bool:
    """Say what is asked for; return False if it cannot be had, as far as that is known before."""
    if args.max_loss is not None:
        what = "agreement" if args.eval_dir is None else "top-1"
        where = f"{apart} images more" if apart else f"the images of {args.eval_dir}"
        say(
            f"budget: at most {args.max_loss:g} points of {what} lost: up to {NUM_SIZES} sizes of "
            f"one ranking; {where} decide and judge"
        )
        return True
    if args.of == "latency":
        say(f"budget: {_listed(sizes)} of the latency that is then measured")
        return True
    share = document["smallest"][args.of] / document["dense"][args.of]
    out_of_reach = [keep for keep in sizes if keep < share]
    which = "it" if len(sizes) == 1 else _listed(out_of_reach)
    say(
        f"budget: {_listed(sizes)} of {args.of}, smallest possible {percent(share)}"
        + (f": {which} cannot be reached" if out_of_reach else "")
    )
    return not out_of_reach


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(map(percent, shares))


def _may_go(args: argparse.Namespace) -> Sequence[str]:
    return leaving(STRUCTURES[args.granularity], args.of)


def _branches(
    args: argparse.Namespace,
    subject: Subject,
    groups: ChannelGroups,
    layers: Sequence[str],
) -> dict[str, Any]:
    """Return the branches that can go, and what is left without most of them, and of channels."""
    may_go = _may_go(args)
    if "branch" not in may_go:
        return {}
    model, x = subject.model, subject.example
    found = find_branches(model, x)
    if not found and "channel" not in may_go:
        raise ValueError(NO_BRANCHES)
    num = most_gone(args.max_depth_removed, found)
    say(f"branches: {len(found)}, of which {num} may go")
    smallest: dict[str, float] = {}
    left: dict[frozenset[str], ChannelGroups] = {}  # of the network without some branches
    kinds: tuple[Literal["macs", "params"], ...] = ("macs", "params")
    for of in kinds:
        saved = branch_savings(model, groups, found, of, x)
        gone = frozenset(sorted(saved, key=saved.__getitem__)[len(saved) - num :])
        if gone not in left:
            network = remove_branches(model, Removal.of(found, gone), share=True)
            there = [name for name, _ in network.named_modules() if name in layers]
            left[gone] = find_groups(network, x, ignore=there, verify=False)
        smallest[of] = (
            smallest_facts(left[gone], limits_of(args))[of]
            if "channel" in may_go
            else cost(left[gone], {}, of)
        )
    return {"branches": [b.name for b in found], "smallest": smallest}


def _plan_weights(args: argparse.Namespace) -> Outcome:
    subject = open_subject(args)
    images = open_data(args, labelled=False)
    layers = ignored(args, subject)
    weights = prunable_weights(subject.model, ignore=layers)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    left, undivided = args.keep * sum(sizes.values()), []
    if args.granularity != "weight":
        n, m = pattern_of(args.granularity)
        undivided = [name for name, weight in weights.items() if weight.shape[1] % m]
        left = sum(size * (1 if name in undivided else n / m) for name, size in sizes.items())
    num = _num_images(args, images)
    forward, backward = seconds_of(subject)
    # No trial on noise: most of the time goes into refits, which take as long for a few images.
    expected = Expected(num * (2 * (forward + backward) + 4 * forward))
    document = {
        **provenance(args, subject),
        "dry_run": True,
        "granularity": args.granularity,
        "num_images": num,
        "dense": {"weights": sum(sizes.values())},
        "pruned": {"weights": round(left)},
        "blocked": [{"name": name, "num_channels": sizes[name], "reason": "inputs do not divide"}
                    for name in undivided],
        "seconds": expected.seconds,
    }  # fmt: skip
    say(
        f"{document['model']}: of {short(sum(sizes.values()))} weights in {len(sizes)} layers "
        f"{short(left)} stay, all others are set to zero"
    )
    blocked_lines(document["blocked"])
    say(f"{_images(num, images)}, criterion {args.criterion}, repair {args.repair}")
    say_time(expected, "refits of all layers (most of the time: seconds to minutes), ")
    return 0, document


def _plan_training(args: argparse.Namespace, *, labelled: bool) -> Outcome:
    """Say how a saved model would be trained, and about how long it would take."""
    recipe = recipe_of(args)
    args.folder = local_folder(args.folder)
    config = read_config(args.folder)
    dense = args.dense or dense_weights(config, args.folder)
    args.dense = None
    subject, _ = open_pruned(args)
    check_trainable(args, subject, labelled=labelled)
    images = open_data(args, labelled=labelled)
    held_back = held_back_places(args, Fits.of_report(read_report(args.folder), images))
    num = (images.count or 0) - len(held_back)
    num = args.num_images or 0 if images.count is None else min(num, args.num_images or num)
    seconds = _training(args, num, *seconds_of(subject), teacher=not labelled)
    document = {
        **provenance(args, subject),
        "dry_run": True,
        "num_images": num,
        "epochs": recipe.epochs,
        "minutes": recipe.minutes,
        "seconds": seconds,
    }
    teacher = "with labels" if labelled else f"towards the dense model ({dense}), without labels"
    length = length_of(recipe.epochs, recipe.minutes)
    say(f"{args.folder}: {length} on {counted(num, 'image')} of {images.name}, {teacher}")
    size = args.batch_size or 128
    say(f"{recipe.opt}, {recipe.sched}, peak rate {recipe.lr:g}, batches of {size}")
    measuring = " and measuring" if recipe.minutes is None else ""
    say_time(Expected(seconds), beside=f"reading images{measuring}")
    return 0, document


plan_distill = partial(_plan_training, labelled=False)
plan_finetune = partial(_plan_training, labelled=True)


def plan_benchmark(args: argparse.Namespace) -> Outcome:
    """Say which rows `benchmark` would measure, and about how long it would take."""
    subject = open_subject(args)
    plan = plan_of(args, subject)
    images = open_data(args, labelled=plan.labelled)
    groups = find_groups(subject.model, subject.example)
    num = _num_images(args, images)
    forward, backward = seconds_of(subject)
    rows = len(plan.keys())
    seconds = len(plan.series()) * num * (forward + backward) + rows * num * 4 * forward
    document = _document(args, subject, groups, seconds, num_images=num)
    document["num_rows"] = rows
    _say_groups(document, groups)
    say(
        f"{rows} rows: {', '.join(plan.criteria)}; repair {', '.join(plan.repairs)}; keep "
        f"{', '.join(map(str, plan.keeps))}; {len(plan.seeds)} seeds; {num} images of {images.name}"
    )
    say_time(Expected(seconds), "measuring top-1 on --eval-dir, ")
    return 0, document


def _num_images(args: argparse.Namespace, images: ImageSource, apart: int = 0) -> int:
    """Return how many images a run will see; for auto, which only the run can tell, a guess."""
    wanted = _GUESS if args.num_images == AUTO else args.num_images
    num = int(wanted if images.count is None else min(wanted, images.count - apart))
    if num < 2:
        raise ValueError(
            f"{images.name}: expected at least 2 images, found {num}; a few hundred work well"
        )
    return num


def _images(num: int, images: ImageSource, num_others: int = 0) -> str:
    """Return how many images are used; ``num_others``: those that measure, if they are others."""
    held = f"{num_others} others" if num_others else f"{num_held(num)} of them"
    return f"{num} images of {images.name}, {held} held back to measure what comes out"


def _document(
    args: argparse.Namespace,
    subject: Subject,
    groups: ChannelGroups,
    seconds: float,
    *,
    num_images: int,
) -> dict[str, Any]:
    return {
        **provenance(args, subject),
        "dry_run": True,
        "keep": args.keep if getattr(args, "max_loss", None) is None else None,
        "max_loss": getattr(args, "max_loss", None),
        "num_images": num_images,
        "dense": {"macs": groups.macs(), "params": groups.params()},
        "smallest": smallest_facts(groups, limits_of(args)),  # with branches it may be less
        "groups": [group_facts(group) for group in groups],
        "blocked": blocked_facts(groups),
        "seconds": seconds,
    }


def _say_groups(document: dict[str, Any], groups: ChannelGroups, *, channels: bool = True) -> None:
    num = sum(group.num_channels for group in groups)
    cut = f"{len(groups)} groups with {num} channels or heads can be cut"
    say(
        f"{document['model']}: {short(document['dense']['macs'])} MACs, "
        f"{short(document['dense']['params'])} parameters; "
        + (cut if channels else "every width stays")
    )
    if channels:
        blocked_lines(document["blocked"])


def _reconstructing(args: argparse.Namespace) -> str:
    """Return what a trial leaves out."""
    if args.repair != "reconstruct":
        return ""
    if args.reconstructions == 1:
        return "block reconstruction (minutes), "
    return f"{args.reconstructions} block reconstructions (minutes each), "


def _training(
    args: argparse.Namespace, num: int, forward: float, backward: float, *, teacher: bool = True
) -> float:
    recipe = recipe_of(args)
    if recipe.epochs is None:
        return 60.0 * (recipe.minutes or 0.0)
    # The gradient of the weights costs about as much as that of the activations.
    return float(recipe.epochs * num * ((2 if teacher else 1) * forward + 2 * backward))
