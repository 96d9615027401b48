"""Several sizes of one command: a folder for each, and which of them an earlier run has left."""

from __future__ import annotations

import argparse
import glob
import json
from pathlib import Path

from tpvprune.cli.recipes import of_size

COMPARISON = "comparison.html"


def folders(args: argparse.Namespace) -> dict[float, Path]:
    """Return where each size goes: the output itself if there is one, else folders inside of it."""
    output = Path(args.output)
    if len(args.keeps) == 1:
        return {args.keeps[0]: output}
    return {keep: output / f"keep-{keep:g}" for keep in args.keeps}


def check_place(args: argparse.Namespace) -> None:
    """Check that several sizes go into a folder of nothing else; a ValueError says what is there.

    Else a saved model would be one with others inside of it.
    """
    output = Path(args.output)
    if len(args.keeps) == 1 or not output.is_dir():
        return
    others = sorted(
        path.name
        for path in output.iterdir()
        if not path.name.startswith(("keep-", ".")) and path.name != COMPARISON
    )
    if others:
        raise ValueError(
            f"{output}: expected a new folder or one of sizes (keep-0.5, ...), found "
            f"{others[0]} in it: choose another --output"
        )


def check_no_other(args: argparse.Namespace, folder: Path) -> None:
    """Check that one of several sizes is not there already, of another command."""
    if len(args.keeps) > 1 and not args.overwrite and (folder / "report.json").is_file():
        raise ValueError(
            f"{folder}: expected nothing or a size of this very command, found one of another: "
            f"--ranking {folder} with another --output goes on from its ranking"
        )


def is_done(args: argparse.Namespace, keep: float, folder: Path) -> bool:
    """Tell whether a run of the same command line has left this size."""
    if args.overwrite or len(args.keeps) == 1 or not (folder / "report.json").is_file():
        return False
    recipe = json.loads(json.dumps(of_size(args.choices, keep)))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        same = config["provenance"]["command"] == args.command_line
        return bool(same and config["provenance"].get("recipe") == recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # which is then in the way, and said to be


def is_begun(output: Path) -> bool:
    """Tell whether runs that were stopped have left a state, or one of several sizes."""
    output = Path(output).expanduser().resolve()
    states = output.parent.glob(f"{glob.escape(output.name)}.unfinished*.safetensors")
    return any(states) or any(output.glob("keep-*"))


def of_one(args: argparse.Namespace, keep: float, folder: Path) -> argparse.Namespace:
    """Return the flags of one size."""
    return argparse.Namespace(
        **{**vars(args), "keep": keep, "output": folder, "choices": of_size(args.choices, keep)}
    )
