"""From the flags of `tpvprune prune` to the arguments of the functions behind it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from tpvprune.cli.flag_values import STRUCTURES
from tpvprune.groups.budget import LatencyTable
from tpvprune.pipeline.choices import Choices
from tpvprune.runtimes.names import TABLE
from tpvprune.scores.criteria import with_labels
from tpvprune.scores.taps import Probing
from tpvprune.widths.latency_file import read_latency_table
from tpvprune.widths.limits import Limits

_FROM_FLAGS = (
    "keep", "of", "latency_batch_size", "latency_threads", "steps", "allocation",
    "max_depth_removed", "mirrored", "reconstructions", "seed",
)  # fmt: skip
_ALL_IMAGES: dict[str, Any] = {"num_images": None}  # the command has chosen them already


def pruning_options(
    args: argparse.Namespace, batches: Any, *, ignore: Sequence[str]
) -> dict[str, Any]:
    """Return what the flags say to :func:`tpvprune.pipeline.prune`.

    ``batches``: labelled ones, where the criterion needs labels. ``ignore``: layers that stay.
    """
    return {
        **{name: getattr(args, name) for name in _FROM_FLAGS},
        "criterion": with_labels(args.criterion, batches),
        "limits": limits_of(args, ignore=ignore),
        "probing": Probing(**probing_options(args)),
        "latency_runtime": latency_runtime(args),
        "repair": "compensate" if args.repair == "distill" else args.repair,
        "granularity": STRUCTURES[args.granularity],
        "outputs": outputs_of(args),
        **_ALL_IMAGES,
    }


def check_pruning_options(args: argparse.Namespace) -> None:
    """Check before any work what :func:`tpvprune.pipeline.prune` would refuse."""
    Choices(**pruning_options(args, (), ignore=()))


def latency_runtime(args: argparse.Namespace) -> str | LatencyTable:
    """Return where milliseconds are measured, or the table that says them."""
    if args.latency_runtime == TABLE:
        return read_latency_table(args.latency_table)
    return str(args.latency_runtime)


def outputs_of(args: argparse.Namespace) -> dict[str, float] | None:
    """Return which outputs count by the flags, and how much; None: all."""
    given = getattr(args, "outputs", None)
    return None if given is None else dict(given)


def limits_of(args: argparse.Namespace, *, ignore: Sequence[str] = ()) -> Limits:
    """Return how far groups may shrink by the flags, those that the command has."""
    names = ("round_to", "min_channels", "max_removed")
    return Limits(**{n: getattr(args, n) for n in names if n in args}, ignore=tuple(ignore))


def probing_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say of probing, for :func:`tpvprune.tpv_scores` and the like."""
    # float16, which training may use, is too narrow to score in.
    amp = torch.bfloat16 if args.amp and args.criterion == "tpv" else None
    return {
        "num_probes": args.num_probes,
        "amp": amp,
        "grad_checkpointing": args.grad_checkpointing,
        "seed": args.seed,
    }


def weight_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say to :func:`tpvprune.weights.pruning.prune_weights`."""
    named = {name: getattr(args, name) for name in ("keep", "criterion", "repair", "num_probes")}
    pattern = None if args.granularity == "weight" else args.granularity
    return {
        **named, "pattern": pattern, "outputs": outputs_of(args), "seed": args.seed, **_ALL_IMAGES
    }  # fmt: skip
