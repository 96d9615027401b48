"""Follow every channel of a network through one forward pass.

Each tensor carries *fields*: integer arrays, broadcastable to the tensor, that name for every
element the atom (one row, column or entry of a parameter) it stands or falls with. Pure data
movement (view, permute, split, cat, roll, indexing) is replayed on the fields themselves, so
whatever a model does to the shape of its activations is followed exactly; additions and products
unite atoms; convolutions and linear layers read one set of atoms and start another. What cannot
be followed is pinned with a reason, never guessed.

Unlike torch-pruning's walk over autograd nodes this tracks indices per dimension, sees weights used
functionally and frozen ones, and traces sizes that a model writes down (``sizes.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.groups.tracing import channelwise, contractions, movements
from tpvprune.groups.tracing.coupling import Coupling, Run
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
from tpvprune.passes import operations

_FOLLOWED: dict[str, Callable[[Tracker, Any, Any, Any], None]] = {
    "scaled_dot_product_attention": contractions.attend,
    "batch_norm": channelwise.batch_norm,
    "instance_norm": channelwise.batch_norm,
    "layer_norm": channelwise.layer_norm,
    "rms_norm": channelwise.layer_norm,
    "group_norm": channelwise.group_norm,
    "prelu": channelwise.prelu,
    "embedding": channelwise.embed,
    "glu": channelwise.glu,
    "fold": channelwise.fold,
    "pad": movements.pad,
    "setitem": movements.set_item,
}
_REMEDIES = {
    "multi_head_attention_forward": ": prune what tpvprune.unfuse_attention(model) returns",
    "local_response_norm": ": without a channel its neighbours would be normalised by others",
}


class Tracker(TorchFunctionMode):
    """Torch-function mode that labels tensors with the atoms they depend on; see :func:`track`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, str] = {}
        self._keep_alive: list[Tensor] = []  # an id is that of one tensor as long as this lives
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self._names.setdefault(id(tensor), name)
                self._keep_alive.append(tensor)
        self.atoms = Atoms()
        self.roots, self.unite = self.atoms.roots, self.atoms.unite
        self.coupling = Coupling(self.atoms)
        self._fields: dict[int, list[Field]] = {}
        self.param_atoms: dict[tuple[str, int], Tensor] = {}
        self.kernels: set[str] = set()  # weights whose dimensions from the third on are positions
        self.producers: set[tuple[str, int]] = set()
        self.consumers: set[tuple[str, int]] = set()
        self.calls: list[contractions.Call] = []
        self.pads: list[tuple[str, Tensor, Tensor]] = []  # module, zero channels before and after
        self.conv_group_atoms: list[Tensor] = []
        self.head_atoms: list[Tensor] = []
        self.module_path: list[str] = [""]
        self.outputs: dict[str, Tensor | None] = {}  # module -> its output; None: ran twice
        self.num_contractions = self.num_norms = self.num_mixers = 0
        self.batch_size = 1

    # ---- fields -----------------------------------------------------------------------------

    def name_of(self, tensor: Tensor) -> str:
        """Return the name of a parameter or buffer; empty of other tensors."""
        return self._names.get(id(tensor), "")

    def pin(self, nested: Any, reason: str) -> None:
        """Leave whole whatever tensors in nested arguments depend on."""
        for field in (f for t in flatten(nested) for f in self.labels(t)):
            self.unite(field, FIXED, reason)

    def labels(self, tensor: Any) -> list[Field]:
        """Return the fields of a tensor; a parameter gets one along each dimension."""
        if not isinstance(tensor, Tensor):
            return []
        key, name = id(tensor), self.name_of(tensor)
        if key not in self._fields and name and tensor.is_floating_point():
            self._fields[key] = []
            for dim, size in enumerate(tensor.shape):
                if size > 1 and not (dim > 1 and name in self.kernels):
                    atoms = self.param_atoms[name, dim] = self.atoms.new(size)
                    self._fields[key].append(along(atoms, dim, tensor.ndim))
        return self._fields.get(key, [])

    def set_labels(self, tensor: Any, fields: Iterable[Field]) -> None:
        """Label a tensor; fields that say nothing are dropped."""
        if not isinstance(tensor, Tensor):
            return
        kept: list[Field] = []
        for field in fields:
            simple = self.atoms.simplify(field)
            tells = simple.numel() > 1 and bool((simple > 0).any())
            if tells and not any(torch.equal(k, simple) for k in kept):
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
            self.unite(rows, rows[:, :1], reason)
            if (atoms > 0).any():
                self.unite(atoms, rows[:, 0], reason)
            atoms = torch.where(atoms > 0, atoms, rows[:, 0])
        return self.roots(atoms)

    # ---- dispatch ---------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operations.function_name(func)
        if name in operations.CONTRACTIONS:
            self.num_contractions += 1
        elif name in operations.NORMS:
            self.num_norms += 1
        elif name in operations.MIXERS:
            self.num_mixers += 1
        out = func(*args, **kwargs)
        if isinstance(out, torch.Size):
            return self._traced_size(args[0])
        if name == "size" and isinstance(out, int):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._traced_size(args[0])[dim]
        if name == "numel" and self.labels(args[0]):
            return math.prod(self._traced_size(args[0]))
        if name == "set" or (
            not any(isinstance(o, Tensor) for o in flatten(out)) and name != "setitem"
        ):
            return out
        try:
            self._propagate(name, func, args, kwargs, out)
        except Exception as error:  # whatever it is, the model itself runs
            reason = f"passes through {name}, which could not be followed ({error})"
            self.pin((args, kwargs, out), reason)
            for o in flatten(out):
                self.set_labels(o, [])
        return out

    def _traced_size(self, tensor: Tensor) -> torch.Size:
        """Return a size in which those of labelled dimensions remember where they come from."""
        fields = self.labels(tensor)
        return torch.Size(
            TracedInt(s, AxisSize(self.coupling.number(fields, d, s)), self.coupling.compared)
            if any(f.shape[d] > 1 for f in fields)
            else s
            for d, s in enumerate(tensor.shape)
        )

    def _propagate(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [t for t in flatten((args, kwargs)) if isinstance(t, Tensor)]
        if name in operations.RECURRENT:
            contractions.recur(self, args)
        elif name in operations.CONTRACTIONS:
            contractions.contract(self, name, args, kwargs, out)
        elif name == "einsum":
            contractions.sum_products(self, args, out)
        elif name in operations.MATMULS:
            contractions.multiply(self, args[0], args[1], out)
        elif any(self.labels(t) for t in tensors):
            self._propagate_labelled(name, func, args, kwargs, out)

    def _propagate_labelled(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [t for t in flatten((args, kwargs)) if isinstance(t, Tensor)]
        if name in _FOLLOWED:
            _FOLLOWED[name](self, args, kwargs, out)
        elif name in operations.LIKE:
            self.set_labels(out, self.labels(args[0]))
        elif name in operations.MOVES:
            movements.move(self, name, func, args, kwargs, out)
        elif name in operations.POINTWISE:
            self.pointwise(name, tensors[:1] if name in operations.CASTS else tensors, out)
            if name in operations.MIXERS:
                self.mix(self.labels(args[0]), _dims(args, kwargs, -1 if "softmax" in name else 1))
        elif name in operations.POOLS:
            self._pool(name, args[0], out)
        elif name in operations.REDUCTIONS and isinstance(out, Tensor) and not out.ndim:
            self.pin(tensors, f"passes through {name}, which makes one number of all there is")
        elif name in operations.REDUCTIONS:
            dims = _dims(args, kwargs, None)
            self.mix(self.labels(args[0]), dims)
            self._reduce(args[0], dims, out)
        elif name not in operations.NEW and not name.startswith("_"):
            remedy = _REMEDIES.get(name, "")
            self.pin(tensors, f"passes through {name}, which is not followed{remedy}")

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
        dims, combined = set(varying(field)), f"is combined ({name}) with"
        met: set[int] = set()
        for other in others:
            common = set(varying(other)) & dims
            met |= common
            if common == dims == set(varying(other)):
                self.unite(field, other, f"{combined} channels that must stay")
            elif common:
                self.coupling.defer(field, other, f"{combined} channels of another shape")
        self.coupling.defer_fixed(field, dims - met, shape, f"{combined} a tensor of fixed width")

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

    def mix(self, fields: Sequence[Field], dims: Sequence[int], *noted: list[Run]) -> None:
        """Note that the last mixer runs over ``dims`` of a tensor, also in other lists."""
        mixers = self.coupling.mixers
        self.coupling.run_over(self.num_mixers - 1, fields, dims, mixers, *noted)

    def _reduce(self, x: Tensor, dims: Sequence[int], out: Any) -> None:
        for o in flatten(out):
            if not isinstance(o, Tensor):
                continue
            fields = []
            for field in self.labels(x):
                # Along a reduced dimension all positions count alike: what stays is the rest.
                rest = field
                for d in dims:
                    if rest.shape[d] > 1 and len(varying(rest)) > 1:
                        self.coupling.join(field, field.shape)
                    rest = rest.narrow(d, 0, 1)
                fields.append(rest if o.ndim == x.ndim else rest.squeeze(tuple(dims)))
            self.set_labels(o, fields)


def track(model: nn.Module, inputs: tuple[Any, ...]) -> Tracker:
    """Run a private copy of a model once and return the labels of everything it touched.

    Hooks and traced attributes are put on it and stay.
    """
    tracker = Tracker(model)
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
    tracker.pin(out, "is an output of the network")
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
