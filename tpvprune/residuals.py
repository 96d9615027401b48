"""What the other inputs of a layer cannot predict: covariances and residual maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tpvprune.distributed import places, share
from tpvprune.groups import ChannelGroups
from tpvprune.moments import Moments, in_single
from tpvprune.observer import Observer
from tpvprune.positions import by_channel, sampled_rows
from tpvprune.running import evaluating, fast_layout, on_device
from tpvprune.taps import reader_plan

_FLOOR = 1e-10


def residual_maps(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    ridge: float,
    max_samples: int | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Fit what the other inputs of a reader cannot predict linearly: r = (a - mean) M.

    Column c of M is P[:, c] / P_cc for single channels; the inputs of one unit of several
    channels (a head) leave together, so M there is P[:, R] P_RR^-1.

    Args:
        model: The network.
        groups: Its channel groups.
        inputs: Batches [B, ...].
        ridge: See :func:`ridge_inverse`.
        max_samples: See :func:`input_covariances`.

    Returns:
        Reader call -> (mean [n], M [n, n]), in the dtype of the model's parameters, float32 at
        least.
    """
    plan = reader_plan(groups)
    dtype = in_single(next(model.parameters())[:0]).dtype
    covariances = input_covariances(model, groups, inputs, max_samples=max_samples)
    maps = {}
    for call in list(covariances):
        mean, covariance = covariances.pop(call)  # one matrix in float64 at a time
        readers = [(reader.index, reader.channel) for _, reader in plan[call]]
        matrix = residual_map(ridge_inverse(covariance, ridge), readers)
        maps[call] = (mean.to(dtype), matrix.to(dtype))
    return maps


def residual_map(precision: Tensor, readers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return M with (a - mean) M the part of each unit that the other inputs cannot predict.

    Args:
        precision: Inverse covariance [n, n] of the inputs.
        readers: The ``index`` and ``channel`` of each :class:`tpvprune.groups.Reader`.

    Returns:
        [n, n]; columns that nobody reads are zero.
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
    """Return (covariance + ridge * mean variance * I)^-1.

    Args:
        covariance: Symmetric [n, n], float64.
        ridge: Relative to the mean variance.

    Returns:
        The inverse [n, n]; NaN if the covariance is not finite. Of a matrix that is singular to
        rounding the small eigenvalues are raised first, and a warning says so.
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


def input_covariances(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    max_inputs: int = 4096,
    max_positions: int = 64,
    max_samples: int | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Measure how the inputs of every reader vary together over samples and positions.

    Args:
        model: The network.
        groups: Its channel groups.
        inputs: Batches [B, ...]; how the samples are split into them does not matter.
        max_inputs: Calls with more inputs (a flattened feature map) are left out.
        max_positions: At most so many positions of a sample are read, spread evenly.
        max_samples: Only so many samples, the first, are read; None for all.

    Returns:
        Reader call -> (mean [n], covariance [n, n]), float64; products are formed in float32 at
        least, whatever the model computes in (:mod:`tpvprune.moments`).
    """
    plan = reader_plan(groups)
    moments: dict[int, Moments] = {}
    seen = num = 0

    def observe(call: int, a: Tensor) -> None:
        dim = plan[call][0][1].channel_dim
        if a.shape[dim] > max_inputs:
            return
        rows = sampled_rows(by_channel(a, dim, num), places(seen, num), max_positions)
        if call not in moments:
            moments[call] = Moments(a.shape[dim], joint=True, device=a.device)
        moments[call].add(rows)

    with evaluating(model), torch.no_grad():
        for batch in inputs:
            x = batch if max_samples is None else batch[: share(max_samples) - seen]
            num = len(x)
            if not num:
                break
            moved = fast_layout(on_device(x, model), model)
            with Observer(set(plan), observe):
                model(moved)
            seen += num
    found = {}
    for call in list(moments):
        _, mean, covariance = moments.pop(call).over_processes()
        found[call] = mean, covariance
    return found


def residual(a: Tensor, dim: int, mean: Tensor, matrix: Tensor) -> Tensor:
    """Return (a - mean) M along ``dim``."""
    mean, matrix = mean.to(a), matrix.to(a)
    flat = (a.movedim(dim, -1) - mean) @ matrix
    return flat.movedim(-1, dim)
