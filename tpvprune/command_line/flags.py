"""Every flag of the command line, with timm's names wherever timm has one."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_EPILOG = (
    "exit codes: 0 done; 2 bad input; 3 budget not reachable (the best effort is saved); 1 bug. "
    "Text and progress go to stderr; with --json, one JSON document goes to stdout."
)


class _UsageError(ValueError):
    """Wrong flags: reported in one line like every other bad input."""


class _Parser(argparse.ArgumentParser):
    def section(self, title: str) -> argparse._ArgumentGroup:
        """Return the help section of that title, made where there is none."""
        titled = [group for group in self._action_groups if group.title == title]
        return titled[0] if titled else self.add_argument_group(title)

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; wrong flags raise ValueError, in one line."""
    parser = _Parser(
        prog="tpvprune",
        description="Prune a pretrained vision model with unlabeled images.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, add, usage, text in _COMMANDS:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EPILOG,
            usage=f"tpvprune {name} {usage}",
        )
        add(sub)
        run = sub.section("run")
        run.add_argument(
            "--seed", type=int, default=0, metavar="N", help="seed of every random choice (0)"
        )
        run.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        print(f"tpvprune {version('tpvprune')}")
        parser.exit()


def _add_prune(sub: _Parser) -> None:
    _add_model(sub)
    _add_data(sub, num_images=True)
    sub.section("images").add_argument(
        "--eval-dir", metavar="D", help="labelled images, only to measure top-1 before and after"
    )
    _add_criterion(sub)
    how = sub.section("pruning")
    how.add_argument(
        "--keep", type=_fraction, default=0.5, metavar="X", help="fraction that stays, 0 to 1 (0.5)"
    )
    how.add_argument(
        "--of", choices=("macs", "params"), default="macs", help="what --keep is a fraction of"
    )
    how.add_argument(
        "--repair",
        choices=("none", "bn", "compensate", "auto"),
        default="compensate",
        help="what follows a cut; auto chooses by output variance (compensate)",
    )
    how.add_argument("--steps", type=_count, default=1, metavar="N", help="rounds of cutting (1)")
    how.add_argument(
        "--allocation",
        choices=("curves", "rank"),
        help="widths by joint variance curves (tpv), or by rank per cost",
    )
    how.add_argument("--round-to", type=_count, default=1, metavar="N", help="width multiples (1)")
    how.add_argument(
        "--min-channels", type=_count, default=1, metavar="N", help="narrowest width allowed (1)"
    )
    how.add_argument(
        "--max-removed",
        type=_fraction,
        default=1.0,
        metavar="X",
        help="largest fraction of one group that may go (1)",
    )
    _add_ignore(how)
    _add_device(sub)
    sub.section("run").add_argument(
        "--latency-repeats", type=int, default=50, metavar="N", help="timed calls, 0 for none (50)"
    )
    _add_output(sub, "folder for the pruned model and its report")


def _add_score(sub: _Parser) -> None:
    _add_model(sub)
    _add_data(sub, num_images=True)
    _add_criterion(sub)
    _add_ignore(sub.section("pruning"))
    _add_device(sub)
    _add_output(sub, "JSON file for the scores")


def _add_groups(sub: _Parser) -> None:
    _add_model(sub)
    _add_preprocessing(sub)
    _add_ignore(sub.section("pruning"))


def _add_evaluate(sub: _Parser) -> None:
    sub.add_argument("folder", nargs="?", metavar="OUT", help="folder that `prune` wrote")
    _add_model(sub, required=False)
    sub.section("model").add_argument(
        "--dense",
        metavar="F",
        help="OUT is compared with this checkpoint of the dense model, or with `pretrained`",
    )
    _add_data(sub, num_images=False)
    _add_device(sub)
    sub.section("run").add_argument(
        "--latency-repeats", type=int, default=50, metavar="N", help="timed calls, 0 for none (50)"
    )


def _add_demo(sub: _Parser) -> None:
    _add_output(sub, "folder for the report (demo-output)", default="demo-output")


def _add_model(sub: _Parser, *, required: bool = True) -> None:
    group = sub.section("model")
    group.add_argument(
        "--model", required=required, metavar="M", help="timm's name, or hf-hub:..., local-dir:..."
    )
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="F", help="safetensors or weights-only torch file")
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")
    group.add_argument(
        "--num-classes", type=int, metavar="N", help="classifier size (else the checkpoint's)"
    )
    group.add_argument(
        "--model-kwargs", nargs="*", default=(), type=_pair, metavar="K=V", help="model arguments"
    )


def _add_data(sub: _Parser, *, num_images: bool) -> None:
    group = sub.section("images")
    group.add_argument("--data-dir", metavar="D", help="folder or .tar of images, no labels needed")
    group.add_argument("--dataset", default="", metavar="NAME", help="torch/..., hfds/..., wds/...")
    group.add_argument(
        "--split",
        default="train" if num_images else "validation",
        metavar="S",
        help="split of the dataset (%(default)s)",
    )
    group.add_argument("--dataset-download", action="store_true", help="let timm download it")
    group.add_argument("--class-map", metavar="F", help="file: class name -> index")
    group.add_argument("--input-key", metavar="K", help="image column of the dataset")
    group.add_argument("--target-key", metavar="K", help="label column of the dataset")
    group.add_argument(
        "--num-images",
        type=_count,
        default=1024 if num_images else None,
        metavar="N",
        help="images used, chosen by the seed " + ("(1024)" if num_images else "(all)"),
    )
    group.add_argument(
        "-b", "--batch-size", type=_count, default=64, metavar="N", help="images per batch (64)"
    )
    group.add_argument(
        "-j", "--workers", type=int, default=4, metavar="N", help="decoding threads (4)"
    )
    _add_preprocessing(sub)


def _add_preprocessing(sub: _Parser) -> None:
    group = sub.section("preprocessing (default: the model's pretrained_cfg)")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--input-size",
        nargs=3,
        type=_count,
        metavar=("C", "H", "W"),
        help="channels, height, width",
    )
    size.add_argument("--img-size", type=_count, metavar="N", help="short for --input-size 3 N N")
    group.add_argument("--mean", nargs="+", type=float, metavar="X", help="one, or one per channel")
    group.add_argument("--std", nargs="+", type=float, metavar="X", help="likewise")
    group.add_argument("--crop-pct", type=float, metavar="X", help="part of the image that stays")
    group.add_argument("--interpolation", metavar="NAME", help="bilinear, bicubic, ...")


def _add_criterion(sub: _Parser) -> None:
    group = sub.section("pruning")
    group.add_argument("--criterion", default="tpv", metavar="NAME", help="how to score (tpv)")
    group.add_argument(
        "--num-probes", type=_count, default=1, metavar="N", help="random output directions (1)"
    )


def _add_ignore(group: Any) -> None:
    group.add_argument(
        "--ignore", nargs="+", default=(), metavar="NAME", help="layers whose channels stay"
    )


def _add_device(sub: _Parser) -> None:
    sub.section("run").add_argument(
        "--device", default="cpu", metavar="DEV", help="cpu, cuda, cuda:1, mps (cpu)"
    )


def _add_output(sub: _Parser, text: str, default: str | None = None) -> None:
    group = sub.section("run")
    group.add_argument(
        "--output", type=Path, required=default is None, default=default, metavar="OUT", help=text
    )
    group.add_argument("--overwrite", action="store_true", help="replace what OUT holds")


_COMMANDS: tuple[tuple[str, Callable[[_Parser], None], str, str], ...] = (
    (
        "prune",
        _add_prune,
        "--model M --data-dir D --output OUT [options]",
        "Prune a model and save the smaller one.",
    ),
    (
        "score",
        _add_score,
        "--model M --data-dir D --output F [options]",
        "Score every channel and write the scores as JSON.",
    ),
    (
        "groups",
        _add_groups,
        "--model M [options]",
        "Show what can be pruned, what not, and why.",
    ),
    (
        "evaluate",
        _add_evaluate,
        "(OUT | --model M) --data-dir D [options]",
        "Measure a model or a saved pruned model.",
    ),
    ("demo", _add_demo, "[options]", "Prune a small model on handwritten digits, offline."),
)


def _checked(convert: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Any:
    def check(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
        return value

    return check


_fraction = _checked(float, lambda x: 0 < x <= 1, "a fraction above 0 and up to 1")


_count = _checked(int, lambda n: n >= 1, "a whole number of at least 1")


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
