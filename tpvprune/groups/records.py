"""Channel groups as plain records: what :func:`tpvprune.find_groups` returns.

Everything later in the flow (scores, costs, masks, removal) is a loop over these records; no layer
type is looked at again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from tpvprune.groups.axes import Axis
from tpvprune.groups.tracing.sizes import AxisSize, SizeRule, substitute
from tpvprune.passes.positions import BatchAxis, by_channel


@dataclass(frozen=True)
class ParamSlice:
    """The part of one parameter or buffer that a group's channels own.

    ``index[i]`` along ``dim`` belongs to channel ``channel[i]``. ``side`` is "consumer" for the
    input dimension of the layers that mix the channels, "producer" for everything else.
    """

    param: str
    dim: int
    index: Tensor
    channel: Tensor
    side: Literal["producer", "consumer"]


@dataclass(frozen=True)
class Reader:
    """One call that reads the channels: together, a group's readers are its cut.

    ``call`` is the ordinal among the convolution and linear calls of one forward;
    ``index[i]`` along ``channel_dim`` of its input belongs to channel ``channel[i]``. ``batch`` is
    where its images lie; None: one after the other along dimension 0.
    """

    call: int
    module: str
    channel_dim: int
    index: Tensor
    channel: Tensor
    batch: BatchAxis | None = None

    def by_channel(self, t: Tensor, num: int) -> Tensor:
        """View an input on ``num`` images, or its gradient, as ``positions.by_channel`` does."""
        return by_channel(t, self.channel_dim, num, self.batch)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed one by one, each from everywhere it appears.

    ``name`` is the qualified name of the first layer that produces them. ``blocked`` says why a
    group cannot be pruned (None: it can). A unit is a "channel", an attention "head" or a
    "conv group" (the channels of one group of a grouped convolution).
    """

    name: str
    num_channels: int
    slices: tuple[ParamSlice, ...] = field(repr=False)
    readers: tuple[Reader, ...] = field(repr=False)
    unit: str = "channel"
    blocked: str | None = None


@dataclass(frozen=True)
class CallCost:
    """MACs of one call for one input; they scale with the kept fraction of every axis."""

    module: str
    macs: float
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Pad:
    """A module that pads channels with zeros: its ``front`` and ``back`` follow the channels."""

    module: str
    front: Axis
    back: Axis


@dataclass(frozen=True)
class ChannelGroups:
    """The groups of one model: iterable over those that can be pruned, ``blocked`` the others."""

    groups: tuple[ChannelGroup, ...]
    blocked: tuple[ChannelGroup, ...]
    costs: tuple[CallCost, ...]
    param_axes: Mapping[str, tuple[tuple[int, Axis], ...]]
    param_sizes: Mapping[str, int]
    norms: Mapping[int, Axis]
    pads: tuple[Pad, ...]
    mixers: Mapping[int, tuple[tuple[int, Axis], ...]] = field(default_factory=dict)
    sizes: tuple[SizeRule, ...] = ()
    standardised: tuple[Axis, ...] = ()
    output_axes: Mapping[str, tuple[int, Axis]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def _by_name(self) -> dict[str, ChannelGroup]:
        return {g.name: g for g in self.groups}

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def macs(self, kept: Mapping[str, Tensor] | None = None) -> float:
        """Return the MACs of one input when ``kept`` stays (1 MAC = 1 fused multiply-add).

        Counted: convolutions, linear layers and the two products of attention.
        """
        total = 0.0
        for cost in self.costs:
            part = cost.macs
            for axis in cost.axes:
                part *= axis.kept(kept or {}).double().mean().item()
            total += part
        return total

    def params(self, kept: Mapping[str, Tensor] | None = None) -> int:
        """Return the number of parameters when ``kept`` stays."""
        total = 0
        for name, size in self.param_sizes.items():
            part = size
            for _, axis in self.param_axes.get(name, ()):
                part = part * int(axis.kept(kept or {}).sum()) // axis.size
            total += part
        return total


def with_blocked(groups: ChannelGroups, reasons: Mapping[str, str]) -> ChannelGroups:
    """Return the same groups; those in ``reasons`` stay whole, and nothing refers to them."""
    if not reasons:
        return groups

    def strip(axis: Axis) -> Axis:
        return replace(axis, members=tuple(m for m in axis.members if m[0] not in reasons))

    def strip_size(size: AxisSize) -> AxisSize:
        return replace(size, axis=None if size.axis is None else strip(size.axis))

    gone = (replace(g, blocked=reasons[g.name]) for g in groups if g.name in reasons)
    return replace(
        groups,
        groups=tuple(g for g in groups if g.name not in reasons),
        blocked=(*groups.blocked, *gone),
        costs=tuple(replace(c, axes=tuple(map(strip, c.axes))) for c in groups.costs),
        param_axes={p: tuple((d, strip(a)) for d, a in ax) for p, ax in groups.param_axes.items()},
        norms={i: strip(a) for i, a in groups.norms.items()},
        mixers={i: tuple((d, strip(a)) for d, a in ax) for i, ax in groups.mixers.items()},
        sizes=tuple(
            SizeRule(substitute(r.expression, strip_size), strip(r.axis)) for r in groups.sizes
        ),
        pads=tuple(replace(p, front=strip(p.front), back=strip(p.back)) for p in groups.pads),
        standardised=tuple(map(strip, groups.standardised)),
        output_axes={m: (d, strip(a)) for m, (d, a) in groups.output_axes.items()},
    )
