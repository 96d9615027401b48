"""The whole method: groups -> scores -> selection -> removal -> repair -> proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.absorption import absorption, scaled
from tpvprune.allocation import allocate
from tpvprune.batches import hold_back
from tpvprune.batchnorm import recalibrate_batchnorm
from tpvprune.clock import Clock, Counted, Progress
from tpvprune.compensation import compensate_weights
from tpvprune.criteria import NEEDS_LABELS, SCORERS, scorer
from tpvprune.curves import variance_curves
from tpvprune.distributed import by_first, check_same, from_first, total
from tpvprune.evaluation import agreement, output_variance
from tpvprune.finite import check_outputs
from tpvprune.groups import ChannelGroups, Kept, find_groups, with_blocked
from tpvprune.latency import LatencyTable, Speed, as_fast_as, compare_latency, latency_table
from tpvprune.narrowest import narrowest
from tpvprune.reconstruction import reconstruct_blocks
from tpvprune.removal import remove_channels, restore_empty
from tpvprune.rounds import Record, Rounds
from tpvprune.running import evaluating, first_output, on_device
from tpvprune.scores import Scores
from tpvprune.selection import Budget, Floors, check_budget, cost, reaches, select_channels

Repair = Literal["none", "bn", "compensate", "reconstruct", "auto"]
Of = Literal["macs", "params", "latency"]
Allocation = Literal["curves", "rank", "plain"]
_NOTHING = 1e-9  # a share of the cost that no floor lets a model go down to


@dataclass(frozen=True)
class PruningResult:
    """What :func:`prune` returns: the smaller model and how it came about.

    ``report`` is plain data (JSON-ready): budget, cost before and after, output variance of the
    repairs on held-back images, steps, widths, blocked groups with reasons, timings in seconds.
    """

    model: nn.Module
    groups: ChannelGroups
    scores: Scores
    kept: Kept
    report: dict[str, Any]


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    keep: float = 0.5,
    of: Of = "macs",
    criterion: str = "tpv",
    repair: Repair = "compensate",
    steps: int = 1,
    allocation: Allocation | None = None,
    round_to: int = 1,
    min_channels: int = 1,
    max_removed: float = 1.0,
    num_probes: int = 1,
    amp: torch.dtype | None = None,
    grad_checkpointing: bool = False,
    absorb: bool | None = None,
    ignore: Iterable[str] = (),
    latency_batch_size: int = 1,
    labelled_batches: Iterable[Any] | None = None,
    state: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruningResult:
    """Prune a pretrained model to a budget with unlabeled inputs, and repair it.

    Args:
        model: Any vision model; untouched.
        batches: Re-iterable of unlabeled input tensors [B, ...]; a labelled loader is accepted and
            its labels are dropped before anything sees them. The last tenth, at most 64, is
            held back to measure repairs.
        keep: Fraction of the dense cost that stays, in (0, 1].
        of: ``"macs"``, ``"params"``, or ``"latency"``: milliseconds measured on the device of the
            model (:mod:`tpvprune.latency`); ``report["speed"]`` holds what came of it.
        criterion: A key of ``tpvprune.criteria.SCORERS``.
        repair: ``"none"``, ``"bn"`` (BatchNorm recalibration), ``"compensate"`` (weight
            compensation), ``"reconstruct"`` (compensation, then block reconstruction: minutes
            where compensation takes seconds, and better), or ``"auto"``: of none, bn and
            compensate the one with the least output variance on the held-back inputs.
        steps: Prune in so many rounds of equal ratio, each scored on the repaired network before.
        allocation: ``"curves"``: widths by joint variance curves and a dynamic programme
            (``"tpv"`` only, its default); ``"rank"``: greedy ranking by score per cost;
            ``"plain"``: by score alone.
        round_to: Kept widths are multiples of this, in groups of more than that many single
            channels; at most the width of the widest.
        min_channels: Units every group keeps.
        max_removed: Largest fraction of a group that may go.
        num_probes: Random output directions per input.
        amp: ``torch.bfloat16`` scores in mixed precision (``"tpv"`` only).
        grad_checkpointing: Score with less memory in more time (``"tpv"`` only).
        absorb: Scale the curves by how much of an early, middle or late cut the repair makes up
            for (:func:`tpvprune.absorption.absorption`), at three compensations more; None: where
            the repair refits weights.
        ignore: Modules whose outputs stay whole.
        latency_batch_size: Inputs of one call, where latency is the budget.
        labelled_batches: Re-iterable of (inputs, class indices); only criteria that need labels
            read it.
        state: File for the state of the unfinished run, written whenever channels have left; if
            it is that of the same model, inputs and arguments, the run goes on from there to the
            same result. The caller removes it. Among several processes it is not used.
        seed: Of everything random.
        progress: Called with (stage, done, total).

    Returns:
        The result; ``report["reached"]`` tells whether the budget was met.

    Raises:
        ValueError: If an argument is out of range, the criterion needs labels and has none, or
            the state is damaged.
    """
    check_budget(keep, "macs" if of == "latency" else of, round_to, min_channels, max_removed)
    _check(criterion, repair, steps, allocation, labelled_batches)
    clock = Clock(progress)
    fit, held = hold_back(batches)
    with clock("groups"):
        example = _example(model, fit)
        groups = _prunable(find_groups(model, example, ignore=ignore))
        aim = _aim(of, keep, model, groups, example.repeat_interleave(latency_batch_size, 0))
    use_curves = (allocation or ("curves" if criterion == "tpv" else "rank")) == "curves"
    floors = Floors(
        round_to=aim.round_to(round_to), min_channels=min_channels, max_removed=max_removed
    )
    _check_rounding(round_to, groups)
    probing: dict[str, Any] = {
        "num_probes": num_probes, "amp": amp, "grad_checkpointing": grad_checkpointing,
        "seed": seed,
    }  # fmt: skip
    absorb = repair in {"compensate", "reconstruct", "auto"} if absorb is None else absorb
    selector = _Selector(
        criterion, use_curves, allocation != "plain", fit,
        labelled_batches if criterion in NEEDS_LABELS else fit,
        aim.budget, floors, probing, clock,
    )  # fmt: skip
    record = Record.of(
        state, model, torch.cat(fit), keep, of, criterion, repair, steps, allocation, absorb,
        latency_batch_size, list(floors.items()), list(probing.items()), [g.name for g in groups],
    )  # fmt: skip
    rounds = record.load(model, groups) or Rounds(
        model, _whole(groups), factors=None if absorb else {}
    )
    aim.speed, clock.seconds = rounds.speed, {**clock.seconds, **rounds.seconds}
    for step in range(max(1, rounds.chosen), steps + 1):
        if step > rounds.chosen:
            now = groups if step == 1 else _regrouped(rounds.model, groups, rounds.kept, example)
            target = min(1.0, keep ** (step / steps) * aim.cost(groups) / aim.cost(now))
            found = selector.scored(rounds, now, step, steps)
            with clock("selection", step, steps):
                choose = selector.prepared(rounds, now, target, found)
                chosen = aim.choose(choose, rounds.model, now, target, last=step == steps)
            with clock("removal", step, steps):
                rounds.model = remove_channels(rounds.model, now, chosen)
                rounds.kept = compose(rounds.kept, chosen)
            rounds.chosen, rounds.speed, rounds.seconds = step, aim.speed, clock.seconds
            record.save(rounds)
        for stage, refit in _repairs(repair, last=step == steps, progress=progress).items():
            with clock(stage, step, steps):
                rounds.model = refit(
                    rounds.model, model, fit, groups=groups, kept=rounds.kept, seed=seed
                )
        rounds.history.append(_measure(groups, rounds.kept, rounds.model, model, held))
    with clock("repair"):
        candidates = _candidates(
            repair, remove_channels(model, groups, rounds.kept), rounds.model, fit
        )
        variances = {n: output_variance(c, model, held) for n, c in candidates.items()}
    best = min(variances, key=variances.__getitem__) if repair == "auto" else repair
    report = {
        "keep": keep,
        "of": of,
        "criterion": criterion,
        "used_labels": criterion in NEEDS_LABELS,
        "allocation": "curves" if use_curves else allocation or "rank",
        "repair": repair,
        "repair_chosen": best,
        "seed": seed,
        "num_images": int(total(sum(map(len, fit)))),
        "num_held_back": int(total(sum(map(len, held)))),
        "reached": aim.reached(groups, rounds.kept),
        "output_variance": variances,
        "output_second_moment": _second_moment(model, held),
        "steps": rounds.history,
        "timings": clock.seconds,
        **_widths(groups, rounds.kept),
        **aim.facts(),
    }
    assert rounds.scores is not None
    return PruningResult(candidates[best], groups, rounds.scores, rounds.kept, report)


# ---- pieces ---------------------------------------------------------------------------------


@dataclass
class _Aim:
    """What must be met: a budget, and for milliseconds the proof by the clock."""

    budget: Budget
    keep: float
    dense: nn.Module
    batch: Tensor
    speed: Speed | None = None

    def round_to(self, wanted: int) -> int:
        if wanted == 1 and isinstance(self.budget, LatencyTable):
            return self.budget.step
        return wanted

    def cost(self, groups: ChannelGroups) -> float:
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
        if self.speed is not None:
            return self.speed.ratio <= self.keep
        return reaches(groups, kept, keep=self.keep, of=self.budget)

    def facts(self) -> dict[str, Any]:
        return {} if self.speed is None else {"speed": asdict(self.speed)}


def _aim(of: Of, keep: float, model: nn.Module, groups: ChannelGroups, batch: Tensor) -> _Aim:
    budget = by_first(latency_table, model, groups, batch) if of == "latency" else of
    return _Aim(budget, keep, model, batch)


@torch.no_grad()
def _example(model: nn.Module, fit: list[Tensor]) -> Tensor:
    """Return the first input, which the model gives finite outputs for."""
    example = on_device(from_first(fit[0][:1]), model)
    with evaluating(model):
        check_outputs(model, example, first_output(model(example)), batch=0)
    return example


def _check(criterion: str, repair: str, steps: int, allocation: str | None, labelled: Any) -> None:
    if criterion not in SCORERS:
        raise ValueError(f"criterion: expected one of {', '.join(SCORERS)}, found {criterion!r}.")
    if repair not in get_args(Repair):
        known = ", ".join(get_args(Repair))
        raise ValueError(f"repair: expected one of {known}, found {repair!r}.")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, found {steps}.")
    if allocation not in {None, *get_args(Allocation)} or (
        allocation == "curves" and criterion != "tpv"
    ):
        raise ValueError(
            "allocation: expected 'rank' or 'plain', or 'curves' with criterion 'tpv', found "
            f"{allocation!r} with {criterion!r}."
        )
    if criterion in NEEDS_LABELS and labelled is None:
        raise ValueError(
            f"criterion {criterion!r} needs labels: pass labelled_batches, "
            "or use 'tpv', which needs none."
        )


def _prunable(groups: ChannelGroups) -> ChannelGroups:
    """Return the groups.

    Raises:
        ValueError: If there is nothing to prune.
    """
    if len(groups):
        return groups
    reasons = "; ".join(f"{b.name}: {b.blocked}" for b in groups.blocked[:3])
    raise ValueError(f"expected a model with channels that can be pruned, found none ({reasons}).")


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
    aim = keep
    for _ in range(4):
        chosen = restore_empty(groups, choose(keep=aim), ranks)
        if reaches(groups, chosen, keep=keep, of=of):
            break
        # Channels were put back where a layer would have none: the others must pay for them.
        aim *= keep * cost(groups, {}, of) / cost(groups, chosen, of)
    else:
        lowest = restore_empty(groups, choose(keep=_NOTHING), ranks)
        if not reaches(groups, lowest, keep=keep, of=of):
            chosen = narrowest(groups, of, ranks=ranks, **floors)
    check_same("channels to cut", chosen)
    return chosen


def _check_rounding(round_to: int, groups: ChannelGroups) -> None:
    widest = max((g.num_channels for g in groups if g.unit == "channel"), default=1)
    if round_to > max(1, widest):
        raise ValueError(
            f"round_to: expected at most {widest}, the width of the widest group, found {round_to}"
        )


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


@dataclass(frozen=True)
class _Selector:
    """How a round finds out which channels matter least."""

    criterion: str
    use_curves: bool
    per_cost: bool
    fit: list[Tensor]
    source: Any
    budget: Budget
    floors: Floors
    probing: Mapping[str, Any]
    clock: Clock

    def scored(self, rounds: Rounds, groups: ChannelGroups, step: int, steps: int) -> Scores | None:
        """Return the scores of the network as it is, where the choice needs them."""
        if rounds.scores is not None and self.use_curves:
            return None
        with self.clock("scores", step, steps):
            found = self._score(rounds.model, groups)
        rounds.scores = rounds.scores or found
        return found

    def prepared(
        self, rounds: Rounds, groups: ChannelGroups, target: float, found: Scores | None
    ) -> Callable[[float], Kept]:
        """Return how to choose widths for a fraction of the cost of the network as it is."""
        choose: Callable[..., Kept]
        ranks: Mapping[str, Tensor]
        if self.use_curves:
            choose, ranks = self._by_curves(rounds, groups, target)
        else:
            assert found is not None
            ranks = {**found}
            choose = partial(
                select_channels, rounds.model, groups, found,
                of=self.budget, per_cost=self.per_cost, **self.floors,
            )  # fmt: skip
        return partial(_feasible, choose, groups, ranks, of=self.budget, floors=self.floors)

    def _score(self, model: nn.Module, groups: ChannelGroups) -> Scores:
        seen = Counted(self.source, "scoring", self.clock.progress)
        options = self.probing if self.criterion == "tpv" else {"seed": self.probing["seed"]}
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
        return partial(choose, scaled(curves, rounds.factors)), ranks


def _repairs(
    repair: Repair, *, last: bool, progress: Progress | None
) -> dict[str, Callable[..., nn.Module]]:
    """Return the refits that follow one round of cutting, in order."""
    refits: dict[str, Callable[..., nn.Module]] = {}
    if repair == "reconstruct" and last:
        refits["reconstruction"] = partial(reconstruct_blocks, progress=progress)
    elif repair in {"compensate", "reconstruct", "auto"}:
        refits["compensation"] = compensate_weights
    return refits


def _candidates(
    repair: Repair, removed: nn.Module, compensated: nn.Module, fit: list[Tensor]
) -> dict[str, nn.Module]:
    candidates = {"none": removed}
    if repair in {"bn", "auto"}:
        candidates["bn"] = recalibrate_batchnorm(removed, fit)
    if repair in {"compensate", "reconstruct", "auto"}:
        candidates["reconstruct" if repair == "reconstruct" else "compensate"] = compensated
    if repair == "auto":
        candidates["compensate+bn"] = recalibrate_batchnorm(compensated, fit)
    return candidates


def _measure(
    groups: ChannelGroups, kept: Kept, pruned: nn.Module, dense: nn.Module, held: list[Tensor]
) -> dict[str, float]:
    return {
        "macs": groups.macs(kept),
        "params": groups.params(kept),
        "agreement": agreement(pruned, dense, held),
        "output_variance": output_variance(pruned, dense, held),
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


def _second_moment(model: nn.Module, held: list[Tensor]) -> float:
    """Return E||f||^2, the yardstick of every output variance."""
    with evaluating(model), torch.no_grad():
        square = sum(
            float(first_output(model(on_device(x, model))).double().square().sum()) for x in held
        )
    return total(square) / total(sum(len(x) for x in held))
