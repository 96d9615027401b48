"""`tpvprune prune --granularity weight` and `2:4`: weights become zero, shapes stay."""

from __future__ import annotations

import argparse

from tpvprune.cli.console import stages
from tpvprune.cli.flag_groups import check_unset
from tpvprune.cli.flag_values import STRUCTURES
from tpvprune.cli.pruning_options import weight_options
from tpvprune.cli.session import Outcome, Subject
from tpvprune.cli.session_images import Opened
from tpvprune.cli.session_results import finished
from tpvprune.groups import find_groups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.clock import Clock
from tpvprune.pipeline.choices import Choices
from tpvprune.processes.membership import num_processes
from tpvprune.weights.masks import pattern_of
from tpvprune.weights.pruning import prune_weights
from tpvprune.widths.limits import Limits

_CHOICES = ("of", "steps", "allocation", "max_depth_removed", "mirrored", "reconstructions")
_OTHERS_ONLY = {
    **{name: getattr(Choices, name) for name in _CHOICES},
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
    check_unset(args, _OTHERS_ONLY, f"does not apply to --granularity {args.granularity}")
    if num_processes() > 1:
        raise ValueError("--granularity weight and 2:4 run in one process: leave torchrun out")
    return True


def run(args: argparse.Namespace, opened: Opened) -> Outcome:
    """Remove single weights, save, measure, and show what it cost."""
    subject = opened.subject
    with stages() as progress:
        result = prune_weights(
            subject.model,
            unlabeled(opened.batches, device=subject.device),
            **weight_options(args),
            ignore=opened.layers,
            progress=progress,
        )
    return finished(args, opened, result, Clock(None, opened.seconds))


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
