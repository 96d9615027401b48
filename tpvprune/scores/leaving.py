"""The order in which the channels of a wide group leave: by second moments (``second_moments``)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvprune.groups import Reader
from tpvprune.passes.crossing import fetched
from tpvprune.passes.finite import NotFiniteError
from tpvprune.scores.residuals import Inputs

_MAX_STEPS = 96  # channels of wide groups leave in so many blocks


@dataclass(frozen=True)
class Part:
    """One reader of a group: P [n, n] and G [own, own], or only E u_c^2 [own] without a map."""

    reader: Reader
    inputs: Inputs | None
    moments: Tensor


class _Left:
    """What is left of one reader with a map: P and G of the inputs that have not left."""

    def __init__(self, part: Part, num_channels: int) -> None:
        assert part.inputs is not None
        self._part, self._inputs, self._num = part, part.inputs, num_channels
        self._p, self._g = part.inputs.precision.clone(), part.moments.clone()
        self._index, self._channel = (t.cpu() for t in (part.reader.index, part.reader.channel))
        self.shrinkage = part.inputs.shrinkage

    def costs(self) -> Tensor:
        """Return tr(G_cc P_cc^-1) of every unit [C]."""
        costs = torch.zeros(self._num, dtype=torch.float64, device=self._g.device)
        for unit, own in _by_unit(self._channel):
            g = self._g[own[:, :, None], own[:, None, :]]
            at = self._index[own]
            p = self._p[at[:, :, None], at[:, None, :]]
            costs[unit] += (
                (g * torch.linalg.inv(p)).sum((1, 2)) if p.shape[1] > 1 else ((g / p)[:, 0, 0])
            )
        return costs

    def remove(self, gone: Tensor) -> float:
        """Let units [C] (BoolTensor) leave."""
        own = gone[self._channel]
        if not bool(own.any()):
            return 0.0
        at = self._index[own]
        residual = torch.linalg.inv(self._p[at][:, at])
        taken = self._p[:, at] @ residual  # [n, |R|]
        lost = float((self._g[own][:, own] * residual).sum())
        stay = torch.ones(len(self._p), dtype=torch.bool)
        stay[at] = False
        self._g = _carried(self._g, own, -taken[self._index[~own]].T)
        self._p = self._p[stay][:, stay].addmm_(taken[stay], self._p[at][:, stay], alpha=-1)
        place = stay.cumsum(0) - 1
        self._index, self._channel = place[self._index[~own]], self._channel[~own]
        return lost

    def shrink_less(self, gone: Tensor) -> None:
        """Once units [C] (BoolTensor) have left: fewer inputs that stay, other maps of them."""
        reader, moments = self._part.reader, self._part.moments
        own = gone[reader.channel.cpu()]
        at = reader.index.cpu()
        g = moments[own][:, own]
        shrinkage = self._inputs.less_shrunk(at[own], g, self.shrinkage)
        if shrinkage == self.shrinkage:
            return
        self.shrinkage = shrinkage
        m = self._inputs.residual_map(at[own], shrinkage)
        self._g = _carried(moments, own, -m[at[~own]].T)
        self._p = self._inputs.precision_without(at[own], shrinkage)


def _carried(g: Tensor, own: Tensor, share: Tensor) -> Tensor:
    """Return G of the inputs that stay, with what they carry for those that left, ``own``.

    ``share`` [|R|, own that stay]: by how much each of those stands in.
    """
    g_gone = g[own]
    cross = share.T @ g_gone[:, ~own]
    g = g[~own][:, ~own]
    g += cross
    g += cross.T
    g += share.T @ g_gone[:, own] @ share
    return g


class _Static:
    """A reader without a map: what a channel costs does not depend on the others."""

    shrinkage = 0.0  # there is no map

    def __init__(self, part: Part, num_channels: int) -> None:
        zero = part.moments.new_zeros(num_channels)
        self._costs = zero.index_add_(0, part.reader.channel.to(zero.device), part.moments)

    def costs(self) -> Tensor:
        """Return the cost of every unit [C]."""
        return self._costs

    def remove(self, gone: Tensor) -> float:
        """Return what the output loses by these units [C]."""
        return float(self._costs[gone].sum())

    def shrink_less(self, gone: Tensor) -> None:
        """Nothing here depends on what has left."""


def _by_unit(channel: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (units [U], their own inputs [U, k]) for every number k of inputs of a unit."""
    order = channel.argsort(stable=True)
    units, counts = channel[order].unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    for k in counts.unique().tolist():
        of_size = counts == k
        yield units[of_size], order[starts[of_size][:, None] + torch.arange(k)]


@dataclass(frozen=True)
class Leaving:
    """The order in which the channels of a group leave, and what is lost, up to a common factor.

    Attributes:
        order: Channels [C].
        shape: What was lost once k have left [C].
        alone: What is lost with each channel alone [C].
        shrinkages: Of each part's maps, at the counts asked for.
    """

    order: Tensor
    shape: Tensor
    alone: Tensor
    shrinkages: tuple[tuple[float, ...], ...]


def block_size(num_channels: int) -> int:
    """Return how many channels leave at a time."""
    return -(-num_channels // _MAX_STEPS)


def ranked(left: Tensor, costs: Tensor, savings: Tensor) -> Tensor:
    """Return the channels that are ``left``, those first that cost least for what they save.

    No others are ranked: so every step makes progress, whatever the numbers.
    """
    candidates = left.nonzero().squeeze(1)
    return candidates[(costs / savings.clamp_min(1e-12))[candidates].argsort(stable=True)]


def leaving_order(
    parts: Sequence[Part], num_channels: int, savings: Tensor, counts: Sequence[int] = ()
) -> Leaving:
    """Let the cheapest channels leave, block after block.

    ``savings``: what each channel's removal saves [C]. ``counts``: when so many have left (rising),
    the shrinkage is chosen anew for those that stay. NotFiniteError if what is lost is not finite.
    """
    # The numbers stay on their device; which channels are left, and leave, the host decides.
    left = [(_Left if p.inputs else _Static)(p, num_channels) for p in parts]
    block = block_size(num_channels)
    stays = torch.ones(num_channels, dtype=torch.bool)
    order: list[Tensor] = []
    shape = [0.0]

    def each() -> Tensor:
        (costs,) = fetched(sum((p.costs() for p in left), torch.zeros(())))
        return costs

    first = each()
    shrinkages: list[tuple[float, ...]] = []
    while (num_left := int(stays.sum())) > 1:
        costs = each() if order else first
        until = min((c for c in counts if c > num_channels - num_left), default=num_channels - 1)
        num_leaving = min(block, until - num_channels + num_left)
        chosen = ranked(stays, costs, savings)[:num_leaving]
        gone = torch.zeros(num_channels, dtype=torch.bool)
        gone[chosen] = True
        lost = sum(p.remove(gone) for p in left)
        if not math.isfinite(lost):
            raise NotFiniteError(
                f"expected a finite curve, found {lost} with {num_left} of {num_channels} channels "
                "left: the inputs of its readers are collinear or not finite, ignore the layer"
            )
        lost = max(0.0, lost)
        # Within a block by what each costs alone, so that the curve rises from cheap to dear.
        alone = costs[chosen].clamp_min(0)
        alone = alone / alone.sum() if float(alone.sum()) > 0 else alone + 1 / len(chosen)
        shape += (shape[-1] + lost * alone.cumsum(0)).tolist()
        order.append(chosen)
        stays[chosen] = False
        if num_channels - num_left + num_leaving in counts:
            for p in left:
                p.shrink_less(~stays)
            shrinkages.append(tuple(p.shrinkage for p in left))
    leaves = torch.cat([*order, stays.nonzero().squeeze(1)])
    return Leaving(
        leaves,
        torch.tensor(shape, dtype=torch.float64),
        first.clamp_min(0),
        tuple(zip(*shrinkages, strict=True)) or ((),) * len(parts),
    )
