"""The command line: run a command, and say in one line what was wrong."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from tpvprune.command_line.flags import build_parser

DONE, BUG, BAD_INPUT, NOT_REACHED, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code: 0 done, 2 bad input, 3 budget not reachable, 1 bug.
    """
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = build_parser().parse_args(argv)
        args.command_line = shlex.join(["tpvprune", *argv])
        # Nothing but the JSON document may reach stdout, whatever a library prints.
        with contextlib.redirect_stdout(sys.stderr):
            commands = importlib.import_module("tpvprune.command_line.commands")
            code, document = getattr(commands, f"run_{args.command}")(args)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except MemoryError:
        return _fail(BAD_INPUT, "out of memory: lower -b or --num-images")
    except Exception as error:
        return _failed(error)
    if args.json:
        print(json.dumps(_plain(document), indent=2, allow_nan=False))
    return int(code)


def _failed(error: Exception) -> int:
    if type(error).__name__ == "OutOfMemoryError":
        return _fail(BAD_INPUT, "out of memory: lower -b or --num-images")
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _is_ours(error)):
        return _fail(BAD_INPUT, " ".join(str(error).split()) or type(error).__name__)
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
    print(f"tpvprune: error: {message}", file=sys.stderr)
    return code


def _plain(value: Any) -> Any:
    """Return `value` as JSON knows it: no infinities, no paths, no tensors."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
