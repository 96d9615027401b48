"""Which rows a benchmark has: criteria, rankings, budgets, repairs, seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tpvprune.benchmark.rows import KEY, RANKINGS, STOCK_RANKING, Row, key_of
from tpvprune.scores.baselines.stock import STOCK, STOCK_NEEDS_LABELS
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS

REPAIRS = ("none", "bn", "compensate", "reconstruct")


class Series(NamedTuple):
    """One way to prune; its seed draws the images and all that is random."""

    seed: int
    criterion: str
    ranking: str


class Target(NamedTuple):
    """How far it goes: cuts in a row, and the fraction of the dense MACs that stays."""

    steps: int
    keep: float


@dataclass(frozen=True)
class Plan:
    """Which rows a benchmark has.

    Criteria are keys of ``SCORERS`` and ``STOCK``, and ``keeps`` fractions of the dense MACs. The
    ranking ``"curves"`` concerns ``"tpv"`` only; torch-pruning ranks rows of ``STOCK`` by itself,
    once. With ``steps`` above 1, the last of ``keeps`` is reached in so many cuts of equal size,
    scored anew and measured after each.
    """

    model: str
    criteria: tuple[str, ...]
    keeps: tuple[float, ...]
    repairs: tuple[str, ...]
    rankings: tuple[str, ...]
    seeds: tuple[int, ...]
    num_images: int
    steps: int = 1

    def __post_init__(self) -> None:
        """Check that every row can be made."""
        for what, names, known in (
            ("criteria", self.criteria, (*SCORERS, *STOCK)),
            ("repair", self.repairs, REPAIRS),
            ("ranking", self.rankings, tuple(RANKINGS)),
        ):
            for name in names:
                if name not in known:
                    expected = ", ".join(known)
                    raise ValueError(f"{what}: expected some of {expected}, found {name!r}")
        if self.steps > 1 and (len(self.keeps) > 1 or any(c in STOCK for c in self.criteria)):
            raise ValueError(
                "iterative pruning: expected one budget, that of the last step, and no tp: "
                "criteria, which go in one step: run them apart"
            )
        if not self.keys():
            raise ValueError(
                "no row to measure: the ranking 'curves' is for the criterion tpv only: "
                "add per_cost or plain"
            )

    @property
    def labelled(self) -> bool:
        """Whether any criterion needs labels."""
        return any(map(needs_labels, self.criteria))

    def series(self) -> list[Series]:
        """Return what is measured at every target, in the order of the rows."""
        return [
            Series(seed, criterion, ranking)
            for seed in self.seeds
            for criterion in self.criteria
            for ranking in ((STOCK_RANKING,) if criterion in STOCK else self.rankings)
            if ranking != "curves" or criterion == "tpv"
        ]

    def targets(self) -> list[Target]:
        """Return the points of each series that are measured, on the way down."""
        if self.steps == 1:
            return [Target(1, keep) for keep in self.keeps]
        size = (1 - self.keeps[0]) / self.steps
        return [Target(step, round(1 - step * size, 6)) for step in range(1, self.steps + 1)]

    def row(self, series: Series, target: Target, repair: str) -> Row:
        """Return the part of a row that says which one it is."""
        seed, criterion, ranking = series
        values = (
            self.model, criterion, RANKINGS.get(ranking, ranking), repair, target.steps,
            self.num_images, target.keep, seed,
        )  # fmt: skip
        labels = "yes" if needs_labels(criterion) else "no"
        return {
            **dict(zip(KEY, map(str, values), strict=True)),
            "labels": labels,
            "ranking": ranking,
        }

    def keys(self) -> list[tuple[str, ...]]:
        """Return the keys of all rows, in order."""
        return [
            key_of(self.row(series, target, repair))
            for series in self.series()
            for target in self.targets()
            for repair in self.repairs
        ]


def needs_labels(criterion: str) -> bool:
    """Tell whether a criterion reads labels."""
    return criterion in NEEDS_LABELS or criterion in STOCK_NEEDS_LABELS
