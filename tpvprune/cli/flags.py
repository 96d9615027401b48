"""The parser of the command line, and what makes a shell complete it."""

from __future__ import annotations

import argparse
import difflib
import importlib
from itertools import takewhile
from typing import Any

from tpvprune.cli.command_flags import COMMANDS
from tpvprune.cli.flag_groups import Parser, add
from tpvprune.disk.versions import versions

_SHELLS = ("bash", "zsh", "fish", "tcsh")
_FILES, _FOLDERS = ("F",), ("D", "OUT", "OUT2")
_EPILOG = (
    "exit codes: 0 done; 1 bug; 2 bad input; 3 budget not reachable (the best effort is saved); "
    "4 another process of the run was lost; 130 interrupted. Text and progress go to stderr; with "
    "--json, one JSON document goes to stdout."
)


class _Command(Parser):
    """The parser of one command, which says what it does not know before what it misses."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is left over here, where the help is that of the command."""
        given = list(args or ())
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for name in (text.partition("=")[0] for text in takewhile("--".__ne__, given)):
            # argparse takes the beginning of a flag for the flag.
            if name.startswith("--") and not any(flag.startswith(name) for flag in known):
                close = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean {close[0]}?" if close else ""
                self.error(f"unrecognized arguments: {name}{hint}")
        found, left = super().parse_known_args(given, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; wrong flags raise ValueError, in one line."""
    parser = Parser(
        prog="tpvprune",
        description="Prune a pretrained vision model with unlabeled images.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Command
    )

    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.text,
            description=command.text,
            epilog=_EPILOG,
            usage=f"tpvprune {name} {command.usage}",
        )
        command.add(sub)
        add(sub, "--seed", "--json")
    shell = commands.add_parser("completion", help="Print what makes a shell complete the flags.")
    shell.add_argument("shell", choices=_SHELLS, action=_PrintCompletion, of=parser)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        found = versions("tpvprune", "torch", "timm", "torch-pruning")
        print(*(f"{name} {number}" for name, number in found.items() if name != "python"), sep="\n")
        parser.exit()


class _PrintCompletion(argparse.Action):
    """Print the script of the shell that is named, by shtab, and exit."""

    def __init__(self, *args: Any, of: argparse.ArgumentParser, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.of = of

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> None:
        try:
            shtab = importlib.import_module("shtab")
        except ImportError:
            parser.error("completion: needs shtab: pip install 'tpvprune[completion]'")
        _mark_paths(self.of, shtab)
        print(shtab.complete(self.of, shell=shell))
        parser.exit()


def _mark_paths(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Tell shtab which values are files and which are folders, by their names in the help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _mark_paths(sub, shtab)
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
