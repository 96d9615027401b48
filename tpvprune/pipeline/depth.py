"""Depth before width: which branches go, and how many, decided by trial.

Branches are ranked by score per saved cost. Then networks without the first few of them are cut to
the budget in width, repaired roughly, and compared with the dense one on images that took no part
in that: the number of branches that leaves the least difference is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.depth import Branch, Removal, find_branches, remove_branches
from tpvprune.depth.choice import Damage, best_depth, branch_order, most_gone, most_trials
from tpvprune.depth.savings import branch_savings, table_without
from tpvprune.groups import ChannelGroups, Kept, find_groups, with_blocked
from tpvprune.groups.budget import Budget, LatencyTable, cost
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.evaluation import Reference
from tpvprune.passes.unseen import with_unseen
from tpvprune.pipeline.setup import Depth, Setup
from tpvprune.processes.shares import by_first
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.repairs.compensation import refitted
from tpvprune.widths.ranking import Ranking
from tpvprune.widths.repair_factors import ROUGHLY, split_inputs

_TRIAL_MACS, _TRIAL_IMAGES = 1.2e11, (128, 512)
_SCORE_IMAGES = 128
_CLOCK_SPREAD = 1.25  # between what branches seem to save and what they save, timed twice
NO_BRANCHES = (
    "granularity: expected a model with branches, found none that can go whole: prune channels"
)
_NO_BRANCH = "no branch can go whole: channels alone were pruned"


def shallower(given: Setup, ranking: Ranking, keep: float) -> Setup:
    """Return the run without the branches that are better gone.

    ValueError if only branches may go, and none can.
    """
    clock = given.clock
    with clock("branches"):
        branches = find_branches(given.dense, given.batch[:1], outputs=given.outputs)
        if not branches:
            if "channel" not in given.told.leaves:
                raise ValueError(NO_BRANCHES)
            given.notes.append(_NO_BRANCH)
            return given
        saved = by_first(
            branch_savings, given.dense, given.groups, branches, given.budget, given.batch
        )
        by_clock = isinstance(given.budget, LatencyTable)
        enough = (1 - keep) * given.dense_cost * (_CLOCK_SPREAD if by_clock else 1.0)
        images = torch.cat(given.fit)[:_SCORE_IMAGES].split(len(given.fit[0]))
        order, scores = branch_order(
            given.dense, branches, images, saved,
            most=most_gone(given.told.max_depth_removed, branches),
            enough=enough, seed=given.by.probing.seed, outputs=given.outputs,
            compensated=given.by.stand_in == "map",
        )  # fmt: skip
        least, most_images = _TRIAL_IMAGES
        affordable = int(_TRIAL_MACS / max(given.groups.macs(), 1.0))
        fit, held = split_inputs(given.fit, min(most_images, max(least, affordable)))
    found = _Branches(given, branches, saved, scores)
    dense, numbers = Reference(given.dense, held, given.outputs), itertools.count(1)

    def damage(num: int) -> Damage:
        with clock("trials of depth", next(numbers), most_trials(len(order))):
            there = found.without(order[:num])
            kept, over = _narrowed(there, ranking, keep)
            if over > 1e-9:
                return over, float("inf")
            return 0.0, dense.difference(_repaired_roughly(there, kept, fit)).output_variance

    num = best_depth(damage, len(order))
    return found.final(order[:num])


def chosen_before(given: Setup, choice: Mapping[str, Any] | None) -> Setup:
    """Return the run without the branches that left before it was stopped.

    ``choice``: of :attr:`Depth.choice`; None: the network has no branch.
    """
    if choice is None:
        given.notes.append(_NO_BRANCH)
        return given
    with given.clock("branches"):
        branches = find_branches(given.dense, given.batch[:1], outputs=given.outputs)
    by_name = {b.name: b for b in branches}
    found = _Branches(given, branches, choice["savings"], choice["scores"])
    return found.final([by_name[name] for name in choice["gone"]])


@dataclass(frozen=True)
class _Branches:
    """The branches of a network, what each saves and what the outputs lose with it."""

    given: Setup
    branches: Sequence[Branch]
    savings: Mapping[str, float]
    scores: Mapping[str, float]

    def final(self, gone: Sequence[Branch]) -> Setup:
        """Return the run without some branches, its groups verified."""
        with self.given.clock("groups"):
            found = self.without(gone, verify=True)
        of, may = len(self.branches), most_gone(self.given.told.max_depth_removed, self.branches)
        if may == 0:
            self.given.notes.append(
                f"max_depth_removed: {self.given.told.max_depth_removed:g} of {of} branches are "
                "none: all stayed"
            )
        elif len(gone) == may < of:
            self.given.notes.append(
                f"max_depth_removed: {may} of {of} branches went, as many as may: where more may, "
                "what is left may be closer to the dense model"
            )
        return found

    def without(self, gone: Sequence[Branch], *, verify: bool = False) -> Setup:
        """Return the run without some branches."""
        given = self.given
        names = tuple(b.name for b in gone)
        removal = Removal.of(self.branches, names)
        network = remove_branches(given.dense, removal, share=True)
        modules = dict(network.named_modules())
        ignore = [name for name in given.limits.ignore if name in modules]
        groups = given.groups
        if gone:
            groups = find_groups(network, given.batch[:1], ignore=ignore, verify=verify)
            groups = with_blocked(groups, _not_ranked(groups, given.groups))
        budget: Budget = given.budget
        if isinstance(budget, LatencyTable):
            budget = table_without(budget, gone, self.savings)
        aligned = with_unseen(given.dense, removal.blocks, (*removal.zeroed, *removal.passed))
        dense = {"macs": given.groups.macs(), "params": given.groups.params()}
        depth = Depth(removal, self.scores, self.savings, names, dense)
        return replace(
            given, start=network, aligned=aligned, groups=groups, budget=budget, depth=depth
        )


def _narrowed(there: Setup, ranking: Ranking, keep: float) -> tuple[Kept, float]:
    """Return what stays of the channels under the budget, and which share of it is missing."""
    target = keep * there.dense_cost
    kept = {g.name: torch.ones(g.num_channels, dtype=torch.bool) for g in there.groups}
    whole = cost(there.groups, kept, there.budget)
    if whole > target:
        kept = ranking.choose(
            there.groups, keep=target / whole, of=there.budget, limits=there.limits
        )
    return kept, cost(there.groups, kept, there.budget) / target - 1


def _repaired_roughly(there: Setup, kept: Kept, fit: Sequence[Tensor]) -> nn.Module:
    by, cut = there.by, remove_channels(there.start, there.groups, kept)
    if by.stand_in == "map":
        return refitted(
            cut, there.aligned, fit, groups=there.groups, kept=kept, ridge=None,
            **ROUGHLY, seed=by.probing.seed,
        )  # fmt: skip
    return recalibrate_batchnorm(cut, fit) if by.stand_in == "mean" else cut


def _not_ranked(groups: ChannelGroups, ranked: ChannelGroups) -> dict[str, str]:
    """Return the groups that the dense network has not, or in another size, with a reason."""
    reasons = {b.name: b.blocked or "" for b in ranked.blocked}
    return {
        g.name: reasons.get(g.name, "not a group of the dense model")
        for g in groups
        if g.name not in ranked or ranked[g.name].num_channels != g.num_channels
    }
