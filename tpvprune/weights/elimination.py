"""The order in which the weights of a layer leave while the others take over.

Weights that leave together are not the sum of weights that leave alone: what stood in for one may
itself be gone. So the weights of a row leave in rounds, and after each those that stay are refitted
exactly: with H the second moments of the layer's inputs (plus ridge) and K what stays,

    w_K = H_KK^-1 (H w)_K,    cost_j = E[delta_o^2] w_j^2 / [H_KK^-1]_jj,

optimal brain surgeon (Hassibi & Stork, NIPS 1992) with the TPV of the row's output in front, which
makes the rows of one layer comparable. Where rows are too long for that, columns are swept once
from left to right, as by Frantar & Alistarh (SparseGPT, ICML 2023,
https://arxiv.org/abs/2301.00774, algorithm 1), once for every density.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvprune.weights.masks import highest
from tpvprune.weights.repair import inverse_factor, row_factors

_EXACT = 2e10  # multiplications of one round up to which rows are solved one by one
_BLOCK = 128  # columns between two updates of all that follow
_ROUNDS_PER_NEIGHBOUR = 4


@dataclass(frozen=True)
class Path:
    """One layer as it gets sparser, [steps, *shape of the weight]; the first step is dense.

    ``masks`` are True where a weight stays; ``changes`` is what compensated removal adds to the
    weights.
    """

    masks: Tensor
    changes: Tensor

    def densities(self) -> Tensor:
        """Return the fraction of weights that stays at each step, float64."""
        return self.masks.flatten(1).double().mean(1)


def elimination_path(
    weight: Tensor,
    gram: Tensor,
    sensitivity: Tensor,
    *,
    num_steps: int = 16,
    pattern: tuple[int, int] | None = None,
    ridge: float = 1e-2,
) -> Path:
    """Let the weights of one layer leave in the order of what their leaving costs.

    ``weight``: [out, in per group, ...]. ``gram``: E[x x^T] of its inputs [groups, unknowns,
    unknowns]. ``sensitivity``: E[delta^2] of its outputs [out]. ``num_steps``: densities 1, 1 -
    1/num_steps, ... 1/num_steps; with a pattern (n, m) the path ends there, in steps of its own.
    """
    groups, unknowns = gram.shape[:2]
    start = weight.detach().reshape(groups, -1, unknowns).float()
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(unknowns, dtype=gram.dtype, device=gram.device)
    curvature = (gram + ridge * mean.clamp_min(1e-30) * eye).float()
    costs = sensitivity.reshape(groups, -1, 1).float()
    layout = _Layout(start.shape, weight.shape[1], pattern)
    exact = costs.numel() * unknowns**3 / 3 <= _EXACT
    walk = _rounds if exact else _sweeps
    steps = list(walk(start, curvature, costs, layout, layout.targets(num_steps)))
    masks, fitted = (torch.stack(parts) for parts in zip(*steps, strict=True))
    changes = (fitted - start).reshape(len(steps), *weight.shape)
    return Path(masks.reshape(len(steps), *weight.shape), changes.to(weight.dtype))


@dataclass(frozen=True)
class _Layout:
    """How the weights of a layer [groups, rows, unknowns] are ranked: all, or by neighbours."""

    shape: torch.Size
    channels: int
    pattern: tuple[int, int] | None

    def targets(self, num_steps: int) -> list[float]:
        """Return the densities after each round."""
        if self.pattern is None:
            return [1 - step / num_steps for step in range(1, num_steps)]
        n, m = self.pattern
        rounds = _ROUNDS_PER_NEIGHBOUR * (m - n)
        return [1 - (1 - n / m) * step / rounds for step in range(1, rounds + 1)]

    def order(self) -> Tensor:
        """Return the unknowns in the order that makes neighbours adjacent."""
        unknowns = self.shape[2]
        return torch.arange(unknowns).reshape(self.channels, -1).T.reshape(-1)

    def leave(self, cost: Tensor, mask: Tensor, density: float) -> Tensor:
        """Return the mask after the cheapest have left, down to the density."""
        cost = cost.masked_fill(~mask, torch.inf)
        num = int(mask.sum()) - max(1, round(density * mask.numel()))
        if self.pattern is None:
            gone = cost.flatten().topk(max(0, num), largest=False).indices
        else:
            gone = self._neighbours(cost, mask, num, density)
        left = mask.flatten().clone()
        left[gone] = False
        return left.reshape(mask.shape)

    def _neighbours(self, cost: Tensor, mask: Tensor, num: int, density: float) -> Tensor:
        # One of every m neighbours leaves, then a second one of each, and so on: else some would
        # have to give several at the end, unweighed.
        assert self.pattern is not None
        m = self.pattern[1]
        n = m - math.ceil((1 - density) * m - 1e-9)
        place = torch.arange(mask.numel(), device=mask.device).reshape(mask.shape)
        order = self.order().to(mask.device)
        cost, place, here = (t[..., order].reshape(-1, m) for t in (cost, place, mask))
        least, which = cost.min(1)
        least = least.masked_fill(here.sum(1) <= n, torch.inf)
        num = min(num, int(least.isfinite().sum()))
        chosen = least.topk(num, largest=False).indices
        return place[chosen, which[chosen]]


Step = tuple[Tensor, Tensor]  # mask, refitted weights; [groups, rows, unknowns]


def _rounds(
    start: Tensor, curvature: Tensor, costs: Tensor, layout: _Layout, targets: list[float]
) -> Iterator[Step]:
    mask = torch.ones_like(start, dtype=torch.bool)
    for density in [*targets, None]:
        fitted, spread = _refit(start, curvature, mask)
        yield mask, fitted
        if density is not None:
            mask = layout.leave(costs * fitted.square() / spread, mask, density)


def _refit(start: Tensor, curvature: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the refitted weights and diag(H_KK^-1), 1 where nothing stays."""
    target = start @ curvature
    fitted, spread = torch.zeros_like(start), torch.ones_like(start)
    for g, matrix in enumerate(curvature):
        for rows, m, factor in row_factors(matrix, mask[g].to(start)):
            inverse = torch.cholesky_inverse(factor)
            fitted[g, rows] = (inverse @ (target[g, rows] * m)[..., None])[..., 0] * m
            spread[g, rows] = inverse.diagonal(dim1=1, dim2=2)
    return fitted, spread


def _sweeps(
    start: Tensor, curvature: Tensor, costs: Tensor, layout: _Layout, targets: list[float]
) -> Iterator[Step]:
    yield torch.ones_like(start, dtype=torch.bool), start
    order = layout.order().to(start.device)
    back = order.argsort()
    factors = [inverse_factor(matrix[order][:, order].double()).float() for matrix in curvature]
    for density in targets if layout.pattern is None else targets[-1:]:
        parts = [
            _sweep(w[:, order], factor, cost, layout.pattern, density)
            for w, factor, cost in zip(start, factors, costs, strict=True)
        ]
        mask, fitted = (torch.stack(p)[..., back] for p in zip(*parts, strict=True))
        yield mask, fitted


def _sweep(
    weights: Tensor, factor: Tensor, cost: Tensor, pattern: tuple[int, int] | None, density: float
) -> Step:
    weights = weights.clone()
    mask = torch.ones_like(weights, dtype=torch.bool)
    size = _BLOCK if pattern is None else pattern[1] * max(1, _BLOCK // pattern[1])
    for first in range(0, weights.shape[1], size):
        block = slice(first, first + size)
        diagonal = factor.diagonal()[block]
        found = cost * (weights[:, block] / diagonal).square()
        n, m = pattern or (max(1, round(density * found.numel())), found.numel())
        mask[:, block] = highest(found.reshape(-1, m), n).reshape(found.shape)
        errors = torch.zeros_like(found)
        for j in range(found.shape[1]):
            column = first + j
            gone = weights[:, column].masked_fill(mask[:, column], 0)
            errors[:, j] = gone / diagonal[j]
            row = factor[column, column : first + found.shape[1]]
            weights[:, column : first + found.shape[1]] -= errors[:, j, None] * row
        behind = first + found.shape[1]
        weights[:, behind:] -= errors @ factor[block, behind:]
    return mask, weights * mask
