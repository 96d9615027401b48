"""The command line: run a command, and say in one line what was wrong."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tpvprune.cli import sizes
from tpvprune.cli.command_flags import COMMANDS
from tpvprune.cli.first_checks import check_first
from tpvprune.cli.flags import build_parser
from tpvprune.cli.recipes import parsed

_TRAINING = ("distill", "finetune")
# Python's spelling of a flag, from a function that Python users call too.
_SPELLINGS = {
    "overwrite=True": "--overwrite",
    "lower lr (": "lower --lr (",
    "set clip_grad": "set --clip-grad",
    "or freeze_batchnorm": "or --freeze-batchnorm",
}
DONE, BUG, BAD_INPUT, NOT_REACHED, LOST, INTERRUPTED = 0, 1, 2, 3, 4, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    args = None
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = parsed(build_parser(), argv)
        command = COMMANDS[args.command]
        if "keeps" in args:
            args.keep = min(args.keeps)  # what a plan goes by
        args.command_line = shlex.join(["tpvprune", *argv])
        # Nothing but the JSON document may reach stdout, whatever a library prints.
        with _processes(args) as first, contextlib.redirect_stdout(sys.stderr):
            dry = getattr(args, "dry_run", False)
            home = "planning" if dry else command.home
            module = importlib.import_module(f"tpvprune.cli.{home}")
            name = args.command.replace("-", "_")
            run = getattr(module, f"{'plan' if dry else 'run'}_{name}")
            # Milliseconds are to be those of a plain process, as the model will run in.
            if not command.plain and getattr(args, "of", None) != "latency":
                importlib.import_module("tpvprune.passes.memory").keep_freed_memory()
            code, document = _within_memory(run, args)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, f"interrupted{_left_by(args)}")
    except Exception as error:
        return _failed(error)
    if args.json and first:
        plain = importlib.import_module("tpvprune.reports.report").plain
        print(json.dumps(plain(document), indent=2, allow_nan=False))
    return int(code)


def _left_by(args: argparse.Namespace | None) -> str:
    """Return what is there of a command that was stopped."""
    if args is None:
        return ""
    command = COMMANDS[args.command]
    if not (command.saves and sizes.is_begun(args.output)):
        return command.after
    return (
        ": the output is untouched; the same command goes on after the last finished "
        f"{command.saves}"
    )


def _within_memory(
    run: Callable[[argparse.Namespace], tuple[int, Any]], args: argparse.Namespace
) -> tuple[int, Any]:
    """Run a command; when memory runs out, again with batches half as large, down to one image.

    A command starts anew; finished rows of a benchmark are on the disk. How images are split into
    batches decides the result of training, and a little that of BatchNorm recalibration.
    """
    memory = importlib.import_module("tpvprune.passes.memory")
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    while True:
        attempt = argparse.Namespace(**vars(args))
        try:
            return run(attempt)
        except Exception as error:
            size = _images_per_batch(attempt)
            lacking = memory.is_lack_of_memory(error)
            if not lacking or size == 1 or shared or "batch_size" not in args:
                raise
        # Outside of the handler, where the error no longer holds what filled the memory.
        args = argparse.Namespace(**{**vars(args), "batch_size": size // 2})
        differs = " (which trains differently)" if args.command in _TRAINING else ""
        importlib.import_module("tpvprune.cli.console").say(
            f"note: out of memory: going on with {size // 2} images per batch{differs}"
        )
        memory.release_memory()


def _images_per_batch(args: argparse.Namespace) -> int:
    """Return how many images a batch has, as the flags say or the command decided."""
    default = 128 if args.command in _TRAINING else getattr(args, "images_per_batch", 64)
    return int(getattr(args, "batch_size", None) or default)


@contextlib.contextmanager
def _processes(args: Any) -> Iterator[bool]:
    """Join the other processes of torchrun, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        check_first(args)  # before anything heavy is imported
        yield True
        return
    if not COMMANDS[args.command].shared:
        raise ValueError(f"{args.command} runs in one process: start it without torchrun")
    distributed = importlib.import_module("tpvprune.processes.shares")
    membership = importlib.import_module("tpvprune.processes.membership")
    args.device = membership.device_here(args.device)
    with membership.joined(args.device), contextlib.ExitStack() as stack:
        distributed.check_same("command", args.command_line)
        distributed.by_first(check_first, args)
        if not membership.is_first():
            silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield membership.is_first()


def _failed(error: Exception) -> int:
    if type(error).__name__ == "OtherProcessError":
        return BUG
    if type(error).__name__ == "LostProcessError":
        return _fail(LOST, str(error))
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _is_ours(error)):
        return _fail(BAD_INPUT, " ".join(str(error).split()) or type(error).__name__)
    if importlib.import_module("tpvprune.passes.memory").is_lack_of_memory(error):
        return _fail(BAD_INPUT, "out of memory: lower -b, --num-images or the input size")
    traceback.print_exception(error)
    return _fail(BUG, "this is a bug: please report it with the lines above")


def _is_ours(error: BaseException) -> bool:
    # A ValueError out of torch, timm or the standard library is a bug of ours.
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    name = step.tb_frame.f_globals.get("__name__", "") if step else ""
    return str(name).partition(".")[0] == __name__.partition(".")[0]


def _fail(code: int, message: str) -> int:
    number = os.environ.get("RANK", "0")
    where = "" if number == "0" else f"process {number}: "
    for python, flag in _SPELLINGS.items():
        message = message.replace(python, flag)
    line = f"tpvprune: error: {where}{message}"
    if sys.stderr.isatty():  # a pipe gets one line
        width = min(80, shutil.get_terminal_size().columns)
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)
    return code
