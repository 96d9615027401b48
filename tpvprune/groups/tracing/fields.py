"""Atoms, fields and the union-find that says which atoms stand or fall together.

An *atom* is one row, column or entry of a parameter. A *field* of a tensor is an integer array,
broadcastable to it, that names for every element the atom it depends on. Atom 0 is immovable.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Field = Tensor  # int64, as many dimensions as its tensor, size 1 where it does not vary

FIXED = torch.zeros(1, dtype=torch.long)


class Atoms:
    """Union-find over atoms; ``pinned`` says why a component must stay."""

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        self._num = 1
        self.pinned: dict[int, str] = {}
        self.num_unions = 0

    def new(self, num: int) -> Tensor:
        """Return fresh atoms, [num]."""
        first, last = self._num, self._num + num
        if last > len(self._parent):
            self._parent = np.resize(self._parent, 2 * last)
        self._parent[first:last] = np.arange(first, last)
        self._num = last
        return torch.arange(first, last)

    def roots(self, atoms: Tensor) -> Tensor:
        """Return the representatives of an array of atoms, same shape."""
        roots = self._parent[atoms.numpy()]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                return torch.from_numpy(np.asarray(roots))  # of one atom NumPy gives a number
            roots = above

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Unite two broadcastable arrays of atoms element by element; atom 0 pins the other."""
        ra, rb = (r.reshape(-1) for r in torch.broadcast_tensors(self.roots(a), self.roots(b)))
        differ = ra != rb
        if not bool(differ.any()):
            return
        pairs = torch.stack([ra[differ], rb[differ]], 1).unique(dim=0)
        for x, y in pairs.tolist():
            low, high = sorted((self._root(x), self._root(y)))
            if low == high or (low == 0 and high in self.pinned):
                continue
            self.num_unions += 1
            if low == 0:
                self.pinned[high] = reason
                continue
            self._parent[high] = low
            if high in self.pinned:
                self.pinned.setdefault(low, self.pinned[high])

    def _root(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = int(parent[atom])
        return atom

    def is_pinned(self, field: Field) -> bool:
        """Return whether everything that a simplified field names must stay."""
        pinned = self.pinned
        return bool(pinned) and all(a == 0 or a in pinned for a in field.unique().tolist())

    def simplify(self, field: Field) -> Field:
        """Return the field by representatives, of size 1 wherever it is constant."""
        field = self.roots(field)
        for d in varying(field):
            first = field.narrow(d, 0, 1)
            if bool((field == first).all()):
                field = first
        return field


def named(args: Any, kwargs: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return positional and keyword arguments by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def flatten(value: Any) -> Iterable[Any]:
    """Yield the leaves of nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from flatten(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from flatten(v)
    else:
        yield value


def substitute_tensors(value: Any, swap: dict[int, Tensor]) -> Any:
    """Return nested arguments with tensors replaced by what ``swap`` holds for their id."""
    if isinstance(value, Tensor):
        return swap.get(id(value), value)
    if isinstance(value, (tuple, list)):
        return type(value)(substitute_tensors(v, swap) for v in value)
    if isinstance(value, dict):
        return {k: substitute_tensors(v, swap) for k, v in value.items()}
    return value


def along(atoms: Tensor, dim: int, ndim: int) -> Field:
    """Return a field of ``ndim`` dimensions that varies along one."""
    shape = [1] * ndim
    shape[dim] = len(atoms)
    return atoms.reshape(shape)


def right_align(field: Field, ndim: int) -> Field:
    """Return the field with leading dimensions of size 1, as broadcasting adds them."""
    return field.reshape([1] * (ndim - field.ndim) + list(field.shape))


def varying(field: Field) -> list[int]:
    """Return the dimensions along which a field varies."""
    return [d for d, s in enumerate(field.shape) if s > 1]


def unite_all_but(atoms: Atoms, field: Field, free: Collection[int], reason: str) -> None:
    """Unite along every dimension except ``free``."""
    for d in varying(field):
        if d not in free:
            atoms.unite(field, field.narrow(d, 0, 1), reason)
            field = field.narrow(d, 0, 1)
