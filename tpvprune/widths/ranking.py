"""In which order the channels of each group leave, and what that does to the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.budget import Budget, reaches
from tpvprune.passes.clock import Clock, Counted
from tpvprune.processes.shares import check_same, total
from tpvprune.scores.criteria import NEEDS_LABELS, Labelled, Scorer, scorer
from tpvprune.scores.curves import Curve, StandIn, variance_curves
from tpvprune.scores.taps import Probing
from tpvprune.scores.tpv import Scores
from tpvprune.widths.allocation import allocate
from tpvprune.widths.limits import Limits
from tpvprune.widths.narrowest import narrowest
from tpvprune.widths.selection import greedy, ranked_by_scores

Allocation = Literal["curves", "rank", "plain"]


@dataclass(frozen=True)
class Ranking:
    """What the channels of a network are worth.

    Attributes:
        curves: Group name -> the order in which its channels leave, and the damage on the way.
        scores: What each channel is worth by itself.
        allocation: How widths follow: see :func:`tpvprune.prune`.
    """

    curves: Mapping[str, Curve]
    scores: Scores
    allocation: Allocation

    def choose(self, groups: ChannelGroups, *, keep: float, of: Budget, limits: Limits) -> Kept:
        """Return what stays under a budget; the smallest selection there is if none fits.

        Args:
            groups: The groups that were ranked.
            keep: Fraction of the dense cost that stays, in (0, 1].
            of: What the fraction is of.
            limits: How far groups may shrink.

        Returns:
            Group name -> BoolTensor [C], True = stays; the same in all processes.
        """
        if self.allocation == "curves":
            kept = allocate(groups, self.curves, keep=keep, of=of, limits=limits)
        else:
            per_cost = self.allocation == "rank"
            kept = greedy(groups, self.curves, keep=keep, of=of, limits=limits, per_cost=per_cost)
        if not reaches(groups, kept, keep=keep, of=of):
            ranks = {name: curve.order.argsort() for name, curve in self.curves.items()}
            kept = narrowest(groups, of, ranks=ranks, limits=limits)
        check_same("channels to cut", kept)
        return kept

    def predicted(self, kept: Kept) -> float:
        """Return the output variance that curves promise of a choice; 0 of scores."""
        if self.allocation != "curves":
            return 0.0
        removed = {name: int((~mask).sum()) for name, mask in kept.items()}
        return sum(float(self.curves[name].variance[num]) for name, num in removed.items())


@dataclass(frozen=True)
class RankBy:
    """How channels are ranked.

    Attributes:
        criterion: A key of ``SCORERS``, or a scorer of one's own.
        allocation: None: ``"curves"`` for ``"tpv"``, ``"rank"`` for all others.
        of: The budget: what is cheap to keep is worth keeping.
        stand_in: What takes the place of a channel (``"tpv"`` only).
        probing: How the passes are run (of others than ``"tpv"`` the seed alone counts).

    Raises:
        ValueError: If they do not go together, or the criterion needs labels and has none.
    """

    criterion: str | Scorer = "tpv"
    allocation: Allocation | None = None
    of: Budget = "macs"
    stand_in: StandIn = "map"
    probing: Probing = field(default_factory=Probing)

    def __post_init__(self) -> None:
        if isinstance(self.criterion, str):
            scorer(self.criterion)
            if self.criterion in NEEDS_LABELS:
                raise ValueError(
                    f"criterion {self.criterion!r} needs labels: pass tpvprune.with_labels("
                    f"{self.criterion!r}, labelled_batches), or use 'tpv', which needs none."
                )
        if self.allocation not in {None, *get_args(Allocation)} or (
            self.allocation == "curves" and self.criterion != "tpv"
        ):
            raise ValueError(
                "allocation: expected 'rank' or 'plain', or 'curves' with criterion 'tpv', found "
                f"{self.allocation!r} with {self.name!r}."
            )

    @property
    def name(self) -> str:
        """The criterion by its name."""
        named = self.criterion.name if isinstance(self.criterion, Labelled) else self.criterion
        return named if isinstance(named, str) else getattr(named, "__qualname__", repr(named))

    @property
    def how(self) -> Allocation:
        """How widths follow."""
        return self.allocation or ("curves" if self.criterion == "tpv" else "rank")

    def ranked(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        batches: list[Tensor],
        clock: Clock,
    ) -> Ranking:
        """Measure what the channels of a network are worth.

        Args:
            model: The network.
            groups: Its channel groups.
            batches: Unlabeled inputs [B, ...].
            clock: Told how far the passes are.

        Returns:
            The ranking.
        """
        with clock("ranking"):
            if self.how == "curves":
                curves = variance_curves(
                    model, groups, Counted(batches, "curves", clock.progress, passes=2),
                    stand_in=self.stand_in, of=self.of, progress=clock.progress,
                    **vars(self.probing),
                )  # fmt: skip
                return Ranking(curves, _alone(curves, batches), self.how)
            scores = self._scored(model, groups, Counted(batches, "scoring", clock.progress))
            per_cost = self.how == "rank"
            curves = ranked_by_scores(groups, scores, of=self.of, per_cost=per_cost)
            return Ranking(curves, scores, self.how)

    def _scored(self, model: nn.Module, groups: ChannelGroups, batches: Counted) -> Scores:
        score = scorer(self.criterion) if isinstance(self.criterion, str) else self.criterion
        options: dict[str, Any] = {"seed": self.probing.seed}
        if self.criterion == "tpv":
            options = {**vars(self.probing), "compensated": self.stand_in != "zero"}
        return score(model, groups, batches, **options)


def _alone(curves: Mapping[str, Curve], batches: list[Tensor]) -> Scores:
    """Return what each channel changes alone, as scores."""
    values = {name: curve.alone for name, curve in curves.items()}
    stderr = {name: c.stderr for name, c in curves.items() if c.stderr is not None}
    return Scores(values, stderr or None, int(total(sum(map(len, batches)))), "tpv")
