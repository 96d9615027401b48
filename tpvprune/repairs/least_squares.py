r"""Ridge least squares in chunks, the ridge chosen on rows that took no part in the fit.

.. math:: \min_{D, b} \; E \| x D + b - e \|^2 + \lambda s \| D \|^2

with s the mean variance of x. Too few rows make a small ridge fit noise: with n rows and u
unknowns the error on other rows is about (1 + u / n) / (1 - u / n) times that on these. So a part
of the rows is held back, and of several lambda, among them infinity (D = 0), the one with the least
error on those is taken, as far as going downhill finds it; then all rows are fitted with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvprune.passes.moments import centred, in_single
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import gathered, summed

RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, math.inf)
FIXED_RIDGE = 1e-3  # where no rows are held back to choose it

_ROWS_AT_ONCE, _NUMBERS_AT_ONCE = 4096, 1 << 22


@dataclass(frozen=True)
class Fit:
    """Change D [groups, unknowns, outputs], intercept b [groups, 1, outputs], and the ridge."""

    change: Tensor
    intercept: Tensor
    ridge: float


@dataclass(frozen=True)
class Moments:
    """Count, means, and centred second moments (sums) of x [g, n, u] and e [g, n, o]."""

    count: float
    x_mean: Tensor
    e_mean: Tensor
    gram: Tensor
    cross: Tensor
    square: Tensor

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows together (Chan, Golub and LeVeque 1983)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        dx, de = other.x_mean - self.x_mean, other.e_mean - self.e_mean
        part = other.count / count
        weight = self.count * part
        return Moments(
            count,
            self.x_mean + part * dx,
            self.e_mean + part * de,
            self.gram + other.gram + weight * (dx.mT @ dx),
            self.cross + other.cross + weight * (dx.mT @ de),
            self.square + other.square + weight * de.square().sum((1, 2)),
        )

    def uncentred(self) -> Moments:
        """Return the moments about zero: what a fit without an intercept sees."""
        zeros = torch.zeros_like(self.x_mean), torch.zeros_like(self.e_mean)
        sums = self._sums(self.x_mean, self.e_mean)
        return Moments(self.count, *zeros, *sums) if self.count else self

    def over_all(self) -> Moments:
        """Return those of the rows of all processes."""
        if num_processes() == 1:
            return self
        here = torch.tensor(float(self.count), dtype=torch.float64)
        count, x_sum, e_sum = summed(here, self.count * self.x_mean, self.count * self.e_mean)
        x_mean, e_mean = (t / max(float(count), 1.0) for t in (x_sum, e_sum))
        sums = summed(*self._sums(self.x_mean - x_mean, self.e_mean - e_mean))
        return Moments(float(count), x_mean, e_mean, *sums)

    def _sums(self, dx: Tensor, de: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums about points from which the means are so far."""
        return (
            self.gram + self.count * (dx.mT @ dx),
            self.cross + self.count * (dx.mT @ de),
            self.square + self.count * de.square().sum((1, 2)),
        )

    def factor(self, ridge: float) -> Tensor:
        """Return the Cholesky factor of the system; a ridge too small for the rounding grows."""
        least = 1e-12 * max(self.count, 1.0)
        scale = self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(least)
        return factorised(self.gram, ridge * scale)


def moments(x: Tensor, e: Tensor, *, in_place: bool = False) -> Moments:
    """Return the moments of some rows.

    ``x``: inputs [groups, rows, unknowns]. ``e``: what is fitted [groups, rows, outputs].
    Both are centred, ``in_place`` where they are nobody else's, before any product, which is taken
    in float32 or better.
    """
    num = float(x.shape[1])
    if not num:
        x_mean, e_mean = (t.sum(1, keepdim=True) for t in (x.double(), e.double()))
    else:
        (x_mean, x), (e_mean, e) = (centred(in_single(t), 1, in_place=in_place) for t in (x, e))
    squares = e.square().sum((1, 2), dtype=torch.float64)
    cross = (e.mT @ x).mT  # the other way round, x^T e of one column takes six times as long
    return Moments(num, x_mean, e_mean, (x.mT @ x).double(), cross.double(), squares)


def rows_at_once(x: Tensor) -> int:
    """Return how many rows of x [g, n, u] to multiply at once.

    Of few most of the time is overhead; many leave the caches.
    """
    return max(1, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // (len(x) * max(1, x.shape[2]))))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts [g, n, u] in memory of their own.

    Of several groups, which have few unknowns each, those of an unknown lie side by side: products
    of rows that do not take many times as long.
    """
    if len(parts[0]) == 1:
        return torch.cat(list(parts), 1)
    return torch.cat([part.mT for part in parts], 2).mT


class LeastSquares:
    """One problem, fed in chunks of rows.

    ``few_rows``: whether all rows together are fewer than the unknowns: they are then kept, and the
    system is that of the rows, not of the unknowns.
    """

    def __init__(self, *, free: bool, few_rows: bool = False) -> None:
        self._free, self._few = free, few_rows
        self._folds: list[Moments | None] = [None, None]
        self._rows: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])

    def add(self, x: Tensor, e: Tensor, *, held: bool = False) -> None:
        """Take in rows.

        ``x``: [groups, rows, unknowns]. ``e``: [groups, rows, outputs]. ``held``: whether they only
        judge the ridge.
        """
        rows = self._rows[held]
        rows.append((x, e))
        if not self._few and _count(rows) >= max(rows_at_once(x), x.shape[2]):
            self._flush(held)

    def _taken(self, *folds: int) -> tuple[Tensor, Tensor]:
        parts = [part for fold in folds for part in self._rows[fold]]
        for fold in folds:
            self._rows[fold].clear()
        x, e = map(joined, zip(*parts, strict=True))
        return x, e

    def _flush(self, fold: int) -> None:
        if not self._rows[fold]:
            return
        found, known = moments(*self._taken(fold), in_place=True), self._folds[fold]
        self._folds[fold] = found if known is None else known + found

    def solve(self, ridge: float | None = None) -> Fit:
        """Return the fit; ``ridge``: lambda; None: chosen on the rows held back."""
        if self._few:
            return self._by_rows(ridge)
        fit, held = self.folds()
        both = fit + held
        if ridge is None:
            ridge = FIXED_RIDGE
            if held.count and fit.count:
                ridge = _best(lambda r: _held_loss(_change(fit, r), fit, held))
        change = _change(both, ridge)
        return Fit(change, both.e_mean - both.x_mean @ change, ridge)

    def folds(self) -> tuple[Moments, Moments]:
        """Return the moments of the rows to fit and of those held back, of all processes."""
        for fold in range(2):
            self._flush(fold)
        found = [m.over_all() for m in self._folds if m is not None]
        fit, held = found if self._free else [m.uncentred() for m in found]
        return fit, held

    def _by_rows(self, ridge: float | None) -> Fit:
        num_held = _count(self._rows[1])
        x, e = self._taken(0, 1)
        held = torch.arange(x.shape[1]) >= x.shape[1] - num_held
        if num_processes() > 1:
            ((x, e, held),) = gathered([(x.transpose(0, 1), e.transpose(0, 1), held)])
            x, e = x.transpose(0, 1), e.transpose(0, 1)
        x, e = in_single(x), in_single(e)
        if ridge is None:
            ridge = FIXED_RIDGE
            if bool(held.any()) and not bool(held.all()):
                ridge = self._chosen_by_rows(x[:, ~held], e[:, ~held], x[:, held], e[:, held])
        x_mean, e_mean, x, e = self._centred(x, e)
        kernel = (x @ x.mT).double()
        change = x.double().mT @ _dual(kernel, e.double(), x.shape[2], ridge)
        return Fit(change, e_mean - x_mean @ change, ridge)

    def _chosen_by_rows(self, x: Tensor, e: Tensor, x_held: Tensor, e_held: Tensor) -> float:
        x_mean, e_mean, x, e = self._centred(x, e)
        across = ((x_held - x_mean.to(x)) @ x.mT).double()
        kernel, left = (x @ x.mT).double(), e_held.double() - e_mean

        def loss(ridge: float) -> float:
            dual = _dual(kernel, e.double(), x.shape[2], ridge)
            return float((left - across @ dual).square().sum())

        return _best(loss)

    def _centred(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        means = (t.mean(1, keepdim=True, dtype=torch.float64) for t in (x, e))
        x_mean, e_mean = means if self._free else map(torch.zeros_like, means)
        return x_mean, e_mean, x - x_mean.to(x), e - e_mean.to(e)


def _count(rows: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(x.shape[1] for x, _ in rows)


def _best(loss: Callable[[float], float]) -> float:
    """Return the ridge of the least loss, from the middle of them downhill: it has one valley."""
    known: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in known:
            known[i] = loss(RIDGES[i]) if 0 <= i < len(RIDGES) else math.inf
        return known[i]

    best = len(RIDGES) // 2
    for step in (-1, 1):
        while at(best + step) < at(best):
            best += step
    return RIDGES[best]


def _change(m: Moments, ridge: float) -> Tensor:
    """Return D [g, u, o]."""
    if math.isinf(ridge):
        return torch.zeros_like(m.cross)
    return torch.cholesky_solve(m.cross, m.factor(ridge))


def factorised(gram: Tensor, ridge: Tensor) -> Tensor:
    """Return the lower Cholesky factor of gram + ridge I [g, u, u], with a ridge [g] that grows.

    It does until the factor exists, which is NaN where the matrix is not finite.
    """
    finite = gram.isfinite().flatten(1).all(1)
    least = 1e-14 * gram.diagonal(dim1=1, dim2=2).mean(1).abs() + 1e-300
    for _ in range(16):
        damped = gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        factor, failed = torch.linalg.cholesky_ex(damped)
        singular = (failed > 0) & finite
        if not bool(singular.any()):
            return factor.masked_fill_(~finite[:, None, None], torch.nan)
        ridge = torch.where(singular, torch.maximum(10 * ridge, least), ridge)
    return torch.full_like(gram, torch.nan)


def _dual(kernel: Tensor, e: Tensor, unknowns: int, ridge: float) -> Tensor:
    """Return A [g, rows, o] with D = x^T A."""
    if math.isinf(ridge):
        return torch.zeros_like(e)
    trace = kernel.diagonal(dim1=1, dim2=2).sum(1)
    scale = (trace / unknowns).clamp_min(1e-12 * max(e.shape[1], 1))
    return torch.cholesky_solve(e, factorised(kernel, ridge * scale))


def _held_loss(change: Tensor, fit: Moments, held: Moments) -> float:
    """Return the squared error on the rows held back."""
    moved = held.gram @ change
    bias = (held.e_mean - fit.e_mean) - (held.x_mean - fit.x_mean) @ change
    parts = [(change * moved).sum(), -2 * (change * held.cross).sum(), held.square.sum()]
    return float(sum(parts)) + held.count * float(bias.square().sum())
