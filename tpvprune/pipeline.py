"""The whole method: groups -> scores -> selection -> removal -> repair -> proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.batchnorm import recalibrate_batchnorm
from tpvprune.choosing import Of, Selector, aim_at, stand_in
from tpvprune.clock import Clock, Progress
from tpvprune.compensation import compensate_weights
from tpvprune.criteria import NEEDS_LABELS, SCORERS
from tpvprune.distributed import check_same, from_first, total
from tpvprune.drawing import NUM_IMAGES, hold_back
from tpvprune.evaluation import agreement, output_variance
from tpvprune.finite import check_outputs
from tpvprune.groups import ChannelGroups, Kept, find_groups, with_blocked
from tpvprune.reconstruction import reconstruct_blocks
from tpvprune.removal import remove_channels
from tpvprune.rounds import Record, Rounds
from tpvprune.running import evaluating, first_output, on_device
from tpvprune.scores import Scores
from tpvprune.selection import Floors, check_budget

Repair = Literal["none", "bn", "compensate", "reconstruct", "auto"]
Allocation = Literal["curves", "rank", "plain"]


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
    num_images: int | None = NUM_IMAGES,
    keep: float = 0.5,
    of: Of = "macs",
    criterion: str = "tpv",
    repair: Repair = "compensate",
    foresee: Repair | None = None,
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
            its labels are dropped before anything sees them. Order does not matter.
        num_images: So many images are drawn at random from it, or all where there are no more, or
            with None; a random tenth of them, at most 128, is held back to measure repairs. The
            loader is never held whole in memory, and of a DataLoader over a larger dataset only
            what is drawn is loaded.
        keep: Fraction of the dense cost that stays, in (0, 1].
        of: ``"macs"``, ``"params"``, or ``"latency"``: milliseconds measured on the device of the
            model (:mod:`tpvprune.latency`); ``report["speed"]`` holds what came of it.
        criterion: A key of ``tpvprune.criteria.SCORERS``.
        repair: ``"none"``, ``"bn"`` (BatchNorm recalibration), ``"compensate"`` (weight
            compensation), ``"reconstruct"`` (compensation, then block reconstruction: minutes
            where compensation takes seconds, and better), or ``"auto"``: of none, bn and
            compensate the one with the least output variance on the held-back inputs.
        foresee: The repair that ``"tpv"`` counts on: only where weights are refitted will other
            channels stand in for those that leave. None: ``repair``; another where you repair
            the result yourself.
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
            the foreseen repair refits weights.
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
    foresee = foresee or repair
    _check(criterion, (repair, foresee), steps, allocation, labelled_batches)
    clock = Clock(progress)
    fit, held = hold_back(batches, num_images=num_images, seed=seed)
    with clock("groups"):
        example = _example(model, fit)
        groups = _prunable(_agreed(find_groups(model, example, ignore=ignore)))
        aim = aim_at(of, keep, model, groups, example.repeat_interleave(latency_batch_size, 0))
    use_curves = (allocation or ("curves" if criterion == "tpv" else "rank")) == "curves"
    floors = Floors(
        round_to=aim.round_to(round_to), min_channels=min_channels, max_removed=max_removed
    )
    _check_rounding(round_to, groups)
    probing: dict[str, Any] = {
        "num_probes": num_probes, "amp": amp, "grad_checkpointing": grad_checkpointing,
        "seed": seed,
    }  # fmt: skip
    absorb = stand_in(foresee) == "map" if absorb is None else absorb
    selector = Selector(
        criterion, use_curves, stand_in(foresee), allocation != "plain", fit,
        labelled_batches if criterion in NEEDS_LABELS else fit,
        aim.budget, floors, probing, clock,
    )  # fmt: skip
    record = Record.of(
        state, model, dict(enumerate(fit)), keep, of, criterion, repair, foresee, steps, allocation,
        absorb, latency_batch_size, list(floors.items()), list(probing.items()),
        [g.name for g in groups],
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


@torch.no_grad()
def _example(model: nn.Module, fit: list[Tensor]) -> Tensor:
    """Return the first input, which the model gives finite outputs for."""
    example = on_device(from_first(fit[0][:1]), model)
    with evaluating(model):
        check_outputs(model, example, first_output(model(example)), batch=0)
    return example


def _check(
    criterion: str,
    repairs: Iterable[str],
    steps: int,
    allocation: str | None,
    labelled: Any,
) -> None:
    if criterion not in SCORERS:
        raise ValueError(f"criterion: expected one of {', '.join(SCORERS)}, found {criterion!r}.")
    for repair in repairs:
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
    reasons = "; ".join(f"{b.name}: {b.blocked}" for b in groups.blocked[:3])
    raise ValueError(f"expected a model with channels that can be pruned, found none ({reasons}).")


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
