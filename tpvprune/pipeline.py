"""The whole method: groups -> scores -> selection -> removal -> repair -> proof."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups, Kept, find_groups, with_blocked
from tpvprune.groups.budget import check_budget
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.clock import Clock, Progress
from tpvprune.passes.drawing import NUM_IMAGES, hold_back
from tpvprune.passes.evaluation import Difference, difference
from tpvprune.passes.finite import check_outputs
from tpvprune.passes.running import by_image, evaluating, first_output, on_device, tensors_of
from tpvprune.processes.shares import check_same, from_first, total
from tpvprune.repairs import guard
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.repairs.compensation import compensate_weights
from tpvprune.repairs.reconstruction import reconstruct_blocks
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS
from tpvprune.scores.tpv import Scores
from tpvprune.widths.choosing import Aim, Of, Selector, aim_at, stand_in
from tpvprune.widths.rounds import Record, Rounds
from tpvprune.widths.selection import Floors

Repair = Literal["none", "bn", "compensate", "reconstruct", "auto"]
Allocation = Literal["curves", "rank", "plain"]

_ABSORBABLE = 2e11  # MACs of all images' forwards: four compensations more take minutes at most


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
            model (:mod:`tpvprune.widths.latency`); ``report["speed"]`` holds what came of it.
        criterion: A key of ``tpvprune.scores.criteria.SCORERS``.
        repair: ``"none"``, ``"bn"`` (BatchNorm recalibration), ``"compensate"`` (weight
            compensation), ``"reconstruct"`` (block reconstruction: minutes where compensation
            takes seconds, and mostly better), or ``"auto"``: of none, bn and compensate the one
            closest to the dense model on the held-back inputs. A repair that is further from it
            there than a cheaper one is not returned: ``report["repair_chosen"]`` and
            ``report["warnings"]`` say so.
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
            for (:func:`tpvprune.widths.absorption.absorption`), at four compensations more; None:
            where the foreseen repair refits weights and that is cheap (images times MACs up to
            2e11).
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
        example, notes = _example(model, fit)
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
    if absorb is None:
        absorb = stand_in(foresee) == "map" and groups.macs() * total(_num(fit)) <= _ABSORBABLE
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
    run = _Run(
        model, fit, held, groups, example, aim, selector, record, repair, keep, steps, seed, clock,
        notes=notes,
    )  # fmt: skip
    refits: dict[str, nn.Module] = {}
    outcome: Difference | None = None
    for step in range(max(1, rounds.chosen), steps + 1):
        refits, outcome = _round(run, rounds, step)
    with clock("repair"):
        candidates = _candidates(repair, remove_channels(model, groups, rounds.kept), refits, fit)
        measured = {
            n: outcome if c is rounds.model and outcome else difference(c, model, held)
            for n, c in candidates.items()
        }
        if refits and guard.best_repair(measured, repair) == "none":
            candidates["bn"] = recalibrate_batchnorm(candidates["none"], fit)
            measured["bn"] = difference(candidates["bn"], model, held)
    best = guard.best_repair(measured, repair)
    num_fit = int(total(_num(fit)))
    report = {
        "keep": keep,
        "of": of,
        "criterion": criterion,
        "used_labels": criterion in NEEDS_LABELS,
        "allocation": "curves" if use_curves else allocation or "rank",
        "repair": repair,
        "repair_chosen": best,
        "seed": seed,
        "num_images": num_fit,
        "num_held_back": int(total(_num(held))),
        "images_used": {"selection": num_fit, "repair": num_fit, **run.used},
        "reached": aim.reached(groups, rounds.kept),
        "warnings": [*guard.warnings_of(measured, repair, best), *run.notes, *groups.notes],
        "held_back": guard.facts(measured[best]),
        "output_variance": {n: m.output_variance for n, m in measured.items()},
        "variance_share": {n: m.share for n, m in measured.items()},
        "output_second_moment": _second_moment(model, held),
        "steps": rounds.history,
        "timings": clock.seconds,
        **_widths(groups, rounds.kept),
        **aim.facts(),
    }
    assert rounds.scores is not None
    return PruningResult(candidates[best], groups, rounds.scores, rounds.kept, report)


# ---- rounds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What does not change between rounds; ``used`` and ``notes`` grow for the report."""

    model: nn.Module
    fit: list[Tensor]
    held: list[Tensor]
    groups: ChannelGroups
    example: Tensor
    aim: Aim
    selector: Selector
    record: Record
    repair: Repair
    keep: float
    steps: int
    seed: int
    clock: Clock
    used: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _round(run: _Run, rounds: Rounds, step: int) -> tuple[dict[str, nn.Module], Difference]:
    """Cut to the next target and repair.

    Returns:
        The repaired models by repair, cheapest first, and how far the last is from the dense one.
    """
    before = rounds.model, rounds.kept
    is_new = step > rounds.chosen
    if is_new:
        _cut(run, rounds, step)
    refits, outcome = _refitted(run, rounds, step)
    if is_new and run.selector.use_curves and guard.cannot_be_true(outcome, rounds.predicted):
        # The curves promised far less damage than there is: rank channel by channel instead.
        ranked = replace(rounds, model=before[0], kept=before[1])
        _cut(run, ranked, step, rank=True)
        others, second = _refitted(run, ranked, step)
        if second.share < outcome.share:
            run.notes.append(
                f"step {step}: widths by variance curves left {outcome.share:.2g} of the dense "
                f"model's variance where ranked ones leave {second.share:.2g}: these were taken"
            )
            rounds.kept, refits, outcome = ranked.kept, others, second
            rounds.model = ranked.model
    costs = {"macs": run.groups.macs(rounds.kept), "params": run.groups.params(rounds.kept)}
    rounds.history.append({**costs, **guard.facts(outcome)})
    return refits, outcome


def _cut(run: _Run, rounds: Rounds, step: int, *, rank: bool = False) -> None:
    """Let channels leave, and note where the run stands."""
    groups, aim, clock = run.groups, run.aim, run.clock
    now = groups if step == 1 else _regrouped(rounds.model, groups, rounds.kept, run.example)
    target = min(1.0, run.keep ** (step / run.steps) * aim.cost(groups) / aim.cost(now))
    found = run.selector.scored(rounds, now, step, run.steps, always=rank)
    with clock("selection", step, run.steps):
        choose = run.selector.prepared(rounds, now, target, found, rank=rank)
        chosen = aim.choose(choose, rounds.model, now, target, last=step == run.steps)
        rounds.predicted += run.selector.predicted(rounds, chosen)
    with clock("removal", step, run.steps):
        rounds.model = remove_channels(rounds.model, now, chosen)
        rounds.kept = compose(rounds.kept, chosen)
    rounds.chosen, rounds.speed, rounds.seconds = step, aim.speed, clock.seconds
    run.record.save(rounds)


def _refitted(run: _Run, rounds: Rounds, step: int) -> tuple[dict[str, nn.Module], Difference]:
    """Repair ``rounds.model``.

    Returns:
        As :func:`_round`.
    """
    last = step == run.steps
    given: dict[str, Any] = {"groups": run.groups, "kept": rounds.kept, "seed": run.seed}
    cut, refits = rounds.model, {}
    if run.repair in {"compensate", "reconstruct", "auto"}:
        with run.clock("compensation", step, run.steps):
            refits["compensate"] = compensate_weights(cut, run.model, run.fit, **given)
    if run.repair == "reconstruct" and last:
        with run.clock("reconstruction", step, run.steps):
            refits["reconstruct"] = reconstruct_blocks(
                cut, run.model, run.fit, **given, used=run.used, progress=run.clock.progress
            )
    rounds.model = [cut, *refits.values()][-1]
    with run.clock("measurement", step, run.steps):
        return refits, difference(rounds.model, run.model, run.held)


# ---- pieces ---------------------------------------------------------------------------------


@torch.no_grad()
def _example(model: nn.Module, fit: list[Tensor]) -> tuple[Tensor, list[str]]:
    """Return the first input, and what is to be said of the model's outputs for it.

    They are finite, with one row an image.
    """
    example = on_device(from_first(fit[0][:1]), model)
    twice = torch.cat([example, example])  # of one image any first dimension could be the batch's
    with evaluating(model):
        returned = model(twice)
    outputs = first_output(returned)
    by_image(outputs, len(twice))
    check_outputs(model, twice, outputs, batch=0)
    others = [t for t in tensors_of(returned) if t.is_floating_point() and t.ndim][1:]
    note = (
        f"the model returns {1 + len(others)} outputs of real numbers: scores, output variance and "
        f"agreement are those of the first, of shape {list(outputs.shape[1:])} an image"
    )
    return example, [note] if others else []


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
    # The head is blocked in every network: what else is says more.
    blocked = sorted(groups.blocked, key=lambda b: b.blocked == "is an output of the network")
    reasons = "; ".join(f"{b.name}: {b.blocked}" for b in blocked[:3])
    raise ValueError(f"expected a model with channels that can be pruned, found none ({reasons}).")


def _check_rounding(round_to: int, groups: ChannelGroups) -> None:
    widest = max((g.num_channels for g in groups if g.unit == "channel"), default=1)
    if round_to > max(1, widest):
        raise ValueError(
            f"round_to: expected at most {widest}, the width of the widest group, found {round_to}"
        )


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


def _candidates(
    repair: Repair, removed: nn.Module, refits: Mapping[str, nn.Module], fit: list[Tensor]
) -> dict[str, nn.Module]:
    """Return the models to choose from: unrepaired, and by every repair that was made."""
    candidates = {"none": removed}
    if repair in {"bn", "auto"}:
        candidates["bn"] = recalibrate_batchnorm(removed, fit)
    candidates |= refits
    if repair == "auto":
        candidates["compensate+bn"] = recalibrate_batchnorm(refits["compensate"], fit)
    return candidates


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
