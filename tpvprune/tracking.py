"""Follow every channel of a network through one forward pass.

Each tensor carries *fields*: integer arrays, broadcastable to the tensor, that name for every
element the atom (one row, column or entry of a parameter) it stands or falls with. Pure data
movement (view, permute, split, cat, roll, indexing) is replayed on the fields themselves, so
whatever a model does to the shape of its activations is followed exactly; additions and products
unite atoms; convolutions and linear layers read one set of atoms and start another. What cannot
be followed is pinned with a reason, never guessed.

This differs from torch-pruning's walk over autograd nodes in: 1. indices are tracked per
dimension, so heads, chunks and windows need no index arithmetic; 2. weights used functionally
(``F.linear(x, self.qkv.weight)``) are seen; 3. frozen parameters, ``no_grad`` and train mode do
not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONTRACTIONS = frozenset(
    {"conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)
_MATMULS = frozenset({"matmul", "bmm", "mm"})
_JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
NORMS = frozenset({"layer_norm", "rms_norm"})
_MOVES = frozenset(
    "view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t squeeze "
    "unsqueeze expand expand_as repeat tile repeat_interleave chunk split split_with_sizes "
    "tensor_split unbind select narrow getitem index_select flip roll cat concat concatenate stack "
    "hstack vstack pixel_shuffle pixel_unshuffle channel_shuffle view_as reshape_as rot90 diagonal "
    "broadcast_to get".split()
)
_POINTWISE = frozenset(
    "add sub rsub mul div truediv true_divide maximum minimum where masked_fill addcmul addcdiv lerp "
    "pow rpow relu relu6 gelu silu sigmoid logsigmoid tanh hardswish hardsigmoid hardtanh leaky_relu "
    "elu celu selu mish softplus softsign exp expm1 log log1p sqrt rsqrt abs neg clamp clamp_min "
    "clamp_max clip square reciprocal erf sin cos sign clone contiguous to float double half "
    "bfloat16 type type_as detach dropout dropout1d dropout2d alpha_dropout feature_dropout softmax "
    "log_softmax normalize nan_to_num prelu threshold identity alias requires_grad copy glu_free "
    "gt lt ge le eq ne logical_not logical_and logical_or".split()
)
_POOLS = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d lp_pool2d "
    "interpolate upsample grid_sample max_pool2d_with_indices boolean_dispatch "
    "_max_pool2d _max_pool1d".split()
)
_REDUCTIONS = frozenset("mean sum amax amin var std logsumexp norm prod vector_norm".split())
_NEW = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty "
    "new_full new_tensor bernoulli_".split()
)

Field = Tensor  # int64, as many dimensions as its tensor, size 1 where it does not vary


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


@dataclass(frozen=True)
class Norm:
    """One LayerNorm-like call over labelled channels (``ordinal`` counts such calls)."""

    ordinal: int
    atoms: Tensor


@dataclass(frozen=True)
class ChannelPad:
    """Zero channels that module ``module`` puts before and after its input's channels."""

    module: str
    front: Tensor
    back: Tensor


def function_name(func: Callable[..., Any]) -> str:
    """Return the plain name of a torch function: ``__iadd__`` and ``add_`` are both ``add``."""
    name = getattr(func, "__name__", type(func).__name__)
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        # __radd__, __iadd__ and __add__ unite the same operands.
        if name[:1] in "ir" and name[1:] in {"add", "sub", "mul", "truediv", "pow", "matmul"}:
            name = name[1:]
    elif name.endswith("_") and not name.startswith("_"):
        name = name.rstrip("_")
    return name


class Tracker(TorchFunctionMode):
    """Torch-function mode that labels tensors with the atoms they depend on.

    Use :func:`track`; the attributes are read by :mod:`tpvprune.groups` afterwards.
    """

    def __init__(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.names = {}
        self._keep_alive: list[Tensor] = []
        for name, tensor in named_tensors:
            self.names.setdefault(id(tensor), (name, tensor))
        self._parent: list[int] = [0]  # atom 0: immovable
        self._fields: dict[int, list[Field]] = {}
        self.param_atoms: dict[tuple[str, int], Tensor] = {}
        self.producers: set[tuple[str, int]] = set()
        self.pinned: dict[int, str] = {}
        self.calls: list[Call] = []
        self.norms: list[Norm] = []
        self.pads: list[ChannelPad] = []
        self.conv_group_atoms: list[Tensor] = []
        self.head_atoms: list[Tensor] = []
        self.module_path: list[str] = [""]
        self.num_contractions = 0
        self.num_norms = 0
        self.batch_size = 1

    # ---- union-find -------------------------------------------------------------------------

    def _new_atoms(self, num: int) -> Tensor:
        first = len(self._parent)
        self._parent.extend(range(first, first + num))
        return torch.arange(first, first + num)

    def find(self, atom: int) -> int:
        """Return the representative of an atom's component."""
        parent, root = self._parent, atom
        while parent[root] != root:
            root = parent[root]
        while parent[atom] != root:
            parent[atom], atom = root, parent[atom]
        return root

    def find_all(self, atoms: Tensor) -> Tensor:
        """Return the representatives of an array of atoms, same shape."""
        unique, inverse = atoms.unique(return_inverse=True)
        return torch.tensor([self.find(a) for a in unique.tolist()], dtype=torch.long)[inverse]

    def _unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Unite two broadcastable arrays of atoms element by element; atom 0 pins the other."""
        a, b = torch.broadcast_tensors(a, b)
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)], 1).unique(dim=0)
        for x, y in pairs.tolist():
            low, high = sorted((self.find(x), self.find(y)))
            if low == high:
                continue
            if low == 0:
                self.pinned.setdefault(high, reason)
                continue
            self._parent[high] = low
            if high in self.pinned:
                self.pinned.setdefault(low, self.pinned[high])

    def _pin(self, tensors: Iterable[Any], reason: str) -> None:
        for t in tensors:
            for field in self._labels(t):
                self._unite(field, torch.zeros(1, dtype=torch.long), reason)

    # ---- fields -----------------------------------------------------------------------------

    def _labels(self, tensor: Any) -> list[Field]:
        if not isinstance(tensor, Tensor):
            return []
        key = id(tensor)
        if key in self._fields:
            return self._fields[key]
        if key in self.names and tensor.is_floating_point():
            name, _ = self.names[key]
            fields = []
            for dim, size in enumerate(tensor.shape):
                if size > 1 or tensor.ndim <= 2:
                    atoms = self._param_axis(name, dim, size)
                    fields.append(_along(atoms, dim, tensor.ndim))
            self._fields[key] = [f for f in fields if f.numel() > 1]
            return self._fields[key]
        return []

    def _param_axis(self, name: str, dim: int, size: int) -> Tensor:
        if (name, dim) not in self.param_atoms:
            self.param_atoms[name, dim] = self._new_atoms(size)
        return self.param_atoms[name, dim]

    def _set(self, tensor: Any, fields: Iterable[Field]) -> None:
        if not isinstance(tensor, Tensor):
            return
        kept: list[Field] = []
        for field in fields:
            field = _compress(self.find_all(field))
            if field.numel() == 1 or not bool((field > 0).any()):
                continue
            if any(k.shape == field.shape and torch.equal(k, field) for k in kept):
                continue
            kept.append(field)
        self._keep_alive.append(tensor)
        self._fields[id(tensor)] = kept

    def _axis(self, tensor: Tensor, dim: int, reason: str) -> Tensor:
        """Return the atoms along one dimension, [size]; fields that vary jointly are united."""
        size = tensor.shape[dim]
        dim %= tensor.ndim
        atoms = torch.zeros(size, dtype=torch.long)
        for field in self._labels(tensor):
            if field.shape[dim] == 1:
                continue
            lines = field.movedim(dim, 0).reshape(size, -1)
            self._unite(lines, lines[:, :1], reason)
            if (atoms > 0).any():
                self._unite(atoms, lines[:, 0], reason)
            atoms = torch.where(atoms > 0, atoms, lines[:, 0])
        return self.find_all(atoms)

    def _off_axis(self, tensor: Tensor, dims: Sequence[int]) -> list[Field]:
        """Return the fields that do not vary along any of ``dims``."""
        dims = [d % tensor.ndim for d in dims]
        return [f for f in self._labels(tensor) if all(f.shape[d] == 1 for d in dims)]

    # ---- dispatch ---------------------------------------------------------------------------

    def __torch_function__(  # type: ignore[no-untyped-def]  # noqa: D105
        self, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        name = function_name(func)
        ordinal = self._count(name)
        out = func(*args, **kwargs)
        if name in {"get", "set"} and not isinstance(out, Tensor):
            return out
        self._propagate(name, func, args, kwargs, out, ordinal)
        return out

    def _count(self, name: str) -> int | None:
        if name in CONTRACTIONS:
            self.num_contractions += 1
            return self.num_contractions - 1
        if name in NORMS:
            self.num_norms += 1
            return self.num_norms - 1
        return None

    def _propagate(
        self, name: str, func: Any, args: Any, kwargs: Any, out: Any, ordinal: int | None
    ) -> None:
        tensors = [t for t in _flatten((args, tuple(kwargs.values()))) if isinstance(t, Tensor)]
        if not any(isinstance(o, Tensor) for o in _flatten(out)) and name != "setitem":
            return
        if name in CONTRACTIONS:
            self._contraction(name, args, kwargs, out, ordinal)
        elif name in _MATMULS:
            self._matmul(args[0], args[1], out)
        elif name == "scaled_dot_product_attention":
            self._attention(args, kwargs, out)
        elif name == "batch_norm":
            self._batch_norm(args, kwargs, out)
        elif name in NORMS:
            self._layer_norm(args, kwargs, out, ordinal)
        elif name == "group_norm":
            self._group_norm(args, kwargs, out)
        elif name == "pad":
            self._pad(args, kwargs, out)
        elif not any(self._labels(t) for t in tensors):
            return
        elif name in _MOVES:
            self._move(name, func, args, kwargs, out)
        elif name == "setitem":
            self._setitem(args)
        elif name in _POINTWISE:
            self._pointwise(name, tensors, out)
        elif name in _POOLS:
            self._pool(name, args[0], out)
        elif name in _REDUCTIONS:
            self._reduce(args, kwargs, out)
        elif name in _NEW or name.startswith("_") or name in {"is_floating_point", "size"}:
            return
        else:
            self._pin(tensors, f"passes through {name}, which is not followed")

    # ---- data movement ----------------------------------------------------------------------

    def _move(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if name in _JOINS:
            self._stay_rectangular(name, args, kwargs)
        tensors = [t for t in _flatten((args, tuple(kwargs.values()))) if isinstance(t, Tensor)]
        data = [t for t in tensors if self._labels(t) or t.is_floating_point()]
        outs = [o for o in _flatten(out) if isinstance(o, Tensor)]
        results: list[list[Field]] = [[] for _ in outs]
        for level in range(max((len(self._labels(t)) for t in data), default=0)):
            swap = {}
            for t in data:
                fields = sorted(self._labels(t), key=_first_varying)
                full = fields[level] if level < len(fields) else torch.zeros([1] * t.ndim).long()
                swap[id(t)] = full.expand(t.shape).contiguous()
            moved = func(*_replace(args, swap), **_replace(kwargs, swap))
            for i, ids in enumerate(o for o in _flatten(moved) if isinstance(o, Tensor)):
                results[i].append(ids)
        for o, fields in zip(outs, results, strict=True):
            self._set(o, fields)

    def _stay_rectangular(self, name: str, args: Any, kwargs: Any) -> None:
        """Unite what is joined along another dimension (a class token and the patches)."""
        parts = list(args[0] if args else kwargs["tensors"])
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        fields = [
            f for t in parts for f in self._labels(t) if name == "stack" or f.shape[dim % t.ndim] == 1
        ]
        for f in fields:
            dims = _varying(f)
            for t in parts:
                meets = [g for g in self._labels(t) if set(_varying(g)) & set(dims)]
                for g in meets:
                    self._unite(f, g, f"is joined ({name}) with channels that must stay")
                if not meets and t.ndim == f.ndim and any(t.shape[d] > 1 for d in dims):
                    zero = torch.zeros(1, dtype=torch.long)
                    self._unite(f, zero, f"is joined ({name}) with a tensor of fixed width")
        for t in parts:
            self._set(t, self._labels(t))

    def _setitem(self, args: Any) -> None:
        target, index, value = args
        old, new = self._labels(target), self._labels(value)
        if len(old) > 1 or len(new) > 1:
            self._pin([target, value], "is written in place into part of another tensor")
            return
        ids = (old[0] if old else torch.zeros([1] * target.ndim).long()).expand(target.shape).clone()
        values = new[0] if new else torch.zeros(1, dtype=torch.long)
        ids[index] = values
        self._set(target, [ids])

    def _pad(self, args: Any, kwargs: Any, out: Tensor) -> None:
        x, widths = args[0], list(args[1] if len(args) > 1 else kwargs["pad"])
        fields = []
        for field in self._labels(x):
            for i in range(len(widths) // 2):
                dim, (front, back) = x.ndim - 1 - i, widths[2 * i : 2 * i + 2]
                if field.shape[dim] == 1 or (front == 0 and back == 0):
                    continue
                if front < 0 or back < 0 or sum(s > 1 for s in field.shape) > 1:
                    self._unite(field, torch.zeros(1).long(), "is cropped by a negative padding")
                    continue
                # The new zero channels get atoms of their own: what they are later added to
                # tells which of them go, and the padding module is told how many stay.
                pads = self._new_atoms(front), self._new_atoms(back)
                self.pads.append(ChannelPad(self.module_path[-1], *pads))
                pieces = [_along(p, dim, x.ndim) for p in pads]
                field = torch.cat([pieces[0], field, pieces[1]], dim)
            fields.append(field)
        self._set(out, fields)

    # ---- element-wise, pooling, reduction ---------------------------------------------------

    def _pointwise(self, name: str, tensors: list[Tensor], out: Any) -> None:
        ndim = out.ndim
        operands = [(t, [_right_align(f, ndim) for f in self._labels(t)]) for t in tensors]
        merged: list[Field] = []
        for i, (_, fields) in enumerate(operands):
            for field in fields:
                dims = _varying(field)
                for j, (other, other_fields) in enumerate(operands):
                    if i == j:
                        continue
                    meets = [f for f in other_fields if set(_varying(f)) & set(dims)]
                    for f in meets:
                        self._unite(field, f, f"is combined ({name}) with channels that must stay")
                    shape = [1] * (ndim - other.ndim) + list(other.shape)
                    if not meets and any(shape[d] > 1 for d in dims):
                        zero = torch.zeros(1, dtype=torch.long)
                        self._unite(field, zero, f"is combined ({name}) with a tensor of fixed width")
                merged.append(field)
        self._set(out, merged)

    def _pool(self, name: str, x: Tensor, out: Any) -> None:
        outs = [o for o in _flatten(out) if isinstance(o, Tensor)]
        spatial = range(2, x.ndim)
        kept = self._off_axis(x, list(spatial))
        for field in self._labels(x):
            if not any(field is k for k in kept):
                self._unite(field, torch.zeros(1).long(), f"varies over the positions that {name} pools")
        for o in outs:
            if o.is_floating_point():
                self._set(o, kept)

    def _reduce(self, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0]
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        if not isinstance(dims, (int, tuple, list)) or isinstance(dims, bool):
            dims = list(range(x.ndim))
        dims = sorted({d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)}, reverse=True)
        keepdim = out.ndim == x.ndim
        fields = []
        for field in self._off_axis(x, dims):
            for d in dims:
                field = field if keepdim else field.squeeze(d)
            fields.append(field)
        self._set(out, fields)

    # ---- normalisation ----------------------------------------------------------------------

    def _batch_norm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0]
        values = _named(args, kwargs, ("input", "running_mean", "running_var", "weight", "bias"))
        fields = list(self._labels(x))
        atoms = self._axis(x, 1, "is normalised jointly")
        for key in ("running_mean", "running_var", "weight", "bias"):
            vector = values.get(key)
            if isinstance(vector, Tensor):
                self._unite(self._axis(vector, 0, ""), atoms, "is normalised with a fixed width")
        self._set(out, fields)

    def _layer_norm(self, args: Any, kwargs: Any, out: Tensor, ordinal: int | None) -> None:
        values = _named(args, kwargs, ("input", "normalized_shape", "weight", "bias"))
        x, shape = args[0], values["normalized_shape"]
        operands = [values[k] for k in ("weight", "bias") if isinstance(values.get(k), Tensor)]
        self._pointwise("layer_norm", [x, *operands], out)
        if len(shape) == 1 and ordinal is not None:
            self.norms.append(Norm(ordinal, self._axis(x, -1, "is normalised jointly")))

    def _group_norm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        values = _named(args, kwargs, ("input", "num_groups", "weight", "bias"))
        x, num_groups = args[0], int(values["num_groups"])
        atoms = self._axis(x, 1, "is normalised jointly")
        for key in ("weight", "bias"):
            if isinstance(values.get(key), Tensor):
                self._unite(self._axis(values[key], 0, ""), atoms, "is normalised with a fixed width")
        if num_groups == 1:
            zero = torch.zeros(1, dtype=torch.long)
            self._unite(atoms, zero, "is normalised over all channels by GroupNorm(1)")
        blocks = atoms.reshape(num_groups, -1)
        self._unite(blocks, blocks[:, :1], "")
        self._set(out, [_along(atoms, 1, x.ndim)])

    # ---- contractions -----------------------------------------------------------------------

    def _contraction(self, name: str, args: Any, kwargs: Any, out: Tensor, ordinal: int | None) -> None:
        values = _named(args, kwargs, ("input", "weight", "bias"))
        x, weight, bias = values["input"], values["weight"], values.get("bias")
        linear, transposed = name == "linear", "transpose" in name
        groups = 1 if linear else _conv_groups(args, kwargs, transposed)
        x_dim = -1 if linear else x.ndim - (weight.ndim - 2) - 1
        out_dim = x_dim
        module = self.names[id(weight)][0].rpartition(".")[0] if id(weight) in self.names else ""
        module = module or self.module_path[-1]
        read = self._axis(x, x_dim, f"is read jointly by {module}")
        w_out, w_in = (1, 0) if transposed else (0, 1)
        made = self._axis(weight, w_out, "")
        if groups == 1:
            self._unite(read, self._axis(weight, w_in, ""), f"enters {module} beside fixed inputs")
            self._mark_producer(weight, w_out)
        elif transposed:
            self._unite(read, torch.zeros(1).long(), f"enters {module}, a grouped transposed convolution")
            made = made.repeat(groups)
        else:
            blocks = torch.cat([read.reshape(groups, -1), made.reshape(groups, -1)], 1)
            self._unite(blocks, blocks[:, :1], f"enters {module} beside fixed inputs")
            if blocks.shape[1] > 2:
                self.conv_group_atoms.append(blocks[:, 0])
        if isinstance(bias, Tensor):
            self._unite(self._axis(bias, 0, ""), made, f"has a bias of fixed width in {module}")
        spatial = [] if linear else list(range(x.ndim - (weight.ndim - 2), x.ndim))
        passing = [f for f in self._labels(x) if f.shape[x_dim] == 1]
        for f in passing:
            if any(f.shape[d] > 1 for d in spatial):
                self._unite(f, torch.zeros(1).long(), f"is convolved along itself by {module}")
        self._set(out, [*passing, _along(made, out_dim % out.ndim, out.ndim)])
        positions = x.numel() / x.shape[x_dim] if transposed else out.numel() / out.shape[out_dim]
        factors = (read, made) if groups == 1 else (made,)
        self.calls.append(
            Call(ordinal, module, x_dim, read if groups == 1 else None,
                 positions * weight.numel() / self.batch_size, factors + tuple(_flat(f) for f in passing))
        )

    def _mark_producer(self, weight: Tensor, dim: int) -> None:
        if id(weight) in self.names:
            self.producers.add((self.names[id(weight)][0], dim))

    def _matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if a.ndim < 2 or b.ndim < 2:
            self._pin([a, b], "is multiplied as a vector, which is not followed")
            return
        self._separate_heads(a)
        self._separate_heads(b)
        self._unite(self._axis(a, -1, "is contracted"), self._axis(b, -2, "is contracted"),
                    "is contracted with a tensor of fixed width")
        for t in (a, b):
            self._set(t, self._labels(t))
        left = [f for f in self._labels(a) if f.shape[-1] == 1]
        right = [f for f in self._labels(b) if f.shape[-2] == 1]
        self._join(out, [(a, left, -1), (b, right, -2)])
        factors = {_key(f): _flat(f) for f in [*left, *right]}
        inner = self._axis(a, -1, "")
        extra = (inner,) if bool((inner > 0).any()) else ()
        macs = out.numel() * a.shape[-1] / self.batch_size
        self.calls.append(Call(None, self.module_path[-1], 0, None, macs, (*factors.values(), *extra)))

    def _separate_heads(self, t: Tensor) -> None:
        """Make fields that vary over batch dimensions constant over the two matrix dimensions.

        An activation of shape [B, heads, N, d] whose atoms vary over heads *and* d can lose a
        whole head, but not single dimensions of one head: the array would not be rectangular.
        """
        for field in self._labels(t):
            dims = _varying(field)
            if len(dims) > 1 and any(d < t.ndim - 2 for d in dims):
                heads = field
                for d in (t.ndim - 1, t.ndim - 2):
                    heads = heads.narrow(d, 0, 1)
                self._unite(field, heads, "is split into heads beside fixed inputs")
                self.head_atoms.append(heads.reshape(-1))
        self._set(t, self._labels(t))

    def _join(self, out: Tensor, parts: list[tuple[Tensor, list[Field], int]]) -> None:
        """Unite the batch fields of two factors; matrix dimensions pass to the product."""
        fields: list[Field] = []
        for i, (t, own, _) in enumerate(parts):
            other, other_fields, contracted = parts[1 - i]
            for f in own:
                field = _right_align(f, out.ndim)
                dims = _varying(field)
                for g in other_fields:
                    g = _right_align(g, out.ndim)
                    if set(_varying(g)) & set(dims) & set(range(out.ndim - 2)):
                        self._unite(field, g, "is multiplied with fixed heads")
                shape = [1] * (out.ndim - other.ndim) + list(other.shape)
                met = any(set(_varying(_right_align(g, out.ndim))) & set(dims) for g in other_fields)
                if not met and any(d < out.ndim - 2 and shape[d] > 1 for d in dims):
                    self._unite(field, torch.zeros(1).long(), "is multiplied with fixed heads")
                fields.append(field)
        self._set(out, fields)

    def _attention(self, args: Any, kwargs: Any, out: Tensor) -> None:
        values = _named(args, kwargs, ("query", "key", "value", "attn_mask"))
        query, key, value = values["query"], values["key"], values["value"]
        if query.shape[:-2] != key.shape[:-2]:
            self._pin([query, key, value], "is attended with grouped queries, which is not followed")
            return
        for t in (query, key, value):
            self._separate_heads(t)
        for t in (query, key):
            for field in self._labels(t):
                if field.shape[-1] > 1:
                    # A single head: its softmax scale hangs on its width, so it stays whole.
                    self._unite(field, field.narrow(-1, 0, 1), "is a query/key dimension")
            self._set(t, self._labels(t))
        self._set(query, [f for f in self._labels(query) if f.shape[-1] == 1])
        self._set(key, [f for f in self._labels(key) if f.shape[-1] == 1])
        self._join(out, [(query, self._labels(query), -1), (key, self._labels(key), -1)])
        scores = [f for f in self._labels(out) if f.shape[-1] == 1 and f.shape[-2] == 1]
        mask = values.get("attn_mask")
        if isinstance(mask, Tensor) and self._labels(mask):
            for f in scores:
                for g in self._labels(mask):
                    self._unite(f, _right_align(g, f.ndim), "is masked with fixed heads")
        self._set(out, scores)
        self._join(out, [(out, scores, -1), (value, self._labels(value), -2)])
        heads = {_key(f): _flat(f) for f in self._labels(out)}
        m, d, e = key.shape[-2], query.shape[-1], value.shape[-1]
        macs = out.numel() / e * m * (d + e) / self.batch_size
        self.calls.append(Call(None, self.module_path[-1], 0, None, macs, tuple(heads.values())))


def track(model: nn.Module, inputs: tuple[Any, ...]) -> Tracker:
    """Run ``model(*inputs)`` once and return the labels of everything it touched.

    Args:
        model: A private copy, in eval mode; hooks are put on it and not removed.
        inputs: Positional arguments of its forward; only their shapes matter.

    Returns:
        The tracker, with the network's outputs pinned.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tracker = Tracker(named)
    tracker.batch_size = next((len(i) for i in _flatten(inputs) if isinstance(i, Tensor) and i.ndim), 1)

    def leave(*_: Any) -> None:
        tracker.module_path.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: tracker.module_path.append(name))
        module.register_forward_hook(leave)
    with torch.no_grad(), tracker:
        out = model(*inputs)
    values = list(out.values()) if isinstance(out, dict) else out
    tracker._pin(_flatten(values), "is an output of the network")
    return tracker


def _named(args: Any, kwargs: Any, names: Sequence[str]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _conv_groups(args: Any, kwargs: Any, transposed: bool) -> int:
    position = 6
    return int(kwargs.get("groups", args[position] if len(args) > position else 1))


def _flatten(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from _flatten(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _flatten(v)
    else:
        yield value


def _replace(value: Any, swap: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return swap.get(id(value), value)
    if isinstance(value, (tuple, list)):
        return type(value)(_replace(v, swap) for v in value)
    if isinstance(value, dict):
        return {k: _replace(v, swap) for k, v in value.items()}
    return value


def _along(atoms: Tensor, dim: int, ndim: int) -> Field:
    shape = [1] * ndim
    shape[dim] = len(atoms)
    return atoms.reshape(shape)


def _right_align(field: Field, ndim: int) -> Field:
    return field.reshape([1] * (ndim - field.ndim) + list(field.shape)) if field.ndim < ndim else field


def _varying(field: Field) -> list[int]:
    return [d for d, s in enumerate(field.shape) if s > 1]


def _first_varying(field: Field) -> int:
    return next(iter(_varying(field)), -1)


def _compress(field: Field) -> Field:
    for d, size in enumerate(field.shape):
        if size > 1:
            first = field.narrow(d, 0, 1)
            if bool((field == first).all()):
                field = first
    return field


def _flat(field: Field) -> Tensor:
    return field.reshape(-1)


def _key(field: Field) -> tuple[int, ...]:
    return tuple(field.reshape(-1).tolist())
