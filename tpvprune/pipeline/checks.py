"""Groups, limits and rankings that do not go together, each told in one line."""

from __future__ import annotations

from torch import nn

from tpvprune.disk.digest import digest_of
from tpvprune.groups import ChannelGroups
from tpvprune.processes.shares import check_same
from tpvprune.scores.criteria import SCORERS
from tpvprune.widths.limits import Limits
from tpvprune.widths.ranking import RankBy, Ranking


def agreed(groups: ChannelGroups) -> ChannelGroups:
    """Return the groups, which are the same in all processes.

    ValueError if they are not; everywhere, and before anything is summed over them.
    """
    # Not the reasons: they quote rounding, which may differ between machines.
    check_same("channel groups", [(g.name, g.num_channels) for g in groups])
    return groups


def prunable(groups: ChannelGroups) -> ChannelGroups:
    """Return the groups.

    ValueError if there is nothing to prune.
    """
    if len(groups):
        return groups
    # The head is blocked in every network: what else is says more.
    blocked = sorted(groups.blocked, key=lambda b: b.blocked == "is an output of the network")
    reasons = "; ".join(f"{b.name}: {b.blocked}" for b in blocked[:3])
    raise ValueError(f"expected a model with channels that can be pruned, found none ({reasons}).")


def check_rounding(limits: Limits, groups: ChannelGroups) -> None:
    """Check what widths are to be multiples of."""
    widest = max((g.num_channels for g in groups if g.unit == "channel"), default=1)
    if limits.round_to > max(1, widest):
        raise ValueError(
            f"round_to: expected at most {widest}, the width of the widest group, found "
            f"{limits.round_to}"
        )


def check_ranking(
    ranking: Ranking | None, by: RankBy, model: nn.Module, groups: ChannelGroups
) -> None:
    """Check a ranking that was given."""
    if ranking is None:
        return
    if ranking.allocation != by.how:
        raise ValueError(
            f"ranking: expected one by {by.how}, found one by {ranking.allocation}: leave it out, "
            "and channels are ranked anew"
        )
    made = ranking.scores.criterion
    if made != by.name and {made, by.name} <= SCORERS.keys():  # one of one's own has any name
        raise ValueError(
            f"ranking: expected one by {by.name!r}, found one by {made!r}: leave it out, and "
            "channels are ranked anew"
        )
    if by.criterion == "tpv" and ranking.stand_in != by.stand_in:
        raise ValueError(
            f"ranking: expected one where a {by.stand_in} takes the place of a channel, as it will "
            f"after this repair, found one where a {ranking.stand_in} does: leave it out, and "
            "channels are ranked anew"
        )
    found = {name: len(curve.order) for name, curve in ranking.curves.items()}
    if found != {g.name: g.num_channels for g in groups}:
        raise ValueError(
            f"ranking: expected one of the groups of this model, found {len(found)} others: leave "
            "it out, and channels are ranked anew"
        )
    if ranking.of != digest_of(model).hex():
        raise ValueError(
            "ranking: expected one of these weights, found one of others: leave it out, and "
            "channels are ranked anew"
        )
