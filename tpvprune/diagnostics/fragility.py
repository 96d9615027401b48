"""How far criteria and measures move under changes that leave the model as good as it was.

Reference:
    Zhang, Louis, Position: many generalization measures for deep learning are fragile, 2025,
    https://arxiv.org/abs/2510.18934
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpvprune.diagnostics.catalogue import Measure, Setting
from tpvprune.diagnostics.changes import Change
from tpvprune.diagnostics.measures import Measurement
from tpvprune.groups import ChannelGroups
from tpvprune.passes.clock import Progress
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS
from tpvprune.scores.tpv import Scores, tpv_scores
from tpvprune.widths.selection import select_channels

CRITERIA: Mapping[str, Callable[..., Scores]] = {
    **SCORERS,
    "tpv_uncompensated": partial(tpv_scores, compensated=False),
}
"""Those of the package, and TPV without compensation, which is exactly invariant."""

DEFAULT_CRITERIA = ("tpv", "tpv_uncompensated", "jbr", "activation_variance", "magnitude")


@dataclass(frozen=True)
class Fragility:
    """What was measured; every inner mapping is by the name of the change.

    Attributes:
        changes: What was done to the model and its images.
        values: Measure -> its value in the first setting.
        moved: Measure -> change -> value / first value - 1.
        tau: Criterion -> change -> Kendall's rank correlation of the channels' scores.
        overlap: Criterion -> change -> fraction of the channels cut at ``keep`` that are the same.
        left_out: Measure, criterion or change -> why it is missing.
    """

    changes: tuple[Change, ...]
    values: Mapping[str, Measurement]
    moved: Mapping[str, Mapping[str, float]]
    tau: Mapping[str, Mapping[str, float]]
    overlap: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def fragility(
    setting: Setting,
    changes: Sequence[Change],
    *,
    measures: Mapping[str, Measure],
    criteria: Sequence[str] = DEFAULT_CRITERIA,
    keep: float = 0.5,
    left_out: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Fragility:
    """Measure how far every measure and every ranking of channels moves under each change.

    Cost: that of all measures and criteria, once and once more per change.

    Args:
        setting: Model and images as they are.
        changes: See :func:`tpvprune.diagnostics.changes.changes_of`.
        measures: Name -> measure.
        criteria: Names in ``CRITERIA``; those that need labels read ``setting.labelled``.
        keep: Fraction of the MACs that stays where the overlap of two cuts is measured.
        left_out: What is missing already, with reasons.
        progress: Called with (stage, done, all).

    Returns:
        The table. What cannot be measured on this model is left out, with the reason.

    Raises:
        ValueError: If a criterion is unknown.
    """
    for name in criteria:
        if name not in CRITERIA:
            raise ValueError(f"criteria: expected names of {', '.join(CRITERIA)}, found {name!r}")
    missing = dict(left_out or {})
    total = (len(changes) + 1) * (len(measures) + len(criteria))
    done = 0

    def taken(at: Setting) -> tuple[dict[str, Measurement], dict[str, dict[str, Tensor]]]:
        nonlocal done
        values: dict[str, Measurement] = {}
        scores: dict[str, dict[str, Tensor]] = {}
        for name in (*measures, *criteria):
            if progress is not None:
                progress(name, done, total)
            done += 1
            if name in missing:
                continue
            try:
                if name in measures:
                    values[name] = measures[name].of(at)
                else:
                    scores[name] = _scores(name, at)
            except ValueError as error:
                missing[name] = str(error)
        return values, scores

    first, ranked = taken(setting)
    moved: dict[str, dict[str, float]] = {name: {} for name in first}
    tau: dict[str, dict[str, float]] = {name: {} for name in ranked}
    overlap: dict[str, dict[str, float]] = {name: {} for name in ranked}
    for change in changes:
        values, scores = taken(change.setting)
        for name, value in values.items():
            moved[name][change.name] = value.value / first[name].value - 1
        for name, by_group in scores.items():
            before = ranked[name]
            joined = [torch.cat(list(s.values())) for s in (before, by_group)]
            tau[name][change.name] = kendall(*joined)
            overlap[name][change.name] = same_cut(setting.groups, before, by_group, keep=keep)
    return Fragility(tuple(changes), first, moved, tau, overlap, missing)


def _scores(name: str, at: Setting) -> dict[str, Tensor]:
    batches: Any = at.labelled if name in NEEDS_LABELS else at.batches
    if name in NEEDS_LABELS and not at.has_labels:
        raise ValueError(f"criterion {name}: expected labelled images, found none")
    known = name == "tpv_uncompensated"
    scores = at.tpv if known else CRITERIA[name](at.model, at.groups, batches, seed=at.seed)
    return {group.name: scores[group.name].cpu().double() for group in at.groups}


def kendall(a: Tensor, b: Tensor) -> float:
    r"""Compute Kendall's rank correlation of two score vectors.

    .. math:: \tau_b = \frac{\sum_{i<j} s_{ij} t_{ij}}{\sqrt{\sum s^2 \sum t^2}}, \quad
        s_{ij} = \mathrm{sign}(a_i - a_j)

    Args:
        a: Scores [C].
        b: Scores [C] of the same channels.

    Returns:
        Correlation in [-1, 1]; NaN where all scores of one side are equal.

    Raises:
        ValueError: If the vectors differ in length.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"kendall needs two vectors of one length, found {tuple(a.shape)} and {tuple(b.shape)}"
        )
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(len(a) - 1):
        s, t = ((v[i] - v[i + 1 :]).sign().double().cpu() for v in (a, b))
        sums += torch.stack([s @ t, s @ s, t @ t])
    return float(sums[0] / (sums[1] * sums[2]).sqrt())


def same_cut(
    groups: ChannelGroups,
    scores: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    *,
    keep: float,
) -> float:
    """Return the fraction of channels cut at a budget that two rankings have in common.

    Args:
        groups: Channel groups.
        scores: Group name -> scores [C].
        others: The same by another ranking.
        keep: Fraction of the MACs that stays, in (0, 1].

    Returns:
        Common removals over those of the larger cut; 1 where nothing is cut.
    """
    kept = [select_channels(groups, s, keep=keep) for s in (scores, others)]
    cut, other = (torch.cat([~mask[group.name] for group in groups]) for mask in kept)
    most = max(int(cut.sum()), int(other.sum()))
    return int((cut & other).sum()) / most if most else 1.0
