"""`completion`: a script for the shell, by shtab."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

SHELLS = ("bash", "zsh", "fish", "tcsh")
_FILES, _FOLDERS = ("F",), ("D", "OUT", "OUT2")


class PrintCompletion(argparse.Action):
    """Print the script of the shell that is named, and exit."""

    def __init__(self, *args: Any, of: argparse.ArgumentParser, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.of = of

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> None:
        """Print."""
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
