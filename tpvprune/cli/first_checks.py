"""What can be told from flags and paths alone, before seconds go into imports and work."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpvprune.cli import sizes
from tpvprune.cli.command_flags import COMMANDS
from tpvprune.cli.flag_groups import check_unset
from tpvprune.cli.flag_values import AUTO, STRUCTURES
from tpvprune.disk.atomic import OWN_FILES, check_folder
from tpvprune.disk.path_checks import (
    check_checkpoint,
    check_file,
    check_images,
    check_list,
    check_ranking,
    check_run,
    check_saved,
    check_table,
    check_writable,
)
from tpvprune.runtimes.names import TABLE, check_runtime
from tpvprune.scores.criterion_names import READS_OUTPUTS, is_labelled

NO_FILES = ("pretrained", "factory")  # what --dense may be beside a file
NEITHER = "expected either the folder of a pruned model or --model M"
_UNTIMED = {"latency_runtime": "eager", "latency_table": None, "latency_threads": None}
# What is read and may not be written over, in flags.
_READ = (
    "folder", "checkpoint", "dense", "data_dir", "data_list", "class_map", "eval_dir",
    "held_out_dir", "latency_table",
)  # fmt: skip
_OF_MODELS = {"checkpoint": None, "pretrained": False, "num_classes": None}
_ON_THE_HUB = ("hf-hub:", "hf_hub:")


def check_first(args: argparse.Namespace) -> None:
    """Find what is missing, unknown or in the way; a ValueError tells what it is."""
    _check_input_stays(args)
    _check_output(args)
    if getattr(args, "granularity", "") in STRUCTURES or args.command == "score":
        is_labelled(args.criterion)
    if args.command == "compare":
        _check_runs(args.folders)
    _check_auto(args)
    _check_outputs(args)
    _check_training(args)
    _check_max_loss(args)
    _check_latency(args)
    _check_subject(args)
    if "data_dir" in args:
        _check_images(args)


def _check_auto(args: argparse.Namespace) -> None:
    if getattr(args, "num_images", None) != AUTO:
        return
    granularity = getattr(args, "granularity", None) or "channel"
    if args.criterion != "tpv" or granularity not in STRUCTURES:
        raise ValueError(
            "--num-images auto: expected --criterion tpv and channels or heads, found "
            f"{args.criterion} and {granularity}, which have no standard errors: pass a number"
        )


def _check_outputs(args: argparse.Namespace) -> None:
    if args.command == "prune" and args.repair == "distill" and args.outputs:
        raise ValueError(
            "--outputs: expected a repair that tells outputs apart, found --repair distill, which "
            "teaches all of them: take another, or leave --outputs out"
        )
    if args.command == "score" and args.outputs and args.criterion not in READS_OUTPUTS:
        raise ValueError(
            f"--outputs: expected a criterion that looks at outputs, found {args.criterion}: "
            "leave one of them out"
        )


def _check_training(args: argparse.Namespace) -> None:
    if args.command != "prune" or args.repair == "distill":
        return
    found = f"found --repair {args.repair}: leave one of them out"
    check_unset(args, args.untrained, f"expected only with --repair distill, {found}")


def _check_max_loss(args: argparse.Namespace) -> None:
    if getattr(args, "max_loss", None) is None:
        return
    if args.granularity not in STRUCTURES:
        raise ValueError(
            "--max-loss: expected channels, heads or branches to be pruned, found --granularity "
            f"{args.granularity}: pass --keep"
        )
    if args.repair == "distill":
        raise ValueError(
            "--max-loss: expected a repair without training, which each size would need, found "
            "--repair distill: leave it out, and run `distill` on what comes out"
        )


def _check_latency(args: argparse.Namespace) -> None:
    if "latency_runtime" not in args:
        return
    runtime, table = args.latency_runtime, getattr(args, "latency_table", None)
    if getattr(args, "of", "latency") != "latency":
        found = f"found --of {args.of}: leave one of them out"
        check_unset(args, _UNTIMED, f"expected only with --of latency, {found}")
    if (runtime == TABLE) != (table is not None):
        raise ValueError(
            "expected --latency-runtime table and --latency-table F together, found one of them"
        )
    if table is not None:
        check_table(table)
    else:
        check_runtime(runtime)


def _check_runs(folders: Sequence[str]) -> None:
    if len(folders) == 1 and (page := Path(folders[0]) / sizes.COMPARISON).is_file():
        raise ValueError(
            f"compare: expected at least two folders, found one that holds several: {page} "
            f"compares them; for another page pass {Path(folders[0]) / '*'}"
        )
    if len(folders) < 2:
        raise ValueError(
            f"compare: expected at least two folders, found {len(folders)}: report.html of a "
            "folder shows that run alone"
        )
    for folder in folders:
        check_run(folder)


def _check_output(args: argparse.Namespace) -> None:
    writes = COMMANDS[args.command].writes
    if args.command == "prune":
        _check_sizes(args)
    elif writes == "model":
        check_writable(check_folder(args.output, overwrite=args.overwrite))
    elif writes == "file" and args.output is not None:
        check_file(args.output, overwrite=args.overwrite)


def _check_input_stays(args: argparse.Namespace) -> None:
    """Check that what is written does not take the place of what is read."""
    if args.command == "prune":
        outputs = list(sizes.folders(args).values())
    else:  # others that write a folder leave what else is in it
        outputs = [args.output] if COMMANDS[args.command].writes and args.output else []
    named = (getattr(args, name, None) for name in _READ)
    read = {*named, *getattr(args, "folders", ())} - {None, *NO_FILES}
    for output, given in itertools.product(outputs, read):
        place, found = (Path(os.path.realpath(Path(path).expanduser())) for path in (output, given))
        inside = place.parent == found and place.name in OWN_FILES
        if place == found or place in found.parents or inside:
            raise ValueError(
                f"--output {output}: expected another place than that of {given}, which is read "
                "and stays as it is: choose another name"
            )


def _check_sizes(args: argparse.Namespace) -> None:
    if len(set(sizes.folders(args).values())) < len(args.keeps):
        raise ValueError("--keep: expected different sizes, found one twice: leave it out")
    if len(args.keeps) > 1 and args.granularity not in STRUCTURES:
        raise ValueError(
            f"--keep: expected one size with --granularity {args.granularity}, found "
            f"{len(args.keeps)}: run them one by one"
        )
    sizes.check_place(args)
    for keep, folder in sizes.folders(args).items():
        if not sizes.is_done(args, keep, folder):
            sizes.check_no_other(args, folder)
            check_writable(check_folder(folder, overwrite=args.overwrite))
    if args.ranking is not None:
        check_ranking(args.ranking)


def _check_subject(args: argparse.Namespace) -> None:
    folder: Any = getattr(args, "folder", None)
    if "folder" in args and folder is None and args.model is None:
        raise ValueError(NEITHER)
    if folder is not None:
        _check_folder(args, folder)
    for path in (getattr(args, "checkpoint", None), getattr(args, "dense", None)):
        if path is not None and path not in NO_FILES:
            check_checkpoint(str(path))


def _check_folder(args: argparse.Namespace, folder: str) -> None:
    found = f"found with the folder {folder}, which has weights of its own: leave one of them out"
    check_unset(args, _OF_MODELS, f"expected with --model, {found}")
    if not folder.startswith(_ON_THE_HUB):
        check_saved(folder)


def _check_images(args: argparse.Namespace) -> None:
    if not has_images(args) and args.command != "export":
        raise ValueError("no images given: pass --data-dir D, --data-list F or --dataset NAME")
    if args.data_list is not None:
        check_list(args.data_list)
    elif args.data_dir is not None and not args.dataset:
        check_images(args.data_dir, arrays=True)
    for name in ("eval_dir", "held_out_dir"):
        if getattr(args, name, None) is not None:
            check_images(getattr(args, name))


def has_images(args: argparse.Namespace) -> bool:
    """Tell whether the flags name images."""
    return args.data_dir is not None or args.data_list is not None or bool(args.dataset)
