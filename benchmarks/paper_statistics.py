"""Statistics over networks, their bootstrap intervals, and what becomes of a threshold.

An interval is the bootstrap's at 95 %: the statistic of 1,000 sets that are drawn anew with
replacement. What is drawn are configurations, each with all of its seeds, as seeds of one
configuration are alike; where a statistic compares ways of training, the seeds within each way.

Draws repeat networks, and repeated networks are ties, which move a rank correlation: so draws have
a bias of their own, and all of them may lie on one side of the figure. The interval reaches over
their quantiles as they are, and less their median bias, figure + (quantile - median); the latter
contain the figure.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from paper_models import Way

from tpvprune.diagnostics.ablation import spearman
from tpvprune.diagnostics.normalized_loss import fit_line

Row = dict[str, Any]
Statistic = Callable[[Sequence[Row]], float]

HELD, NOT_HELD, UNDECIDED = "held", "not held", "undecided"
NUM_DRAWS = 1000
CORRELATION = (-1.0, 1.0)  # what a rank correlation can be
_OF_NETWORK = ("images", *(field.name for field in fields(Way) if field.name != "set"))
_OF_CONFIGURATION = tuple(name for name in _OF_NETWORK if name != "seed")


def network(row: Row) -> Hashable:
    """Return which network a row is of: it may be in several sets."""
    return tuple(row[name] for name in _OF_NETWORK)


def configuration(row: Row) -> Hashable:
    """Return how a network was trained, but for its seed."""
    return tuple(row[name] for name in _OF_CONFIGURATION)


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Return the first row of every network."""
    found: dict[Hashable, Row] = {}
    for row in rows:
        found.setdefault(network(row), row)
    return list(found.values())


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
    unit: Callable[[Row], Hashable] = configuration,
    within: Sequence[str] = (),
    reach: tuple[float, float] = (-math.inf, math.inf),
    num_draws: int | None = None,
) -> Interval:
    """Return a statistic with its interval.

    Args:
        rows: One for each network.
        statistic: Of such rows.
        unit: What a row belongs to; the rows of a unit are drawn together.
        within: Columns that say how a network was trained; units are then drawn among the rows
            that agree in all of them.
        reach: What the statistic can be at all; rounding errors beyond are cut off.
        num_draws: Sets that are drawn; None: ``NUM_DRAWS``.

    Returns:
        The interval; infinite with fewer than three units, or two in any way of training.
    """
    cells: dict[Hashable, dict[Hashable, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[tuple(row[name] for name in within)][unit(row)].append(row)
    num_draws = num_draws or NUM_DRAWS
    value = min(max(_of(statistic, rows), reach[0]), reach[1])
    if min(map(len, cells.values()), default=0) < (2 if within else 3):
        return Interval(value, -math.inf, math.inf)
    choices = [list(cell.values()) for cell in cells.values()]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(num_draws):
        drawn: list[Row] = []
        for units in choices:
            places = torch.randint(len(units), (len(units),), generator=generator)
            drawn += [row for i in places.tolist() for row in units[i]]
        found.append(_of(statistic, drawn))
    known = sorted(v for v in found if math.isfinite(v))
    if len(known) < num_draws / 2:
        return Interval(value, -math.inf, math.inf)
    ends = [known[round(q * (len(known) - 1))] for q in (0.025, 0.975)]
    shifted = [value + (end - statistics.median(known)) for end in ends]
    low, high = min(ends[0], shifted[0]), max(ends[1], shifted[1])
    return Interval(value, max(low, reach[0]), min(high, reach[1]))


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


def correlation(rows: Sequence[Row], x: str, y: str, **how: Any) -> Interval:
    """Return the rank correlation of two measures with its interval."""
    return bootstrap(rows, rank(x, y), reach=CORRELATION, **how)


def exponent(rows: Sequence[Row], key: str) -> float:
    """Return b of value ~ n^b over training sets of n images."""
    x, y = ([math.log(v) for v in column(rows, k)] for k in ("num_train", key))
    return fit_line(x, y).slope


def quantile(ratio: Callable[[Row], float], q: float) -> Statistic:
    """Return a quantile of a number per network, as a statistic."""
    return lambda rows: torch.tensor([ratio(row) for row in rows]).double().quantile(q).item()
