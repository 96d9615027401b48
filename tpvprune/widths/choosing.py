"""How one round of pruning chooses the channels that stay: the budget, and the ranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor, nn

from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.budget import Budget, LatencyTable, cost, reaches
from tpvprune.groups.removal import remove_channels, restore_empty
from tpvprune.passes.clock import Clock, Counted
from tpvprune.processes.shares import by_first, check_same
from tpvprune.scores.criteria import scorer
from tpvprune.scores.curves import StandIn, variance_curves
from tpvprune.scores.tpv import Scores
from tpvprune.widths.absorption import absorption, scaled
from tpvprune.widths.allocation import allocate
from tpvprune.widths.latency import Speed, as_fast_as, compare_latency, latency_table
from tpvprune.widths.narrowest import narrowest
from tpvprune.widths.rounds import Rounds
from tpvprune.widths.selection import Floors, select_channels

Of = Literal["macs", "params", "latency"]

# Where scores do not choose but are reported: so many images, fewer of a large model.
_FEWEST, _MOST, _MACS = 32, 128, 1e12
_MOST_AIMS = 100  # each is lower than the one before; a handful is what it takes


def stand_in(repair: str) -> StandIn:
    """Return what takes the place of a channel when this repair follows.

    Args:
        repair: See :func:`tpvprune.prune`.

    Returns:
        ``"map"`` where weights are refitted; see :func:`tpvprune.scores.curves.variance_curves`.
    """
    # Recalibrating BatchNorm restores the means.
    places: dict[str, StandIn] = {"none": "zero", "bn": "mean"}
    return places.get(repair, "map")


@dataclass
class Aim:
    """What must be met: a budget, and for milliseconds the proof by the clock."""

    budget: Budget
    keep: float
    dense: nn.Module
    batch: Tensor
    speed: Speed | None = None

    def round_to(self, wanted: int) -> int:
        """Return the multiple to round widths to: the one that runs fast, if none is wanted."""
        if wanted == 1 and isinstance(self.budget, LatencyTable):
            return self.budget.step
        return wanted

    def cost(self, groups: ChannelGroups) -> float:
        """Return the cost of the whole."""
        return cost(groups, {}, self.budget)

    def choose(
        self,
        choose: Callable[[float], Kept],
        pruned: nn.Module,
        groups: ChannelGroups,
        target: float,
        *,
        last: bool,
    ) -> Kept:
        """Return what stays; the last choice is made by the clock where time is the budget."""

        def measure(chosen: Kept) -> Speed:
            smaller = remove_channels(pruned, groups, chosen)
            return by_first(compare_latency, self.dense, smaller, self.batch)

        if not last or not isinstance(self.budget, LatencyTable):
            return choose(target)
        chosen, self.speed = as_fast_as(self.keep, target, choose, measure)
        return chosen

    def reached(self, groups: ChannelGroups, kept: Kept) -> bool:
        """Return whether what stays meets the budget."""
        if self.speed is not None:
            return self.speed.ratio <= self.keep
        return reaches(groups, kept, keep=self.keep, of=self.budget)

    def facts(self) -> dict[str, Any]:
        """Return what the report says of the speed, where it was measured."""
        return {} if self.speed is None else {"speed": asdict(self.speed)}


def aim_at(of: Of, keep: float, model: nn.Module, groups: ChannelGroups, batch: Tensor) -> Aim:
    """Return what must be met.

    Args:
        of: What the budget is of.
        keep: Fraction of the dense cost that stays.
        model: The dense model.
        groups: Its channel groups.
        batch: One call's inputs, where time is the budget.

    Returns:
        The aim, with the measured costs of widths where time is the budget.
    """
    budget = by_first(latency_table, model, groups, batch) if of == "latency" else of
    return Aim(budget, keep, model, batch)


@dataclass(frozen=True)
class Selector:
    """How a round finds out which channels matter least."""

    criterion: str
    use_curves: bool
    stand_in: StandIn
    per_cost: bool
    fit: list[Tensor]
    source: Any
    budget: Budget
    floors: Floors
    probing: Mapping[str, Any]
    clock: Clock

    def scored(
        self, rounds: Rounds, groups: ChannelGroups, step: int, steps: int, *, always: bool = False
    ) -> Scores | None:
        """Return the scores of the network as it is, where the choice needs them."""
        if rounds.scores is not None and self.use_curves and not always:
            return None
        with self.clock("scores", step, steps):
            few = self.use_curves and not always
            num = max(_FEWEST, min(_MOST, int(_MACS / max(groups.macs(), 1.0))))
            source = _first(self.source, num) if few else self.source
            found = self._score(rounds.model, groups, source)
        rounds.scores = rounds.scores or found
        return found

    def prepared(
        self,
        rounds: Rounds,
        groups: ChannelGroups,
        target: float,
        found: Scores | None,
        *,
        rank: bool = False,
    ) -> Callable[[float], Kept]:
        """Return how to choose widths for a fraction of the cost of the network as it is.

        With ``rank`` by ranking single channels, whatever was asked for.
        """
        if self.use_curves and not rank:
            choose, ranks = self._by_curves(rounds, groups, target)
            return partial(_feasible, choose, groups, ranks, of=self.budget, floors=self.floors)
        assert found is not None
        choose = partial(
            select_channels, rounds.model, groups, found,
            of=self.budget, per_cost=self.per_cost, **self.floors,
        )  # fmt: skip
        return partial(_feasible, choose, groups, {**found}, of=self.budget, floors=self.floors)

    def predicted(self, rounds: Rounds, chosen: Kept) -> float:
        """Return the output variance that the curves promise of a choice; 0 without curves."""
        return sum(
            float(curve.variance[int((~chosen[name]).sum())])
            for name, curve in (rounds.curves or {}).items()
            if name in chosen
        )

    def _score(self, model: nn.Module, groups: ChannelGroups, source: Any) -> Scores:
        seen = Counted(source, "scoring", self.clock.progress)
        options: Mapping[str, Any] = {"seed": self.probing["seed"]}
        if self.criterion == "tpv":
            options = {**self.probing, "compensated": self.stand_in != "zero"}
        return scorer(self.criterion)(model, groups, seen, **options)

    def _by_curves(
        self, rounds: Rounds, groups: ChannelGroups, target: float
    ) -> tuple[Callable[..., Kept], Mapping[str, Tensor]]:
        """Return how to choose widths, and the channels' ranks; measure the factors once."""
        progress = self.clock.progress
        curves = variance_curves(
            rounds.model,
            groups,
            Counted(self.fit, "curves", progress, passes=2),
            stand_in=self.stand_in,
            of=self.budget,
            progress=progress,
            **self.probing,
        )
        ranks = {name: curve.order.argsort() for name, curve in curves.items()}
        choose = partial(allocate, groups, of=self.budget, **self.floors)
        if rounds.factors is None:
            draft = restore_empty(groups, choose(curves, keep=target), ranks)
            rounds.factors = absorption(
                rounds.model, groups, draft, curves, self.fit,
                seed=self.probing["seed"], progress=progress,
            )  # fmt: skip
        rounds.curves = scaled(curves, rounds.factors)
        return partial(choose, rounds.curves), ranks


def _first(batches: list[Tensor], num: int) -> list[Tensor]:
    """Return the first batches, of so many images or a few more."""
    starts = accumulate((len(x) for x in batches), initial=0)
    return [x for x, start in zip(batches, starts, strict=False) if start < num]


def _feasible(
    choose: Callable[..., Kept],
    groups: ChannelGroups,
    ranks: Mapping[str, Tensor],
    keep: float,
    *,
    of: Budget,
    floors: Floors,
) -> Kept:
    """Return a selection that fits the budget, if any does, and leaves every layer a channel."""
    chosen = _fitting(choose, groups, ranks, keep, of) or narrowest(
        groups, of, ranks=ranks, **floors
    )
    check_same("channels to cut", chosen)
    return chosen


def _fitting(
    choose: Callable[..., Kept],
    groups: ChannelGroups,
    ranks: Mapping[str, Tensor],
    keep: float,
    of: Budget,
) -> Kept | None:
    """Return a selection that fits the budget, or None where aiming lower finds no other."""
    dense, aim, before = cost(groups, {}, of), keep, None
    for _ in range(_MOST_AIMS):
        wanted = choose(keep=aim)
        chosen = restore_empty(groups, wanted, ranks)
        if reaches(groups, chosen, keep=keep, of=of):
            return chosen
        found = cost(groups, wanted, of), cost(groups, chosen, of)
        if found == before:  # the floors
            return None
        # Channels were put back where a layer would have none: the others must pay for them.
        aim, before = min(aim, found[0] / dense) * keep * dense / found[1], found
        if not 0 < aim < 1:
            return None
    return None
