r"""Least squares through the activation behind a layer.

What counts is not a layer's pre-activation but what the activation lets through: where the dense
network is at -3 and a ReLU follows, -1 is no error. So with phi the activation, z = s y + c the
value that it reads of a pre-activation y (s, c: the BatchNorm between them and a shortcut, if any)
and z* the dense one,

.. math:: \min_{D, b} \; E \| \phi(z + s (x D + b)) - \phi(z^*) \|^2

The linear fit of z* is the start; then what the activations still lack,
:math:`\phi(z^*) - \phi(z)`, is regressed on the inputs, a few times (for a ReLU the targets are
those of the alternation of Zhang et al., Accelerating Very Deep Convolutional Networks, 2016,
section 3.3). Of all steps and three ridges, among them no change at all, those with the least error
on inputs that are held back are taken, and the last of them is repeated with all inputs.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from tpvprune.processes.shares import summed, total
from tpvprune.repairs.least_squares import Fit, Moments, joined, moments, rows_at_once

Activation = Callable[[Tensor], Tensor]

_STEPS = 5  # through the activation, behind the linear fit; the first tries three ridges
_LEAST_GAIN = 1e-3  # of the error, for one step more
_LARGEST_RIDGE = 10.0  # where the linear fit would rather leave the weights
_MOST_MACS = 4e10  # of one step over all rows
_MOST_BYTES = 1 << 29  # of the rows that are held
_ROWS_PER_UNKNOWN = 4
_DEAD = 1e-8


@dataclass
class _Rows:
    """Inputs x [g, n, u], values that phi reads now, and dense ones; at last phi of these."""

    x: Tensor
    present: Tensor
    wanted: Tensor

    def at(self, index: Any) -> _Rows:
        return _Rows(self.x[:, index], self.present[:, index], self.wanted[:, index])


# What a step fits: centred sums of x^T e [g, u, o], and the mean of e [g, 1, o].
_Sought = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _System:
    """Rows of here; over those of all processes the moments of x and (z* - z) / s."""

    rows: list[_Rows]
    moments: Moments
    _factors: dict[float, Tensor] = field(default_factory=dict)

    def __add__(self, other: _System) -> _System:
        return _System([*self.rows, *other.rows], self.moments + other.moments)

    @property
    def linear(self) -> _Sought:
        return self.moments.cross, self.moments.e_mean

    def solved(self, sought: _Sought, ridge: float) -> Fit:
        """Return the ridge least squares fit of what is sought."""
        if ridge not in self._factors:
            self._factors[ridge] = self.moments.factor(ridge)
        cross, mean = sought
        change = torch.cholesky_solve(cross, self._factors[ridge])
        return Fit(change, mean - self.moments.x_mean @ change, ridge)


def rows_to_hold(num_rows: int, groups: int, unknowns: int, outputs: int) -> int:
    """Return how many of the rows of a layer are held for its fit; 0: too few for one."""
    by_macs = _MOST_MACS / (2 * groups * unknowns * outputs)
    by_bytes = _MOST_BYTES / (4 * groups * (unknowns + 2 * outputs))
    found = int(min(num_rows, by_macs, by_bytes))
    return found if found >= _ROWS_PER_UNKNOWN * unknowns else 0


@dataclass
class ActivationFit:
    """The fit of one layer, fed in chunks of rows.

    ``slope``: s, how much of a change of the pre-activation it reads [groups, 1, outputs].
    """

    activation: Activation
    slope: Tensor
    free: bool
    _fit: list[_Rows] = field(default_factory=list)
    _held: list[_Rows] = field(default_factory=list)

    def add(self, x: Tensor, present: Tensor, wanted: Tensor, *, held: bool = False) -> None:
        """Take in rows, which are overwritten.

        ``x``: [groups, rows, unknowns]. ``present``: what the activation reads with the present
        weights [groups, rows, outputs]. ``held``: whether they only judge.
        """
        (self._held if held else self._fit).append(_Rows(x, present, wanted))

    def improved(
        self,
        linear: Fit,
        *,
        given: bool = False,
        known: tuple[Moments, Moments] | None = None,
    ) -> Fit:
        """Return the step through the activation, from the linear fit, that is best on held rows.

        Without such rows that is the linear fit. ``given``: its ridge is the one to take.
        ``known``: moments of x and of what the linear fit is to (``LeastSquares.folds``), where
        that was fed the same rows.
        """
        if not total(sum(r.x.shape[1] for r in self._held)):
            return linear
        ridge = min(linear.ridge, _LARGEST_RIDGE)
        origin, problem, held = self._systems(known)
        here, before = problem.solved(problem.linear, ridge), None
        least = self._loss(here)
        ridges = (ridge,) if given else (ridge, 10 * ridge, ridge / 10)
        for _ in range(_STEPS):
            sought = self._sought(problem, here)
            steps = [problem.solved(sought, r) for r in ridges]
            losses = list(map(self._loss, steps))
            loss = min(losses)
            best = steps[losses.index(loss)]
            gain = 1 - loss / least if least else 0.0
            if gain > 0:
                ridge, least, before = best.ridge, loss, here
            if not gain >= _LEAST_GAIN:
                break
            here, ridges = best, (best.ridge,)
        none = Fit(torch.zeros_like(here.change), torch.zeros_like(here.intercept), ridge)
        if self._loss(none) <= least:
            return none
        both = problem + held
        found = both.solved(both.linear if before is None else self._sought(both, before), ridge)
        return Fit(found.change, found.intercept - origin @ found.change, ridge)

    def _systems(self, known: tuple[Moments, Moments] | None) -> tuple[Tensor, _System, _System]:
        """Return where x is taken from [g, 1, u], and the rows to fit and those held back.

        From now on x is what it is beyond there, and ``wanted`` phi of the dense values.
        """
        folds = (self._fit, self._held) = _in_blocks(self._fit), _in_blocks(self._held)
        found = list(map(self._without_dead, known)) if known else list(map(self._moments, folds))
        # Rounded once: a difference of float64 and float32 takes ten times as long.
        rounded = found[0].x_mean.to(self._fit[0].x)
        origin = rounded.to(found[0].x_mean)
        for r in (part for rows in folds for part in rows):
            r.x.sub_(rounded)
            r.wanted = self.activation(r.wanted)
        fit, held = (
            _System(rows, replace(m, x_mean=m.x_mean - origin))
            for rows, m in zip(folds, found, strict=True)
        )
        return origin, fit, held

    def _moments(self, rows: list[_Rows]) -> Moments:
        """Return the moments of x and (z* - z) / s over the rows of all processes."""
        found = (
            moments(r.x, self._per_slope(r.wanted - r.present))
            for whole in rows
            for r in _parts(whole)
        )
        summed_up = functools.reduce(operator.add, found).over_all()
        return summed_up if self.free else summed_up.uncentred()

    def _without_dead(self, m: Moments) -> Moments:
        """Return moments in which outputs that are scaled to nothing ask for no change."""
        dead = self.slope.abs() < _DEAD
        cross, mean = m.cross.masked_fill(dead, 0.0), m.e_mean.masked_fill(dead, 0.0)
        return replace(m, cross=cross, e_mean=mean)

    def _per_slope(self, values: Tensor) -> Tensor:
        """Return changes of what is read as changes of the pre-activation."""
        dead = self.slope.abs() < _DEAD
        return (values / torch.where(dead, 1.0, self.slope)).masked_fill_(dead, 0.0)

    def _sought(self, problem: _System, here: Fit) -> _Sought:
        """Return what to fit next: what the present step gives, and what phi still lacks."""
        m = problem.moments
        products, lacks = self._lacking(problem.rows, here)
        cross = m.gram @ here.change + products - m.x_mean.mT @ lacks
        mean = m.x_mean @ here.change + here.intercept
        return cross, mean + lacks / m.count if self.free else mean

    def _lacking(self, rows: Iterable[_Rows], here: Fit) -> tuple[Tensor, Tensor]:
        """Return the sums of x^T e [g, u, o] and of e [g, 1, o], e = (phi(z*) - phi(z)) / s."""
        sums: list[Any] = [0.0, 0.0]
        for r in (part for whole in rows for part in _parts(whole)):
            error = r.wanted - self.activation(self._moved(r, here))
            sums[0] = sums[0] + (error.mT @ r.x).mT.double()
            sums[1] = sums[1] + error.sum(1, keepdim=True).double()
        products, lacks = map(self._per_slope, summed(*sums))
        return products, lacks

    def _loss(self, here: Fit) -> float:
        """Return the squared error on the rows held back; infinite where it is not finite."""
        errors = (
            self.activation(self._moved(r, here)) - r.wanted
            for rows in self._held
            for r in _parts(rows)
        )
        parts = (error.square_().sum(1).double().sum() for error in errors)
        loss = float(summed(functools.reduce(torch.add, parts))[0])
        return loss if math.isfinite(loss) else math.inf

    def _moved(self, rows: _Rows, here: Fit) -> Tensor:
        """Return what the activation reads with changed weights."""
        x, change, intercept = rows.x, here.change.to(rows.x), here.intercept.to(rows.x)
        if change.shape[2] == 1:  # the other way round x D takes three times as long
            moved = (change.mT @ x.mT).mT.add_(intercept)
        else:
            moved = torch.baddbmm(intercept, x, change)
        return torch.addcmul(rows.present, moved, self.slope.to(x))


def _in_blocks(parts: list[_Rows]) -> list[_Rows]:
    """Return the same rows in fewer parts: of few rows most of the time is overhead."""
    blocks: list[_Rows] = []
    taken: list[_Rows] = []
    while parts:
        taken.append(parts.pop(0))
        if not parts or sum(r.x.shape[1] for r in taken) >= rows_at_once(taken[0].x):
            whole = (joined([getattr(r, f.name) for r in taken]) for f in fields(_Rows))
            blocks.append(_Rows(*whole))
            taken = []
    return blocks


def _parts(rows: _Rows) -> Iterator[_Rows]:
    """Yield a few rows at a time: what is computed from them is as large as they are."""
    num = rows_at_once(rows.x)
    for start in range(0, max(1, rows.x.shape[1]), num):
        yield rows.at(slice(start, start + num))
