"""The whole method: groups -> ranking -> widths -> removal -> repair -> measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpvprune.depth import Removal
from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.clock import Progress
from tpvprune.passes.forwards import called_as
from tpvprune.pipeline.choices import Choices, told_by
from tpvprune.pipeline.depth import chosen_before, shallower
from tpvprune.pipeline.run import Run, report_of
from tpvprune.pipeline.setup import Setup, set_up
from tpvprune.repairs import guard
from tpvprune.scores.tpv import Scores
from tpvprune.widths.ranking import Ranking
from tpvprune.widths.rounds import Record, Rounds


@dataclass(frozen=True)
class PruningResult:
    """What :func:`prune` returns: the smaller model and how it came about.

    ``kept`` says which channels stayed, ``ranking`` what they were worth: another budget needs no
    new one (``prune(..., ranking=result.ranking)``). ``report`` is plain data (JSON-ready): budget,
    cost before and after, output variance of the repairs on held-back images, steps, widths,
    blocked groups with reasons, timings in seconds. ``removed`` names the modules of residual
    branches that left, ``groups`` and ``kept`` are those of what is left of the network.
    """

    model: nn.Module
    groups: ChannelGroups
    ranking: Ranking
    kept: Kept
    report: dict[str, Any]
    removed: Removal = field(default_factory=Removal)

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


@told_by(Choices)
def prune(model: nn.Module, batches: Iterable[Any], told: Choices) -> PruningResult:
    """Prune a pretrained model to a budget with unlabeled inputs, and repair it.

    Args:
        model: Any vision model; untouched. ``nn.MultiheadAttention`` in it is replaced first
            (:func:`tpvprune.unfuse_attention`), weights that are computed are folded
            (:func:`tpvprune.fold_weights`).
        batches: Re-iterable of unlabeled input tensors [B, ...]; a labelled loader is accepted and
            its labels are dropped before anything sees them. Order does not matter.
        keep: Fraction of the dense cost that stays, in (0, 1].
        of: ``"macs"``, ``"params"``, or ``"latency"``: milliseconds measured where the model will
            run (:mod:`tpvprune.widths.latency`); ``report["speed"]`` holds what came of it.
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
            ``"plain"``: by score alone. None with ``"tpv"`` and no refit of weights (``"none"``,
            ``"bn"``): curves or ranking, whichever is closer to the dense model on the images held
            back.
        limits: How far groups may shrink, and what stays whole.
        granularity: ``"channel"``, ``"branch"``, or ``"channel,branch"``: residual branches, and
            layers of chains, that go whole, as many as leave the least damage under the budget, or
            none (:mod:`tpvprune.pipeline.depth`). With ``"branch"`` alone every width stays, and
            no channel is ranked. None: both where ``of`` is ``"latency"``, else channels.
        max_depth_removed: Largest fraction of the branches that may go, in [0, 1], where they may.
        ranking: Of an earlier result on the same model, images and criterion, for another budget.
        planned_repair: The repair that ``"tpv"`` counts on: only where weights are refitted will
            other channels stand in for those that leave. None: ``repair``; another where you
            repair the result yourself.
        repair_factors: Scale the curves by how much of an early, middle or late cut the repair
            makes up for (:mod:`tpvprune.widths.repair_factors`), at four compensations more; None:
            where the planned repair refits weights and that is cheap (256 of the images, or all,
            at 1.2e11 MACs of forwards at most).
        mirrored: Fit weights to the mirror image of every input [B, C, H, W], too, where left and
            right mean nothing: a gain with small images, in a third more time; with large ones
            none was found, in 1.7 times that of compensation (``benchmarks/README.md``).
        reconstructions: With repair ``"reconstruct"``: so many, each of its own part of the images,
            in so many times the time; the mean of their weights is taken
            (:func:`tpvprune.reconstruct_blocks`, ``num_fits``). Each wants about a thousand images.
        steps: Prune in so many rounds of equal ratio, each scored on the repaired network before.
        num_images: So many images are drawn at random from ``batches``, or all where there are no
            more, or with None; a random tenth of them, at most 128, is held back to measure
            repairs. The loader is never held whole in memory, and of a DataLoader over a larger
            dataset only what is drawn is loaded.
        latency_batch_size: Inputs of one call, where latency is the budget.
        latency_runtime: Where they are measured: ``"eager"`` or ``"compile"`` on the device of the
            model, ``"onnxruntime"`` or ``"openvino"`` on the CPU, or a table of another device
            (:func:`tpvprune.widths.latency_file.read_latency_table`), which is taken at its word.
        latency_threads: Of one call on a CPU; None: as many as torch is set to.
        probing: How the passes of ``"tpv"`` are run (its seed is ``seed``).
        outputs: Of a model with several outputs those that count, or how much each counts, in units
            of its own second moment; None: all, alike. A name is the keys or places on the way to
            the tensor, joined by dots: ``"logits"``, ``"0"``, ``"aux.1"``. Agreement is that of the
            first.
        forward: Called as ``forward(model, x)`` in the place of the model's own call, and scored,
            verified, measured and repaired along what it returns; the result is called as the
            model is. None: the model's own call, but for torchvision's detectors what they
            return before their post-processing (:mod:`tpvprune.passes.detection`).
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
    return pruned(model, set_up(model, batches, told))


def pruned(model: nn.Module, given: Setup) -> PruningResult:
    """Prune a model by what was looked up of it; see :func:`prune`."""
    whole, told = given, given.told
    ranking, keep = told.ranking, told.keep
    how = (
        sorted(told.leaves), told.max_depth_removed, keep, told.repair, told.mirrored,
        told.reconstructions, told.steps,
    )  # fmt: skip
    record = Record.of(told.state, *whole.parts(), *how, *_parts_of(ranking))
    if "branch" in told.leaves:
        ranking = None if record.facts() else whole.ranked(ranking)
        if ranking is None:
            given = chosen_before(whole, record.facts()["depth"])
        else:
            given = shallower(whole, ranking, keep)
    groups, clock = given.groups, given.clock
    run = Run(given)
    choice = given.depth.choice if given.depth else None
    rounds = record.load(given.start, groups)
    if rounds is None:
        kept = {g.name: torch.ones(g.num_channels, dtype=torch.bool) for g in groups}
        rounds = Rounds(
            given.start, kept, whole.ranked(ranking), predicted=given.predicted,
            seconds=clock.seconds,
        )  # fmt: skip
        record.save(rounds, choice)
    clock.seconds = {**clock.seconds, **rounds.seconds}
    for step in range(rounds.chosen + 1, told.steps + 1):
        before = replace(rounds)
        ranked = run.ranked(rounds, step)
        run.cut(rounds, step, *ranked)
        refits, outcome = run.repaired(rounds, step)
        refits, outcome = run.ranked_instead(before, rounds, step, refits, outcome, ranked=ranked)
        costs = {"macs": groups.macs(rounds.kept), "params": groups.params(rounds.kept)}
        rounds.history.append({**costs, **guard.facts(outcome)})
        if step < told.steps:
            rounds.seconds = clock.seconds
            record.save(rounds, choice)
    with clock("repair"):
        removed = remove_channels(given.start, groups, rounds.kept)
        candidates, measured = run.compared(removed, refits, rounds.model, outcome)
    best = guard.best_repair(measured, told.repair)
    report = report_of(run, rounds, measured, best)
    gone = given.depth.removal if given.depth else Removal()
    found = called_as(candidates[best], model)
    return PruningResult(found, groups, rounds.ranking, rounds.kept, report, gone)


def rank_channels(model: nn.Module, batches: Iterable[Any], **choices: Any) -> Ranking:
    """Measure what the channels of a network are worth, once for every size.

    ``prune(model, batches, keep=..., ranking=ranking)`` with the same arguments gives what it
    gives without a ranking; with one, a further size costs its repair.

    Args:
        model: Any vision model; untouched.
        batches: Re-iterable of unlabeled input tensors [B, ...].
        **choices: Of :func:`prune`; ``keep``, ``steps`` and what else concerns a cut do not count.

    Returns:
        The ranking, which can be saved.

    Raises:
        ValueError: If an argument is out of range.
    """
    told = Choices(**choices)
    return set_up(model, batches, told).ranked(told.ranking)


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


class Sizes:
    """Prunes a model to one size after the other, each as :func:`tpvprune.prune` would.

    The images are drawn, the groups found and verified, the milliseconds measured and the channels
    ranked once. What the dense network gives, and layers are fitted to, is kept in memory between
    the repairs (2 GiB at most, where 8 GiB are free), until this object goes.

    Args:
        model: Any vision model; untouched.
        batches: Re-iterable of unlabeled input tensors [B, ...]; labels are dropped unread.
        **choices: Of :func:`tpvprune.prune`, but ``keep`` and ``state``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], **choices: Any) -> None:
        """Look up what all sizes share, but for the ranking."""
        told = Choices(**choices)
        self._model, self._given = model, set_up(model, batches, told, several=True)
        self.ranking: Ranking | None = told.ranking
        """What channels are worth; None before the first size, unless it was given."""

    def prune(
        self, keep: float, *, state: str | Path | None = None, progress: Progress | None = None
    ) -> PruningResult:
        """Prune to one size.

        Args:
            keep: Fraction of the dense cost that stays, in (0, 1].
            state: As of :func:`tpvprune.prune`, another file for each size.
            progress: Called with (stage, done, total); None: as given for all sizes.

        Returns:
            What ``tpvprune.prune(..., keep=keep, ranking=self.ranking)`` returns.

        Raises:
            ValueError: If ``keep`` is out of range, or the state is damaged.
        """
        told = self._given.told
        told = replace(
            told, keep=keep, state=state, ranking=self.ranking, progress=progress or told.progress
        )
        result = pruned(self._model, self._given.for_size(told))
        self.ranking = result.ranking
        return result
