"""Arguments of :func:`tpvprune.prune` that do not go together, each told in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from tpvprune.disk.digest import digest_of
from tpvprune.groups import ChannelGroups
from tpvprune.groups.budget import LatencyTable
from tpvprune.processes.shares import check_same
from tpvprune.runtimes.names import check_runtime
from tpvprune.scores.criteria import SCORERS
from tpvprune.widths.limits import Limits
from tpvprune.widths.ranking import RankBy, Ranking

Repair = Literal["none", "bn", "compensate", "reconstruct", "auto"]
Of = Literal["macs", "params", "latency"]
Granularity = Literal["channel", "branch"]


def check_repairs(steps: int, *repairs: str | None) -> None:
    """Check repairs and the number of rounds."""
    for repair in repairs:
        if repair not in {None, *get_args(Repair)}:
            known = ", ".join(get_args(Repair))
            raise ValueError(f"repair: expected one of {known}, found {repair!r}.")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, found {steps}.")


def granularity_for(granularity: Sequence[Granularity] | None, of: Of) -> Sequence[Granularity]:
    """Return what may leave.

    ``granularity``: what was asked for; None: nothing. Returns that; of what was not asked for
    branches beside channels where milliseconds count, as narrower layers do not spare calls; else
    channels.
    """
    usual: dict[str, Sequence[Granularity]] = {"latency": ("channel", "branch")}
    return usual.get(of, ("channel",)) if granularity is None else granularity


def check_granularity(granularity: Sequence[str], max_depth_removed: float) -> None:
    """Check what may leave."""
    known = get_args(Granularity)
    if not granularity or isinstance(granularity, str) or set(granularity) - set(known):
        raise ValueError(f"granularity: expected some of {known}, found {granularity!r}.")
    if not 0 <= max_depth_removed <= 1:
        raise ValueError(
            f"max_depth_removed: expected a fraction in [0, 1], found {max_depth_removed}."
        )


def check_latency(
    of: str, batch_size: int, runtime: str | LatencyTable, threads: int | None
) -> None:
    """Check where milliseconds are measured."""
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError(
            "latency_batch_size and latency_threads: expected at least 1, found "
            f"{batch_size} and {threads}"
        )
    if of != "latency" and (runtime != "eager" or threads is not None):
        raise ValueError(
            "latency_runtime and latency_threads: expected only with a budget of latency, found "
            f"one of {of}: leave them out"
        )
    if not isinstance(runtime, LatencyTable):
        check_runtime(runtime)
    elif batch_size not in {1, runtime.batch_size}:
        raise ValueError(
            f"latency_batch_size: expected {runtime.batch_size}, that of the table, found "
            f"{batch_size}: leave it out, or write another table"
        )


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
