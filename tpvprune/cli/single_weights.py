"""`tpvprune prune --granularity weight` and `2:4`: weights become zero, shapes stay."""

from __future__ import annotations

import argparse
from typing import Any

from tpvprune.cli.console import show_pruned, stages
from tpvprune.cli.flag_groups import STRUCTURES
from tpvprune.cli.pruning_options import weight_options
from tpvprune.cli.session import Subject, ignored, open_subject
from tpvprune.cli.session_images import images_to_prune_with, open_data
from tpvprune.cli.session_results import pruned_document, saved_with
from tpvprune.groups import find_groups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.clock import Clock
from tpvprune.pipeline.choices import Choices
from tpvprune.processes.membership import num_processes
from tpvprune.saved.checkpoint import save_pruned
from tpvprune.weights.masks import pattern_of
from tpvprune.weights.pruning import prune_weights
from tpvprune.widths.limits import Limits

_OTHERS_ONLY = {
    **{name: getattr(Choices, name) for name in ("of", "steps", "allocation", "max_depth_removed")},
    **{name: getattr(Limits, name) for name in ("round_to", "min_channels", "max_removed")},
}


def asked_for(args: argparse.Namespace) -> bool:
    """Tell whether single weights are to be removed; check the flag, and those that go with it."""
    if args.granularity in STRUCTURES:
        return False
    if args.granularity != "weight":
        n, m = pattern_of(args.granularity)
        if args.keep not in {0.5, n / m}:
            raise ValueError(f"--keep: {n} of {m} weights stay with --granularity {n}:{m}")
    for flag, default in _OTHERS_ONLY.items():
        if getattr(args, flag) != default:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name}: does not apply to --granularity {args.granularity}")
    if num_processes() > 1:
        raise ValueError("--granularity weight and 2:4 run in one process: leave torchrun out")
    return True


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Remove single weights, save, measure, and show what it cost."""
    subject = open_subject(args)
    layers = ignored(args, subject)
    images = open_data(args, labelled=False)
    clock = Clock(None)
    with clock("reading images"):
        batches, labelled, eval_images = images_to_prune_with(args, subject, images)
    with stages() as progress:
        result = prune_weights(
            subject.model,
            unlabeled(batches, device=subject.device),
            **weight_options(args),
            ignore=layers,
            progress=progress,
        )
    document, seen = pruned_document(
        args, subject, result, images=images, batches=batches, eval_images=eval_images,
        labelled=labelled, clock=clock,
    )  # fmt: skip
    save_pruned(
        result.model,
        args.output,
        **saved_with(args, subject, granularity=args.granularity),
        report={**document, **seen},
        masks=result.masks,
    )
    show_pruned(document)
    return 0, document


def all_but_heads(subject: Subject, layers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the layers that produce what is no attention head."""
    groups = find_groups(subject.model, subject.example, ignore=layers)
    heads: set[str] = set()
    others: set[str] = set()
    for group in groups:
        names = {s.param.rpartition(".")[0] for s in group.slices if s.side == "producer"}
        (heads if group.unit == "head" else others).update(names)
    if not heads:
        raise ValueError(
            f"--granularity head: {subject.made.name} has no attention heads that can be pruned"
        )
    return tuple(sorted(others - heads))
