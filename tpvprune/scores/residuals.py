"""What the other inputs of a layer cannot predict: covariances and residual maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups
from tpvprune.passes.crossing import sent
from tpvprune.passes.moments import Moments, in_single
from tpvprune.passes.observer import Observer
from tpvprune.passes.positions import sampled_rows
from tpvprune.passes.running import evaluating, fast_layout, on_device
from tpvprune.processes.shares import global_indices, share, total
from tpvprune.scores.taps import reader_plan

_FLOOR = 1e-10
_HELD_EVERY = 4
SHRINKAGES = (1e-3, 0.01, 0.04, 0.1, 0.25, 0.5, 0.8)
_LARGEST_DOUBLE = 1024  # inputs up to which shrinkages are compared in float64
_MAX_INPUTS = 4096  # of a reader: calls with more (a flattened feature map) are left out
_MAX_POSITIONS = 64  # of a sample, spread evenly


def residual_maps(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    ridge: float,
    max_samples: int,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Fit what the other inputs of a reader cannot predict linearly: r = (a - mean) M.

    Column c of M is P[:, c] / P_cc for single channels; the inputs of one unit of several
    channels (a head) leave together, so M there is P[:, R] P_RR^-1.

    ``inputs``: batches [B, ...]. ``ridge``: see :func:`ridge_inverse`; of readers with more inputs
    than there are samples the covariance is shrunk instead (:class:`Inputs`). ``max_samples``: only
    so many samples, the first, are read. Returns reader call -> (mean [n], M [n, n]), in the dtype
    of the model's parameters, float32 at least.
    """
    plan = reader_plan(groups)
    dtype = in_single(next(model.parameters())[:0]).dtype
    num, fit, held = folded_covariances(model, groups, inputs, max_samples=max_samples)
    num = int(total(num))
    both, maps = merged(fit, held), {}
    for call in list(both):
        mean, covariance = both.pop(call)  # one matrix in float64 at a time
        readers = [(reader.index, reader.channel) for _, reader in plan[call]]
        if len(mean) <= num:
            precision = ridge_inverse(covariance, ridge)
        else:
            precision = inputs_of(call, fit, held).precision
        matrix = residual_map(precision, readers)
        maps[call] = (mean.to(dtype), matrix.to(dtype))
    return maps


Fit = tuple[Tensor, Tensor]
"""Mean [n] and covariance [n, n], float64, of the inputs of one reader."""

Covariances = Mapping[int, tuple[Tensor, Tensor, float]]
"""Reader call -> (mean [n], covariance [n, n], number of rows that they are of)."""


@dataclass(frozen=True)
class Inputs:
    r"""How the inputs of one reader vary.

    .. math:: P = \big((1 - \rho) \Sigma + \rho \, \mathrm{diag}\, \Sigma\big)^{-1}

    with the rho of :data:`SHRINKAGES` with which each input is predicted best from the others on
    rows that took no part: of few rows the sample covariance promises predictions that hold on
    these rows alone (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance
    matrices, J. Multivariate Analysis 2004).

    Attributes:
        fit: Of the images that maps are fitted to.
        held: Of others, by which shrinkages are chosen.
        precision: P [n, n]; NaN if a covariance is not finite.
        shrinkage: rho.
    """

    fit: Fit
    held: Fit
    precision: Tensor
    shrinkage: float = SHRINKAGES[0]

    @classmethod
    def of(cls, fit: Fit, held: Fit) -> Inputs:
        """Choose the shrinkage."""
        mean, covariance = fit
        moved = held[0] - mean
        spread = held[1] + torch.outer(moved, moved)
        variance = _positive(covariance.diagonal())
        wide = len(covariance) > _LARGEST_DOUBLE
        parts = [t.float() if wide else t for t in (covariance, spread, variance)]
        chosen, least, best = None, float("inf"), torch.full_like(covariance, torch.nan)
        for rho in SHRINKAGES:
            precision = _shrunk_inverse(parts[0], parts[2], rho)
            if precision is None:
                continue
            alone = precision / precision.diagonal()
            errors = (alone * (parts[1] @ alone)).sum(0) / parts[2]
            loss = float(errors.mean())
            if not loss < least:
                break  # the error falls, then rises
            chosen, least, best = rho, loss, precision
        if chosen is None:
            return cls(fit, held, best)
        again = _shrunk_inverse(covariance, variance, chosen) if wide else None
        return cls(fit, held, best.double() if again is None else again, chosen)

    def less_shrunk(self, gone: Tensor, gradients: Tensor, shrinkage: float) -> float:
        """Return the shrinkage, at most ``shrinkage``, to predict some inputs by those that stay.

        The fewer stay, the less do their maps need it: it falls as long as the variance of the
        output on held-back images does. ``gone``: [|R|], as indices of inputs; ``gradients``:
        E d d^T [|R|, |R|] there.
        """
        at = SHRINKAGES.index(shrinkage)
        if not at or not len(gone):
            return shrinkage
        stay, mean = self._others(gone), self.held[0] - self.fit[0]
        dtype = torch.float32 if len(mean) > _LARGEST_DOUBLE else torch.float64
        own, across = (t.to(dtype) for t in _split(self.fit[1], stay, gone))
        held_own, held_across = (t.to(dtype) for t in _split(self.held[1], stay, gone))
        mean, gradients = mean.to(dtype), gradients.to(dtype)

        def variance(shrinkage: float) -> float:
            """Return tr(G M^T E[(a - mean)(a - mean)^T] M) less what no map changes."""
            b = _predictors(own, across, shrinkage)
            moved = mean[gone] - mean[stay] @ b
            moment = ((b @ gradients) * (held_own @ b - 2 * held_across)).sum()
            return float(moment + moved @ gradients @ moved)

        least = variance(shrinkage)
        while at and (found := variance(SHRINKAGES[at - 1])) < least:
            at, least = at - 1, found
        return SHRINKAGES[at]

    def precision_without(self, gone: Tensor, shrinkage: float) -> Tensor:
        """Return the inverse covariance [|S|, |S|] of inputs that stay; NaN if there is none."""
        stay = self._others(gone)
        own = self.fit[1][stay][:, stay]
        found = _shrunk_inverse(own, _positive(own.diagonal()), shrinkage)
        return torch.full_like(own, torch.nan) if found is None else found

    def residual_map(self, gone: Tensor, shrinkage: float) -> Tensor:
        """Return M [n, |R|] with (a - mean) M what the inputs that stay cannot predict of ``gone``.

        The identity where inputs leave, elsewhere minus their predictors; NaN if there are none.
        """
        m = self.fit[1].new_zeros(len(self.fit[0]), len(gone))
        m[gone] = torch.eye(len(gone), dtype=m.dtype, device=m.device)
        stay = self._others(gone)
        m[stay] = -_predictors(*_split(self.fit[1], stay, gone), shrinkage)
        return m

    def _others(self, gone: Tensor) -> Tensor:
        stays = torch.ones(len(self.fit[0]), dtype=torch.bool, device=self.fit[0].device)
        stays[gone] = False
        return stays.nonzero().squeeze(1)


def _split(covariance: Tensor, stay: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance of inputs that stay [|S|, |S|], and theirs with others [|S|, |R|]."""
    rows = covariance[stay]
    return rows[:, stay], rows[:, gone]


def _predictors(own: Tensor, across: Tensor, shrinkage: float) -> Tensor:
    """Return B [|S|, |R|] of the least squares that are shrunk; NaN if there is none."""
    if not across.numel():
        return across
    factor = _shrunk_factor(own, _positive(own.diagonal()), shrinkage)
    if factor is None:
        return torch.full_like(across, torch.nan)
    return torch.cholesky_solve((1 - shrinkage) * across, factor)


def inputs_of(call: int, fit: Covariances, held: Covariances) -> Inputs:
    """Return how a reader's inputs vary, judged by those of the fit where none are held back."""
    return Inputs.of(fit[call][:2], held.get(call, fit[call])[:2])


def _positive(variance: Tensor) -> Tensor:
    """Return variances of inputs that never vary at a millionth of the others'."""
    variance = variance.clamp_min(0)
    return variance + 1e-6 * variance.mean() + 1e-30


def _shrunk_inverse(covariance: Tensor, variance: Tensor, rho: float) -> Tensor | None:
    """Return the inverse of the shrunk covariance; None if it is singular to rounding."""
    factor = _shrunk_factor(covariance, variance, rho)
    return None if factor is None else torch.cholesky_inverse(factor)


def _shrunk_factor(covariance: Tensor, variance: Tensor, rho: float) -> Tensor | None:
    """Return the Cholesky factor of the shrunk covariance, or None."""
    damped = (1 - rho) * covariance
    damped.diagonal().add_(rho * variance)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if bool(failed.any()) else factor


def residual_map(precision: Tensor, readers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return M [n, n] with (a - mean) M the part of each unit that the others cannot predict.

    ``precision``: inverse covariance [n, n]. ``readers``: the ``index`` and ``channel`` of each;
    columns that nobody reads are zero.
    """
    matrix = torch.zeros_like(precision)
    for index, channel in readers:
        order = channel.argsort(stable=True)
        inputs = index[order]
        counts = channel[order].unique_consecutive(return_counts=True)[1]
        alone = (counts == 1).repeat_interleave(counts)
        single, several = inputs[alone], inputs[~alone]
        matrix[:, single] = precision[:, single] / precision[single, single]
        for unit in several.split(counts[counts > 1].tolist()):
            p = precision[:, unit]
            matrix[:, unit] = torch.linalg.solve(p[unit], p.T).T
    return matrix


def ridge_inverse(covariance: Tensor, ridge: float) -> Tensor:
    """Return (covariance + ridge * mean variance * I)^-1; NaN if the covariance is not finite.

    Of a matrix that is singular to rounding the small eigenvalues are raised first, and a warning
    says so.
    """
    if not bool(covariance.isfinite().all()):  # which the scores report
        return torch.full_like(covariance, torch.nan)
    scale = covariance.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex(covariance + ridge * scale * eye)
    if not bool(failed.any()):
        return torch.cholesky_inverse(factor)
    warnings.warn(
        f"the covariance of {len(covariance)} inputs is singular at a ridge of {ridge:g}: its "
        f"eigenvalues below {_FLOOR:g} of the mean variance were raised to that",
        stacklevel=2,
    )
    values, vectors = torch.linalg.eigh(covariance + ridge * scale * eye)
    return vectors / values.clamp_min(_FLOOR * scale) @ vectors.T


def is_held(first: int, num: int) -> Tensor:
    """Return which of some inputs of here take no part in a fit, but judge it: BoolTensor [num].

    A quarter of the whole set, in runs of four, so that two or four processes draw the same
    directions for it as one.
    """
    return global_indices(first, num) % (4 * _HELD_EVERY) >= 4 * (_HELD_EVERY - 1)


def folded_covariances(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    max_samples: int | None = None,
) -> tuple[int, Covariances, Covariances]:
    """Measure the covariances of three quarters of the samples, and of the last quarter.

    ``inputs``: batches [B, ...]. ``max_samples``: only so many samples, the first, are read; None
    for all. Returns how many samples of here were read; the covariances of those that
    :func:`is_held` leaves, and of those that it holds back, if there are any. Products are formed
    in float32 at least, whatever the model computes in (:mod:`tpvprune.passes.moments`).
    """
    plan = reader_plan(groups)
    moments: dict[int, tuple[Moments, Moments]] = {}
    seen = num = 0
    at = torch.zeros(0)
    folds: list[Tensor] = []

    def observe(call: int, a: Tensor) -> None:
        reader = plan[call][0][1]
        width = a.shape[reader.channel_dim]
        if width > _MAX_INPUTS:
            return
        rows = sampled_rows(reader.by_channel(a, num), at, _MAX_POSITIONS).view(num, -1, width)
        if call not in moments:
            fit, held = (Moments(width, joint=True, device=a.device) for _ in range(2))
            moments[call] = fit, held
        for part, samples in zip(moments[call], folds, strict=True):
            part.add(rows[samples].flatten(0, 1))

    with evaluating(model), torch.no_grad():
        for batch in inputs:
            x = batch if max_samples is None else batch[: share(max_samples) - seen]
            num = len(x)
            if not num:
                break
            moved = fast_layout(on_device(x, model), model)
            at = global_indices(seen, num, moved.device)
            held = is_held(seen, num)
            folds = [sent(part.nonzero().squeeze(1), moved.device) for part in (~held, held)]
            with Observer(set(plan), observe):
                model(moved)
            seen += num
    found: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    for call in list(moments):
        for fold, part in zip(found, moments.pop(call), strict=True):
            count, mean, covariance = part.over_processes()
            if count:
                fold[call] = mean, covariance, count
    return seen, *found


def merged(fit: Covariances, held: Covariances) -> dict[int, tuple[Tensor, Tensor]]:
    """Return mean and covariance of both parts together, by reader call."""
    both = {}
    for call, (mean, covariance, num) in fit.items():
        if call not in held:
            both[call] = mean, covariance
            continue
        other, spread, more = held[call]
        part, moved = more / (num + more), other - mean
        joined = (1 - part) * covariance + part * spread
        joined.addr_(moved, moved, alpha=part * (1 - part))
        both[call] = mean + part * moved, joined
    return both
