"""The flags of photographs.py, and what they decide."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tpvprune
from tpvprune.benchmark.plan import Plan
from tpvprune.benchmark.rows import RANKINGS, Row
from tpvprune.cli.flag_groups import (
    Parser,
    add,
    add_model,
    add_preprocessing,
)
from tpvprune.cli.flag_values import count, count_or_auto, fraction
from tpvprune.widths.limits import Limits

UNLABELED = ("tpv", "jbr", "magnitude", "random", "tp:magnitude")
LABELLED = ("taylor", "taylor_torch_pruning", "tp:taylor")
_USUAL = {
    "granularity": "channel", "of": "macs", "latency_batch_size": 1, "max_depth_removed": 1.0,
    "round_to": None,
}  # fmt: skip
_NOT_OF_RANKINGS = ("granularity", "max_depth_removed")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; wrong ones are a ValueError."""
    parser = Parser(prog="photographs.py", description="real weights, real photographs")
    add_flags(parser)
    return parsed(parser, argv)


def add_flags(parser: Parser) -> None:
    """Add all flags."""
    add_model(parser, required=False)
    images = parser.section("images")
    images.add_argument("--calib-dir", metavar="D", help="folder or .tar, no labels needed")
    images.add_argument(
        "--calib-labels",
        type=Path,
        metavar="F",
        help="file name, tab, class index a line: for the labelled criteria (class folders)",
    )
    images.add_argument(
        "--test-dir", nargs="+", metavar="D[:CROP]", help="labelled sets, crop_pct of their own"
    )
    images.add_argument("--class-map", metavar="F", help="file: class name -> index")
    images.add_argument(
        "--num-test", type=count, metavar="N", help="of each set, the same for every seed (all)"
    )
    images.add_argument("--num-images", type=count, default=1000, metavar="N", help="(1000)")
    images.add_argument("-b", "--batch-size", type=count, default=16, metavar="N", help="(16)")
    add_preprocessing(parser)
    how = parser.section("comparison")
    how.add_argument(
        "--criteria",
        nargs="+",
        metavar="NAME",
        help=f"({', '.join(UNLABELED)}, with --calib-labels also {', '.join(LABELLED)})",
    )
    how.add_argument(
        "--ranking",
        nargs="+",
        default=["curves", "per_cost"],
        choices=list(RANKINGS),
        help="(curves and per_cost; curves concern tpv alone)",
    )
    how.add_argument(
        "--granularity",
        choices=["channel", "branch", "channel,branch"],
        default="channel",
        help="of our criteria: what is removed (channel)",
    )
    how.add_argument(
        "--of",
        choices=["macs", "params", "latency"],
        default="macs",
        help="of our criteria: what --keep is a fraction of (macs)",
    )
    how.add_argument(
        "--max-depth-removed",
        type=fraction,
        default=1.0,
        metavar="X",
        help="of our criteria: largest fraction of the branches that may go (1)",
    )
    how.add_argument(
        "--latency-batch-size",
        type=count,
        default=1,
        metavar="N",
        help="images of one call, where that is latency (1)",
    )
    how.add_argument(
        "--round-to",
        type=count_or_auto,
        metavar="N",
        help="of our criteria: multiples of widths, as of the command (1: any; of latency auto)",
    )
    how.add_argument("--keep", type=fraction, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    how.add_argument("--repair", nargs="+", default=["compensate"], metavar="NAME")
    run_ = parser.section("run")
    run_.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (0)")
    run_.add_argument("--seeds", type=count, default=1, metavar="N", help="how many (1)")
    run_.add_argument("--threads", type=count, default=os.cpu_count(), metavar="N", help="(all)")
    run_.add_argument(
        "--rankings",
        type=Path,
        metavar="D",
        help="folder for our rankings: other budgets and granularities of a seed need no new one",
    )
    run_.add_argument("--output", type=Path, metavar="F", help="CSV file to write (results/...)")
    run_.add_argument("--summary", type=Path, nargs="+", metavar="F", help="print, run nothing")
    add(parser, "--device")


def parsed(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of a parser with these flags; wrong ones are a ValueError."""
    args = parser.parse_args(argv)
    if not args.summary:
        for name in ("model", "calib_dir", "test_dir"):
            if getattr(args, name) is None:
                parser.error(f"--{name.replace('_', '-')} is required")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    """Return which rows the arguments ask for."""
    standard = (*UNLABELED, *(LABELLED if args.calib_labels else ()))
    return Plan(
        model=args.model.partition(".")[0],
        criteria=tuple(args.criteria or standard),
        keeps=tuple(args.keep),
        repairs=tuple(args.repair),
        rankings=tuple(args.ranking),
        seeds=tuple(range(args.seed, args.seed + args.seeds)),
        num_images=args.num_images,
    )


def settings_of(args: argparse.Namespace) -> Row:
    """Return what decides the rows besides what they say themselves; of paths the last part."""
    given = {
        "size": input_size_of(args) and "x".join(map(str, input_size_of(args) or ())),
        **{name: getattr(args, name) for name in ("mean", "std", "crop_pct", "interpolation")},
        **{
            name: getattr(args, name)
            for name, usual in _USUAL.items()
            if getattr(args, name) != usual
        },
        **dict(args.model_kwargs),
    }
    sets = [(Path(path).name, crop) for path, crop in map(with_crop, args.test_dir)]
    number = "" if args.num_test is None else f" ({args.num_test})"
    pretrained = "pretrained" if args.pretrained else "random"
    return {
        "weights": Path(args.checkpoint).name if args.checkpoint else pretrained,
        "calibration": Path(args.calib_dir).name,
        "test_sets": "; ".join(
            (name if crop is None else f"{name}:{crop:g}") + number for name, crop in sets
        ),
        "arguments": "; ".join(f"{k} {_listed(v)}" for k, v in given.items() if v is not None),
    }


def ranking_file(args: argparse.Namespace, *parts: object) -> Path | None:
    """Return where a ranking is kept, if it is.

    ``parts``, flags and the code that ranks tell it from all others.
    """
    if args.rankings is None:
        return None
    shared = argparse.Namespace(**vars(args) | {name: _USUAL[name] for name in _NOT_OF_RANKINGS})
    facts = args.model, args.num_images, args.batch_size, settings_of(shared), _code(), *parts
    return (
        Path(args.rankings) / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.safetensors"
    )


@cache
def _code() -> str:
    """Return a digest of all modules of tpvprune."""
    folder = Path(tpvprune.__file__).parent
    return hashlib.sha256(
        b"".join(p.read_bytes() for p in sorted(folder.rglob("*.py")))
    ).hexdigest()


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what our criteria are told besides: arguments of :func:`tpvprune.prune`."""
    return {
        "of": args.of,
        "granularity": args.granularity.split(","),
        "max_depth_removed": args.max_depth_removed,
        "latency_batch_size": args.latency_batch_size,
        "limits": Limits(round_to=args.round_to or ("auto" if args.of == "latency" else 1)),
    }


def _listed(value: Any) -> str:
    return " ".join(f"{v:g}" for v in value) if isinstance(value, (list, tuple)) else str(value)


def input_size_of(args: argparse.Namespace) -> tuple[int, ...] | None:
    if args.img_size is not None:
        return 3, args.img_size, args.img_size
    return None if args.input_size is None else tuple(args.input_size)


def with_crop(text: str) -> tuple[str, float | None]:
    """Split PATH[:crop_pct]."""
    path, _, crop = text.rpartition(":")
    try:
        return (path, float(crop)) if path else (text, None)
    except ValueError:
        return text, None
