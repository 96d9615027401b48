"""A chart of several falling curves with error bars, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tpvprune.reports.charts import nice_floor, percent, spaced
from tpvprune.reports.text import cell

_TOP, _BOTTOM = 18.0, 318.0


@dataclass(frozen=True)
class Curve:
    """Points (x, y, error up and down or None) in [0, 1], drawn with a style class."""

    label: str
    style: str
    points: Sequence[tuple[float, float, float | None]]


def curve_chart(curves: Sequence[Curve], about: str) -> str:
    """Draw fractions against the fraction of MACs, falling from left to right."""
    points = [point for curve in curves for point in curve.points]
    left, right = max(x for x, _, _ in points), min(x for x, _, _ in points)
    low, step = nice_floor(max(0.0, min(y - (error or 0.0) for _, y, error in points)))

    def across(x: float) -> str:
        return f"{8 + 88 * (left - x) / max(left - right, 1e-9):.2f}%"

    def down(y: float) -> str:
        return f"{_TOP + (_BOTTOM - _TOP) * (1 - min(max(y, low), 1.0)) / (1 - low):.1f}"

    parts = []
    for tick in range(round((1 - low) / step) + 1):
        level = down(1 - tick * step)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{level}" y2="{level}"/>')
        parts.append(f'<text x="0" y="{float(level) - 4:.1f}">{percent(1 - tick * step, 0)}</text>')
    for x in spaced(sorted({x for x, _, _ in points}, reverse=True), (left - right) / 8):
        place = f'x="{across(x)}" y="{_BOTTOM + 18}" text-anchor="middle"'
        parts.append(f"<text {place}>{percent(x, 0)}</text>")
    for curve in curves:
        numbers = ", ".join(f"{percent(y)} at {percent(x, 0)}" for x, y, _ in curve.points)
        parts.append(f'<g class="{curve.style}">')
        parts.append(f"<title>{cell(curve.label)}: {numbers}</title>")
        for (x1, y1, _), (x2, y2, _) in pairwise(curve.points):
            ends = f'x1="{across(x1)}" y1="{down(y1)}" x2="{across(x2)}" y2="{down(y2)}"'
            parts.append(f'<line class="curve" {ends}/>')
        for x, y, error in curve.points:
            if error:
                ends = f'y1="{down(y - error)}" y2="{down(y + error)}"'
                parts.append(f'<line class="error" x1="{across(x)}" x2="{across(x)}" {ends}/>')
            parts.append(f'<circle cx="{across(x)}" cy="{down(y)}" r="3"/>')
        parts.append("</g>")
    head = f'<svg height="{_BOTTOM + 26}" role="img" aria-label="{cell(about)}">'
    return f"{head}{''.join(parts)}</svg>"
