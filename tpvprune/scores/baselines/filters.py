"""Scores to compare against that set each filter beside the others of its layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, ChannelGroups
from tpvprune.scores.baselines.weights import data_free, owned_rows, weights_of
from tpvprune.scores.tpv import Scores


@torch.no_grad()
def fpgm_scores(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[Tensor] = (), *, seed: int = 0
) -> Scores:
    """Score channels by the distance of their filter to the layer's other filters.

    S_c = Σ_layers Σ_j ‖w_c − w_j‖₂, over the layers that write the channels. A filter
    near the geometric median of its layer is the one that the others can replace.
    Differs from torch-pruning, which measures distances of *squared* weights and adds
    the input side.

    Reference:
        He et al. 2019, "Filter pruning via geometric median", equation 6,
        https://arxiv.org/abs/1811.00250
    """
    weights = weights_of(model)

    def distance(group: ChannelGroup) -> Tensor:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for channels, filters in _filters(weights, group):
            pairwise = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
            total[channels] += pairwise.sum(1)
        return total

    return data_free(groups, "fpgm", distance)


@torch.no_grad()
def whc_scores(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[Tensor] = (), *, seed: int = 0
) -> Scores:
    """Score channels by the weighted hybrid criterion: large filters unlike the others.

    S_c = Σ_layers ‖w_c‖ Σ_{j≠c} ‖w_j‖ (1 − |cos(w_c, w_j)|), over the layers that write the
    channels (the producer side).

    Reference:
        Chen et al. 2023, "WHC: weighted hybrid criterion for filter pruning on convolutional
        neural networks", ICASSP, https://arxiv.org/abs/2302.08185
    """
    weights = weights_of(model)

    def unlike(group: ChannelGroup) -> Tensor:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for channels, filters in _filters(weights, group):
            norms = filters.norm(dim=1)
            # Norms times cosine is the inner product: no division, so no filter is too small.
            pairs = (torch.outer(norms, norms) - (filters @ filters.T).abs()).clamp_min(0)
            total[channels] += pairs.fill_diagonal_(0).sum(1)
        return total

    return data_free(groups, "whc", unlike)


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
        rows = owned_rows(weight, part)
        order = torch.argsort(part.channel.cpu(), stable=True)
        channels, local, counts = torch.unique(
            part.channel.cpu()[order], return_inverse=True, return_counts=True
        )
        slot = torch.arange(len(order)) - (counts.cumsum(0) - counts)[local]
        filters = rows.new_zeros(len(channels), int(counts.max()), rows.shape[1])
        filters[local, slot] = rows[order]
        yield channels, filters.flatten(1)
