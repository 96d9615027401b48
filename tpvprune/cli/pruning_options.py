"""From the flags of `tpvprune prune` to the arguments of the functions behind it."""

from __future__ import annotations

import argparse
from typing import Any

import torch

_FROM_FLAGS = (
    "keep",
    "of",
    "latency_batch_size",
    "criterion",
    "steps",
    "allocation",
    "round_to",
    "min_channels",
    "max_removed",
)
_ALL_IMAGES: dict[str, Any] = {"num_images": None}  # the command has chosen them already


def pruning_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say to :func:`tpvprune.pipeline.prune`."""
    repair = "compensate" if args.repair == "distill" else args.repair
    named = {name: getattr(args, name) for name in _FROM_FLAGS}
    return {**named, **probing_options(args), "repair": repair, **_ALL_IMAGES}


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
    return {**named, "pattern": pattern, "seed": args.seed, **_ALL_IMAGES}
