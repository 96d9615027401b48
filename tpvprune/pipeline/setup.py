"""What a run is given: the network, its groups, the images that are drawn, the budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.depth import Removal
from tpvprune.disk.digest import digest_of
from tpvprune.groups import (
    ChannelGroups,
    find_groups,
    folded_if_equal,
    fused_attention,
    unfuse_attention,
    with_blocked,
)
from tpvprune.groups.budget import Budget, LatencyTable, cost
from tpvprune.groups.reaching import unseen
from tpvprune.passes.clock import Clock
from tpvprune.passes.drawing import hold_back
from tpvprune.passes.evaluation import Reference
from tpvprune.passes.finite import check_outputs
from tpvprune.passes.forwards import forward_of, own_forward, said_of_forward, with_forward
from tpvprune.passes.memory import spare_bytes
from tpvprune.passes.outputs import Outputs
from tpvprune.passes.running import evaluating, on_device
from tpvprune.pipeline.choices import Choices
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import by_first, check_same, from_first, total
from tpvprune.repairs.compensation import TARGET_BYTES, Wanted, wanted_by
from tpvprune.scores.criteria import SCORERS
from tpvprune.scores.criterion_names import READS_CLASSES
from tpvprune.scores.curves import StandIn
from tpvprune.scores.taps import Probing
from tpvprune.widths.latency import latency_table
from tpvprune.widths.latency_file import measured_elsewhere
from tpvprune.widths.limits import Limits
from tpvprune.widths.ranking import RankBy, Ranking
from tpvprune.widths.repair_factors import repair_factors as measured_factors

# Repair factors take four compensations more, minutes at most: on so many MACs of forwards, unless
# that leaves too few images to fit and to measure with; more would tell nothing new.
_FACTOR_MACS, _FACTOR_IMAGES = 1.0e11, (256, 1024)
_FACTOR_KEEP = 0.6  # of the cost: they hardly depend on it, and so they serve every size


@dataclass(frozen=True)
class Depth:
    """Which branches of a network have left."""

    removal: Removal
    branches: Mapping[str, float]  # scores of all that could go
    savings: Mapping[str, float]  # what leaves with each, in units of the budget
    gone: tuple[str, ...]
    dense: Mapping[str, float]  # MACs and parameters of the whole network

    @property
    def choice(self) -> dict[str, Any]:
        """What a run that goes on has to know: milliseconds are never twice the same."""
        return {
            "scores": dict(self.branches), "savings": dict(self.savings), "gone": list(self.gone)
        }  # fmt: skip


@dataclass
class DenseValues:
    """What the dense network gives, once it was asked for."""

    are_kept: bool  # several repairs share what layers are fitted to
    reference: Reference | None = None
    wanted: Wanted | None = None


@dataclass(frozen=True)
class Setup:
    """What a run is given, and what it looks up once."""

    told: Choices
    dense: nn.Module  # its attention unfused
    start: nn.Module  # what channels leave: the dense network, or that without some branches
    aligned: nn.Module  # the dense network with the calls of ``start``: such branches run unseen
    groups: ChannelGroups  # of ``start``
    fit: list[Tensor]  # what scores and repairs see, in batches
    held: list[Tensor]  # what only measures
    batch: Tensor  # what is timed where latency is the budget; its first is an example
    outputs: Outputs
    budget: Budget
    dense_cost: float  # in its units
    limits: Limits
    by: RankBy
    images_for_factors: int  # that repair factors are measured on; 0: they are not
    clock: Clock
    notes: list[str]  # what is to be said of the network, a line each
    values: DenseValues
    depth: Depth | None = None

    def for_size(self, told: Choices) -> Setup:
        """Return the same for another ``keep``, ``ranking``, ``state`` and ``progress``."""
        return replace(self, told=told, clock=Clock(told.progress), notes=list(self.notes))

    @property
    def reference(self) -> Reference:
        """The dense network on the images held back."""
        values = self.values
        values.reference = values.reference or Reference(self.dense, self.held, self.outputs)
        return values.reference

    def wanted(self) -> Wanted | None:
        """Return what layers are fitted to, if several repairs share it; else None."""
        values = self.values
        if not values.are_kept or self.depth is not None or num_processes() > 1:
            return None
        device = next(self.dense.parameters()).device
        if values.wanted is None and spare_bytes(device) >= TARGET_BYTES:
            values.wanted = wanted_by(
                self.dense, self.fit, **self.told.views, seed=self.by.probing.seed
            )
        return values.wanted

    @property
    def predicted(self) -> float:
        """The output variance that the scores of the branches that left promise."""
        return sum(self.depth.branches[name] for name in self.depth.gone) if self.depth else 0.0

    def parts(self) -> list[Any]:
        """Return what tells one run from another."""
        where = (self.budget.device,) if isinstance(self.budget, LatencyTable) else ()
        timed = (len(self.batch), *where)
        return [
            self.dense, dict(enumerate(self.fit)), self.told.of, timed, self.by.name,
            self.by.how, self.by.stand_in, self.by.probing, self.limits, self.images_for_factors,
            [g.name for g in self.groups], self.notes,
        ]  # fmt: skip

    def ranked(self, given: Ranking | None = None) -> Ranking:
        """Return a ranking of the dense network, checked or new, with factors where they count."""
        _check_ranking(given, self.by, self.dense, self.groups)
        ranking = given or self.by.ranked(self.dense, self.groups, self.fit, self.clock)
        if not (self.images_for_factors and len(self.groups)) or ranking.allocation != "curves":
            return replace(ranking, factors=None)
        if ranking.factors is not None:
            return ranking
        with self.clock("repair factors"):
            draft = ranking.choose(
                self.groups, keep=_FACTOR_KEEP, of=self.budget, limits=self.limits
            )
            factors = measured_factors(
                self.dense, self.groups, draft, ranking.curves, self.fit,
                max_inputs=self.images_for_factors, seed=self.by.probing.seed,
                outputs=self.outputs, progress=self.clock.progress,
            )  # fmt: skip
        return replace(ranking, factors=factors)


def set_up(
    model: nn.Module, batches: Iterable[Any], told: Choices, *, several: bool = False
) -> Setup:
    """Draw the images and find the groups; ``several``: more than one repair will follow."""
    limits, clock = told.limits or Limits(), Clock(told.progress)
    forward = told.forward or forward_of(model)
    model = own_forward(model) if forward is None else with_forward(model, forward)
    fit, held = hold_back(batches, num_images=told.num_images, seed=told.seed)
    _check_shapes(fit, held)
    if told.reconstructions > len(fit):
        raise ValueError(
            f"reconstructions: expected at most {len(fit)}, as many as there are batches, found "
            f"{told.reconstructions}: give more images, or smaller batches"
        )
    with clock("groups"):
        model, said_of_folded = folded_if_equal(model, on_device(from_first(fit[0][:1]), model))
        fused = fused_attention(model)
        model = unfuse_attention(model) if fused else model
        counted = Outputs.measured(model, fit, told.outputs)
        probing = replace(told.probing or Probing(), seed=told.seed, outputs=counted)
        follows = stand_in(told.planned_repair or told.repair)
        by = RankBy(told.criterion, told.allocation, "macs", follows, probing)
        example = _example(model, fit, counted)
        groups = find_groups(model, example, ignore=limits.ignore)
        if told.outputs is not None:
            gone = unseen(model, groups, (example,), list(counted.scales))
            groups = with_blocked(groups, gone)
        # Before anything is summed over them. Not the reasons for what is blocked: they quote
        # rounding, which may differ between machines.
        check_same("channel groups", [(g.name, g.num_channels) for g in groups])
        groups = _prunable(groups) if "channel" in told.leaves else _whole(groups)
        batch = example.repeat_interleave(told.latency_batch_size, 0)
        budget = _budget(told, model, groups, batch)
    _check_rounding(limits, groups)
    if limits.round_to == "auto" and isinstance(budget, LatencyTable):
        limits = replace(limits, round_to=budget.step)  # widths that run fast
    return Setup(
        told, model, model, model, groups, fit, held, batch, counted, budget,
        cost(groups, {}, budget), limits, replace(by, of=budget),
        _images_for_factors(told.repair_factors, by, groups, fit), clock,
        [
            *said_of_forward(forward), *counted.said(), *_said_of_criterion(by, counted),
            *said_of_folded, *_said_of_fused(fused), *groups.notes,
        ],
        DenseValues(several or told.steps > 1),
    )  # fmt: skip


def _check_shapes(*batches: list[Tensor]) -> None:
    """Check that all inputs are alike: layers are fitted to all of them at once."""
    shapes = sorted({tuple(x.shape[1:]) for part in batches for x in part})
    if len(shapes) > 1:
        raise ValueError(
            f"batches: expected inputs of one shape, found {list(shapes[0])} and "
            f"{list(shapes[1])}: bring images to one size"
        )


def _budget(told: Choices, model: nn.Module, groups: ChannelGroups, batch: Tensor) -> Budget:
    """Return what is spared, as it is counted; milliseconds are measured."""
    if told.of != "latency":
        return told.of
    if isinstance(told.latency_runtime, LatencyTable):
        return measured_elsewhere(told.latency_runtime, model, batch)
    return by_first(
        latency_table, model, groups, batch,
        runtime=told.latency_runtime, num_threads=told.latency_threads,
    )  # fmt: skip


def stand_in(repair: str) -> StandIn:
    """Return what takes the place of a channel when this repair follows; see `variance_curves`."""
    if repair == "bn":  # which restores the means
        return "mean"
    return "zero" if repair == "none" else "map"


@torch.no_grad()
def _example(model: nn.Module, fit: list[Tensor], outputs: Outputs) -> Tensor:
    """Return the first input, for which the outputs are finite."""
    example = on_device(from_first(fit[0][:1]), model)
    with evaluating(model):
        check_outputs(model, example, outputs.joined(model(example), 1), batch=0)
    return example


def _said_of_criterion(by: RankBy, outputs: Outputs) -> list[str]:
    """Return which of several outputs a criterion reads that is defined for classes alone."""
    if by.name not in READS_CLASSES or len(outputs.scales) < 2:
        return []
    first = next(iter(outputs.scales))
    return [f"criterion {by.name} is defined for class logits: it reads output {first!r} alone"]


def _said_of_fused(names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        f"{names[0]}{more}: nn.MultiheadAttention was replaced by linear layers that compute the "
        "same, so that heads can be removed: of the dense model unfuse_attention makes the same"
    ]


def _images_for_factors(
    wanted: bool | None, by: RankBy, groups: ChannelGroups, fit: list[Tensor]
) -> int:
    """Return on how many images repair factors are measured; 0: they are not."""
    affordable = int(_FACTOR_MACS / max(groups.macs(), 1.0))
    if wanted is None:
        enough = affordable >= min(_FACTOR_IMAGES[0], total(sum(map(len, fit))))
        wanted = by.stand_in == "map" and enough
    least, most = _FACTOR_IMAGES
    return min(most, max(least, affordable)) if wanted and by.how == "curves" else 0


def _prunable(groups: ChannelGroups) -> ChannelGroups:
    """Return the groups; ValueError if there is nothing to prune."""
    if len(groups):
        return groups
    # The head is blocked in every network: what else is says more.
    blocked = sorted(groups.blocked, key=lambda b: b.blocked == "is an output of the network")
    reasons = "; ".join(f"{b.name}: {b.blocked}" for b in blocked[:3])
    raise ValueError(f"expected a model with channels that can be pruned, found none ({reasons}).")


def _whole(groups: ChannelGroups) -> ChannelGroups:
    """Return none that can be pruned."""
    return with_blocked(groups, dict.fromkeys((g.name for g in groups), "only branches may go"))


def _check_rounding(limits: Limits, groups: ChannelGroups) -> None:
    """Check what widths are to be multiples of."""
    widest = max((g.num_channels for g in groups if g.unit == "channel"), default=1)
    if limits.round_to != "auto" and limits.round_to > max(1, widest):
        raise ValueError(
            f"round_to: expected at most {widest}, the width of the widest group, found "
            f"{limits.round_to}"
        )


def _check_ranking(
    ranking: Ranking | None, by: RankBy, model: nn.Module, groups: ChannelGroups
) -> None:
    """Check a ranking that was given."""
    if ranking is None:
        return
    made, wrong = ranking.scores.criterion, ""
    found = {name: len(curve.order) for name, curve in ranking.curves.items()}
    if made != by.name and {made, by.name} <= SCORERS.keys():  # one of one's own has any name
        wrong = f"one by criterion {by.name!r}, found one by {made!r}"
    elif ranking.allocation != by.how:
        wrong = f"one for allocation {by.how!r}, found one for {ranking.allocation!r}"
    elif by.criterion == "tpv" and ranking.stand_in != by.stand_in:
        wrong = (
            f"one where a {by.stand_in} takes the place of a channel, as it will after this "
            f"repair, found one where a {ranking.stand_in} does"
        )
    elif found != {g.name: g.num_channels for g in groups}:
        wrong = f"one of the groups of this model, found {len(found)} others"
    elif ranking.of != digest_of(model).hex():
        wrong = "one of these weights, found one of others"
    if wrong:
        raise ValueError(f"ranking: expected {wrong}: leave it out, and channels are ranked anew")
