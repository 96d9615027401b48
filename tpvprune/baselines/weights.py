"""Scores to compare against that look at the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, ChannelGroups, ParamSlice
from tpvprune.scores import Scores


@torch.no_grad()
def magnitude_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Tensor] = (),
    *,
    p: int = 2,
    seed: int = 0,
) -> Scores:
    """Score channels by the size of every weight that goes with them.

    S_c = Σ |w|^p over the weights of channel c on both sides of the group: filters,
    normalisation scales, and the columns of the layers that read it; no biases.

    Args:
        model: Model that the groups were found in.
        groups: Channel groups to score.
        batches: Ignored; the criterion reads weights only.
        p: Power of the magnitude, 1 or 2. No root is taken, so that p = 2 has the
            units of an output variance under equal noise on every weight.
        seed: Ignored; the criterion is deterministic.

    Returns:
        Scores, float64 [C] per group.

    Raises:
        ValueError: If p is neither 1 nor 2.

    Reference:
        Li et al. 2017, "Pruning filters for efficient ConvNets" (p = 1, filters);
        Fang et al. 2023, "DepGraph" (whole group), https://arxiv.org/abs/2301.12900
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, found {p}: choose L1 or L2 magnitude")
    weights = _weights(model)

    def magnitude(group: ChannelGroup) -> Tensor:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for part in group.slices:
            if part.param in weights:
                rows = _rows(weights[part.param], part).abs().pow(p).sum(1)
                total.index_add_(0, part.channel.cpu(), rows)
        return total

    return _data_free(groups, "magnitude" if p == 2 else "magnitude_l1", magnitude)


@torch.no_grad()
def bn_scale_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Tensor] = (),
    *,
    seed: int = 0,
) -> Scores:
    """Score channels by the scale of their BatchNorm.

    S_c = Σ |γ_c| over the BatchNorm layers of the group.

    Args:
        model: Model that the groups were found in.
        groups: Channel groups to score.
        batches: Ignored; the criterion reads weights only.
        seed: Ignored; the criterion is deterministic.

    Returns:
        Scores, float64 [C] per group.

    Raises:
        ValueError: If a group has no BatchNorm with a scale: its scores could not be
            compared with the others'.

    Reference:
        Liu et al. 2017, "Learning efficient convolutional networks through network
        slimming", https://arxiv.org/abs/1708.06519
    """
    scales = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    }

    parts = {g.name: [part for part in g.slices if part.param in scales] for g in groups}
    for name, found in parts.items():
        if not found:
            raise ValueError(
                "bn_scale needs a BatchNorm with a scale in every group, "
                f"{name!r} has none: ignore that group or choose another criterion"
            )

    def scale(group: ChannelGroup) -> Tensor:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for part in parts[group.name]:
            rows = _rows(scales[part.param], part).abs().sum(1)
            total.index_add_(0, part.channel.cpu(), rows)
        return total

    return _data_free(groups, "bn_scale", scale)


@torch.no_grad()
def fpgm_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Tensor] = (),
    *,
    seed: int = 0,
) -> Scores:
    """Score channels by the distance of their filter to the layer's other filters.

    S_c = Σ_layers Σ_j ‖w_c − w_j‖₂, over the layers that write the channels. A filter
    near the geometric median of its layer is the one that the others can replace.
    Differs from torch-pruning, which measures distances of *squared* weights and adds
    the input side.

    Args:
        model: Model that the groups were found in.
        groups: Channel groups to score.
        batches: Ignored; the criterion reads weights only.
        seed: Ignored; the criterion is deterministic.

    Returns:
        Scores, float64 [C] per group.

    Reference:
        He et al. 2019, "Filter pruning via geometric median", equation 6,
        https://arxiv.org/abs/1811.00250
    """
    weights = _weights(model)

    def distance(group: ChannelGroup) -> Tensor:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for channels, filters in _filters(weights, group):
            pairwise = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
            total[channels] += pairwise.sum(1)
        return total

    return _data_free(groups, "fpgm", distance)


def random_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Tensor] = (),
    *,
    seed: int = 0,
) -> Scores:
    """Score channels at random: the floor that every criterion must beat.

    S_c ~ U(0, 1), independent.

    Args:
        model: Ignored; only the sizes of the groups count.
        groups: Channel groups to score.
        batches: Ignored.
        seed: Seed of the draw.

    Returns:
        Scores, float64 [C] per group.
    """
    generator = torch.Generator().manual_seed(seed)
    return _data_free(
        groups,
        "random",
        lambda group: torch.rand(group.num_channels, generator=generator, dtype=torch.float64),
    )


def _data_free(
    groups: ChannelGroups, criterion: str, score: Callable[[ChannelGroup], Tensor]
) -> Scores:
    return Scores(
        {group.name: score(group) for group in groups},
        num_samples=0,
        criterion=criterion,
        used_labels=False,
    )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    # No magnitude criterion counts biases.
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[2] != "bias"
    }


def _rows(parameter: Tensor, part: ParamSlice) -> Tensor:
    """Return the owned positions as float64 rows [n, numel per position]."""
    rows = parameter.movedim(part.dim, 0).reshape(parameter.shape[part.dim], -1)
    return rows[part.index.to(rows.device)].double().cpu()


def _filters(weights: dict[str, Tensor], group: ChannelGroup) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield per writing layer the channels [m] and their filters [m, D].

    A channel with several positions in one layer has them concatenated; a channel
    with fewer than its neighbours is padded with zeros.
    """
    for part in group.slices:
        weight = weights.get(part.param)
        # Normalisation scales and position embeddings are written too, but no filters.
        if weight is None or weight.ndim < 2 or not part.param.endswith("weight"):
            continue
        if part.side != "producer":
            continue
        rows = _rows(weight, part)
        order = torch.argsort(part.channel.cpu(), stable=True)
        channels, local, counts = torch.unique(
            part.channel.cpu()[order], return_inverse=True, return_counts=True
        )
        slot = torch.arange(len(order)) - (counts.cumsum(0) - counts)[local]
        filters = rows.new_zeros(len(channels), int(counts.max()), rows.shape[1])
        filters[local, slot] = rows[order]
        yield channels, filters.flatten(1)
