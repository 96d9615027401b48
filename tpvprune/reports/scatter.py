"""One number against another, point by point, on log scales: near the diagonal, they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tpvprune.reports.text import cell, power_of_ten, significant

_SIDE, _LEFT, _TOP = 320.0, 56.0, 10.0


def scatter_chart(
    points: Sequence[tuple[str, tuple[float, float], tuple[float, float]]], across: str, up: str
) -> str:
    """Draw points with their standard errors and the diagonal, as inline SVG.

    Points with a value that is not positive have no place on a log scale and are left out.
    """
    shown = [p for p in points if p[1][0] > 0 and p[2][0] > 0]
    if not shown:
        raise ValueError("scatter: expected a point with two positive values, found none")
    logs = [math.log10(value) for _, x, y in shown for value in (x[0], y[0])]
    low, high = min(logs) - 0.1, max(logs) + 0.1

    def place(value: float) -> float:
        exponent = math.log10(value) if value > 0 else low
        return _SIDE * (min(max(exponent, low), high) - low) / (high - low)

    right, bottom = _LEFT + _SIDE, _TOP + _SIDE
    parts = [f'<line class="grid" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{_TOP}"/>']
    for exponent in range(math.ceil(low), math.floor(high) + 1):
        at = place(10.0**exponent)
        x, y, text = _LEFT + at, bottom - at, power_of_ten(exponent)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for name, (x_value, x_error), (y_value, y_error) in shown:
        x, y = _LEFT + place(x_value), bottom - place(y_value)
        ends = [_LEFT + place(x_value - x_error), _LEFT + place(x_value + x_error)]
        ends += [bottom - place(y_value - y_error), bottom - place(y_value + y_error)]
        a, b, c, d = (f"{end:.1f}" for end in ends)
        parts.append(f'<line class="kept-bar" x1="{a}" x2="{b}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<line class="kept-bar" x1="{x:.1f}" x2="{x:.1f}" y1="{c}" y2="{d}"/>')
        label = f"{name}: {significant(x_value)} {across}, {significant(y_value)} {up}"
        parts.append(
            f'<circle class="kept-dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
            f"<title>{cell(label)}</title></circle>"
        )
    middle = _LEFT + _SIDE / 2
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{cell(across)}</text>')
    parts.append(
        f'<text transform="rotate(-90)" x="{-(_TOP + _SIDE / 2)}" y="14" '
        f'text-anchor="middle">{cell(up)}</text>'
    )
    size = f'width="{right + 10:.0f}" height="{bottom + 46:.0f}"'
    about = f'role="img" aria-label="{cell(up)} against {cell(across)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {about}>{"".join(parts)}</svg>'
