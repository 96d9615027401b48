"""Refit what stays of every weight, layer by layer, so that the others take over.

The problem of :mod:`tpvprune.repairs.compensation` with zeros prescribed. With W* the unconstrained
refit and H its curvature (the second moments of the layer's inputs in the repaired network, plus
ridge), the best weights of a row under a mask minimise (w - w*)^T H (w - w*); that is the update of
optimal brain surgeon (Hassibi & Stork, NIPS 1992) for all removed weights R of the row at once,

    w_K = w*_K + H_KK^-1 H_KR w*_R,

solved exactly where rows are short, and column after column for all rows together, as by Frantar &
Alistarh (SparseGPT, ICML 2023, https://arxiv.org/abs/2301.00774, algorithm 1), where they are long.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.repairs.compensation import refitted

_EXACT = 2e10  # multiplications of a layer up to which rows are solved one by one: a second or two
_CHUNK = 1 << 25  # elements of row matrices at a time


def compensate_masked(
    dense: nn.Module,
    batches: Iterable[Any],
    masks: Mapping[str, Tensor],
    *,
    ridge: float = 1e-3,
    rows_per_input: int = 12,
    min_rows: int = 16384,
    max_bytes: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of the model with masked weights zero and all others refitted.

    Targets, order, intercepts and arguments are those of :func:`tpvprune.compensate_weights`.
    ``masks``: BoolTensors by parameter name, True = stays. ``ridge``: relative to the mean square
    of a layer's inputs, towards the dense weights.
    """

    def constrain(name: str, weights: Tensor, curvature: Tensor) -> Tensor:
        mask = masks.get(f"{name}.weight")
        return weights if mask is None else masked_fit(weights, curvature, mask)

    repaired = refitted(
        dense, dense, batches, groups=None, kept={}, ridge=ridge, rows_per_input=rows_per_input,
        min_rows=min_rows, max_bytes=max_bytes, seed=seed, constrain=constrain,
    )  # fmt: skip
    _zero(repaired, masks)  # layers that no fit reached
    return repaired


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the model with masked weights zero."""
    masked = copy.deepcopy(model)
    _zero(masked, masks)
    return masked


@torch.no_grad()
def _zero(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        p = model.get_parameter(name)
        p.mul_(mask.to(p))


def masked_fit(weights: Tensor, curvature: Tensor, mask: Tensor) -> Tensor:
    """Return the weights nearest to given ones, in the metric of the curvature, under a mask.

    ``weights``: unconstrained minimiser [groups, outputs, unknowns]. ``curvature``: positive
    definite [groups, unknowns, unknowns]. ``mask``: True = stays; as many elements as ``weights``.
    """
    mask = mask.reshape(weights.shape).to(weights.device)
    num_rows, unknowns = weights[..., 0].numel(), weights.shape[2]
    solve = _exact if num_rows * unknowns**3 / 3 <= _EXACT else _by_columns
    fitted = [solve(w, h, m) for w, h, m in zip(weights, curvature, mask, strict=True)]
    return torch.stack(fitted)


def _exact(weights: Tensor, curvature: Tensor, mask: Tensor) -> Tensor:
    target = weights @ curvature
    fitted = [
        torch.cholesky_solve((target[rows] * m)[..., None], factor)[..., 0] * m
        for rows, m, factor in row_factors(curvature, mask.to(weights))
    ]
    return torch.cat(fitted)


def row_factors(curvature: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Factorise the curvature [unknowns, unknowns] of what stays of every row, some rows at a time.

    ``mask``: 1 = stays, 0 = goes; [rows, unknowns], in the type of the curvature. Yields which
    rows; their masks; Cholesky factors [rows, unknowns, unknowns] of the curvature on what stays
    and the identity on what goes.
    """
    step = max(1, _CHUNK // curvature.numel())
    for first, m in enumerate(mask.split(step)):
        system = curvature * m[:, :, None] * m[:, None, :] + torch.diag_embed(1 - m)
        yield slice(first * step, (first + 1) * step), m, torch.linalg.cholesky(system)


def inverse_factor(matrix: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return torch.linalg.cholesky(inverse, upper=True)


def _by_columns(weights: Tensor, curvature: Tensor, mask: Tensor) -> Tensor:
    factor = inverse_factor(curvature)
    fitted = weights.clone()
    for j in range(weights.shape[1]):
        error = fitted[:, j].masked_fill(mask[:, j], 0) / factor[j, j]
        fitted[:, j:] -= error[:, None] * factor[j, j:]
    return fitted * mask
