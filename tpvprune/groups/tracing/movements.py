"""Data movement on fields: views, permutations, joins, splits, indexing, padding.

A movement is replayed on the fields, as the same torch call on integers; the numbers that a call
was told (``x.split(width, 1)``) are noted, so that they can follow when channels go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpvprune.groups.tracing.fields import FIXED, Field, along, flatten, substitute_tensors, varying
from tpvprune.groups.tracing.sizes import TracedInt
from tpvprune.passes.operations import JOINS, SHAPED, SPLITS

if TYPE_CHECKING:
    from tpvprune.groups.tracing.tracking import Tracker


def move(  # noqa: PLR0917
    tracker: Tracker, name: str, func: Any, args: Any, kwargs: Any, out: Any
) -> None:
    """Replay a movement on the fields of its arguments."""
    if name in JOINS:
        _stay_rectangular(tracker, name, args, kwargs)
    tensors = [t for t in flatten((args, kwargs)) if isinstance(t, Tensor)]
    data = [t for t in tensors if tracker.labels(t) or t.is_floating_point()]
    outs = [o for o in flatten(out) if isinstance(o, Tensor)]
    results: list[list[Field]] = [[] for _ in outs]
    columns = name == "unfold" and getattr(func, "__module__", "") == "torch.nn.functional"
    # Fields that vary over the same dimensions are moved together: cat joins theirs.
    for dims in dict.fromkeys(tuple(varying(f)) for t in data for f in tracker.labels(t)):
        swap = {}
        for t in data:
            found = (f for f in tracker.labels(t) if tuple(varying(f)) == dims)
            full = next(found, FIXED.reshape([1] * t.ndim)).expand(t.shape).contiguous()
            swap[id(t)] = full.double() if columns else full  # im2col knows no integers
        moved = func(*substitute_tensors(args, swap), **substitute_tensors(kwargs, swap))
        for i, ids in enumerate(o for o in flatten(moved) if isinstance(o, Tensor)):
            results[i].append(ids.long())
    for o, fields in zip(outs, results, strict=True):
        tracker.set_labels(o, fields)
    _note_sizes(tracker, name, args, kwargs, outs)


def _note_sizes(
    tracker: Tracker, name: str, args: Any, kwargs: Any, outs: Sequence[Tensor]
) -> None:
    coupling = tracker.coupling
    if name in SHAPED or name == "flatten":
        sizes = _target_sizes(name, args, kwargs, outs[0])
        fields = tracker.labels(outs[0])
        for field in fields:
            coupling.join(field, sizes)
        for d, (value, size) in enumerate(zip(sizes, outs[0].shape, strict=True)):
            coupling.size(value, fields, d, size)
            if type(value) is int and value > 1 and name != "expand":
                coupling.fixed(fields, d, size, range(size))
    elif name in SPLITS:
        _note_split(tracker, name, args, kwargs, outs)
    elif name == "narrow":
        dim, start, length = (*args[1:], *kwargs.values())[:3]
        coupling.size(length, tracker.labels(outs[0]), dim % outs[0].ndim, outs[0].shape[dim])
        _note_prefix(tracker, args[0], dim % args[0].ndim, start)
    elif name == "getitem":
        _note_slices(tracker, args[0], args[1])
    elif name in {"unbind", "select"}:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % args[0].ndim
        _fix(tracker, args[0], dim, range(args[0].shape[dim]))


def _fix(tracker: Tracker, x: Tensor, dim: int, positions: range) -> None:
    tracker.coupling.fixed(tracker.labels(x), dim, x.shape[dim], positions)


def _target_sizes(name: str, args: Any, kwargs: Any, out: Tensor) -> list[Any]:
    """Return what the caller wrote for every dimension of the result (-1: nothing)."""
    if name == "flatten":
        return [-1] * out.ndim
    if name == "unflatten":
        dim, inner = (*args[1:], *kwargs.values())[:2]
        dim %= args[0].ndim
        return [-1] * dim + list(inner) + [-1] * (args[0].ndim - dim - 1)
    sizes = [v for v in flatten((args[1:], kwargs)) if isinstance(v, int)]
    return sizes if len(sizes) == out.ndim else [-1] * out.ndim


def _note_split(
    tracker: Tracker, name: str, args: Any, kwargs: Any, outs: Sequence[Tensor]
) -> None:
    rest = [*args[1:], *(v for k, v in kwargs.items() if k != "dim")]
    dim = kwargs.get("dim", rest[1] if len(rest) > 1 else 0) % outs[0].ndim
    how = rest[0]
    if not any(f.shape[dim] > 1 for o in outs for f in tracker.labels(o)):
        return
    start = 0
    for i, o in enumerate(outs):
        size, labels = o.shape[dim], tracker.labels(o)
        if isinstance(how, (list, tuple)):
            if type(how[i]) is int:
                _fix(tracker, args[0], dim, range(start, start + size))
            tracker.coupling.size(how[i], labels, dim, size)
            start += size
            continue
        if name not in {"chunk", "tensor_split"} and size == how:
            tracker.coupling.size(how, labels, dim, size)
        if i and size == outs[0].shape[dim]:
            tracker.coupling.equal(tracker.labels(outs[0]), labels, dim, size)


def _note_prefix(tracker: Tracker, x: Tensor, dim: int, stop: Any) -> None:
    """Note that ``stop`` counts the channels before it."""
    size = x.shape[dim]
    if type(stop) is int and stop and abs(stop) < size:
        _fix(tracker, x, dim, range(stop) if stop > 0 else range(size + stop, size))
    if isinstance(stop, TracedInt) and 0 < stop < size:
        fields = [f.narrow(dim, 0, int(stop)) for f in tracker.labels(x) if f.shape[dim] > 1]
        tracker.coupling.size(stop, fields, dim, int(stop))


def _note_slices(tracker: Tracker, x: Tensor, index: Any) -> None:
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is Ellipsis or isinstance(i, slice | int) for i in entries):
        return
    given = sum(i is not None and i is not Ellipsis for i in entries)
    dim = 0
    for entry in entries:
        if entry is None:
            continue
        if entry is Ellipsis:
            dim += x.ndim - given
            continue
        if type(entry) is int:
            _fix(tracker, x, dim, range(x.shape[dim]))
        if isinstance(entry, slice) and entry.step in {None, 1}:
            places = range(x.shape[dim])[entry.start : entry.stop]
            told = type(entry.start) is int and type(entry.stop) is int and entry.start > 0
            if told or len(places) == 1:
                _fix(tracker, x, dim, places)
            _note_prefix(tracker, x, dim, entry.start)
            _note_prefix(tracker, x, dim, entry.stop)
        dim += 1


def _stay_rectangular(tracker: Tracker, name: str, args: Any, kwargs: Any) -> None:
    """Unite what is joined along another dimension (a class token and the patches)."""
    parts = list(args[0] if args else kwargs["tensors"])
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    reason = f"is joined ({name}) with channels that must stay"
    for t in parts:
        for f in tracker.labels(t):
            dims = set(varying(f)) - (set() if name == "stack" else {dim % t.ndim})
            for u in parts:
                if u is t or not dims or u.ndim != t.ndim or u.numel() == 0:
                    continue
                _meet(tracker, f, u, dims, reason)
    for t in parts:
        tracker.set_labels(t, tracker.labels(t))


def _meet(tracker: Tracker, field: Field, other: Tensor, dims: set[int], reason: str) -> None:
    met: set[int] = set()
    for g in tracker.labels(other):
        common = set(varying(g)) & dims
        met |= common
        if not common:
            continue
        lines = len(varying(field)) == len(varying(g)) == 1
        if lines or common == set(varying(field)) == set(varying(g)):
            tracker.unite(field, g, reason)
        elif all(a == b or 1 in {a, b} for a, b in zip(field.shape, g.shape, strict=True)):
            tracker.coupling.defer(field, g, reason)
        else:
            tracker.unite(field, FIXED, reason)
            tracker.unite(g, FIXED, reason)
    tracker.coupling.defer_fixed(field, dims - met, other.shape, reason)


def set_item(tracker: Tracker, args: Any, _kwargs: Any, _out: Any) -> None:
    """Follow ``target[index] = value``."""
    target, index, value = args
    old, new = tracker.labels(target), tracker.labels(value)
    if len(old) > 1 or len(new) > 1:
        tracker.pin([target, value], "is written in place into part of another tensor")
        return
    ids = (old[0] if old else FIXED.reshape([1] * target.ndim)).expand(target.shape).clone()
    ids[index] = new[0] if new else FIXED
    tracker.set_labels(target, [ids])


def pad(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow zero padding; new zero channels get atoms of their own."""
    x, widths = args[0], list(args[1] if len(args) > 1 else kwargs["pad"])
    fields = []
    for whole in tracker.labels(x):
        field = whole
        for i in range(len(widths) // 2):
            dim, (front, back) = x.ndim - 1 - i, widths[2 * i : 2 * i + 2]
            if field.shape[dim] == 1 or (front == 0 and back == 0):
                continue
            if front < 0 or back < 0 or sum(s > 1 for s in field.shape) > 1:
                tracker.unite(field, FIXED, "is cropped by a negative padding")
                continue
            # What the new zero channels are later added to tells which of them go, and the
            # padding module is told how many stay.
            pads = tracker.atoms.new(front), tracker.atoms.new(back)
            tracker.pads.append((tracker.module_path[-1], *pads))
            before, after = (along(p, dim, x.ndim) for p in pads)
            field = torch.cat([before, field, after], dim)
        fields.append(field)
    tracker.set_labels(out, fields)
