"""Functions to which one dimension is that of the channels: norms, tables, gates, slopes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tpvprune.groups.tracing.fields import along, named

if TYPE_CHECKING:
    from tpvprune.groups.tracing.tracking import Tracker


def batch_norm(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow a norm of each channel by itself, over what is seen or by what it remembers."""
    x, names = args[0], ("input", "running_mean", "running_var", "weight", "bias")
    values = named(args, kwargs, names)
    vectors = [values[k] for k in names[1:] if isinstance(values.get(k), Tensor)]
    if values.get("running_mean") is None:  # over what is seen: weight standardisation
        others = [d for d in range(x.ndim) if d != 1]
        tracker.mix(tracker.labels(x), others, tracker.coupling.standardised)
    if vectors:
        _unite_vectors(tracker, vectors, tracker.axis(x, 1, "is normalised jointly"))
    tracker.set_labels(out, tracker.labels(x))


def layer_norm(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow a norm over the last dimensions."""
    values = named(args, kwargs, ("input", "normalized_shape", "weight", "bias"))
    x, shape, coupling = args[0], values["normalized_shape"], tracker.coupling
    operands = [values[k] for k in ("weight", "bias") if isinstance(values.get(k), Tensor)]
    tracker.pointwise("layer_norm", [x, *operands], out)
    for d, size in zip(range(x.ndim - len(shape), x.ndim), shape, strict=True):
        coupling.size(size, tracker.labels(x), d, x.shape[d])
    if len(shape) == 1:
        coupling.run_over(tracker.num_norms - 1, tracker.labels(x), [x.ndim - 1], coupling.norms)


def group_norm(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow a norm over groups of channels, which go or stay as a whole."""
    values = named(args, kwargs, ("input", "num_groups", "weight", "bias"))
    x, num_groups = args[0], int(values["num_groups"])
    atoms = tracker.axis(x, 1, "is normalised jointly")
    vectors = [values[k] for k in ("weight", "bias") if isinstance(values.get(k), Tensor)]
    _unite_vectors(tracker, vectors, atoms)
    tracker.set_labels(out, [along(atoms, 1, x.ndim)])
    if num_groups == 1:
        tracker.mix(tracker.labels(x), [1])
    else:
        blocks = atoms.reshape(num_groups, -1)
        tracker.unite(blocks, blocks[:, :1], "")
        tracker.coupling.size(values["num_groups"], [blocks[:, 0]], 0, num_groups)


def _unite_vectors(tracker: Tracker, vectors: Iterable[Tensor], atoms: Tensor) -> None:
    for vector in vectors:
        tracker.unite(tracker.axis(vector, 0, ""), atoms, "is normalised with a fixed width")


def prelu(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Label what has one slope, or one for each channel along dimension 1."""
    x, slopes = args[:2]
    if slopes.numel() > 1:
        atoms = tracker.axis(x, 1, "has one slope for several channels")
        tracker.unite(tracker.axis(slopes, 0, ""), atoms, "has a slope of its own that must stay")
    tracker.set_labels(out, tracker.labels(x))


def embed(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow a table [rows, C] read by an index: its rows stay, its columns are channels."""
    weight = named(args, kwargs, ("input", "weight"))["weight"]
    columns = tracker.axis(weight, 1, "")
    tracker.pin([args[0]], "is an index")
    tracker.set_labels(out, [along(columns, out.ndim - 1, out.ndim)])


def glu(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow a gated linear unit: each channel of the first half goes with one of the second."""
    dim = int(named(args, kwargs, ("input", "dim")).get("dim", -1)) % out.ndim
    halves = []
    for field in tracker.labels(args[0]):
        first, second = field.tensor_split(2, dim) if field.shape[dim] > 1 else (field, field)
        tracker.unite(first, second, "is gated by channels that must stay")
        halves.append(first)
    tracker.set_labels(out, halves)


def fold(tracker: Tracker, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow the sum of patches [B, C * P, L] into [B, C, H, W]: P rows are one channel."""
    tracker.level(args[0], [args[0].ndim - 1], "varies over the positions that fold puts together")
    rows = tracker.axis(args[0], -2, "is folded jointly").reshape(out.shape[-3], -1)
    tracker.unite(rows, rows[:, :1], "is folded beside fixed inputs")
    tracker.set_labels(out, [along(rows[:, 0], out.ndim - 3, out.ndim)])
