"""The rounds of a run (cut, repair, measure), and what is said of it: plain data, for JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tpvprune.groups import ChannelGroups, Kept, find_groups, with_blocked
from tpvprune.groups.budget import LatencyTable, cost
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.evaluation import Difference
from tpvprune.pipeline.setup import Depth, Setup
from tpvprune.processes.shares import by_first, total
from tpvprune.repairs import guard
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.repairs.compensation import compensate_weights
from tpvprune.repairs.reconstruction import reconstruct_blocks
from tpvprune.runtimes.names import TABLE
from tpvprune.widths.ranking import Ranking
from tpvprune.widths.rounds import Rounds
from tpvprune.widths.speed import Speed, Stopwatch, as_fast_as


@dataclass(frozen=True)
class Run:
    """What does not change between rounds; ``notes`` and ``used`` grow for the report."""

    given: Setup
    notes: list[str] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)

    def ranked(self, rounds: Rounds, step: int) -> tuple[ChannelGroups, Ranking]:
        """Rank the channels of the network as it is."""
        given, model = self.given, rounds.model
        if step == 1:
            return given.groups, rounds.ranking
        groups = _regrouped(model, given.groups, rounds.kept, given.batch[:1])
        found = given.by.ranked(model, groups, given.fit, given.clock)
        return groups, replace(found, factors=rounds.ranking.factors)

    def cut(self, rounds: Rounds, step: int, groups: ChannelGroups, ranking: Ranking) -> None:
        """Choose widths, and remove what must go."""
        given, model, steps = self.given, rounds.model, self.given.told.steps
        with given.clock("selection", step, steps):
            target = given.told.keep ** (step / steps) * given.dense_cost
            target = min(1.0, target / cost(groups, {}, given.budget))
            choose = partial(ranking.choose, groups, of=given.budget, limits=given.limits)
            chosen, rounds.speed = self._chosen(rounds, groups, choose, target, step)
            rounds.predicted += ranking.predicted(chosen)
        with given.clock("removal", step, steps):
            rounds.model = remove_channels(model, groups, chosen)
            rounds.kept = compose(rounds.kept, chosen)
        rounds.chosen = step

    def _chosen(
        self,
        rounds: Rounds,
        groups: ChannelGroups,
        choose: Callable[..., Kept],
        target: float,
        step: int,
    ) -> tuple[Kept, Speed | None]:
        """Return what stays; the last choice is made by the clock where time is the budget."""
        given = self.given
        budget = given.budget
        if step < given.told.steps or not isinstance(budget, LatencyTable):
            return choose(keep=target), None
        if budget.runtime == TABLE:
            chosen = choose(keep=target)
            pruned_ms = cost(groups, chosen, budget)
            return chosen, Speed.predicted(
                given.dense_cost, pruned_ms, batch_size=budget.batch_size, device=budget.device
            )
        runtime: Any = budget.runtime
        watch = Stopwatch(given.dense, given.batch, runtime, budget.num_threads)

        def measure(chosen: Kept) -> Speed:
            return by_first(watch.compare, remove_channels(rounds.model, groups, chosen))

        return as_fast_as(given.told.keep, target, lambda share: choose(keep=share), measure)

    def repaired(self, rounds: Rounds, step: int) -> tuple[dict[str, nn.Module], Difference]:
        """Return repaired models, cheapest first, and how far the last is from the dense one."""
        given, cut, refits = self.given, rounds.model, {}
        repair, steps = given.told.repair, given.told.steps
        options: dict[str, Any] = {
            "groups": given.groups, "kept": rounds.kept, **given.told.views,
        }  # fmt: skip
        options["seed"] = given.by.probing.seed
        if repair == "bn":
            refits["bn"] = recalibrate_batchnorm(cut, given.fit)
        if repair in {"compensate", "reconstruct", "auto"}:
            with given.clock("compensation", step, steps):
                refits["compensate"] = compensate_weights(
                    cut, given.aligned, given.fit, **options, wanted=given.wanted(),
                    progress=given.clock.progress,
                )  # fmt: skip
        if repair == "reconstruct" and step == steps:
            with given.clock("reconstruction", step, steps):
                refits["reconstruct"] = reconstruct_blocks(
                    cut, given.aligned, given.fit, **options, used=self.used,
                    num_fits=given.told.reconstructions, progress=given.clock.progress,
                )  # fmt: skip
        rounds.model = [cut, *refits.values()][-1]
        with given.clock("measurement", step, steps):
            return refits, self.given.reference.difference(rounds.model)

    def ranked_instead(
        self,
        before: Rounds,
        rounds: Rounds,
        step: int,
        refits: dict[str, nn.Module],
        outcome: Difference,
        *,
        ranked: tuple[ChannelGroups, Ranking],
    ) -> tuple[dict[str, nn.Module], Difference]:
        """Choose widths by the scores of single channels where curves may be wrong.

        That is where they promised far less damage than there is, and, unless they were asked for,
        where no weights are refitted: deep cuts are not of the first order then. Returns what
        :meth:`repaired` does, of the better cut; ``rounds`` is at it.
        """
        by = self.given.by
        doubted = by.allocation is None and by.stand_in != "map"
        wrong = guard.cannot_be_true(outcome, rounds.predicted)
        if by.how != "curves" or not (doubted or wrong):
            return refits, outcome
        groups, ranking = ranked
        self.cut(before, step, groups, ranking.by_scores(groups, by.of))
        others, second = self.repaired(before, step)
        if not second.share < outcome.share:
            return refits, outcome
        self.notes.append(
            f"step {step}: widths by variance curves left {outcome.share:.2g} of the dense "
            f"model's variance where ranked ones leave {second.share:.2g}: these were taken"
        )
        rounds.kept, rounds.model, rounds.speed = before.kept, before.model, before.speed
        return others, second

    def compared(
        self,
        removed: nn.Module,
        refits: Mapping[str, nn.Module],
        last: nn.Module,
        outcome: Difference,
    ) -> tuple[dict[str, nn.Module], dict[str, Difference]]:
        """Return models by repair, and how far each is from the dense one; ``last`` is known."""
        candidates, fit, repair = {"none": removed}, self.given.fit, self.given.told.repair
        if repair == "auto":
            candidates["bn"] = recalibrate_batchnorm(removed, fit)
        candidates |= refits
        if repair == "auto":
            candidates["compensate+bn"] = recalibrate_batchnorm(refits["compensate"], fit)
        measured = {
            name: outcome if found is last else self.given.reference.difference(found)
            for name, found in candidates.items()
        }
        missing = refits and "bn" not in candidates
        if missing and guard.best_repair(measured, repair) == "none":
            candidates["bn"] = recalibrate_batchnorm(removed, fit)
            measured["bn"] = self.given.reference.difference(candidates["bn"])
        return candidates, measured


def _regrouped(pruned: nn.Module, groups: ChannelGroups, kept: Kept, x: Tensor) -> ChannelGroups:
    """Return the groups of a pruned model; what was blocked stays blocked."""
    # A cut that was proved on the dense model holds on its pruned form: no new verification.
    found = find_groups(pruned, x, verify=False)
    gone = {
        g.name: "blocked in the dense model"
        for g in found
        if g.name not in groups or g.num_channels != int(kept[g.name].sum())
    }
    return with_blocked(found, gone)


def compose(kept: Kept, chosen: Mapping[str, Tensor]) -> Kept:
    """Return what stays of the dense channels after ``chosen`` of the present ones stayed."""
    composed = {name: mask.clone() for name, mask in kept.items()}
    for name, mask in chosen.items():
        composed[name][kept[name].nonzero().squeeze(1)[~mask]] = False
    return composed


def report_of(
    run: Run, rounds: Rounds, measured: Mapping[str, Difference], best: str
) -> dict[str, Any]:
    """Return the report; ``measured``: how far each repair is from the dense model."""
    given, told = run.given, run.given.told
    num_fit = int(total(sum(map(len, given.fit))))
    spent = cost(given.groups, rounds.kept, given.budget)
    reached = spent <= told.keep * given.dense_cost * (1 + 1e-9)
    speed = {} if rounds.speed is None else {"speed": asdict(rounds.speed)}
    if rounds.speed is not None and rounds.speed.rounds:  # else a table says it
        reached = rounds.speed.ratio <= told.keep
    return {
        "keep": told.keep,
        "of": told.of,
        "repair": told.repair,
        "repair_chosen": best,
        "warnings": [*guard.warnings_of(measured, told.repair, best), *run.notes, *given.notes],
        "seed": told.seed,
        "criterion": given.by.name,
        "used_labels": rounds.ranking.scores.used_labels,
        "allocation": given.by.how,
        "granularity": told.named_leaves,
        "round_to": given.limits.round_to,
        "num_images": num_fit,
        "num_held_back": int(total(sum(map(len, given.held)))),
        "mirrored": told.mirrored,
        "reconstructions": told.reconstructions,
        "images_used": {"selection": num_fit, "repair": num_fit, **run.used},
        "reached": reached,
        **speed,
        "held_back": guard.facts(measured[best]),
        "output_variance": {n: m.output_variance for n, m in measured.items()},
        "variance_share": {n: m.share for n, m in measured.items()},
        "output_second_moment": given.reference.second_moment(),
        "steps": rounds.history,
        "timings": given.clock.seconds,
        **_widths(given.groups, rounds.kept),
        **_depth(given.depth),
    }


def _depth(depth: Depth | None) -> dict[str, Any]:
    """Return what is said of branches, and the dense costs with them."""
    if depth is None:
        return {}
    return {
        "dense": dict(depth.dense),
        "branches": [
            {"name": name, "score": score, "gone": name in depth.gone}
            for name, score in depth.branches.items()
        ],
    }


def _widths(groups: ChannelGroups, kept: Kept) -> dict[str, Any]:
    return {
        "dense": {"macs": groups.macs(), "params": groups.params()},
        "pruned": {"macs": groups.macs(kept), "params": groups.params(kept)},
        "groups": [
            {
                "name": g.name,
                "unit": g.unit,
                "num_channels": g.num_channels,
                "kept": int(kept[g.name].sum()),
            }
            for g in groups
        ],
        "blocked": [
            {"name": b.name, "num_channels": b.num_channels, "reason": b.blocked}
            for b in groups.blocked
        ],
    }
