"""Statistics over networks, their bootstrap intervals, and what becomes of a threshold.

An interval is the percentile bootstrap's at 95 %: the statistic of 1,000 sets that are drawn anew
with replacement, of all networks, or, where a statistic compares ways of training, of the seeds
within each way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tpvprune.diagnostics.ablation import spearman
from tpvprune.diagnostics.normalized_loss import fit_line

Row = dict[str, Any]
Statistic = Callable[[Sequence[Row]], float]

HELD, NOT_HELD, UNDECIDED = "held", "not held", "undecided"
NUM_DRAWS = 1000


class Interval(NamedTuple):
    """A figure and its interval at 95 %: infinite where nothing can be said."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not math.isfinite(self.high - self.low):
            return f"{self.value:+.2f} (no interval)"
        digits = 2 if self.high - self.low >= 0.02 else 4
        value, low, high = (f"{number:+.{digits}f}" for number in self)
        return f"{value} ({low} to {high})"


class Bound(NamedTuple):
    """A figure, and where it must lie."""

    what: str
    figure: Interval
    least: float = -math.inf
    most: float = math.inf

    @property
    def needs(self) -> str:
        """The threshold in words."""
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{self.what} {self.least:g} to {self.most:g}"
        is_least = math.isfinite(self.least)
        return f"{self.what} {f'≥ {self.least:g}' if is_least else f'≤ {self.most:g}'}"

    @property
    def verdict(self) -> str:
        """Undecided where the interval crosses the threshold."""
        if self.figure.high < self.least or self.figure.low > self.most:
            return NOT_HELD
        inside = self.least <= self.figure.low and self.figure.high <= self.most
        return HELD if inside else UNDECIDED


def verdict(bounds: Sequence[Bound]) -> str:
    """Return what becomes of a claim that needs all of its bounds."""
    found = {bound.verdict for bound in bounds}
    if NOT_HELD in found:
        return NOT_HELD
    return HELD if found == {HELD} else UNDECIDED


def bootstrap(
    rows: Sequence[Row],
    statistic: Statistic,
    *,
    within: Sequence[str] = (),
    num_draws: int | None = None,
) -> Interval:
    """Return a statistic with its interval.

    Args:
        rows: One for each network.
        statistic: Of such rows.
        within: Columns that say how a network was trained; networks are then drawn among those
            that agree in all of them, which differ in their seeds.
        num_draws: Sets that are drawn; None: ``NUM_DRAWS``.

    Returns:
        The interval; infinite with fewer than three networks, or two in any way of training.
    """
    cells: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cells[tuple(row[name] for name in within)].append(row)
    num_draws, value = num_draws or NUM_DRAWS, _of(statistic, rows)
    if min(map(len, cells.values()), default=0) < (2 if within else 3):
        return Interval(value, -math.inf, math.inf)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(num_draws):
        drawn = []
        for cell in cells.values():
            places = torch.randint(len(cell), (len(cell),), generator=generator)
            drawn += [cell[i] for i in places.tolist()]
        found.append(_of(statistic, drawn))
    known = sorted(v for v in found if math.isfinite(v))
    if len(known) < num_draws / 2:
        return Interval(value, -math.inf, math.inf)
    ends = (round(q * (len(known) - 1)) for q in (0.025, 0.975))
    low, high = (known[end] for end in ends)
    return Interval(value, low, high)


def _of(statistic: Statistic, rows: Sequence[Row]) -> float:
    try:
        return float(statistic(rows))
    except (ValueError, ZeroDivisionError):  # a set in which nothing varies, or too little is left
        return math.nan


def column(rows: Sequence[Row], key: str) -> list[float]:
    """Return one measure of all networks."""
    return [float(row[key]) for row in rows]


def rank(x: str, y: str) -> Statistic:
    """Return the rank correlation of two measures, as a statistic."""
    return lambda rows: spearman(torch.tensor(column(rows, x)), torch.tensor(column(rows, y)))


def exponent(rows: Sequence[Row], key: str) -> float:
    """Return b of value ~ n^b over training sets of n images."""
    x, y = ([math.log(v) for v in column(rows, k)] for k in ("num_train", key))
    return fit_line(x, y).slope


def quantile(ratio: Callable[[Row], float], q: float) -> Statistic:
    """Return a quantile of a number per network, as a statistic."""
    return lambda rows: torch.tensor([ratio(row) for row in rows]).double().quantile(q).item()
