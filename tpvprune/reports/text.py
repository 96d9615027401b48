"""Texts of a page: what a report holds, numbers as people read them, and names of costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

_LABELS = {
    "macs": "MACs",
    "params": "parameters",
    "nonzero_params": "non-zero parameters",
}

_HEADS = {
    "macs": "MACs", "params": "Parameters", "top1": "Top-1", "num_images": "Images",
    "num_held_back": "Images held back", "round_to": "Widths in multiples of",
    "used_labels": "Labels used", "granularity": "What may leave",
}  # fmt: skip


def head_of(key: str) -> str:
    """Return what people call a key of a report, as a heading."""
    return _HEADS.get(key, key.replace("_", " ").capitalize())


def cell(value: Any) -> str:
    """Write whatever a report holds in a place as text: nothing of it is taken for HTML.

    A report may be a stranger's, with strings where numbers belong. Every value of it comes to a
    page through this, or through what writes numbers alone, below.
    """
    return escape(str(value))


def percent(fraction: float, digits: int = 1) -> str:
    """Write a fraction as a percentage."""
    return minus(f"{100 * fraction:.{digits}f}\u202f%")


def whole(number: float) -> str:
    """Write a count in full, thousands set apart."""
    return f"{number:,.0f}".replace(",", "\u202f")


def short(number: float) -> str:
    """Write a count with three or four digits and a unit prefix."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = 4 if number / size >= 100 else 3
            return f"{number / size:#.{digits}g}\u202f{prefix}"
    return f"{number:.4g}"


def significant(number: float, digits: int = 3) -> str:
    """Write any number with a stated number of significant digits."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    exponent = math.floor(math.log10(abs(number)))
    if -4 <= exponent < 6:
        text = f"{number:,.{max(0, digits - 1 - exponent)}f}".replace(",", "\u202f")
    else:
        text = f"{number / 10.0**exponent:.{digits - 1}f}·{power_of_ten(exponent)}"
    return minus(text)


def power_of_ten(exponent: int) -> str:
    """Write a power of ten with raised digits."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def minus(text: str) -> str:
    """Write a number with a minus sign in the place of a hyphen."""
    return text.replace("-", "\u2212")


def side_by_side(
    writers: Iterable[tuple[str, str, Callable[[Any], str]]], *sides: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return label -> the text of each side, where any has the key: (key, label, how to write)."""
    found = {
        label: ["" if side.get(key) is None else write(side[key]) for side in sides]
        for key, label, write in writers
    }
    return {label: texts for label, texts in found.items() if any(texts)}


def cost_labels(*sides: Mapping[str, Any]) -> dict[str, str]:
    """Return what to show of some models; non-zero parameters only where some are zero."""
    masked = any(
        side.get("nonzero_params") is not None and side["nonzero_params"] != side.get("params")
        for side in sides
    )
    return {key: label for key, label in _LABELS.items() if masked or key != "nonzero_params"}
