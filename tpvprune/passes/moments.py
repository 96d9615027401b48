"""Means and covariances of rows that come in parts, without the difference of two large sums.

E[x^2] - E[x]^2 loses what varies little beside its mean: in float32 nothing is left at a mean of
1,000 deviations. Here every part is centred on its own mean, and two parts together vary as much as
each of them plus what their means are apart: squares are only ever added, so that a variance is
never negative and a covariance never indefinite but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import summed


def in_single(t: Tensor) -> Tensor:
    """Return a floating-point tensor in float32; wider ones, and those that are it, as they are."""
    return t if t.dtype.itemsize >= 4 else t.float()


def centred(rows: Tensor, dim: int, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean along a dimension, in float64, and the rows without it."""
    # Taken twice: sums in float64 would take most of the time of a product of the rows.
    shift = rows.mean(dim, keepdim=True)
    left = rows.sub_(shift) if in_place else rows - shift
    rest = left.mean(dim, keepdim=True)  # what rounding left of the mean
    left -= rest
    return shift.double() + rest.double(), left


class Moments:
    """The moments of rows of n numbers: how many, their mean, and how they vary.

    ``count`` is a number, ``mean`` [n], and ``spread`` the sum over the rows of the squares of
    their deviations from the mean [n], or of the products [n, n] of joint moments; both float64.
    """

    def __init__(
        self, size: int, *, joint: bool = False, device: torch.device | str | None = None
    ) -> None:
        self.count = 0.0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.spread = torch.diag(self.mean) if joint else torch.zeros_like(self.mean)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in rows [num, n]: products in float32 at least, whatever they come in."""
        if not len(rows):
            return
        mean, left = centred(in_single(rows.detach()), 0)
        if self.spread.ndim == 2:
            spread = left.T @ left
        else:
            spread = left.square().sum(0, dtype=torch.float64)
        self.merge(float(len(rows)), mean.squeeze(0), spread)

    def merge(self, count: float, mean: Tensor, spread: Tensor) -> None:
        """Take in the moments of other rows."""
        if not count:
            return
        whole = self.count + count
        apart = mean - self.mean
        _add_square(self.spread.add_(spread), apart, self.count * count / whole)
        self.mean.add_(apart, alpha=count / whole)
        self.count = whole

    def over_processes(self) -> tuple[float, Tensor, Tensor]:
        """Return count, mean and (co)variance of the rows of all processes: two collectives.

        Without a row in any of them the last two are NaN.
        """
        here = torch.tensor(self.count, dtype=torch.float64)
        count, total = summed(here, self.mean * self.count)
        mean = total / count.to(total.device)
        spread = self.spread
        if num_processes() > 1:
            spread = _add_square(spread.clone(), self.mean - mean, self.count)
        (spread,) = summed(spread)
        return float(count), mean, spread / float(count)


def _add_square(spread: Tensor, apart: Tensor, weight: float) -> Tensor:
    """Return ``spread`` with the square of a vector, or its outer product, added in place."""
    if spread.ndim == 2:
        return spread.addr_(apart, apart, alpha=weight)
    return spread.addcmul_(apart, apart, value=weight)
