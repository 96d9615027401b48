"""The whole method: groups -> ranking -> widths -> removal -> repair -> measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.disk.digest import digest_of
from tpvprune.groups import (
    ChannelGroups,
    Kept,
    find_groups,
    fused_attention,
    unfuse_attention,
    with_blocked,
)
from tpvprune.groups.budget import Budget, LatencyTable, check_budget, cost, reaches
from tpvprune.groups.reaching import unseen
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.clock import Clock, Progress
from tpvprune.passes.drawing import NUM_IMAGES, hold_back
from tpvprune.passes.evaluation import Difference, difference
from tpvprune.passes.finite import check_outputs
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device
from tpvprune.processes.shares import by_first, check_same, from_first, total
from tpvprune.repairs import guard
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.repairs.compensation import compensate_weights
from tpvprune.repairs.reconstruction import reconstruct_blocks
from tpvprune.scores.criteria import SCORERS, Scorer
from tpvprune.scores.curves import StandIn
from tpvprune.scores.taps import Probing
from tpvprune.scores.tpv import Scores
from tpvprune.widths.latency import Speed, as_fast_as, compare_latency, latency_table
from tpvprune.widths.limits import Limits
from tpvprune.widths.ranking import Allocation, RankBy, Ranking
from tpvprune.widths.repair_factors import repair_factors as measured_factors
from tpvprune.widths.rounds import Record, Rounds

Repair = Literal["none", "bn", "compensate", "reconstruct", "auto"]
Of = Literal["macs", "params", "latency"]

# Repair factors take four compensations more, minutes at most: on so many MACs of forwards, unless
# that leaves too few images to fit and to measure with; more would tell nothing new.
_FACTOR_MACS, _FACTOR_IMAGES = 2e11, (256, 1024)
_FACTOR_KEEP = 0.6  # of the cost: they hardly depend on it, and so they serve every size


@dataclass(frozen=True)
class PruningResult:
    """What :func:`prune` returns: the smaller model and how it came about.

    ``kept`` says which channels stayed, ``ranking`` what they were worth: another budget needs no
    new one (``prune(..., ranking=result.ranking)``). ``report`` is plain data (JSON-ready): budget,
    cost before and after, output variance of the repairs on held-back images, steps, widths,
    blocked groups with reasons, timings in seconds.
    """

    model: nn.Module
    groups: ChannelGroups
    ranking: Ranking
    kept: Kept
    report: dict[str, Any]

    @property
    def scores(self) -> Scores:
        """What each channel is worth by itself."""
        return self.ranking.scores

    @property
    def reached(self) -> bool:
        """Whether the budget was met."""
        return bool(self.report["reached"])

    @property
    def warnings(self) -> list[str]:
        """What the user must know, a line each; the worst first."""
        return list(self.report["warnings"])


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    keep: float = 0.5,
    of: Of = "macs",
    criterion: str | Scorer = "tpv",
    repair: Repair = "compensate",
    allocation: Allocation | None = None,
    limits: Limits | None = None,
    ranking: Ranking | None = None,
    planned_repair: Repair | None = None,
    repair_factors: bool | None = None,
    steps: int = 1,
    num_images: int | None = NUM_IMAGES,
    latency_batch_size: int = 1,
    probing: Probing | None = None,
    outputs: Chosen | None = None,
    state: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruningResult:
    """Prune a pretrained model to a budget with unlabeled inputs, and repair it.

    Args:
        model: Any vision model; untouched. ``nn.MultiheadAttention`` in it is replaced first
            (:func:`tpvprune.unfuse_attention`).
        batches: Re-iterable of unlabeled input tensors [B, ...]; a labelled loader is accepted and
            its labels are dropped before anything sees them. Order does not matter.
        keep: Fraction of the dense cost that stays, in (0, 1].
        of: ``"macs"``, ``"params"``, or ``"latency"``: milliseconds measured on the device of the
            model (:mod:`tpvprune.widths.latency`); ``report["speed"]`` holds what came of it.
        criterion: A key of ``tpvprune.SCORERS``, or a scorer ``(model, groups, batches, seed=0) ->
            Scores``; one that needs labels brings them (:func:`tpvprune.with_labels`).
        repair: ``"none"``, ``"bn"`` (BatchNorm recalibration), ``"compensate"`` (weight
            compensation), ``"reconstruct"`` (block reconstruction: minutes where compensation
            takes seconds, and mostly better), or ``"auto"``: of none, bn and compensate the one
            closest to the dense model on the held-back inputs. A repair that is further from it
            there than a cheaper one is not returned: ``report["repair_chosen"]`` and
            ``report["warnings"]`` say so.
        allocation: ``"curves"``: widths by joint variance curves and a dynamic programme
            (``"tpv"`` only, its default); ``"rank"``: greedy ranking by score per cost;
            ``"plain"``: by score alone.
        limits: How far groups may shrink, and what stays whole.
        ranking: Of an earlier result on the same model, images and criterion, for another budget.
        planned_repair: The repair that ``"tpv"`` counts on: only where weights are refitted will
            other channels stand in for those that leave. None: ``repair``; another where you
            repair the result yourself.
        repair_factors: Scale the curves by how much of an early, middle or late cut the repair
            makes up for (:mod:`tpvprune.widths.repair_factors`), at four compensations more; None:
            where the planned repair refits weights and that is cheap (256 of the images, or all,
            at 2e11 MACs of forwards at most).
        steps: Prune in so many rounds of equal ratio, each scored on the repaired network before.
        num_images: So many images are drawn at random from ``batches``, or all where there are no
            more, or with None; a random tenth of them, at most 128, is held back to measure
            repairs. The loader is never held whole in memory, and of a DataLoader over a larger
            dataset only what is drawn is loaded.
        latency_batch_size: Inputs of one call, where latency is the budget.
        probing: How the passes of ``"tpv"`` are run (its seed is ``seed``).
        outputs: Of a model with several outputs those that count, or how much each counts, in units
            of its own second moment; None: all, alike. A name is the keys or places on the way to
            the tensor, joined by dots: ``"logits"``, ``"0"``, ``"aux.1"``. Agreement is that of the
            first.
        state: File for the state of the unfinished run, written whenever channels have left; if
            it is that of the same model, inputs and arguments, the run goes on from there to the
            same result. The caller removes it. Among several processes it is not used.
        seed: Of everything random.
        progress: Called with (stage, done, total).

    Returns:
        The result; ``reached`` tells whether the budget was met.

    Raises:
        ValueError: If an argument is out of range, the criterion needs labels and has none, or
            the state is damaged.
    """
    check_budget(keep, "macs" if of == "latency" else of)
    _check_repairs(steps, repair, planned_repair)
    limits = limits or Limits()
    clock = Clock(progress)
    fused = fused_attention(model)
    model = unfuse_attention(model) if fused else model
    fit, held = hold_back(batches, num_images=num_images, seed=seed)
    with clock("groups"):
        counted = Outputs.measured(model, fit, outputs)
        probing = replace(probing or Probing(), seed=seed, outputs=counted)
        by = RankBy(criterion, allocation, "macs", stand_in(planned_repair or repair), probing)
        example = _example(model, fit, counted)
        groups = find_groups(model, example, ignore=limits.ignore)
        if outputs is not None:
            groups = with_blocked(groups, unseen(model, groups, (example,), list(counted.scales)))
        groups = _prunable(_agreed(groups))
        batch = example.repeat_interleave(latency_batch_size, 0)
        budget = by_first(latency_table, model, groups, batch) if of == "latency" else of
    _check_rounding(limits, groups)
    _check_ranking(ranking, by, model, groups)
    run = _Run(
        model, groups, fit, held, batch, budget, _rounded(limits, budget), replace(by, of=budget),
        repair, keep, steps, _images_for_factors(repair_factors, by, groups, fit), clock,
    )  # fmt: skip
    record = Record.of(
        state, model, dict(enumerate(fit)), keep, of, by.name, repair, steps, latency_batch_size,
        run.by.how, run.by.stand_in, run.by.probing, run.limits, run.images_for_factors,
        [g.name for g in groups], *_parts_of(ranking),
    )  # fmt: skip
    rounds = record.load(model, groups) or Rounds(model, _whole(groups), ranking=ranking)
    clock.seconds = {**clock.seconds, **rounds.seconds}
    for step in range(max(1, rounds.chosen), steps + 1):
        before = replace(rounds)
        if step > rounds.chosen:
            run.cut(rounds, step)
            record.save(rounds)
        refits, outcome = run.repaired(rounds, step)
        if rounds.chosen > before.chosen and guard.cannot_be_true(outcome, rounds.predicted):
            refits, outcome = run.ranked_instead(before, rounds, step, refits, outcome)
        costs = {"macs": groups.macs(rounds.kept), "params": groups.params(rounds.kept)}
        rounds.history.append({**costs, **guard.facts(outcome)})
    with clock("repair"):
        removed = remove_channels(model, groups, rounds.kept)
        candidates, measured = run.compared(removed, refits, rounds.model, outcome)
    best = guard.best_repair(measured, repair)
    assert rounds.ranking is not None
    report = {
        "keep": keep,
        "of": of,
        "repair": repair,
        "repair_chosen": best,
        "warnings": [
            *guard.warnings_of(measured, repair, best),
            *run.notes,
            *_said_of(counted),
            *_said_of_fused(fused),
            *groups.notes,
        ],
        "seed": seed,
        **run.facts(rounds),
        "held_back": guard.facts(measured[best]),
        "output_variance": {n: m.output_variance for n, m in measured.items()},
        "variance_share": {n: m.share for n, m in measured.items()},
        "output_second_moment": _second_moment(model, held, counted),
        "steps": rounds.history,
        "timings": clock.seconds,
        **_widths(groups, rounds.kept),
    }
    return PruningResult(candidates[best], groups, rounds.ranking, rounds.kept, report)


def stand_in(repair: str) -> StandIn:
    """Return what takes the place of a channel when this repair follows.

    Args:
        repair: See :func:`prune`.

    Returns:
        ``"map"`` where weights are refitted; see :func:`tpvprune.scores.curves.variance_curves`.
    """
    # Recalibrating BatchNorm restores the means.
    without_refit: dict[str, StandIn] = {"none": "zero", "bn": "mean"}
    return without_refit.get(repair, "map")


# ---- rounds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What does not change between rounds; ``notes`` and ``used`` grow for the report."""

    dense: nn.Module
    groups: ChannelGroups
    fit: list[Tensor]
    held: list[Tensor]
    batch: Tensor
    budget: Budget
    limits: Limits
    by: RankBy
    repair: Repair
    keep: float
    steps: int
    images_for_factors: int
    clock: Clock
    notes: list[str] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)

    def cut(self, rounds: Rounds, step: int, *, by: RankBy | None = None) -> None:
        """Rank the channels of the network as it is, choose widths, and remove what must go."""
        model, by = rounds.model, by or self.by
        groups = self.groups
        if step > 1:
            groups = _regrouped(model, self.groups, rounds.kept, self.batch[:1])
        ranking = rounds.ranking if step == 1 and by is self.by else None
        if ranking is None:
            ranking = by.ranked(model, groups, self.fit, self.clock)
        if rounds.ranking is None or rounds.ranking is ranking:
            ranking = rounds.ranking = self._with_factors(rounds.model, groups, ranking)
        ranking = replace(ranking, factors=rounds.ranking.factors)
        with self.clock("selection", step, self.steps):
            target = self.keep ** (step / self.steps) * cost(self.groups, {}, self.budget)
            target = min(1.0, target / cost(groups, {}, self.budget))
            choose = partial(ranking.choose, groups, of=self.budget, limits=self.limits)
            chosen, rounds.speed = self._chosen(rounds, groups, choose, target, step)
            rounds.predicted += ranking.predicted(chosen)
        with self.clock("removal", step, self.steps):
            rounds.model = remove_channels(model, groups, chosen)
            rounds.kept = compose(rounds.kept, chosen)
        rounds.chosen, rounds.seconds = step, self.clock.seconds

    def _with_factors(self, model: nn.Module, groups: ChannelGroups, ranking: Ranking) -> Ranking:
        """Return the ranking with what the repair makes up for, measured unless it has it."""
        if not self.images_for_factors or ranking.allocation != "curves":
            return replace(ranking, factors=None)
        if ranking.factors is not None:
            return ranking
        with self.clock("repair factors"):
            draft = ranking.choose(groups, keep=_FACTOR_KEEP, of=self.budget, limits=self.limits)
            factors = measured_factors(
                model, groups, draft, ranking.curves, self.fit,
                max_inputs=self.images_for_factors, seed=self.by.probing.seed,
                outputs=self.by.probing.outputs, progress=self.clock.progress,
            )  # fmt: skip
        return replace(ranking, factors=factors)

    def _chosen(
        self,
        rounds: Rounds,
        groups: ChannelGroups,
        choose: Callable[..., Kept],
        target: float,
        step: int,
    ) -> tuple[Kept, Speed | None]:
        """Return what stays; the last choice is made by the clock where time is the budget."""
        if step < self.steps or not isinstance(self.budget, LatencyTable):
            return choose(keep=target), None

        def measure(chosen: Kept) -> Speed:
            smaller = remove_channels(rounds.model, groups, chosen)
            return by_first(compare_latency, self.dense, smaller, self.batch)

        return as_fast_as(self.keep, target, lambda share: choose(keep=share), measure)

    def repaired(self, rounds: Rounds, step: int) -> tuple[dict[str, nn.Module], Difference]:
        """Repair the network, and measure how far it is from the dense one.

        Returns:
            The repaired models by repair, cheapest first, and the difference of the last.
        """
        seed = self.by.probing.seed
        given: dict[str, Any] = {"groups": self.groups, "kept": rounds.kept, "seed": seed}
        cut, refits = rounds.model, {}
        if self.repair in {"compensate", "reconstruct", "auto"}:
            with self.clock("compensation", step, self.steps):
                refits["compensate"] = compensate_weights(cut, self.dense, self.fit, **given)
        if self.repair == "reconstruct" and step == self.steps:
            with self.clock("reconstruction", step, self.steps):
                refits["reconstruct"] = reconstruct_blocks(
                    cut, self.dense, self.fit, **given, used=self.used,
                    progress=self.clock.progress,
                )  # fmt: skip
        rounds.model = [cut, *refits.values()][-1]
        with self.clock("measurement", step, self.steps):
            return refits, self._difference(rounds.model)

    def _difference(self, model: nn.Module) -> Difference:
        return difference(model, self.dense, self.held, outputs=self.by.probing.outputs)

    def ranked_instead(
        self,
        before: Rounds,
        rounds: Rounds,
        step: int,
        refits: dict[str, nn.Module],
        outcome: Difference,
    ) -> tuple[dict[str, nn.Module], Difference]:
        """Rank single channels where curves promised far less damage than there is.

        Returns:
            Of the two cuts the better one's repaired models and difference; ``rounds`` is at it.
        """
        if self.by.how != "curves":
            return refits, outcome
        self.cut(before, step, by=replace(self.by, allocation="rank"))
        others, second = self.repaired(before, step)
        if second.share >= outcome.share:
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
        """Return the models to choose from by repair, and how far each is from the dense one.

        Of the last of them this is known.
        """
        candidates = {"none": removed}
        if self.repair in {"bn", "auto"}:
            candidates["bn"] = recalibrate_batchnorm(removed, self.fit)
        candidates |= refits
        if self.repair == "auto":
            candidates["compensate+bn"] = recalibrate_batchnorm(refits["compensate"], self.fit)
        measured = {
            name: outcome if found is last else self._difference(found)
            for name, found in candidates.items()
        }
        if refits and guard.best_repair(measured, self.repair) == "none":
            candidates["bn"] = recalibrate_batchnorm(removed, self.fit)
            measured["bn"] = self._difference(candidates["bn"])
        return candidates, measured

    def facts(self, rounds: Rounds) -> dict[str, Any]:
        """Return what the report says of the images, the choice and the budget."""
        assert rounds.ranking is not None
        num_fit = int(total(_num(self.fit)))
        speed = {} if rounds.speed is None else {"speed": asdict(rounds.speed)}
        reached = reaches(self.groups, rounds.kept, keep=self.keep, of=self.budget)
        return {
            "criterion": self.by.name,
            "used_labels": rounds.ranking.scores.used_labels,
            "allocation": self.by.how,
            "num_images": num_fit,
            "num_held_back": int(total(_num(self.held))),
            "images_used": {"selection": num_fit, "repair": num_fit, **self.used},
            "reached": reached if rounds.speed is None else rounds.speed.ratio <= self.keep,
            **speed,
        }


# ---- pieces ---------------------------------------------------------------------------------


@torch.no_grad()
def _example(model: nn.Module, fit: list[Tensor], outputs: Outputs) -> Tensor:
    """Return the first input, for which the outputs are finite."""
    example = on_device(from_first(fit[0][:1]), model)
    with evaluating(model):
        check_outputs(model, example, outputs.joined(model(example), 1), batch=0)
    return example


def _said_of(outputs: Outputs) -> list[str]:
    """Return what is to be said of outputs that do not count, and of how several do."""
    lines = [
        f"output {name!r} {reason}: it is neither scored nor measured"
        for name, reason in outputs.left_out.items()
    ]
    if len(outputs.scales) > 1:
        names = ", ".join(map(repr, outputs.scales))
        lines.append(
            f"the model returns {len(outputs.scales)} outputs that count, {names}: scores and "
            "output variance are those of all, each in units of its own second moment; agreement "
            "is that of the first"
        )
    return lines


def _said_of_fused(names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        f"{names[0]}{more}: nn.MultiheadAttention was replaced by linear layers that compute the "
        "same, so that heads can be removed: of the dense model unfuse_attention makes the same"
    ]


def _check_repairs(steps: int, *repairs: str | None) -> None:
    for repair in repairs:
        if repair not in {None, *get_args(Repair)}:
            known = ", ".join(get_args(Repair))
            raise ValueError(f"repair: expected one of {known}, found {repair!r}.")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, found {steps}.")


def _agreed(groups: ChannelGroups) -> ChannelGroups:
    """Return the groups, which are the same in all processes.

    Raises:
        ValueError: If they are not; everywhere, and before anything is summed over them.
    """
    # Not the reasons: they quote rounding, which may differ between machines.
    check_same("channel groups", [(g.name, g.num_channels) for g in groups])
    return groups


def _prunable(groups: ChannelGroups) -> ChannelGroups:
    """Return the groups.

    Raises:
        ValueError: If there is nothing to prune.
    """
    if len(groups):
        return groups
    # The head is blocked in every network: what else is says more.
    blocked = sorted(groups.blocked, key=lambda b: b.blocked == "is an output of the network")
    reasons = "; ".join(f"{b.name}: {b.blocked}" for b in blocked[:3])
    raise ValueError(f"expected a model with channels that can be pruned, found none ({reasons}).")


def _check_rounding(limits: Limits, groups: ChannelGroups) -> None:
    widest = max((g.num_channels for g in groups if g.unit == "channel"), default=1)
    if limits.round_to > max(1, widest):
        raise ValueError(
            f"round_to: expected at most {widest}, the width of the widest group, found "
            f"{limits.round_to}"
        )


def _check_ranking(
    ranking: Ranking | None, by: RankBy, model: nn.Module, groups: ChannelGroups
) -> None:
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


def _parts_of(ranking: Ranking | None) -> list[Any]:
    """Return what tells one given ranking from another."""
    if ranking is None:
        return []
    curves = ranking.curves
    return [
        {n: c.order for n, c in curves.items()},
        {n: c.variance for n, c in curves.items()},
        None if ranking.factors is None else dict(ranking.factors),
    ]


def _rounded(limits: Limits, budget: Budget) -> Limits:
    """Return the limits; where milliseconds count, widths are multiples that run fast."""
    if limits.round_to == 1 and isinstance(budget, LatencyTable):
        return replace(limits, round_to=budget.step)
    return limits


def _images_for_factors(
    wanted: bool | None, by: RankBy, groups: ChannelGroups, fit: list[Tensor]
) -> int:
    """Return on how many images repair factors are measured; 0: they are not."""
    affordable = int(_FACTOR_MACS / max(groups.macs(), 1.0))
    if wanted is None:
        enough = affordable >= min(_FACTOR_IMAGES[0], total(_num(fit)))
        wanted = by.stand_in == "map" and enough
    least, most = _FACTOR_IMAGES
    return min(most, max(least, affordable)) if wanted and by.how == "curves" else 0


def _num(batches: Iterable[Tensor]) -> int:
    return sum(map(len, batches))


def _whole(groups: ChannelGroups) -> Kept:
    return {g.name: torch.ones(g.num_channels, dtype=torch.bool) for g in groups}


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


def _second_moment(model: nn.Module, held: list[Tensor], outputs: Outputs) -> float:
    """Return E||f||^2, the yardstick of every output variance."""
    with evaluating(model), torch.no_grad():
        square = sum(
            float(outputs.joined(model(on_device(x, model)), len(x)).double().square().sum())
            for x in held
        )
    return total(square) / total(sum(len(x) for x in held))
