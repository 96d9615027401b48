"""The cheapest selection that leaves every layer a channel: what a budget cannot go below."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.budget import Budget, unit_costs
from tpvprune.groups.removal import restore_empty
from tpvprune.widths.limits import Limits


def narrowest(
    groups: ChannelGroups,
    of: Budget = "macs",
    *,
    ranks: Mapping[str, Tensor] | None = None,
    limits: Limits | None = None,
) -> Kept:
    """Return the selection of least cost that the limits and every layer's need allow.

    Channels of one group need not run through the same layers. The few that run through most serve
    all of them; what a limit asks for beyond those are the cheapest.

    ``ranks``: group name -> Tensor [C], bigger = keep, where channels cost the same; by default the
    first. Returns group name -> BoolTensor [C], which
    :func:`tpvprune.groups.removal.remove_channels` accepts.
    """
    costs = unit_costs(groups, of)
    none = {g.name: torch.zeros(g.num_channels, dtype=torch.bool) for g in groups}
    if ranks is None:
        ranks = {g.name: -torch.arange(g.num_channels) for g in groups}
    shared = {name: _positions(ranks[name].cpu(), cost) for name, cost in costs.items()}
    kept = restore_empty(groups, none, shared)
    for group in groups:
        mask = kept[group.name]
        if not mask.any():
            mask[shared[group.name].argmax()] = True
        missing = (limits or Limits()).least(group) - int(mask.sum())
        cheap = _positions(ranks[group.name].cpu(), -costs[group.name]).masked_fill(mask, -1)
        mask[cheap.topk(max(0, missing)).indices] = True
    return kept


def _positions(ties: Tensor, values: Tensor) -> Tensor:
    """Return the place of each entry in the ascending order of values, then of ties."""
    order = ties.argsort(stable=True)
    order = order[values[order].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
