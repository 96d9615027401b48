"""What widths cost: multiply-accumulates, parameters, or milliseconds by a measured table."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tpvprune.groups.axes import Axis, Kept
from tpvprune.groups.records import ChannelGroups

Term = Callable[[Sequence[float]], float]
"""Cost as a function of the shares that are left of some axes."""


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of one layer: ``ms[i][j]`` at ``ins[i]`` inputs and ``outs[j]`` outputs.

    Depthwise: one entry in ``ins``. ``values``: written per channel, batch times positions.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    values: int

    def at(self, num_in: float, num_out: float) -> float:
        """Return the interpolated milliseconds."""
        rows = [_between(self.outs, row, num_out) for row in self.ms]
        return _between(self.ins, rows, num_in)


@dataclass(frozen=True)
class LatencyTable:
    """What the layers of one model cost on one device.

    Attributes:
        layers: Module name -> its times.
        ms_per_value: What everything else costs for each value that a layer writes.
        constant_ms: What no width changes.
        step: Widths that are no multiples of it gain no time.
        batch_size: Inputs of one call.
        device: Runtime, name of the device, and how many threads.
        runtime: Name of the runtime; ``"table"`` of times that cannot be measured here.
        num_threads: Of one call on a CPU.
        input_shape: Of one input, without the batch axis.
        shapes: Digest of the shapes of the model's parameters.
        model: Its name, for people.
    """

    layers: dict[str, LayerTime]
    ms_per_value: float
    constant_ms: float
    step: int
    batch_size: int
    device: str
    runtime: str = "eager"
    num_threads: int = 0
    input_shape: tuple[int, ...] = ()
    shapes: str = ""
    model: str = ""

    def terms(self, groups: ChannelGroups) -> list[tuple[Term, tuple[Axis, ...]]]:
        """Return what each layer costs as a function of the shares that its axes keep."""
        found: list[tuple[Term, tuple[Axis, ...]]] = [(lambda _: self.constant_ms, ())]
        for name, layer in self.layers.items():
            axes = dict(groups.param_axes.get(f"{name}.weight", ()))
            sizes = ((1, layer.ins[-1]), (0, layer.outs[-1]))
            ends = tuple(axes.get(dim) or Axis(size, ()) for dim, size in sizes)
            found.append((partial(self._ms, layer, ends[0].size, ends[1].size), ends))
        return found

    def _ms(self, layer: LayerTime, size_in: int, size_out: int, shares: Sequence[float]) -> float:
        num_in, num_out = shares[0] * size_in, shares[1] * size_out
        return layer.at(num_in, num_out) + self.ms_per_value * layer.values * num_out


def _between(points: Sequence[int], values: Sequence[float], x: float) -> float:
    i = bisect.bisect_left(points, x)
    if i == 0 or len(points) == 1:
        return values[0]
    if i == len(points):
        return values[-1]
    part = (x - points[i - 1]) / (points[i] - points[i - 1])
    return values[i - 1] + part * (values[i] - values[i - 1])


Budget = Literal["macs", "params"] | LatencyTable
"""What is counted: multiply-accumulates, parameters, or milliseconds by a table."""


def reaches(groups: ChannelGroups, kept: Kept, *, keep: float, of: Budget) -> bool:
    """Return whether ``kept`` fits the budget."""
    return cost(groups, kept, of) <= keep * cost(groups, {}, of) * (1 + 1e-9)


def cost(groups: ChannelGroups, kept: Mapping[str, Tensor], of: Budget) -> float:
    """Return the MACs of one input, the parameters, or the milliseconds, when ``kept`` stays."""
    if of == "macs":
        return groups.macs(kept)
    if of == "params":
        return float(groups.params(kept))
    return sum(
        term([float(axis.kept(kept).double().mean()) for axis in axes])
        for term, axes in _entries(groups, of)
    )


def unit_costs(groups: ChannelGroups, of: Budget) -> dict[str, Tensor]:
    """Return what removing each unit from the dense model saves: group name -> Tensor [C].

    Units of one group need not cost the same: of a padded stream some exist in every stage.
    """
    savings = {g.name: torch.zeros(g.num_channels, dtype=torch.float64) for g in groups}
    for term, axes in _entries(groups, of):
        for i, axis in enumerate(axes):
            # The mean slope down to half: one unit less may save nothing by itself.
            half = [0.5 if j == i else 1.0 for j in range(len(axes))]
            amount = 2 * (term([1.0] * len(axes)) - term(half)) if axis.members else 0.0
            for name, _, channel in axis.members:
                counts = torch.bincount(channel, minlength=len(savings[name]))
                savings[name] += amount * counts / axis.size
    return savings


def _entries(groups: ChannelGroups, of: Budget) -> list[tuple[Term, tuple[Axis, ...]]]:
    """Return what the cost is a sum of: functions of the shares that some axes keep."""
    if isinstance(of, LatencyTable):
        return of.terms(groups)
    if of == "macs":
        amounts = [(c.macs, c.axes) for c in groups.costs]
    else:
        amounts = [
            (float(size), tuple(a for _, a in groups.param_axes.get(name, ())))
            for name, size in groups.param_sizes.items()
        ]
    return [(partial(_product, amount), axes) for amount, axes in amounts]


def _product(amount: float, shares: Sequence[float]) -> float:
    return amount * math.prod(shares)


def check_budget(keep: float, of: object) -> None:
    """Check a budget."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a fraction in (0, 1], found {keep}; 0.5 keeps half.")
    if not isinstance(of, LatencyTable) and of not in {"macs", "params"}:
        raise ValueError(f"of: expected 'macs', 'params' or a latency table, found {of!r}.")


_Shares = tuple[float, dict[str, list[float]]]  # what is fixed, group -> what is left at each width


class CostModel:
    """Exact cost as a function of the widths, given the order in which channels leave.

    ``orders[g]`` lists the channels of a group, first to leave first; a width w keeps the last w.
    """

    def __init__(self, groups: ChannelGroups, of: Budget, orders: Mapping[str, Tensor]) -> None:
        self._constant = 0.0
        self._terms: list[Callable[[Mapping[str, int]], float]] = []
        self._by_group: dict[str, list[Callable[[Mapping[str, int]], float]]] = defaultdict(list)
        for function, axes in _entries(groups, of):
            factors = [_shares(axis, orders) for axis in axes]
            names = {n for _, shares in factors for n in shares}
            if not names:
                self._constant += function([1.0] * len(axes))
                continue
            self._terms.append(partial(_at, function, factors))
            for name in names:
                self._by_group[name].append(self._terms[-1])

    def total(self, widths: Mapping[str, int]) -> float:
        """Return the cost of the whole network."""
        return self._constant + sum(term(widths) for term in self._terms)

    def of_group(self, name: str, widths: Mapping[str, int]) -> float:
        """Return the cost of everything that depends on one group."""
        return sum(term(widths) for term in self._by_group[name])


def _at(function: Term, factors: Sequence[_Shares], widths: Mapping[str, int]) -> float:
    """Return the cost of one call or parameter."""
    return function([f + sum(s[widths[n]] for n, s in shares.items()) for f, shares in factors])


def _shares(axis: Axis, orders: Mapping[str, Tensor]) -> _Shares:
    owned, shares = 0, {}
    for name, _, channel in axis.members:
        counts = torch.bincount(channel, minlength=len(orders[name]))
        left = counts[orders[name].flip(0)].cumsum(0)
        shares[name] = [0.0, *(left.double() / axis.size).tolist()]
        owned += len(channel)
    return 1 - owned / axis.size, shares
