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
on inputs that are held back are taken, and the path up to there is repeated with all of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpvprune.processes.shares import summed, total
from tpvprune.repairs.least_squares import Fit, factorised

Activation = Callable[[Tensor], Tensor]

_STEPS = 6  # the linear fit, and so many less one through the activation
_FIRST_STEPS = 2  # with three ridges; the rest with the best of them
_LARGEST_RIDGE = 10.0  # where the linear fit would rather leave the weights
_MOST_MACS = 4e10  # of one step over all rows
_MOST_BYTES = 1 << 29  # of the rows that are held
_ROWS_PER_UNKNOWN = 4
_ROWS_AT_ONCE = 4096
_DEAD = 1e-8


@dataclass
class _Rows:
    """Inputs x [g, n, u], values now and wanted [g, n, o]."""

    x: Tensor
    present: Tensor
    wanted: Tensor

    def at(self, index: Any) -> _Rows:
        return _Rows(self.x[:, index], self.present[:, index], self.wanted[:, index])


@dataclass(frozen=True)
class _System:
    """Rows, how many in all processes, their mean [g, 1, u] and their Gram matrix [g, u, u]."""

    rows: list[_Rows]
    num: float
    mean: Tensor
    gram: Tensor

    @classmethod
    def of(cls, rows: list[_Rows], *, free: bool) -> _System:
        num = total(sum(r.x.shape[1] for r in rows))
        mean = _summed(r.x.sum(1, keepdim=True, dtype=torch.float64) for r in rows) / num
        mean = mean if free else torch.zeros_like(mean)
        gram = _summed(_cross(x, x, mean) for r in rows for x in r.x.split(_ROWS_AT_ONCE, 1))
        return cls(rows, num, mean, gram)


def rows_to_hold(num_rows: int, groups: int, unknowns: int, outputs: int) -> int:
    """Return how many of the rows of a layer are held for its fit; 0: too few for one.

    Args:
        num_rows: Rows that there are.
        groups: Of the layer.
        unknowns: Inputs of one output.
        outputs: Of one group.

    Returns:
        A number up to ``num_rows``.
    """
    by_macs = _MOST_MACS / (2 * groups * unknowns * outputs)
    by_bytes = _MOST_BYTES / (4 * groups * (unknowns + 2 * outputs))
    found = int(min(num_rows, by_macs, by_bytes))
    return found if found >= _ROWS_PER_UNKNOWN * unknowns else 0


@dataclass
class ActivationFit:
    """The fit of one layer, fed in chunks of rows.

    Args:
        activation: phi, element by element.
        slope: s, how much of a change of the pre-activation it reads [groups, 1, outputs].
        free: Whether there is an intercept.
    """

    activation: Activation
    slope: Tensor
    free: bool
    _fit: list[_Rows] = field(default_factory=list)
    _held: list[_Rows] = field(default_factory=list)

    def add(self, x: Tensor, present: Tensor, wanted: Tensor, held: Tensor) -> None:
        """Take in rows.

        Args:
            x: [groups, rows, unknowns].
            present: What the activation reads with the present weights [groups, rows, outputs].
            wanted: What it reads in the dense network, likewise.
            held: Which rows only judge [rows].
        """
        rows, held = _Rows(x, present, wanted), held.to(x.device)
        self._fit.append(rows.at(~held))
        self._held.append(rows.at(held))

    def improved(self, linear: Fit, *, given: bool = False) -> Fit:
        """Return the fit through the activation, from the ridge of the linear one.

        Args:
            linear: Of the same layer.
            given: Whether its ridge was asked for: then no other is tried.

        Returns:
            The step that is best on the rows held back; the linear fit where none are.
        """
        if not total(sum(r.x.shape[1] for r in self._held)):
            return linear
        ridge = min(linear.ridge, _LARGEST_RIDGE)
        problem = _System.of(self._fit, free=self.free)
        ridges = (ridge,) if given else (ridge, 10 * ridge, ridge / 10)
        paths = {r: self._path(problem, r) for r in ridges}
        tried = {r: self._judged(path, _FIRST_STEPS) for r, path in paths.items()}
        ridge = min(tried, key=lambda r: min(tried[r]))
        losses = [*tried[ridge], *self._judged(paths[ridge], _STEPS - _FIRST_STEPS)]
        best = min(range(len(losses)), key=losses.__getitem__)
        groups, _, unknowns = self._fit[0].x.shape
        zero = linear.change.new_zeros(groups, unknowns, self.slope.shape[2])
        if self._loss(zero, zero[:, :1]) <= losses[best]:
            return Fit(zero, zero[:, :1].clone(), ridge)
        whole = self._path(_System.of([*self._fit, *self._held], free=self.free), ridge)
        return Fit(*next(itertools.islice(whole, best, None)), ridge)

    def _judged(self, path: Iterator[tuple[Tensor, Tensor]], steps: int) -> list[float]:
        """Return the errors after the next steps of a path, on the rows held back."""
        return [self._loss(*step) for step in itertools.islice(path, steps)]

    def _path(self, problem: _System, ridge: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (D [g, u, o], b [g, 1, o]) after each step."""
        scale = problem.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12 * problem.num)
        factor = factorised(problem.gram, ridge * scale)
        change: Tensor | None = None
        intercept: Tensor | None = None
        while True:
            cross, error_sum = self._sums(problem, change, intercept)
            change = torch.cholesky_solve(cross, factor)
            intercept = torch.zeros_like(error_sum)
            if self.free:
                intercept = error_sum / problem.num - problem.mean @ change
            yield change, intercept

    def _sums(
        self, problem: _System, change: Tensor | None, intercept: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the sums of x^T e [g, u, o] and of e [g, 1, o].

        e is what the pre-activation should change by; x is taken from its mean.
        """
        phi, dead = self.activation, self.slope.abs() < _DEAD
        slope = torch.where(dead, 1.0, self.slope)
        sums: list[Any] = [0.0, 0.0]
        for r in (part for whole in problem.rows for part in _parts(whole)):
            wanted = r.wanted
            if change is not None and intercept is not None:
                now = self._moved(r, change, intercept)
                wanted = now + phi(wanted.clone()) - phi(now.clone())
            error = ((wanted - r.present) / slope).masked_fill_(dead, 0.0)
            sums[0] = sums[0] + _cross(r.x, error, problem.mean)
            sums[1] = sums[1] + error.sum(1, keepdim=True, dtype=torch.float64)
        return summed(*sums)

    def _loss(self, change: Tensor, intercept: Tensor) -> float:
        """Return the squared error on the rows held back; infinite where it is not finite."""
        phi = self.activation
        errors = (
            phi(self._moved(r, change, intercept)) - phi(r.wanted.clone())
            for rows in self._held
            for r in _parts(rows)
        )
        loss = float(_summed(error.square().sum(dtype=torch.float64) for error in errors))
        return loss if math.isfinite(loss) else math.inf

    def _moved(self, rows: _Rows, change: Tensor, intercept: Tensor) -> Tensor:
        """Return what the activation reads with changed weights."""
        x = rows.x
        return rows.present + self.slope * torch.baddbmm(intercept.to(x), x, change.to(x))


def _cross(x: Tensor, error: Tensor, mean: Tensor) -> Tensor:
    other = error - mean.to(error) if error is x else error
    return ((x - mean.to(x)).mT @ other).double()


def _summed(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum over all parts of all processes."""
    return summed(functools.reduce(torch.add, parts))[0]


def _parts(rows: _Rows) -> Iterator[_Rows]:
    """Yield a few rows at a time: what is computed from them is as large as they are."""
    for start in range(0, max(1, rows.x.shape[1]), _ROWS_AT_ONCE):
        yield rows.at(slice(start, start + _ROWS_AT_ONCE))
