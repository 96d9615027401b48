"""An HTML page: one file, without any outside resource, and the blocks that it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tpvprune.reports.style import STYLE
from tpvprune.reports.text import cell, significant


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


def section(title: str, about: str, body: str, *, style: str = "") -> str:
    """Set a heading and a few words beside a table or picture."""
    text = f'<div class="about"><h2>{title}</h2>{about}</div>'
    mark = f' class="{style}"' if style else ""
    return f"<section{mark}>{text}<div>{body}</div></section>"


def table(heads: Iterable[str], rows: Iterable[str], *, style: str = "") -> str:
    """Set a table of rows under heads, which are HTML."""
    mark = f' class="{style}"' if style else ""
    body = f"<tbody>{''.join(rows)}</tbody>"
    return f"<table{mark}><thead><tr>{_cells(heads, 'th')}</tr></thead>{body}</table>"


def table_row(head: str | None, values: Iterable[str], *, ours: bool = False) -> str:
    """Set a row of a table, all of it HTML; ``ours`` stands out."""
    first = "" if head is None else f"<th>{head}</th>"
    return f"<tr{' class=ours' if ours else ''}>{first}{_cells(values, 'td')}</tr>"


def _cells(values: Iterable[str], tag: str) -> str:
    """Set cells; what is one already, with a style of its own, stays as it is."""
    return "".join(v if v.startswith(f"<{tag}") else f"<{tag}>{v}</{tag}>" for v in values)


def dots(names: Iterable[tuple[int, str]]) -> list[str]:
    """Return heads of tables, each with the dot of a colour; see :func:`style.hues`."""
    return [f'<th class="dot c{i}">{cell(name)}</th>' for i, name in names]


def reasons(found: Iterable[tuple[str, str]]) -> str:
    """List names, each with its reason."""
    items = "".join(
        f'<li><span class="name">{cell(what)}</span>{cell(reason)}</li>' for what, reason in found
    )
    return f'<ul class="reasons">{items}</ul>'


def left_out(found: Mapping[str, Any]) -> str:
    """List what could not be measured."""
    return section("Left out", "", reasons(found.items())) if found else ""


def with_error(value: str, error: float | None) -> str:
    """Write a number and its standard error, if it has one."""
    if error is None:
        return value
    return f'{value} <span class="soft">\u00b1 {significant(error, 2)}</span>'
