"""Recipes: the choices of a run of `prune`, from a folder or a file, in the place of flags.

What a recipe may hold is what the parser has in the sections below, under the names of the flags;
values are checked as those of flags are. Which model, which images and where to is no part of it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpvprune.cli.flag_groups import Parser
from tpvprune.disk.path_checks import check_saved

_SECTIONS = ("pruning", "training", "preprocessing")
_MORE = frozenset({"num_images", "batch_size", "seed"})
_FILES = frozenset({"ranking", "latency_table"})  # these are given, not chosen
_UNSET = object()
_MOST_BYTES = 64 * 2**20


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; where it names a recipe, that fills in what no flag says.

    A ValueError tells what is wrong with either, in one line.
    """
    args = parser.parse_args(argv)
    if args.command != "prune":
        return args
    prune = prune_parser(parser)
    if args.like is not None:
        chosen = _values(parser, _of_folder(args.like), where=f"--like {args.like}")
    elif args.recipe is not None:
        chosen = _values(parser, _of_file(args.recipe), where=f"--recipe {args.recipe}")
    else:
        chosen = {}
    if chosen:
        args = _with_defaults(parser, argv, _left(prune, chosen, _given(parser, argv)))
    args.choices = recorded(prune, args)
    return args


def prune_parser(parser: argparse.ArgumentParser) -> Parser:
    """Return the parser of `prune`."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: Parser = commands.choices["prune"]
    return found


def choices(prune: Parser) -> dict[str, argparse.Action]:
    """Return what a recipe may hold: name -> flag."""
    found = {}
    for section in prune._action_groups:
        inside = (section.title or "").startswith(_SECTIONS)
        for action in section._group_actions:
            name = _name(action)
            if (inside or name in _MORE) and name not in _FILES:
                found[name] = action
    return found


def recorded(prune: Parser, args: argparse.Namespace) -> dict[str, Any]:
    """Return the choices of a run as plain values; those that do not apply are left out."""
    found = {name: getattr(args, action.dest) for name, action in choices(prune).items()}
    unused = _unused(prune, args.repair, args.of)
    unused |= {"keep"} if args.max_loss is not None else set()
    return {
        name: _plain(value)
        for name, value in found.items()
        if name not in unused and value is not None and value != ()
    }


def of_size(recipe: Mapping[str, Any], keep: float) -> dict[str, Any]:
    """Return the recipe of one of several sizes."""
    return {**recipe, "keep": [keep]} if "keep" in recipe else dict(recipe)


def _unused(prune: Parser, repair: str, of: str) -> set[str]:
    """Return the names of choices that mean nothing beside these."""
    training = set(prune.get_default("untrained"))
    latency = {name for name in choices(prune) if name.startswith("latency_")}
    return (training if repair != "distill" else set()) | (latency if of != "latency" else set())


def _name(action: argparse.Action) -> str:
    """Return the name of a flag, as a recipe has it."""
    longest = max(action.option_strings, key=len, default=action.dest)
    return longest.lstrip("-").replace("-", "_")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [f"{v[0]}={v[1]!r}" if isinstance(v, tuple) else v for v in value]
    return value


# ---- reading ----------------------------------------------------------------------------------


def _of_folder(folder: str) -> dict[str, Any]:
    """Return the recipe of a saved run."""
    check_saved(folder)
    config = _json(Path(folder) / "config.json")
    provenance = config.get("provenance")
    recipe = provenance.get("recipe") if isinstance(provenance, dict) else None
    if not isinstance(recipe, dict):
        raise ValueError(
            f"--like {folder}: expected a recipe in its config.json, found none: an earlier "
            "version, another command or Python wrote it: pass --recipe F"
        )
    return recipe


def _of_file(path: Path) -> dict[str, Any]:
    """Return what a TOML or JSON file says."""
    if not path.is_file():
        raise ValueError(f"--recipe {path}: no such file")
    if path.suffix == ".json":
        return _json(path)
    try:
        toml: Any = importlib.import_module("tomllib")
    except ImportError as error:
        raise ValueError(
            f"--recipe {path}: expected Python 3.11 to read TOML, found an earlier one: write the "
            "same keys as JSON, into a file that ends in .json"
        ) from error
    try:
        found: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--recipe {path}: expected TOML, found damage ({error})") from error
    return found


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: expected at most {_MOST_BYTES} bytes, found more")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found damage ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected names and values, found {type(found).__name__}")
    return found


def _values(
    parser: argparse.ArgumentParser, recipe: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """Return the values of a recipe by destination, as the parser reads them."""
    known = choices(prune_parser(parser))
    tokens: list[str] = []
    named = {str(key).replace("-", "_"): value for key, value in recipe.items()}
    for name, value in named.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "choices of `prune` alone, no files"
            raise ValueError(f"{where}: unknown key {name!r:.80}: {hint}")
        tokens += _tokens(known[name], value, where=f"{where}: {name}")
    try:
        args = parser.parse_args(["prune", "--output=recipe", *tokens])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {known[name].dest: getattr(args, known[name].dest) for name in named}


def _tokens(action: argparse.Action, value: Any, *, where: str) -> list[str]:
    """Return what the command line would say."""
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, found {value!r:.80}")
        return [flag] if value else []
    several = isinstance(value, list) and (
        action.nargs is not None or all(isinstance(entry, str) for entry in value)
    )
    values = value if several else [value]
    for entry in values:
        if isinstance(entry, bool) or not isinstance(entry, (str, int, float)):
            raise ValueError(f"{where}: expected numbers or names, found {entry!r:.80}")
        if str(entry).startswith("--"):
            raise ValueError(f"{where}: expected a value, found the flag {entry!r:.80}")
    if action.nargs is None:
        return [f"{flag}={','.join(map(str, values))}"]
    return [flag, *map(str, values)]


# ---- flags that win ---------------------------------------------------------------------------


def _given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return what the command line itself says, by destination."""
    names = [action.dest for action in choices(prune_parser(parser)).values()]
    args = _with_defaults(parser, argv, dict.fromkeys(names, _UNSET))
    return {name: getattr(args, name) for name in names if getattr(args, name) is not _UNSET}


def _with_defaults(
    parser: argparse.ArgumentParser, argv: Sequence[str], defaults: Mapping[str, Any]
) -> argparse.Namespace:
    """Parse with other defaults; the parser is as before after it."""
    prune = prune_parser(parser)
    before = {name: prune.get_default(name) for name in defaults}
    prune.set_defaults(**defaults)
    try:
        return parser.parse_args(argv)
    finally:
        prune.set_defaults(**before)


def _left(prune: Parser, chosen: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a recipe applies beside the flags that are given."""
    gone: set[str] = set()
    for pair in (("keeps", "max_loss"), ("img_size", "input_size"), ("epochs", "minutes")):
        gone |= set(pair) if given.keys() & set(pair) else set()
    repair, of = given.get("repair", "distill"), given.get("of", "latency")
    gone |= _unused(prune, repair, of)
    return {name: value for name, value in chosen.items() if name not in gone}
