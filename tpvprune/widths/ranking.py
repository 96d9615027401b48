"""In which order the channels of each group leave, and what that does to the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.disk.digest import digest_of
from tpvprune.disk.path_checks import RANKING_FILE
from tpvprune.disk.tensors import by_part, read_facts, read_tensors, save_tensors
from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.budget import Budget, reaches
from tpvprune.passes.clock import Clock, Counted
from tpvprune.processes.shares import check_same, total
from tpvprune.scores.criteria import NEEDS_LABELS, Labelled, Scorer, scorer
from tpvprune.scores.criterion_names import READS_OUTPUTS
from tpvprune.scores.curves import Curve, StandIn, variance_curves
from tpvprune.scores.taps import Probing
from tpvprune.scores.tpv import Scores
from tpvprune.widths.allocation import allocate
from tpvprune.widths.limits import Limits
from tpvprune.widths.narrowest import narrowest
from tpvprune.widths.repair_factors import scaled
from tpvprune.widths.selection import greedy, ranked_by_scores

Allocation = Literal["curves", "rank", "plain"]
PARTS = ("scores", "stderr", "order", "variance")


@dataclass(frozen=True)
class Ranking:
    """What the channels of a network are worth.

    Attributes:
        curves: Group name -> the order in which its channels leave, and the damage on the way.
        scores: What each channel is worth by itself.
        allocation: How widths follow: see :func:`tpvprune.prune`.
        of: Fingerprint of the weights that were ranked, hexadecimal.
        stand_in: What takes the place of a channel in them (of ``"tpv"`` only).
        factors: Group name -> what the variance of its curve is multiplied by, where it was
            measured how much of a cut the repair makes up for
            (:mod:`tpvprune.widths.repair_factors`).
    """

    curves: Mapping[str, Curve]
    scores: Scores
    allocation: Allocation
    of: str
    stand_in: StandIn = "map"
    factors: Mapping[str, float] | None = None

    def save(self, path: str | Path) -> None:
        """Write the ranking as one safetensors file.

        Args:
            path: The file; ValueError tells if the system refuses to write it.
        """
        parts, facts = self.to_parts()
        save_tensors(Path(path), by_part(parts), facts)

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        """Read what :meth:`save` wrote; no pickle is read.

        Args:
            path: The file, or the folder of a saved pruned model.

        Returns:
            The ranking.

        Raises:
            ValueError: If there is none, or the file is damaged.
        """
        path = Path(path)
        path = path / RANKING_FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: expected a ranking that tpvprune saved, found no such file")
        try:
            facts = read_facts(path)
            return cls.from_parts(read_tensors(path, PARTS), facts)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected a ranking that tpvprune saved, found damage or another file "
                f"({type(error).__name__})"
            ) from error

    def to_parts(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Return tensors by :data:`PARTS` and group, and what else there is as plain data."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "scores": self.scores,
            "stderr": self.scores.stderr or {},
            "order": {name: curve.order for name, curve in self.curves.items()},
            "variance": {name: curve.variance for name, curve in self.curves.items()},
        }
        return parts, {
            "allocation": self.allocation,
            "of": self.of,
            "stand_in": self.stand_in,
            "factors": None if self.factors is None else dict(self.factors),
            "criterion": self.scores.criterion,
            "num_samples": self.scores.num_samples,
            "used_labels": self.scores.used_labels,
        }

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
    ) -> Ranking:
        """Return the ranking that :meth:`to_parts` took apart; ValueError if parts do not fit."""
        stderr, factors = parts["stderr"], facts["factors"]
        curves = {
            name: Curve(order, parts["variance"][name], parts["scores"][name], stderr.get(name))
            for name, order in parts["order"].items()
        }
        for name, curve in curves.items():
            if not torch.equal(curve.order.sort().values, torch.arange(len(curve.variance))):
                raise ValueError(f"{name}: expected an order of its channels")
        for key, known in (("allocation", Allocation), ("stand_in", StandIn)):
            if facts[key] not in get_args(known):
                raise ValueError(f"{key}: found {facts[key]!r}")
        if factors is not None and factors.keys() != curves.keys():
            raise ValueError("factors: expected one for each group")
        scores = Scores(
            parts["scores"], stderr or None, facts["num_samples"], facts["criterion"],
            used_labels=facts["used_labels"],
        )  # fmt: skip
        return cls(curves, scores, facts["allocation"], facts["of"], facts["stand_in"], factors)

    def choose(self, groups: ChannelGroups, *, keep: float, of: Budget, limits: Limits) -> Kept:
        """Return what stays under a budget; the smallest selection there is if none fits.

        ``groups``: those that were ranked. ``keep``: fraction of the dense cost that stays, in
        (0, 1]. Returns group name -> BoolTensor [C], True = stays; the same in all processes.
        """
        if self.allocation == "curves":
            kept = allocate(groups, self._repaired, keep=keep, of=of, limits=limits)
        else:
            per_cost = self.allocation == "rank"
            kept = greedy(groups, self.curves, keep=keep, of=of, limits=limits, per_cost=per_cost)
        if not reaches(groups, kept, keep=keep, of=of):
            ranks = {name: curve.order.argsort() for name, curve in self.curves.items()}
            kept = narrowest(groups, of, ranks=ranks, limits=limits)
        check_same("channels to cut", kept)
        return kept

    def by_scores(self, groups: ChannelGroups, of: Budget) -> Ranking:
        """Return the same scores, with widths that follow what each channel is worth by itself.

        ``of``: the budget: what is cheap to keep is worth keeping.
        """
        curves = ranked_by_scores(groups, self.scores, of=of)
        return replace(self, curves=curves, allocation="rank", factors=None)

    def predicted(self, kept: Kept) -> float:
        """Return the output variance that curves promise of a choice; 0 of scores."""
        if self.allocation != "curves":
            return 0.0
        removed = {name: int((~mask).sum()) for name, mask in kept.items()}
        curves = self._repaired
        return sum(float(curves[name].variance[num]) for name, num in removed.items())

    @property
    def _repaired(self) -> Mapping[str, Curve]:
        return self.curves if self.factors is None else scaled(self.curves, self.factors)


@dataclass(frozen=True)
class RankBy:
    """How channels are ranked.

    ``criterion``: a key of ``SCORERS``, or a scorer of one's own. ``allocation``: None:
    ``"curves"`` for ``"tpv"``, ``"rank"`` for all others. ``of``: the budget: what is cheap to keep
    is worth keeping. ``stand_in``: what takes the place of a channel (``"tpv"`` only).
    ``probing``: how the passes are run (of others than ``"tpv"`` the seed alone counts). ValueError
    if they do not go together, or the criterion needs labels and has none.
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
        self, model: nn.Module, groups: ChannelGroups, batches: list[Tensor], clock: Clock
    ) -> Ranking:
        """Measure on unlabeled inputs [B, ...] what the channels of a network are worth."""
        weights = digest_of(model).hex()
        if not len(groups):  # only branches may go
            nothing = Scores({}, None, int(total(sum(map(len, batches)))), self.name)
            return Ranking({}, nothing, self.how, weights, self.stand_in)
        with clock("ranking"):
            if self.how == "curves":
                curves = variance_curves(
                    model, groups, Counted(batches, "curves", clock.progress, passes=2),
                    stand_in=self.stand_in, of=self.of, progress=clock.progress,
                    **vars(self.probing),
                )  # fmt: skip
                scores = _alone(curves, batches)
            else:
                scores = self._scored(model, groups, Counted(batches, "scoring", clock.progress))
                per_cost = self.how == "rank"
                curves = ranked_by_scores(groups, scores, of=self.of, per_cost=per_cost)
            return Ranking(curves, scores, self.how, weights, self.stand_in)

    def _scored(self, model: nn.Module, groups: ChannelGroups, batches: Counted) -> Scores:
        score = scorer(self.criterion) if isinstance(self.criterion, str) else self.criterion
        options: dict[str, Any] = {"seed": self.probing.seed}
        # A scorer of one's own is called with a seed alone.
        if isinstance(self.criterion, (str, Labelled)) and self.name in READS_OUTPUTS:
            options["outputs"] = self.probing.outputs
        if self.criterion == "tpv":
            options = {**vars(self.probing), "compensated": self.stand_in != "zero"}
        return score(model, groups, batches, **options)


def _alone(curves: Mapping[str, Curve], batches: list[Tensor]) -> Scores:
    """Return what each channel changes alone, as scores."""
    values = {name: curve.alone for name, curve in curves.items()}
    stderr = {name: c.stderr for name, c in curves.items() if c.stderr is not None}
    return Scores(values, stderr or None, int(total(sum(map(len, batches)))), "tpv")
