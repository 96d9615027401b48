"""The whole method: groups -> scores -> selection -> removal -> repair -> proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.absorption import absorption, scaled
from tpvprune.allocation import allocate
from tpvprune.batches import hold_back
from tpvprune.batchnorm import recalibrate_batchnorm
from tpvprune.clock import Clock, Progress
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
        round_to: Kept widths are multiples of this.
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
        seed: Of everything random.
        progress: Called with (stage, done, total).

    Returns:
        The result; ``report["reached"]`` tells whether the budget was met.

    Raises:
        ValueError: If an argument is out of range, or the criterion needs labels and has none.
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
    probing: dict[str, Any] = {
        "num_probes": num_probes, "amp": amp, "grad_checkpointing": grad_checkpointing,
        "seed": seed,
    }  # fmt: skip
    pruned, kept, scores = model, _whole(groups), None
    history: list[dict[str, float]] = []
    absorb = repair in {"compensate", "reconstruct", "auto"} if absorb is None else absorb
    factors: Mapping[str, float] | None = None if absorb else {}
    for step in range(1, steps + 1):
        now = groups if step == 1 else _regrouped(pruned, groups, kept, example)
        target = min(1.0, keep ** (step / steps) * aim.cost(groups) / aim.cost(now))
        if scores is None or not use_curves:
            with clock("scores", step, steps):
                found = _score(
                    criterion, pruned, now,
                    labelled_batches if criterion in NEEDS_LABELS else fit,
                    **probing,
                )  # fmt: skip
            scores = scores or found
        with clock("selection", step, steps):
            if use_curves:
                choose, ranks, factors = _by_curves(
                    pruned, now, fit, target, factors,
                    of=aim.budget, floors=floors, probing=probing,
                )  # fmt: skip
            else:
                choose = partial(
                    select_channels, pruned, now, found,
                    of=aim.budget, per_cost=allocation != "plain", **floors,
                )  # fmt: skip
                ranks = {**found}
            chosen = aim.choose(
                partial(_feasible, choose, now, ranks, of=aim.budget, floors=floors),
                pruned, now, target, last=step == steps,
            )  # fmt: skip
        with clock("removal", step, steps):
            pruned, kept = remove_channels(pruned, now, chosen), compose(kept, chosen)
        for stage, refit in _repairs(repair, last=step == steps).items():
            with clock(stage, step, steps):
                pruned = refit(pruned, model, fit, groups=groups, kept=kept, seed=seed)
        history.append(_measure(groups, kept, pruned, model, held))
    with clock("repair"):
        candidates = _candidates(repair, remove_channels(model, groups, kept), pruned, fit)
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
        "reached": aim.reached(groups, kept),
        "output_variance": variances,
        "output_second_moment": _second_moment(model, held),
        "steps": history,
        "timings": clock.seconds,
        **_widths(groups, kept),
        **aim.facts(),
    }
    assert scores is not None
    return PruningResult(candidates[best], groups, scores, kept, report)


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


def _score(
    criterion: str,
    model: nn.Module,
    groups: ChannelGroups,
    source: Any,
    *,
    seed: int,
    **probing: Any,
) -> Scores:
    return scorer(criterion)(
        model, groups, source, seed=seed, **(probing if criterion == "tpv" else {})
    )


def _by_curves(
    model: nn.Module,
    groups: ChannelGroups,
    fit: list[Tensor],
    target: float,
    factors: Mapping[str, float] | None,
    *,
    of: Budget,
    floors: Floors,
    probing: Mapping[str, Any],
) -> tuple[Callable[..., Kept], Mapping[str, Tensor], Mapping[str, float]]:
    """Return how to choose widths, the channels' ranks, and the factors (None: to be measured)."""
    curves = variance_curves(model, groups, fit, of=of, **probing)
    ranks = {name: curve.order.argsort() for name, curve in curves.items()}
    choose = partial(allocate, groups, of=of, **floors)
    if factors is None:
        draft = restore_empty(groups, choose(curves, keep=target), ranks)
        factors = absorption(model, groups, draft, curves, fit, seed=probing["seed"])
    return partial(choose, scaled(curves, factors)), ranks, factors


def _repairs(repair: Repair, *, last: bool) -> dict[str, Callable[..., nn.Module]]:
    """Return the refits that follow one round of cutting, in order."""
    refits: dict[str, Callable[..., nn.Module]] = {}
    if repair == "reconstruct" and last:
        refits["reconstruction"] = reconstruct_blocks
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
