"""The frame of every HTML page: one file, without any outside resource."""

from __future__ import annotations

from collections.abc import Iterable

from tpvprune.reports.style import STYLE
from tpvprune.reports.text import cell


def page(title: str, parts: Iterable[str], *, style: str = "") -> str:
    """Set a page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{cell(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n<footer>MACs are multiply-accumulates of one input. Written by tpvprune.</footer>"
        "\n</main></body></html>\n"
    )
