"""Convolutions, linear layers and attention on fields: who reads and who makes channels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpvprune.groups.tracing.fields import (
    FIXED,
    Field,
    along,
    named,
    right_align,
    unite_all_but,
    varying,
)

if TYPE_CHECKING:
    from tpvprune.groups.tracing.tracking import Tracker


@dataclass(frozen=True)
class Call:
    """One convolution or linear call: who reads what, what it costs.

    ``ordinal`` counts such calls within one forward; ``read`` holds the atoms along
    ``channel_dim`` of the input (``None`` for depthwise and grouped calls, which pass their
    channels on instead of mixing them); ``macs`` are those of one input, and scale with the
    kept fraction of every array in ``factors``.
    """

    ordinal: int | None
    module: str
    channel_dim: int
    read: Tensor | None
    macs: float
    factors: tuple[Tensor, ...]


def contract(tracker: Tracker, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow a convolution or linear call."""
    # Of a transposed convolution the sixth is output_padding.
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    values = named(args, kwargs, names)
    x, weight, bias = values["input"], values["weight"], values.get("bias")
    linear, transposed = name == "linear", "transpose" in name
    told = values.get("groups", 1)
    groups = int(told)
    spatial = range(0) if linear else range(x.ndim - (weight.ndim - 2), x.ndim)
    x_dim = -1 if linear else spatial[0] - 1
    module = tracker.name_of(weight).rpartition(".")[0] or tracker.module_path[-1]
    tracker.level(x, spatial, f"is convolved along itself by {module}")
    read = tracker.axis(x, x_dim, f"is read jointly by {module}")
    w_out, w_in = (1, 0) if transposed else (0, 1)
    made = tracker.axis(weight, w_out, "")
    if groups == 1:
        _consume(tracker, read, weight, w_in, module)
        tracker.producers.update(_owner(tracker, weight, w_out, made, module))
    else:
        if transposed:  # its weight [C_in, C_out / groups, ...] has no axis of all that it makes
            tracker.unite(read, tracker.axis(weight, 0, ""), f"enters {module} beside fixed inputs")
            made = tracker.atoms.new(groups * len(made))
        _pass_on(tracker, read, made, told, module)
    if isinstance(bias, Tensor):
        tracker.unite(tracker.axis(bias, 0, ""), made, f"has a bias of fixed width in {module}")
    passing = [f for f in tracker.labels(x) if _constant(f, [x_dim, *spatial])]
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
    tracker.pin(state, f"is the first state of {module}")
    first = [w for w in weights if _reads_inputs(tracker, w)] if isinstance(weights, list) else []
    if not first:
        tracker.pin([x], f"enters {module} as a packed sequence, which is not followed")
        return
    read = tracker.axis(x, -1, f"is read jointly by {module}")
    for weight in first:
        _consume(tracker, read, weight, 1, module)
    for field in tracker.labels(x):
        if field.shape[-1] == 1:
            tracker.unite(field, FIXED, f"are steps or samples of {module}")
    steps = x.numel() / x.shape[-1] / tracker.batch_size
    reading = sum(w.numel() for w in first)
    others = sum(w.numel() for w in weights if w.ndim > 1) - reading
    ordinal = tracker.num_contractions - 1
    tracker.calls.append(Call(ordinal, module, x.ndim - 1, read, steps * reading, (read,)))
    _cost(tracker, steps * others, [])


def _reads_inputs(tracker: Tracker, weight: Tensor) -> bool:
    name = tracker.name_of(weight).rpartition(".")[2]
    return name in {"weight_ih_l0", "weight_ih_l0_reverse"}


def _consume(tracker: Tracker, read: Tensor, weight: Tensor, dim: int, module: str) -> None:
    tracker.unite(read, tracker.axis(weight, dim, ""), f"enters {module} beside fixed inputs")
    tracker.consumers.update(_owner(tracker, weight, dim, read, module))


def _owner(
    tracker: Tracker, weight: Tensor, dim: int, atoms: Tensor, module: str
) -> list[tuple[str, int]]:
    """Return the parameter (name, dimension) that a weight is, or is computed from."""
    if name := tracker.name_of(weight):
        return [(name, dim)]
    for (name, d), own in tracker.param_atoms.items():
        near = name.rpartition(".")[0] == module and d == dim and len(own) == len(atoms)
        if near and torch.equal(tracker.roots(own), tracker.roots(atoms)):
            return [(name, d)]
    return []


def _pass_on(tracker: Tracker, read: Tensor, made: Tensor, groups: Any, module: str) -> None:
    """Unite the channels of every convolution group: it goes or stays as a whole."""
    blocks = torch.cat([read.reshape(int(groups), -1), made.reshape(int(groups), -1)], 1)
    tracker.unite(blocks, blocks[:, :1], f"enters {module} beside fixed inputs")
    tracker.coupling.size(groups, [blocks[:, 0]], 0, len(blocks))
    if blocks.shape[1] > 2:
        tracker.conv_group_atoms.append(blocks[:, 0])


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
    tracker.mix(tracker.labels(a), [a.ndim - 1])
    left = [f for f in tracker.labels(a) if f.shape[-1] == 1]
    right = [f for f in tracker.labels(b) if f.shape[-2] == 1]
    _join(tracker, out, [(a, left), (b, right)])
    inner = tracker.axis(a, -1, "")
    extra = [inner] if bool((inner > 0).any()) else []
    _cost(tracker, out.numel() * a.shape[-1] / tracker.batch_size, tracker.labels(out), extra)


def _cost(
    tracker: Tracker, macs: float, fields: Iterable[Field], extra: Iterable[Tensor] = ()
) -> None:
    """Note a product of activations: each of its different fields scales the MACs once."""
    lines = [f.reshape(-1) for f in fields]
    factors = {tuple(line.tolist()): line for line in lines}
    tracker.calls.append(
        Call(None, tracker.module_path[-1], 0, None, macs, (*factors.values(), *extra))
    )


def _separate_heads(tracker: Tracker, t: Tensor) -> None:
    """Make fields that vary over batch dimensions constant over the two matrix dimensions.

    Of [B, heads, N, d] whole heads can go, not dimensions of one: it would not be rectangular.
    """
    for field in tracker.labels(t):
        dims = varying(field)
        if len(dims) > 1 and any(d < t.ndim - 2 for d in dims):
            heads = field[..., :1, :1]
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
    scores = [f for f in tracker.labels(out) if _constant(f, [-1, -2])]
    mask = values.get("attn_mask")
    if isinstance(mask, Tensor):
        _mask_heads(tracker, scores, mask)
    tracker.set_labels(out, scores)
    values_read = [f for f in tracker.labels(value) if f.shape[-2] == 1]
    _join(tracker, out, [(out, scores), (value, values_read)])
    m, d, e = key.shape[-2], query.shape[-1], value.shape[-1]
    _cost(tracker, out.numel() / e * m * (d + e) / tracker.batch_size, tracker.labels(out))


def sum_products(tracker: Tracker, args: Any, out: Tensor) -> None:
    """Follow ``einsum`` of two operands."""
    equation, *operands = args if len(args) > 2 else (args[0], *args[1])
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
            tracker.mix([along(f.reshape(-1), where, len(terms[0]))], [where])
    passing = [f for fields in spread for f in fields if _constant(f, contracted)]
    tracker.set_labels(out, [f.reshape(f.shape[: out.ndim]) for f in passing])
    macs = math.prod(max(a, b) for a, b in zip(*shapes, strict=True)) / tracker.batch_size
    _cost(tracker, macs, [tracker.atoms.simplify(f) for fields in spread for f in fields])


def _spread(field: Field, term: str, letters: str) -> Field:
    """Return a field of an operand as one over all letters of an equation."""
    order = sorted(range(len(term)), key=lambda i: letters.index(term[i]))
    sizes = {term[i]: field.shape[i] for i in order}
    return field.permute(order).reshape([sizes.get(c, 1) for c in letters])


def _mask_heads(tracker: Tracker, scores: list[Field], mask: Tensor) -> None:
    for f in scores:
        others = [right_align(g, f.ndim) for g in tracker.labels(mask)]
        shape = [1] * (f.ndim - mask.ndim) + list(mask.shape)
        met = [g for g in others if set(varying(g)) & set(varying(f))]
        fixed = not met and any(shape[d] > 1 for d in varying(f))
        for g in [FIXED] if fixed else met:
            tracker.unite(f, g, "is masked with fixed heads")


def _constant(field: Field, dims: Iterable[int]) -> bool:
    return all(field.shape[d] == 1 for d in dims)
