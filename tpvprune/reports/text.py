"""What a report holds, as text of a page."""

from __future__ import annotations

from html import escape
from typing import Any


def cell(value: Any) -> str:
    """Write whatever a report holds in a place as text: nothing of it is taken for HTML.

    A report may be a stranger's, with strings where numbers belong. Every value of it comes to a
    page through this, or through what writes numbers alone (:mod:`tpvprune.reports.charts`).
    """
    return escape(str(value))
