"""Scores to compare against that look at activations, without gradients or labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.moments import Moments
from tpvprune.passes.observer import Observer
from tpvprune.passes.running import evaluating, on_device
from tpvprune.scores.baselines.gradients import channel_sums
from tpvprune.scores.tpv import Scores


@torch.no_grad()
def activation_variance_scores(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[Any], *, seed: int = 0
) -> Scores:
    """Score channels by how much their activation varies.

    S_c = Σ_m Var_{x,p}(a_{m,c}(x, p)), with a_m the input of reader m and p its positions
    or tokens, in squared activation units. A reader that takes several features of one channel adds
    their variances.

    Reference:
        Berisha et al. 2025, "Variance-based pruning", https://arxiv.org/abs/2507.12988
        (hidden layers of transformer MLPs; here every cut).
    """
    channel_dims = {r.call: r.channel_dim for group in groups for r in group.readers}
    moments: dict[int, Moments] = {}

    def add(call: int, read: Tensor) -> None:
        rows = read.movedim(channel_dims[call], -1)
        rows = rows.reshape(-1, rows.shape[-1])
        if call not in moments:
            moments[call] = Moments(rows.shape[1], device=rows.device)
        moments[call].add(rows.double())

    num_samples = 0
    with evaluating(model):
        for inputs in unlabeled(batches):
            num_samples += len(inputs)
            with Observer(set(channel_dims), add):
                model(on_device(inputs, model))

    variances = {call: found.spread / found.count for call, found in moments.items()}
    values = {g.name: channel_sums(g, ((r, variances[r.call]) for r in g.readers)) for g in groups}
    return Scores(values, num_samples=num_samples, criterion="activation_variance")
