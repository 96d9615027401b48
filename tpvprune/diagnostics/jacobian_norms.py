"""E||J(x)||_F^2 over the weights, parameter by parameter: the trace of H_eff."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tpvprune.passes.batches import unlabeled
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.scores.sample_gradients import SampleGradients, sample_gradients


class Estimate(NamedTuple):
    """A mean and its standard error, in the same unit."""

    value: float
    stderr: float


@dataclass(frozen=True)
class JacobianNorms:
    """Squared Jacobian norms of every sample and parameter.

    Attributes:
        names: Parameters, as ``model.named_parameters()`` names them.
        squares: [samples, parameters], float64: the mean over probes of ||J_p(x)^T v||^2, in
            squared output units per squared weight unit.
    """

    names: tuple[str, ...]
    squares: Tensor

    def trace(self, variances: Mapping[str, float] | None = None) -> Estimate:
        r"""Estimate the trace of H_eff C for a C that is diagonal and constant on parameters.

        .. math:: \mathrm{Tr}(H_{eff} C) = \sum_p \sigma_p^2 \; E_x \| J_p(x) \|_F^2

        Args:
            variances: sigma_p^2 by parameter; those left out are 0. None: 1 for all.

        Returns:
            The estimate; its standard error is over samples, the probes included.
        """
        if variances is None:
            weights = torch.ones(len(self.names), dtype=torch.float64)
        else:
            weights = torch.tensor([float(variances.get(n, 0.0)) for n in self.names]).double()
        return mean_and_error(self.squares @ weights)

    def by_parameter(self) -> dict[str, Estimate]:
        """Return E||J_p||_F^2 of every parameter."""
        return {n: mean_and_error(self.squares[:, i]) for i, n in enumerate(self.names)}


def jacobian_norms(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_probes: int = 1,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> JacobianNorms:
    r"""Estimate E_x ||J_p(x)||_F^2 of every parameter p of a model.

    .. math:: \| J_p(x) \|_F^2 = E_v \| J_p(x)^T v \|^2, \quad v \in \{-1, 1\}^K

    Unbiased for every sample, in one forward and one backward per probe over whole batches
    (:mod:`tpvprune.scores.sample_gradients`). The sum over parameters is the trace of
    H_eff = E_x[J^T J]. No labels.

    Args:
        model: The network; run in eval mode, restored afterwards.
        batches: Re-iterable of unlabeled inputs [B, ...].
        num_probes: Directions per sample, >= 1; a backward each. More lower the part of the error
            that does not come from samples.
        seed: Of the directions.
        outputs: What counts of what the model returns; see :func:`tpvprune.prune`.

    Returns:
        The norms of every sample.

    Raises:
        ValueError: If num_probes is below 1, or a norm is not finite.

    Reference:
        Arpit, Test prediction variance, ICML 2026, https://arxiv.org/abs/2512.11089, equation 6
        and theorem 3.1 (the trace that its stability claim is about).
    """
    if num_probes < 1:
        raise ValueError(f"num_probes: expected at least 1, found {num_probes}.")
    names = tuple(name for name, p in model.named_parameters() if p.is_floating_point())
    column = {name: i for i, name in enumerate(names)}
    rows: list[Tensor] = []
    batch: list[tuple[int, slice, Tensor]] = []

    def collect(name: str, probe: int, samples: slice, found: SampleGradients) -> None:
        batch.append((column[name], samples, found.squared_norms()))

    for num in sample_gradients(
        model, unlabeled(batches), collect, num_probes=num_probes, seed=seed, outputs=outputs
    ):
        table = torch.zeros(num, len(names), dtype=torch.float64)
        for i, samples, squares in batch:
            table[samples, i] += squares.double().cpu() / num_probes
        rows.append(table)
        batch.clear()
    squares = torch.cat(rows)
    if not bool(squares.isfinite().all()):
        wrong = names[int((~squares.isfinite()).any(0).nonzero()[0])]
        raise ValueError(
            f"parameter {wrong!r}: expected finite gradients, found NaN or infinity: check the "
            "weights and the inputs"
        )
    return JacobianNorms(names, squares)


def mean_and_error(values: Tensor) -> Estimate:
    """Return the mean of independent values [N] and its standard error (NaN for one value)."""
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else values.new_tensor(torch.nan)
    return Estimate(values.mean().item(), error.item())
