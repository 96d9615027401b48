"""Small charts as inline SVG and HTML.

Horizontal positions are percentages and vertical ones pixels, so that a chart takes the
width it is given while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tpvprune.reports.text import cell, percent, power_of_ten, significant

_TOP = 18.0
_SIDE, _LEFT, _ABOVE = 320.0, 56.0, 10.0  # of a scatter chart
MAX_DOTS = 48
MAX_SPREAD = 8


def width_rows(groups: Sequence[tuple[str, int, int]], *, shares: bool = False) -> str:
    """Draw one bar per group: its dense width as an outline, the kept part filled.

    Bars share one scale of channels; where widths differ more than 8-fold every outline
    takes the full length and the fill shows the kept share.
    """
    widest = max(dense for _, dense, _ in groups)
    same_scale = not shares and widest <= MAX_SPREAD * min(dense for _, dense, _ in groups)
    rows, stage = [], groups[0][0].split(".")[0]
    for name, dense, kept in groups:
        first = name.split(".")[0] != stage
        stage = name.split(".")[0]
        length = 100 * dense / widest if same_scale else 100
        number = f'{kept}<span class="soft">\u202f/\u202f{dense}</span>'
        if shares:
            number = percent(kept / max(dense, 1))
        rows.append(
            f'<li{" class=gap" if first else ""} title="{cell(name)}: {kept} of {dense}">'
            f'<span class="name">{cell(name)}</span>'
            f'<span class="track"><span class="dense" style="width:{length:.2f}%">'
            f'<span class="stays" style="width:{100 * kept / max(dense, 1):.2f}%">'
            "</span></span></span>"
            f'<span class="num">{number}</span></li>'
        )
    columns = " two" if len(groups) > 24 else ""
    return f'<ol class="rows{columns}">{"".join(rows)}</ol>'


def value_rows(rows: Sequence[tuple[str, float, str]], chosen: str | None = None) -> str:
    """Draw one bar per value, from zero."""
    largest = max(value for _, value, _ in rows) or 1.0
    items = "".join(
        f'<li{" class=chosen" if name == chosen else ""}><span class="name">{cell(name)}</span>'
        f'<span class="track"><span class="stays" style="width:{100 * value / largest:.2f}%">'
        f'</span></span><span class="num">{text}</span></li>'
        for name, value, text in rows
    )
    return f'<ul class="rows plain">{items}</ul>'


@dataclass(frozen=True)
class Curve:
    """Points (x, y, error up and down or None) in [0, 1], drawn with a style class."""

    label: str
    style: str
    points: Sequence[tuple[float, float, float | None]]


def curve_chart(curves: Sequence[Curve], about: str) -> str:
    """Draw fractions against the fraction of MACs, with error bars."""
    points = [point for curve in curves for point in curve.points]
    lowest = max(0.0, min(y - (error or 0.0) for _, y, error in points))
    parts, across, down = _plane([p[0] for p in points], lowest, 300, ticks=8, sides=(8, 88))
    for curve in curves:
        numbers = ", ".join(f"{percent(y)} at {percent(x, 0)}" for x, y, _ in curve.points)
        parts.append(f'<g class="{curve.style}">')
        parts.append(f"<title>{cell(curve.label)}: {numbers}</title>")
        at = [(across(x), down(y)) for x, y, _ in curve.points]
        parts += _lines("curve", at)
        for (x, y), (_, value, error) in zip(at, curve.points, strict=True):
            if error:
                ends = f'y1="{down(value - error)}" y2="{down(value + error)}"'
                parts.append(f'<line class="error" x1="{x}" x2="{x}" {ends}/>')
            parts.append(f'<circle cx="{x}" cy="{y}" r="3"/>')
        parts.append("</g>")
    head = f'<svg height="{_TOP + 326}" role="img" aria-label="{cell(about)}">'
    return f"{head}{''.join(parts)}</svg>"


def step_chart(series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]) -> str:
    """Draw fractions (label, colour, points) against the fraction of MACs, the last in words."""
    points = [point for _, _, line in series for point in line]
    lowest = min(y for _, y in points)
    parts, across, down = _plane([p[0] for p in points], lowest, 190, ticks=6, sides=(12, 74))
    for label, colour, line in series:
        at = [(across(x), down(y)) for x, y in line]
        parts += _lines(f"{colour}-line", at)
        parts += [f'<circle class="{colour}-dot" cx="{x}" cy="{y}" r="3.5"/>' for x, y in at]
        place = f'x="{at[-1][0]}" y="{at[-1][1]}" dx="10" dy="4"'
        text = f"{percent(line[-1][1])}<title>{cell(label)}</title>"
        parts.append(f'<text class="value" {place}>{text}</text>')
    about = 'role="img" aria-label="Fractions of images against MACs"'
    return f'<svg height="{_TOP + 216}" {about}>{"".join(parts)}</svg>'


def _plane(
    xs: Iterable[float], lowest: float, height: int, *, ticks: int, sides: tuple[int, int]
) -> tuple[list[str], Callable[[float], str], Callable[[float], str]]:
    """Return a grid, and what places fractions x, falling from left to right, and y on it."""
    shares = sorted(set(xs), reverse=True)
    span = shares[0] - shares[-1]
    low, step = nice_floor(lowest)

    def across(x: float) -> str:
        return f"{sides[0] + sides[1] * (shares[0] - x) / max(span, 1e-9):.2f}%"

    def down(y: float) -> str:
        return f"{_TOP + height * (1 - min(max(y, low), 1.0)) / (1 - low):.1f}"

    parts = []
    for tick in range(round((1 - low) / step) + 1):
        level = down(1 - tick * step)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{level}" y2="{level}"/>')
        parts.append(f'<text x="0" y="{float(level) - 4:.1f}">{percent(1 - tick * step, 0)}</text>')
    for x in spaced(shares, span / ticks):
        place = f'x="{across(x)}" y="{_TOP + height + 18}" text-anchor="middle"'
        parts.append(f"<text {place}>{percent(x, 0)}</text>")
    return parts, across, down


def _lines(style: str, at: Sequence[tuple[str, str]]) -> list[str]:
    return [
        f'<line class="{style}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'
        for (x1, y1), (x2, y2) in pairwise(at)
    ]


def score_panel(
    values: Sequence[float],
    stderr: Sequence[float] | None,
    kept: Sequence[bool] | None,
    scale: tuple[float, float],
) -> str:
    """Draw the scores of one group, sorted, with one standard error up and down, on a log scale.

    At most 48 channels are drawn, evenly spaced over the ranks. Scores below the scale lie on
    its lower end.
    """
    top, bottom = 3.0, 81.0

    def down(value: float) -> float:
        return bottom - _log_place(value, scale, bottom - top)

    order = sorted(range(len(values)), key=lambda channel: values[channel])
    num = min(len(order), MAX_DOTS)
    shown = [order[round(i * (len(order) - 1) / max(num - 1, 1))] for i in range(num)]
    lines = (down(10.0**exponent) for exponent in _decades(scale))
    parts = [f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>' for y in lines]
    dots = []
    for rank, channel in enumerate(shown):
        x, value = f"{3 + 94 * (rank + 0.5) / num:.1f}%", values[channel]
        colour = "kept" if kept is None or kept[channel] else "gone"
        if stderr is not None:
            ends = down(value - stderr[channel]), down(value + stderr[channel])
            parts.append(
                f'<line class="{colour}-bar" x1="{x}" x2="{x}" '
                f'y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            )
        dots.append(f'<circle class="{colour}-dot" cx="{x}" cy="{down(value):.1f}" r="1.6"/>')
    return f'<svg height="84" aria-hidden="true">{"".join(parts + dots)}</svg>'


def scatter_chart(
    points: Sequence[tuple[str, tuple[float, float], tuple[float, float]]], across: str, up: str
) -> str:
    """Draw points with their standard errors and the diagonal, on log scales.

    Points with a value that is not positive have no place there and are left out.
    """
    shown = [p for p in points if p[1][0] > 0 and p[2][0] > 0]
    if not shown:
        raise ValueError("scatter: expected a point with two positive values, found none")
    logs = [math.log10(value) for _, x, y in shown for value in (x[0], y[0])]
    scale = min(logs) - 0.1, max(logs) + 0.1

    def place(value: float) -> float:
        return _log_place(value, scale, _SIDE)

    right, bottom = _LEFT + _SIDE, _ABOVE + _SIDE
    parts = [f'<line class="grid" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{_ABOVE}"/>']
    for exponent in _decades(scale):
        at = place(10.0**exponent)
        x, y, text = _LEFT + at, bottom - at, power_of_ten(exponent)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_ABOVE}" y2="{bottom}"/>')
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
        f'<text transform="rotate(-90)" x="{-(_ABOVE + _SIDE / 2)}" y="14" '
        f'text-anchor="middle">{cell(up)}</text>'
    )
    size = f'width="{right + 10:.0f}" height="{bottom + 46:.0f}"'
    about = f'role="img" aria-label="{cell(up)} against {cell(across)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {about}>{"".join(parts)}</svg>'


def _log_place(value: float, scale: tuple[float, float], length: float) -> float:
    low, high = scale
    exponent = math.log10(value) if value > 0 else low
    return length * (min(max(exponent, low), high) - low) / (high - low)


def _decades(scale: tuple[float, float]) -> range:
    return range(math.ceil(scale[0]), math.floor(scale[1]) + 1)


def scale_of(values: Sequence[float]) -> tuple[float, float] | None:
    """Choose a log scale that holds all but the lowest scores.

    The lowest 2 % do not stretch it, and it spans six decades at most.
    """
    positive = sorted(value for value in values if value > 0)
    if not positive:
        return None
    high = math.log10(positive[-1])
    low = math.log10(positive[len(positive) // 50])
    margin = max(0.04 * (high - low), 0.1)
    return max(low - margin, high - 6), high + margin


def nice_floor(lowest: float) -> tuple[float, float]:
    """Choose a scale of fractions up to 1."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25):
        low = math.floor(lowest / step - 0.2) * step
        if round((1 - low) / step) <= 5 and low >= 0:
            return low, step
    return 0.0, 0.25


def spaced(ticks: Sequence[float], distance: float) -> list[float]:
    """Leave out ticks that would touch others."""
    chosen = list(ticks[:1])
    for tick in ticks[1:-1]:
        if min(chosen[-1] - tick, tick - ticks[-1]) >= distance:
            chosen.append(tick)
    return chosen + list(ticks[1:][-1:])
