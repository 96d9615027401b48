"""What the values of flags are read and checked as."""

from __future__ import annotations

import argparse
import ast
import math
import re
from collections.abc import Callable
from typing import Any, Literal

AUTO = "auto"  # --num-images: as many as the scores need; --round-to: by the width of a group


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


fraction = _checked(float, lambda x: 0 < x <= 1, "a fraction above 0 and up to 1")
points = _checked(float, lambda x: 0 < x < 100, "points above 0 and below 100")
# Tensors of 32 bits hold no numbers above 3e38.
positive = _checked(float, lambda x: 0 < x <= 1e30, "a number above 0, at most 1e30")
seed = _checked(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
count = _checked(int, lambda n: n >= 1, "a whole number of at least 1")
count_or_auto = _checked(
    lambda text: text if text == AUTO else int(text),
    lambda n: n == AUTO or n >= 1,
    "a whole number of at least 1, or auto",
)

STRUCTURES: dict[str | None, tuple[Literal["channel", "branch"], ...] | None] = {
    None: None,
    "channel": ("channel",),
    "head": ("channel",),
    "branch": ("branch",),
    "channel,branch": ("channel", "branch"),
    "branch,channel": ("channel", "branch"),
}
"""Values of --granularity that change the structure -> what may leave; None: as the budget is."""
granularity = _checked(
    str,
    lambda g: g in STRUCTURES or re.fullmatch(r"weight|\d+:\d+", str(g)) is not None,
    "channel, head, branch, channel,branch, weight or 2:4",
)
word = _checked(str.strip, bool, "a name")


def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Read several values with commas between, each once."""
    return lambda text: list(dict.fromkeys(convert(part) for part in text.split(",")))


def pair(text: str) -> tuple[str, Any]:
    """Return the two sides of NAME=VALUE, whose value may be a Python literal."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def output(text: str) -> tuple[str, float]:
    """Return the name of an output, and how much it counts."""
    name, _, weight = text.partition("=")
    return name, positive(weight or "1")
