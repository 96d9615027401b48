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
    """Return the groups; a ValueError in all processes if they differ between these."""
    # Not the reasons: they quote rounding, which may differ between machines.
    check_same("channel groups", [(g.name, g.num_channels) for g in groups])
    return groups


def prunable(groups: ChannelGroups) -> ChannelGroups:
    """Return the groups; ValueError if there is nothing to prune."""
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
    made, wrong = ranking.scores.criterion, ""
    found = {name: len(curve.order) for name, curve in ranking.curves.items()}
    if ranking.allocation != by.how:
        wrong = f"one by {by.how}, found one by {ranking.allocation}"
    elif made != by.name and {made, by.name} <= SCORERS.keys():  # one of one's own has any name
        wrong = f"one by {by.name!r}, found one by {made!r}"
    elif by.criterion == "tpv" and ranking.stand_in != by.stand_in:
        wrong = (
            f"one where a {by.stand_in} takes the place of a channel, as it will after this "
            f"repair, found one where a {ranking.stand_in} does"
        )
    elif found != {g.name: g.num_channels for g in groups}:
        wrong = f"one of the groups of this model, found {len(found)} others"
    elif ranking.of != digest_of(model).hex():
        wrong = "one of these weights, found one of others"
    if wrong:
        raise ValueError(f"ranking: expected {wrong}: leave it out, and channels are ranked anew")
