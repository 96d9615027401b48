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
not matter; 4. sizes that a model writes down are traced to its attributes (``sizes.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.groups.tracing import contractions, movements
from tpvprune.groups.tracing.calls import Call, ChannelPad, named
from tpvprune.groups.tracing.coupling import Coupling
from tpvprune.groups.tracing.fields import (
    FIXED,
    Atoms,
    Field,
    along,
    flatten,
    right_align,
    unite_all_but,
    varying,
)
from tpvprune.groups.tracing.sizes import AxisSize, TracedInt, trace_attributes
from tpvprune.passes.operations import (
    CASTS,
    CONTRACTIONS,
    MATMULS,
    MIXERS,
    MOVES,
    NEW,
    NORMS,
    POINTWISE,
    POOLS,
    RECURRENT,
    REDUCTIONS,
    function_name,
)

_REMEDIES = {
    "multi_head_attention_forward": ": prune what tpvprune.unfuse_attention(model) returns",
    "local_response_norm": ": without a channel its neighbours would be normalised by others",
}


class Tracker(TorchFunctionMode):
    """Torch-function mode that labels tensors with the atoms they depend on.

    Use :func:`track`; the attributes are read by :mod:`tpvprune.groups` afterwards.
    """

    def __init__(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.names: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in named_tensors:
            self.names.setdefault(id(tensor), (name, tensor))
        self.atoms = Atoms()
        self.coupling = Coupling(self.atoms)
        self._keep_alive: list[Tensor] = []
        self._fields: dict[int, list[Field]] = {}
        self.param_atoms: dict[tuple[str, int], Tensor] = {}
        self.kernels: set[str] = set()  # weights whose dimensions from the third on are positions
        self.producers: set[tuple[str, int]] = set()
        self.consumers: set[tuple[str, int]] = set()
        self.calls: list[Call] = []
        self.pads: list[ChannelPad] = []
        self.conv_group_atoms: list[Tensor] = []
        self.head_atoms: list[Tensor] = []
        self.module_path: list[str] = [""]
        self.outputs: dict[str, Tensor | None] = {}  # module -> its output; None: ran twice
        self.num_contractions = self.num_norms = self.num_mixers = 0
        self.batch_size = 1

    # ---- fields -----------------------------------------------------------------------------

    @property
    def pinned(self) -> dict[int, str]:
        """Return representatives that must stay, with the reason."""
        return self.atoms.pinned

    def find_all(self, atoms: Tensor) -> Tensor:
        """Return the representatives of an array of atoms, same shape."""
        return self.atoms.roots(atoms)

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Unite two broadcastable arrays of atoms element by element; atom 0 pins the other."""
        self.atoms.unite(a, b, reason)

    def pin(self, tensors: Iterable[Any], reason: str) -> None:
        """Leave whole whatever these tensors depend on."""
        for t in tensors:
            for field in self.labels(t):
                self.atoms.unite(field, FIXED, reason)

    def labels(self, tensor: Any) -> list[Field]:
        """Return the fields of a tensor; a parameter gets one along each dimension."""
        if not isinstance(tensor, Tensor):
            return []
        key = id(tensor)
        if key not in self._fields and key in self.names and tensor.is_floating_point():
            name, _ = self.names[key]
            self._fields[key] = [
                along(self._param_axis(name, dim, size), dim, tensor.ndim)
                for dim, size in enumerate(tensor.shape)
                if size > 1 and not (dim > 1 and name in self.kernels)
            ]
        return self._fields.get(key, [])

    def _param_axis(self, name: str, dim: int, size: int) -> Tensor:
        if (name, dim) not in self.param_atoms:
            self.param_atoms[name, dim] = self.atoms.new(size)
        return self.param_atoms[name, dim]

    def set_labels(self, tensor: Any, fields: Iterable[Field]) -> None:
        """Label a tensor; fields that say nothing are dropped."""
        if not isinstance(tensor, Tensor):
            return
        kept: list[Field] = []
        for field in fields:
            simple = self.atoms.simplify(field)
            if simple.numel() == 1 or not bool((simple > 0).any()):
                continue
            if any(k.shape == simple.shape and torch.equal(k, simple) for k in kept):
                continue
            kept.append(simple)
        # What is pinned beside channels that are not (positions, masks) has done its part.
        free = [f for f in kept if not self.atoms.is_pinned(f)]
        self._keep_alive.append(tensor)
        self._fields[id(tensor)] = free or kept

    def axis(self, tensor: Tensor, dim: int, reason: str) -> Tensor:
        """Return the atoms along one dimension, [size]; fields that vary jointly are united."""
        size = tensor.shape[dim]
        dim %= tensor.ndim
        atoms = torch.zeros(size, dtype=torch.long)
        for field in self.labels(tensor):
            if field.shape[dim] == 1:
                continue
            rows = field.movedim(dim, 0).reshape(size, -1)
            self.atoms.unite(rows, rows[:, :1], reason)
            if (atoms > 0).any():
                self.atoms.unite(atoms, rows[:, 0], reason)
            atoms = torch.where(atoms > 0, atoms, rows[:, 0])
        return self.atoms.roots(atoms)

    # ---- dispatch ---------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in CONTRACTIONS:
            self.num_contractions += 1
        elif name in NORMS:
            self.num_norms += 1
        elif name in MIXERS:
            self.num_mixers += 1
        out = func(*args, **kwargs)
        if isinstance(out, torch.Size):
            return self._traced_size(args[0], out)
        if name == "size" and isinstance(out, int):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._traced_size(args[0], args[0].shape)[dim]
        if name == "numel" and self.labels(args[0]):
            return reduce(mul, self._traced_size(args[0], args[0].shape), 1)
        if name == "set" or (
            not any(isinstance(o, Tensor) for o in flatten(out)) and name != "setitem"
        ):
            return out
        try:
            self._propagate(name, func, args, kwargs, out)
        except Exception as error:  # whatever it is, the model itself runs
            tensors = list(flatten((args, kwargs, out)))
            self.pin(tensors, f"passes through {name}, which could not be followed ({error})")
            for o in flatten(out):
                self.set_labels(o, [])
        return out

    def _traced_size(self, tensor: Tensor, size: torch.Size) -> torch.Size:
        """Return a size in which those of labelled dimensions remember where they come from."""
        fields = self.labels(tensor)
        if not fields:
            return size
        return torch.Size(
            TracedInt(s, AxisSize(self.coupling.number(fields, d, s)), self.coupling.compared)
            if any(f.shape[d] > 1 for f in fields)
            else s
            for d, s in enumerate(size)
        )

    def _propagate(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [t for t in flatten((args, kwargs)) if isinstance(t, Tensor)]
        if name in RECURRENT:
            contractions.recur(self, args)
        elif name in CONTRACTIONS:
            contractions.contract(self, name, args, kwargs, out)
        elif name in MATMULS:
            self._product(name, args, out)
        elif not any(self.labels(t) for t in tensors):
            return
        elif name == "scaled_dot_product_attention":
            contractions.attend(self, args, kwargs, out)
        elif name in {"batch_norm", "instance_norm"}:
            self._batch_norm(args, kwargs, out)
        elif name in NORMS:
            self._layer_norm(args, kwargs, out)
        elif name == "group_norm":
            self._group_norm(args, kwargs, out)
        elif name in MOVES:
            movements.move(self, name, func, args, kwargs, out)
        else:
            self._propagate_rest(name, args, kwargs, out)

    def _propagate_rest(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [t for t in flatten((args, kwargs)) if isinstance(t, Tensor)]
        if name == "pad":
            movements.pad(self, args, kwargs, out)
        elif name == "setitem":
            movements.set_item(self, args)
        elif name in movements.ON_CHANNELS:
            movements.ON_CHANNELS[name](self, args, kwargs, out)
        elif name == "prelu":
            self._prelu(args[0], args[1], out)
        elif name in POINTWISE:
            self.pointwise(name, tensors[:1] if name in CASTS else tensors, out)
            if name in MIXERS:
                self._mix(args, kwargs, default=-1 if "softmax" in name else 1)
        elif name in POOLS:
            self._pool(name, args[0], out)
        elif name in REDUCTIONS:
            self._mix(args, kwargs, default=None)
            self._reduce(args, kwargs, out)
        elif name not in NEW and not name.startswith("_"):
            remedy = _REMEDIES.get(name, "")
            self.pin(tensors, f"passes through {name}, which is not followed{remedy}")

    def _product(self, name: str, args: Any, out: Tensor) -> None:
        if name == "einsum":
            flat = args if len(args) > 2 else (args[0], *args[1])
            contractions.sum_products(self, flat, out)
        else:
            contractions.multiply(self, args[0], args[1], out)

    # ---- element-wise, pooling, reduction ---------------------------------------------------

    def pointwise(self, name: str, tensors: list[Tensor], out: Any) -> None:
        """Unite what meets in an element-wise operation."""
        if not isinstance(out, Tensor):  # where(condition) asks for places
            self.pin(tensors, f"passes through {name} with several results, which is not followed")
            return
        ndim = out.ndim
        operands = [
            ([1] * (ndim - t.ndim) + list(t.shape), [right_align(f, ndim) for f in self.labels(t)])
            for t in tensors
        ]
        merged: list[Field] = []
        for i, (_, fields) in enumerate(operands):
            for field in fields:
                for j, (shape, others) in enumerate(operands):
                    if i != j:
                        self.meet(name, field, shape, others)
                merged.append(field)
        # A field along fewer dimensions than another one is implied by it.
        dims = [set(varying(f)) for f in merged]
        self.set_labels(
            out, [f for f, d in zip(merged, dims, strict=True) if not any(d < e for e in dims)]
        )

    def meet(self, name: str, field: Field, shape: Sequence[int], others: list[Field]) -> None:
        """Unite a field with what another operand of ``shape`` has in the same places."""
        dims = set(varying(field))
        met: set[int] = set()
        for other in others:
            common = set(varying(other)) & dims
            met |= common
            if common == dims == set(varying(other)):
                self.atoms.unite(field, other, f"is combined ({name}) with channels that must stay")
            elif common:
                self.coupling.defer(
                    field, other, f"is combined ({name}) with channels of another shape"
                )
        fixed = [d for d in dims - met if shape[d] > 1]
        if fixed:
            zeros = torch.zeros([s if d in fixed else 1 for d, s in enumerate(field.shape)]).long()
            self.coupling.defer(field, zeros, f"is combined ({name}) with a tensor of fixed width")

    def _pool(self, name: str, x: Tensor, out: Any) -> None:
        spatial = range(max(x.ndim - 2, 2) if "2d" in name else 2, x.ndim)
        self.level(x, spatial, f"varies over the positions that {name} pools")
        kept = [f for f in self.labels(x) if all(f.shape[d] == 1 for d in spatial)]
        for o in flatten(out):
            if isinstance(o, Tensor) and o.is_floating_point():
                self.set_labels(o, kept)

    def level(self, x: Tensor, positions: Iterable[int], reason: str) -> None:
        """Make fields constant over positions that are mixed; pin what varies over nothing else."""
        positions = list(positions)
        uneven = [f for f in self.labels(x) if any(f.shape[d] > 1 for d in positions)]
        for field in uneven:
            if set(varying(field)) <= set(positions):
                self.unite(field, FIXED, reason)
            else:
                unite_all_but(self.atoms, field, set(range(x.ndim)) - set(positions), reason)
        if uneven:
            self.set_labels(x, self.labels(x))

    def _mix(self, args: Any, kwargs: Any, default: int | None) -> None:
        dims = _dims(args, kwargs, default)
        self.coupling.mix(self.num_mixers - 1, self.labels(args[0]), dims)

    def _reduce(self, args: Any, kwargs: Any, out: Any) -> None:
        x, dims = args[0], _dims(args, kwargs, None)
        for o in flatten(out):
            if not isinstance(o, Tensor):
                continue
            fields = []
            for field in self.labels(x):
                # Along a reduced dimension all positions count alike: what stays is the rest.
                rest = field
                for d in dims:
                    if rest.shape[d] > 1 and len(varying(rest)) > 1:
                        self.coupling.join(field, list(field.shape))
                    rest = rest.narrow(d, 0, 1)
                for d in sorted(dims, reverse=True):
                    rest = rest if o.ndim == x.ndim else rest.squeeze(d)
                fields.append(rest)
            self.set_labels(o, fields)

    def _prelu(self, x: Tensor, slopes: Tensor, out: Tensor) -> None:
        """Label what has one slope, or one for each channel along dimension 1."""
        if slopes.numel() > 1:
            atoms = self.axis(x, 1, "has one slope for several channels")
            self.unite(self.axis(slopes, 0, ""), atoms, "has a slope of its own that must stay")
        self.set_labels(out, self.labels(x))

    # ---- normalisation ----------------------------------------------------------------------

    def _batch_norm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0]
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        values = named(args, kwargs, names)
        vectors = [values[k] for k in names[1:5] if isinstance(values.get(k), Tensor)]
        if (
            values.get("running_mean") is None
        ):  # normalised over what is seen: weight standardisation
            others = [d for d in range(x.ndim) if d != 1]
            self.coupling.mix(self.num_mixers - 1, self.labels(x), others, standardises=True)
        if not vectors:
            self.set_labels(out, self.labels(x))
            return
        atoms = self.axis(x, 1, "is normalised jointly")
        for vector in vectors:
            self.unite(self.axis(vector, 0, ""), atoms, "is normalised with a fixed width")
        self.set_labels(out, self.labels(x))

    def _layer_norm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        values = named(args, kwargs, ("input", "normalized_shape", "weight", "bias"))
        x, shape = args[0], values["normalized_shape"]
        operands = [values[k] for k in ("weight", "bias") if isinstance(values.get(k), Tensor)]
        self.pointwise("layer_norm", [x, *operands], out)
        for d, size in zip(range(x.ndim - len(shape), x.ndim), shape, strict=True):
            self.coupling.size(size, self.labels(x), d, x.shape[d])
        if len(shape) == 1:
            self.coupling.normalise(self.num_norms - 1, self.labels(x), x.ndim - 1)

    def _group_norm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        values = named(args, kwargs, ("input", "num_groups", "weight", "bias"))
        x, num_groups = args[0], int(values["num_groups"])
        atoms = self.axis(x, 1, "is normalised jointly")
        for key in ("weight", "bias"):
            if isinstance(values.get(key), Tensor):
                self.unite(self.axis(values[key], 0, ""), atoms, "is normalised with a fixed width")
        self.set_labels(out, [along(atoms, 1, x.ndim)])
        if num_groups == 1:
            self.coupling.mix(self.num_mixers - 1, self.labels(x), [1])
        else:
            blocks = atoms.reshape(num_groups, -1)
            self.unite(blocks, blocks[:, :1], "")
            self.coupling.size(values["num_groups"], [blocks[:, 0]], 0, num_groups)


def track(model: nn.Module, inputs: tuple[Any, ...]) -> Tracker:
    """Run ``model(*inputs)`` once and return the labels of everything it touched.

    ``model``: a private copy, in eval mode; hooks and traced attributes are put on it and stay.
    ``inputs``: positional arguments of its forward; only their shapes matter.
    """
    named_tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    tracker = Tracker(named_tensors)
    tracker.batch_size = next(
        (len(i) for i in flatten(inputs) if isinstance(i, Tensor) and i.ndim), 1
    )

    def leave(_module: nn.Module, _args: Any, out: Any) -> None:
        name = tracker.module_path.pop()
        once = name not in tracker.outputs and isinstance(out, Tensor)
        tracker.outputs[name] = out if once else None

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            tracker.kernels.add(f"{name}.weight")
        module.register_forward_pre_hook(lambda *_, name=name: tracker.module_path.append(name))
        module.register_forward_hook(leave)
    trace_attributes(model)
    with torch.no_grad(), tracker:
        out = model(*inputs)
    values = list(out.values()) if isinstance(out, dict) else out
    tracker.pin(flatten(values), "is an output of the network")
    tracker.coupling.settle()
    return tracker


def _dims(args: Any, kwargs: Any, default: int | None) -> list[int]:
    x = args[0]
    dims = kwargs.get("dim", kwargs.get("axis"))
    if dims is None:
        ints = [a for a in args[1:] if isinstance(a, (tuple, list)) or type(a) is int]
        dims = ints[-1] if ints else default
    if dims is None:
        return list(range(x.ndim))
    return sorted({d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)})
