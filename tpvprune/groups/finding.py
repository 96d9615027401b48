"""Find the channel groups: which parts of which parameters stand or fall together."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tpvprune.groups.axes import Axis
from tpvprune.groups.batch_axes import with_batch_axes
from tpvprune.groups.computed import computed_weights
from tpvprune.groups.reaching import unseen
from tpvprune.groups.records import (
    CallCost,
    ChannelGroup,
    ChannelGroups,
    Pad,
    ParamSlice,
    Reader,
    with_blocked,
)
from tpvprune.groups.tracing.fields import FIXED, varying
from tpvprune.groups.tracing.sizes import AxisSize, SizeRule, substitute
from tpvprune.groups.tracing.tracking import Tracker, track
from tpvprune.groups.verification import on_cpu, verify_groups
from tpvprune.passes.costs import count_macs
from tpvprune.passes.running import check_gradients_allowed, check_not_compiled, clear_caches

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_UNCOUNTED = 0.01  # share of the MACs that may go unnoticed: kernels round, and so do we


def find_groups(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    ignore: Iterable[str] = (),
    verify: bool = True,
) -> ChannelGroups:
    """Find the groups of coupled channels of a model, and prove that each can be cut.

    The model may be frozen, in train mode, or called under ``no_grad``; it is not changed.

    Args:
        model: Any module whose forward runs on ``example_inputs``.
        example_inputs: One batch [B, ...], or the tuple of positional arguments.
        ignore: Qualified names of modules whose outputs are left whole.
        verify: Check for every group that masking and removing channels give the same outputs;
            groups that fail are listed in ``.blocked``. Default: ``True``.

    Returns:
        The groups in network order.

    Raises:
        ValueError: If ``ignore`` names no module, the model is compiled, it does not run on the
            inputs, it is called under ``torch.inference_mode()``, its outputs are not finite, or
            old hooks compute its weights.
    """
    check_not_compiled(model)
    check_gradients_allowed()
    computed = _computed_weights(model)
    inputs = _few(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,))
    known, ignored = dict(model.named_modules()), tuple(ignore)
    for name in ignored:
        if name not in known:
            raise ValueError(
                f"ignore: expected the name of a module, found {name!r}; see named_modules()."
            )
    # On the CPU in single precision, whatever the model is in: labels live there.
    private = copy.deepcopy(model).eval().cpu().float()
    clear_caches(private)
    inputs = on_cpu(inputs, torch.float32)
    try:
        tracker = track(private, inputs)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"the model does not run on the example inputs: {error}") from error
    groups = _assemble(private, tracker, ignored)
    groups = with_batch_axes(private, groups, inputs)
    groups = with_blocked(groups, unseen(private, groups, inputs))
    groups = _fit_for_training(model, groups, tracker, inputs)
    groups = replace(groups, blocked=(*groups.blocked, *computed))
    groups = _with_all_costs(private, groups, inputs)
    return verify_groups(model, groups, inputs) if verify else groups


def _computed_weights(model: nn.Module) -> list[ChannelGroup]:
    """Return the layers whose weight is computed, as blocked groups; ValueError if by hooks."""
    reason = "its weight is computed: find the groups of what tpvprune.fold_weights(model) returns"
    found = []
    for name in computed_weights(model):
        path, _, key = name.rpartition(".")
        layer = model.get_submodule(path)
        if not parametrize.is_parametrized(layer):
            raise ValueError(
                f"{name}: expected a parameter, found one that a hook computes: "
                "pass what tpvprune.fold_weights(model) returns"
            )
        weight = getattr(layer, key)
        if weight.ndim:
            found.append(ChannelGroup(path, len(weight), (), (), blocked=reason))
    return found


def _fit_for_training(
    model: nn.Module, groups: ChannelGroups, tracker: Tracker, inputs: tuple[Any, ...]
) -> ChannelGroups:
    """Return the groups, those that layers read in training mode only (auxiliary heads) blocked."""
    ran = {call.module for call in tracker.calls}
    idle = {
        name
        for name, module in model.named_modules()
        if name not in ran and isinstance(module, _LAYERS)
    }
    if not idle:
        return groups
    twice = tuple(  # BatchNorm wants several values a channel
        torch.cat([i, i]) if isinstance(i, Tensor) and i.ndim and len(i) == 1 else i for i in inputs
    )
    try:
        with torch.random.fork_rng(devices=[]):
            training = track(copy.deepcopy(model).cpu().float().train(), twice)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        note = (
            f"{min(idle)} does not run in evaluation mode, and the forward of training mode fails "
            f"on the example inputs ({type(error).__name__}: {first}): the pruned model may not "
            "train"
        )
        return replace(groups, notes=(*groups.notes, note))
    read = {
        root: call.module
        for call in training.calls
        if call.module in idle and call.read is not None
        for root in training.roots(call.read).tolist()
        if root
    }
    reasons = {}
    for group in groups:
        readers = {
            read[root]
            for part in group.slices
            if part.side == "producer" and (part.param, part.dim) in training.param_atoms
            for root in training.roots(training.param_atoms[part.param, part.dim]).tolist()
            if root in read
        }
        if readers:
            reasons[group.name] = f"is read by {min(readers)}, which runs in training mode only"
    return with_blocked(groups, reasons)


def _with_all_costs(
    model: nn.Module, groups: ChannelGroups, inputs: tuple[Any, ...]
) -> ChannelGroups:
    """Return the groups, what runs beside the calls that are followed counted as a fixed cost."""
    try:
        counted = float(count_macs(model, inputs))
    except Exception as error:  # whatever a stranger's operator does under the counter
        note = f"MACs: only those of followed layers are counted ({type(error).__name__}: {error})"
        return replace(groups, notes=(*groups.notes, note))
    rest = counted - groups.macs()
    if rest <= _UNCOUNTED * counted:
        return groups
    note = (
        f"{rest / counted:.0%} of the MACs run in operators that are not followed, such as fused "
        "attention or recurrent layers: they stay, and the budget counts them"
    )
    cost = CallCost("", rest, ())
    return replace(groups, costs=(*groups.costs, cost), notes=(*groups.notes, note))


def _few(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the first two inputs of a batch: what is asked of them does not depend on more."""
    sizes = {len(i) for i in inputs if isinstance(i, Tensor) and i.ndim > 1}
    if len(sizes) != 1 or max(sizes) <= 2:
        return inputs
    return tuple(
        i[:2] if isinstance(i, Tensor) and i.ndim and len(i) in sizes else i for i in inputs
    )


# ---- from atoms to groups -------------------------------------------------------------------


_Key = tuple[str, int]  # parameter, dimension


class _Units:
    """Which (group, channel) every component of atoms is; the size of each group."""

    def __init__(self, tracker: Tracker, ignore: Collection[str]) -> None:
        self._tracker = tracker
        self.owner: dict[int, tuple[str, int]] = {}  # by the representative of the component
        self.reason: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        pinned = tracker.atoms.pinned
        roots = {key: tracker.roots(a).tolist() for key, a in tracker.param_atoms.items()}
        for atoms, keys in _clusters(tracker, roots):
            name = keys[0][0].rpartition(".")[0]
            if name in self.sizes:  # two independent outputs of one module
                name = keys[0][0]
            ordered = dict.fromkeys(r for k in keys for r in roots[k] if r in atoms)
            free = [r for r in ordered if r not in pinned]
            ignored = (i for k in keys for i in ignore if k[0].startswith(f"{i}."))
            if (module := next(ignored, None)) is not None:
                self.reason[name] = f"{module} is ignored on request"
            elif not free:
                self.reason[name] = pinned[next(iter(ordered))]
            elif len(free) == 1:
                self.reason[name] = "has a single unit, which must stay"
            members = free or list(ordered)
            self.sizes[name] = len(members)
            self.owner.update({r: (name, c) for c, r in enumerate(members)})

    def axis(self, atoms: Tensor) -> Axis:
        """Return the owners of an array of atoms [n]."""
        members: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for i, root in enumerate(self._tracker.roots(atoms).tolist()):
            if root in self.owner:
                name, channel = self.owner[root]
                members[name][0].append(i)
                members[name][1].append(channel)
        return Axis(
            len(atoms),
            tuple((n, torch.tensor(i), torch.tensor(c)) for n, (i, c) in members.items()),
        )


def _clusters(
    tracker: Tracker, roots: Mapping[_Key, list[int]]
) -> list[tuple[set[int], list[_Key]]]:
    """Return the components that share a producing layer, with these, in network order."""
    order = {call.module: i for i, call in reversed(list(enumerate(tracker.calls)))}
    producers = [k for k in tracker.param_atoms if k in tracker.producers]
    producers.sort(key=lambda k: order.get(k[0].rpartition(".")[0], len(order)))
    clusters: list[tuple[set[int], list[_Key]]] = []
    for key in producers:
        mine = set(roots[key]) - {0}
        touching = [c for c in clusters if c[0] & mine]
        if not touching:
            clusters.append((mine, [key]))
            continue
        (atoms, keys), *others = touching
        atoms.update(mine, *(other for other, _ in others))
        keys += [key, *(k for _, theirs in others for k in theirs)]
        clusters = [c for c in clusters if c not in others]
    return clusters


def _assemble(model: nn.Module, tracker: Tracker, ignore: Collection[str]) -> ChannelGroups:
    units, coupling = _Units(tracker, ignore), tracker.coupling
    slices: dict[str, list[ParamSlice]] = defaultdict(list)
    param_axes: dict[str, list[tuple[int, Axis]]] = defaultdict(list)
    consumed = tracker.consumers - tracker.producers
    for (param, dim), atoms in tracker.param_atoms.items():
        axis = units.axis(atoms)
        if axis.members:
            param_axes[param].append((dim, axis))
        for name, index, channel in axis.members:
            side: Literal["producer", "consumer"]
            side = "consumer" if (param, dim) in consumed else "producer"
            slices[name].append(ParamSlice(param, dim, index, channel, side))
    readers: dict[str, list[Reader]] = defaultdict(list)
    for call in tracker.calls:
        if call.read is None or call.ordinal is None:
            continue
        for name, index, channel in units.axis(call.read).members:
            reader = Reader(call.ordinal, call.module, call.channel_dim, index, channel)
            readers[name].append(reader)
    kinds: dict[str, str] = {}
    for kind, lines in (("conv group", tracker.conv_group_atoms), ("head", tracker.head_atoms)):
        owned = units.axis(torch.cat([FIXED, *lines]))
        kinds.update({name: kind for name, _, _ in owned.members})
    found = tuple(
        ChannelGroup(
            name, size, tuple(slices[name]), tuple(readers[name]), kinds.get(name, "channel")
        )
        for name, size in units.sizes.items()
    )
    unread = {g.name: "no layer reads its channels" for g in found if not g.readers}
    groups = ChannelGroups(
        groups=found,
        blocked=(),
        costs=tuple(
            CallCost(c.module, c.macs, tuple(map(units.axis, c.factors))) for c in tracker.calls
        ),
        param_axes={p: tuple(a) for p, a in param_axes.items()},
        param_sizes={n: p.numel() for n, p in model.named_parameters()},
        norms={i: units.axis(line) for i, _, line in coupling.lines(coupling.norms)},
        mixers=_mixers(tracker, units),
        sizes=_size_rules(tracker, units),
        standardised=tuple(
            units.axis(line) for _, _, line in coupling.lines(coupling.standardised)
        ),
        output_axes=_output_axes(tracker, units),
        pads=tuple(
            Pad(module, units.axis(front), units.axis(back)) for module, front, back in tracker.pads
        ),
    )
    return with_blocked(groups, unread | units.reason)


def _output_axes(tracker: Tracker, units: _Units) -> dict[str, tuple[int, Axis]]:
    """Return who owns the channels of a module's output, where they lie along one dimension."""
    found = {}
    for module, out in tracker.outputs.items():
        fields = tracker.labels(out)
        lines = {varying(f)[0]: units.axis(f.reshape(-1)) for f in fields if len(varying(f)) == 1}
        owned = [(dim, axis) for dim, axis in lines.items() if axis.members]
        if len(owned) == 1 and len(lines) == len(fields):
            found[module] = owned[0]
    return found


def _mixers(tracker: Tracker, units: _Units) -> dict[int, tuple[tuple[int, Axis], ...]]:
    found: dict[int, list[tuple[int, Axis]]] = defaultdict(list)
    for ordinal, dim, line in tracker.coupling.lines(tracker.coupling.mixers):
        found[ordinal].append((dim, units.axis(line)))
    return {i: tuple(axes) for i, axes in found.items()}


def _size_rules(tracker: Tracker, units: _Units) -> tuple[SizeRule, ...]:
    def with_axis(size: AxisSize) -> AxisSize:
        return replace(size, axis=units.axis(tracker.coupling.axis_atoms(size.number)))

    rules = {
        (expression, tuple(line.tolist())): SizeRule(
            substitute(expression, with_axis), units.axis(line)
        )
        for expression, line in tracker.coupling.uses()
    }
    return tuple(rules.values())
