"""How alike two rankings of channels are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tpvprune.groups import ChannelGroups
from tpvprune.widths.selection import select_channels


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
    cut, other = (_removed(groups, s, keep) for s in (scores, others))
    most = max(int(cut.sum()), int(other.sum()))
    return int((cut & other).sum()) / most if most else 1.0


def _removed(groups: ChannelGroups, scores: Mapping[str, Tensor], keep: float) -> Tensor:
    kept = select_channels(groups, scores, keep=keep)
    return torch.cat([~kept[group.name] for group in groups])
