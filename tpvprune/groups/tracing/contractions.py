"""Convolutions, linear layers and attention on fields: who reads and who makes channels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpvprune.groups.tracing.calls import Call, named
from tpvprune.groups.tracing.fields import (
    FIXED,
    Field,
    along,
    flatten,
    right_align,
    unite_all_but,
    varying,
)

if TYPE_CHECKING:
    from tpvprune.groups.tracing.tracking import Tracker


def contract(tracker: Tracker, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow a convolution or linear call."""
    values = named(args, kwargs, ("input", "weight", "bias"))
    x, weight, bias = values["input"], values["weight"], values.get("bias")
    linear, transposed = name == "linear", "transpose" in name
    groups = 1 if linear else conv_groups(args, kwargs, transposed)
    x_dim = -1 if linear else x.ndim - (weight.ndim - 2) - 1
    module = tracker.names[id(weight)][0].rpartition(".")[0] if id(weight) in tracker.names else ""
    module = module or tracker.module_path[-1]
    spatial = range(0) if linear else range(x.ndim - (weight.ndim - 2), x.ndim)
    tracker.level(x, spatial, f"is convolved along itself by {module}")
    read = tracker.axis(x, x_dim, f"is read jointly by {module}")
    w_out, w_in = (1, 0) if transposed else (0, 1)
    made = tracker.axis(weight, w_out, "")
    if groups == 1:
        tracker.unite(read, tracker.axis(weight, w_in, ""), f"enters {module} beside fixed inputs")
        tracker.producers.update(_owner(tracker, weight, w_out, made, module))
        tracker.consumers.update(_owner(tracker, weight, w_in, read, module))
    else:
        if transposed:  # its weight [C_in, C_out / groups, ...] has no axis of all that it makes
            tracker.unite(read, tracker.axis(weight, 0, ""), f"enters {module} beside fixed inputs")
            made = tracker.atoms.new(groups * len(made))
        told = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        _pass_on(tracker, read, made, told, module)
    if isinstance(bias, Tensor):
        tracker.unite(tracker.axis(bias, 0, ""), made, f"has a bias of fixed width in {module}")
    passing = [
        f
        for f in tracker.labels(x)
        if f.shape[x_dim] == 1 and all(f.shape[d] == 1 for d in spatial)
    ]
    tracker.set_labels(out, [*passing, along(made, x_dim % out.ndim, out.ndim)])
    positions = x.numel() / x.shape[x_dim] if transposed else out.numel() / out.shape[x_dim]
    factors = (read, made) if groups == 1 else (made,)
    tracker.calls.append(
        Call(tracker.num_contractions - 1, module, x_dim, read if groups == 1 else None,
             positions * weight.numel() / tracker.batch_size,
             factors + tuple(f.reshape(-1) for f in passing))
    )  # fmt: skip


def recur(tracker: Tracker, args: Any) -> None:
    """Follow a recurrent layer: its inputs may shrink, what it makes stays."""
    x, state, weights = args[:3]
    module = tracker.module_path[-1]
    tracker.pin(flatten(state), f"is the first state of {module}")
    first = [w for w in weights if _reads_inputs(tracker, w)] if isinstance(weights, list) else []
    if not first:
        tracker.pin([x], f"enters {module} as a packed sequence, which is not followed")
        return
    read = tracker.axis(x, -1, f"is read jointly by {module}")
    for weight in first:
        tracker.unite(read, tracker.axis(weight, 1, ""), f"enters {module} beside fixed inputs")
        tracker.consumers.update(_owner(tracker, weight, 1, read, module))
    for field in tracker.labels(x):
        if field.shape[-1] == 1:
            tracker.unite(field, FIXED, f"are steps or samples of {module}")
    steps = x.numel() / x.shape[-1] / tracker.batch_size
    reading = sum(w.numel() for w in first)
    others = sum(w.numel() for w in weights if w.ndim > 1) - reading
    ordinal = tracker.num_contractions - 1
    tracker.calls += [
        Call(ordinal, module, x.ndim - 1, read, steps * reading, (read,)),
        Call(None, module, 0, None, steps * others, ()),
    ]


def _reads_inputs(tracker: Tracker, weight: Tensor) -> bool:
    name = tracker.names[id(weight)][0] if id(weight) in tracker.names else ""
    return name.rpartition(".")[2] in {"weight_ih_l0", "weight_ih_l0_reverse"}


def _owner(
    tracker: Tracker, weight: Tensor, dim: int, atoms: Tensor, module: str
) -> list[tuple[str, int]]:
    """Return the parameter (name, dimension) that a weight is, or is computed from."""
    if id(weight) in tracker.names:
        return [(tracker.names[id(weight)][0], dim)]
    for (name, d), own in tracker.param_atoms.items():
        near = name.rpartition(".")[0] == module and d == dim and len(own) == len(atoms)
        if near and torch.equal(tracker.find_all(own), tracker.find_all(atoms)):
            return [(name, d)]
    return []


def _pass_on(tracker: Tracker, read: Tensor, made: Tensor, groups: Any, module: str) -> None:
    """Unite the channels of every convolution group: it goes or stays as a whole."""
    blocks = torch.cat([read.reshape(int(groups), -1), made.reshape(int(groups), -1)], 1)
    tracker.unite(blocks, blocks[:, :1], f"enters {module} beside fixed inputs")
    tracker.coupling.size(groups, [blocks[:, 0]], 0, len(blocks))
    if blocks.shape[1] > 2:
        tracker.conv_group_atoms.append(blocks[:, 0])


def conv_groups(args: Any, kwargs: Any, transposed: bool) -> int:
    """Return the ``groups`` argument of a convolution."""
    # input, weight, bias, stride, padding, dilation (or output_padding), groups
    return int(kwargs.get("groups", args[6] if len(args) > 6 else 1))


def multiply(tracker: Tracker, a: Any, b: Any, out: Tensor) -> None:
    """Follow a matrix product of two activations."""
    if a.ndim < 2 or b.ndim < 2:
        tracker.pin([a, b], "is multiplied as a vector, which is not followed")
        return
    _separate_heads(tracker, a)
    _separate_heads(tracker, b)
    inner = tracker.axis(a, -1, "is contracted")
    tracker.unite(
        inner, tracker.axis(b, -2, "is contracted"), "is contracted with a tensor of fixed width"
    )
    for t in (a, b):
        tracker.set_labels(t, tracker.labels(t))
    tracker.coupling.mix(tracker.num_mixers - 1, tracker.labels(a), [a.ndim - 1])
    left = [f for f in tracker.labels(a) if f.shape[-1] == 1]
    right = [f for f in tracker.labels(b) if f.shape[-2] == 1]
    _join(tracker, out, [(a, left), (b, right)])
    factors = {_key(f): f.reshape(-1) for f in tracker.labels(out)}
    inner = tracker.axis(a, -1, "")
    extra = (inner,) if bool((inner > 0).any()) else ()
    macs = out.numel() * a.shape[-1] / tracker.batch_size
    tracker.calls.append(
        Call(None, tracker.module_path[-1], 0, None, macs, (*factors.values(), *extra))
    )


def _separate_heads(tracker: Tracker, t: Tensor) -> None:
    """Make fields that vary over batch dimensions constant over the two matrix dimensions.

    An activation of shape [B, heads, N, d] whose atoms vary over heads *and* d can lose a
    whole head, but not single dimensions of one head: the array would not be rectangular.
    """
    for field in tracker.labels(t):
        dims = varying(field)
        if len(dims) > 1 and any(d < t.ndim - 2 for d in dims):
            heads = field.narrow(t.ndim - 1, 0, 1).narrow(t.ndim - 2, 0, 1)
            tracker.unite(field, heads, "is split into heads beside fixed inputs")
            tracker.head_atoms.append(heads.reshape(-1))
    tracker.set_labels(t, tracker.labels(t))


def _join(tracker: Tracker, out: Tensor, parts: list[tuple[Tensor, list[Field]]]) -> None:
    """Unite the batch fields of two factors; matrix dimensions pass to the product."""
    fields: list[Field] = []
    for i, (_, own) in enumerate(parts):
        other, other_fields = parts[1 - i]
        shape = [1] * (out.ndim - other.ndim) + list(other.shape)
        for f in own:
            field = right_align(f, out.ndim)
            batch = {d for d in varying(field) if d < out.ndim - 2}
            met: set[int] = set()
            for g in (right_align(g, out.ndim) for g in other_fields):
                common = set(varying(g)) & batch
                met |= common
                if common:
                    tracker.unite(field, g, "is multiplied with fixed heads")
            if any(shape[d] > 1 for d in batch - met):
                tracker.unite(field, FIXED, "is multiplied with fixed heads")
            fields.append(field)
    if any(d < out.ndim - 2 for f in fields for d in varying(f)):
        # Heads go as a whole: what all of them share must stay.
        for f in fields:
            if all(d >= out.ndim - 2 for d in varying(f)):
                tracker.unite(f, FIXED, "is shared by all heads")
    tracker.set_labels(out, fields)


def attend(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow ``scaled_dot_product_attention``."""
    values = named(args, kwargs, ("query", "key", "value", "attn_mask"))
    query, key, value = values["query"], values["key"], values["value"]
    shared = [k in {q, 1} for q, k in zip(query.shape[:-2], key.shape[:-2], strict=True)]
    if not all(shared):
        tracker.pin([query, key, value], "is attended with grouped queries, which is not followed")
        return
    for t in (query, key, value):
        _separate_heads(tracker, t)
    for t in (query, key):
        for field in tracker.labels(t):
            if field.shape[-1] > 1:
                # A single head: its softmax scale hangs on its width, so it stays whole.
                tracker.unite(field, field.narrow(-1, 0, 1), "is a query/key dimension")
        tracker.set_labels(t, tracker.labels(t))
        tracker.set_labels(t, [f for f in tracker.labels(t) if f.shape[-1] == 1])
    _join(tracker, out, [(query, tracker.labels(query)), (key, tracker.labels(key))])
    scores = [f for f in tracker.labels(out) if f.shape[-1] == 1 and f.shape[-2] == 1]
    mask = values.get("attn_mask")
    if isinstance(mask, Tensor):
        _mask_heads(tracker, scores, mask)
    tracker.set_labels(out, scores)
    values_read = [f for f in tracker.labels(value) if f.shape[-2] == 1]
    _join(tracker, out, [(out, scores), (value, values_read)])
    heads = {_key(f): f.reshape(-1) for f in tracker.labels(out)}
    m, d, e = key.shape[-2], query.shape[-1], value.shape[-1]
    macs = out.numel() / e * m * (d + e) / tracker.batch_size
    tracker.calls.append(Call(None, tracker.module_path[-1], 0, None, macs, tuple(heads.values())))


def sum_products(tracker: Tracker, args: Any, out: Tensor) -> None:
    """Follow ``einsum`` of two operands."""
    equation, *operands = args
    left, _, target = str(equation).replace(" ", "").partition("->")
    terms = left.split(",")
    if len(operands) != 2 or not target or "." in left or len(terms) != 2:
        tracker.pin(operands, "passes through an einsum that is not followed")
        return
    letters = target + "".join(sorted(set(left) - set(target) - {","}))
    contracted = [i for i, c in enumerate(letters) if c not in target]
    spread = [
        [_spread(f, term, letters) for f in tracker.labels(t)]
        for term, t in zip(terms, operands, strict=True)
    ]
    for f in (f for fields in spread for f in fields if len(varying(f)) > 1):
        rest = set(range(len(letters))) - set(contracted)
        unite_all_but(tracker.atoms, f, rest, "is contracted beside fixed inputs")
    spread = [[tracker.atoms.simplify(f) for f in fields] for fields in spread]
    shapes = [
        [t.shape[term.index(c)] if c in term else 1 for c in letters]
        for term, t in zip(terms, operands, strict=True)
    ]
    for i, fields in enumerate(spread):
        for f in fields:
            tracker.meet("einsum", f, shapes[1 - i], spread[1 - i])
    for f in spread[0]:
        shared = [d for d in varying(f) if d in contracted and letters[d] in terms[1]]
        if shared and len(varying(f)) == 1:
            where = terms[0].index(letters[shared[0]])
            line = along(f.reshape(-1), where, len(terms[0]))
            tracker.coupling.mix(tracker.num_mixers - 1, [line], [where])
    passing = [f for fields in spread for f in fields if all(f.shape[d] == 1 for d in contracted)]
    tracker.set_labels(out, [f.reshape(f.shape[: out.ndim]) for f in passing])
    macs = math.prod(max(a, b) for a, b in zip(*shapes, strict=True)) / tracker.batch_size
    simple = [tracker.atoms.simplify(f) for fields in spread for f in fields]
    factors = {_key(f): f.reshape(-1) for f in simple}
    tracker.calls.append(
        Call(None, tracker.module_path[-1], 0, None, macs, tuple(factors.values()))
    )


def _spread(field: Field, term: str, letters: str) -> Field:
    """Return a field of an operand as one over all letters of an equation."""
    order = sorted(range(len(term)), key=lambda i: letters.index(term[i]))
    sizes = {term[i]: field.shape[i] for i in order}
    return field.permute(order).reshape([sizes.get(c, 1) for c in letters])


def _mask_heads(tracker: Tracker, scores: list[Field], mask: Tensor) -> None:
    reason = "is masked with fixed heads"
    for f in scores:
        others = [right_align(g, f.ndim) for g in tracker.labels(mask)]
        shape = [1] * (f.ndim - mask.ndim) + list(mask.shape)
        met = [g for g in others if set(varying(g)) & set(varying(f))]
        for g in met:
            tracker.unite(f, g, reason)
        if not met and any(shape[d] > 1 for d in varying(f)):
            tracker.unite(f, FIXED, reason)


def _key(field: Field) -> tuple[int, ...]:
    return tuple(field.reshape(-1).tolist())
