"""Scores to compare against that look at the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, ChannelGroups, ParamSlice
from tpvprune.scores.tpv import Scores


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

    ``p``: power of the magnitude, 1 or 2 (others are a ValueError). No root is taken, so that
    p = 2 has the units of an output variance under equal noise on every weight.

    Reference:
        Li et al. 2017, "Pruning filters for efficient ConvNets" (p = 1, filters);
        Fang et al. 2023, "DepGraph" (whole group), https://arxiv.org/abs/2301.12900
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, found {p}: choose L1 or L2 magnitude")
    weights = weights_of(model)
    name = "magnitude" if p == 2 else "magnitude_l1"
    return data_free(groups, name, lambda group: _sizes(group, weights, p))


@torch.no_grad()
def lamp_scores(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[Tensor] = (), *, seed: int = 0
) -> Scores:
    """Score channels by layer-adaptive magnitude, in its group form.

    S_c = s_c / Σ_{j: s_j ≥ s_c} s_j with s the squared magnitude of the whole group, both
    sides of the cut (:func:`magnitude_scores`): what a channel weighs among those that would be
    left, in [0, 1]. The largest of every group scores 1; of equals the later counts as the larger.
    This is `LAMPImportance` of torch-pruning, which however leaves depthwise convolutions out of s.

    Reference:
        Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning",
        https://arxiv.org/abs/2010.07611
    """
    squared = magnitude_scores(model, groups)

    def share(group: ChannelGroup) -> Tensor:
        ascending, order = squared[group.name].sort(stable=True)
        left = ascending.flip(0).cumsum(0).flip(0)
        return torch.empty_like(left).scatter_(0, order, ascending / left.clamp_min(1e-300))

    return data_free(groups, "lamp", share)


@torch.no_grad()
def bn_scale_scores(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[Tensor] = (), *, seed: int = 0
) -> Scores:
    """Score channels by the scale of their BatchNorm.

    S_c = Σ |γ_c| over the BatchNorm layers of the group. ValueError if a group has none with a
    scale: its scores could not be compared with the others'.

    Reference:
        Liu et al. 2017, "Learning efficient convolutional networks through network
        slimming", https://arxiv.org/abs/1708.06519
    """
    scales = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    }
    for group in groups:
        if not any(part.param in scales for part in group.slices):
            raise ValueError(
                "bn_scale needs a BatchNorm with a scale in every group, "
                f"{group.name!r} has none: ignore that group or choose another criterion"
            )
    return data_free(groups, "bn_scale", lambda group: _sizes(group, scales, 1))


def random_scores(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[Tensor] = (), *, seed: int = 0
) -> Scores:
    """Score channels at random, S_c ~ U(0, 1), independent: what every criterion must beat."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(group: ChannelGroup) -> Tensor:
        return torch.rand(group.num_channels, generator=generator, dtype=torch.float64)

    return data_free(groups, "random", drawn)


def _sizes(group: ChannelGroup, weights: Mapping[str, Tensor], p: int) -> Tensor:
    """Return the sum of |w|^p over those of the weights that go with each channel [C]."""
    total = torch.zeros(group.num_channels, dtype=torch.float64)
    for part in group.slices:
        if part.param in weights:
            rows = owned_rows(weights[part.param], part).abs().pow(p).sum(1)
            total.index_add_(0, part.channel.cpu(), rows)
    return total


def data_free(
    groups: ChannelGroups, criterion: str, score: Callable[[ChannelGroup], Tensor]
) -> Scores:
    """Return the scores of a criterion that sees neither images nor labels."""
    return Scores({group.name: score(group) for group in groups}, criterion=criterion)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that criteria of size count: all but biases."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[2] != "bias"
    }


def owned_rows(parameter: Tensor, part: ParamSlice) -> Tensor:
    """Return the owned positions as float64 rows [n, numel per position]."""
    rows = parameter.movedim(part.dim, 0).reshape(parameter.shape[part.dim], -1)
    return rows[part.index.to(rows.device)].double().cpu()
