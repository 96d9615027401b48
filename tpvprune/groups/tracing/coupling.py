"""Constraints between channels that can only be settled after the whole forward pass.

A field that varies over two dimensions at once (heads and their channels) may lose slices along
one of them only, or the array would not stay rectangular; which one is known when everything that
reads it has been seen. Until then this module collects what depends on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpvprune.groups.tracing.fields import FIXED, Atoms, Field, unite_all_but, varying
from tpvprune.groups.tracing.sizes import (
    Attribute,
    AxisSize,
    Expression,
    Operation,
    TracedInt,
    attributes,
    expression_of,
)

_RESHAPED = "is reshaped to the width of channels that must stay"


@dataclass(frozen=True)
class _Axis:
    fields: Sequence[Field]
    dim: int
    size: int


Run = tuple[int, _Axis]  # ordinal of a call, what it runs over


class Coupling:
    """Collects constraints during a forward pass; :meth:`settle` applies them."""

    def __init__(self, atoms: Atoms) -> None:
        self._atoms = atoms
        self._deferred: list[tuple[Field, Field, str]] = []
        self._joint: list[tuple[Field, Sequence[Any]]] = []
        self._axes: list[_Axis] = []
        self._uses: list[tuple[Expression, _Axis]] = []
        self._equal: list[tuple[_Axis, _Axis]] = []
        self._fixed: list[tuple[_Axis, range]] = []
        self.mixers: list[Run] = []
        self.standardised: list[Run] = []  # divided by its variance: one position has none
        self.norms: list[Run] = []

    # ---- what is collected ------------------------------------------------------------------

    def defer(self, field: Field, other: Field, reason: str) -> None:
        """Unite two fields along the dimensions that both vary over, as soon as that is clear."""
        if len(varying(field)) < len(varying(other)) and bool((other > 0).any()):
            return  # comes again with the two exchanged
        if not self._meet(field, other, reason):
            self._deferred.append((field, other, reason))

    def defer_fixed(
        self, field: Field, dims: Iterable[int], shape: Sequence[int], reason: str
    ) -> None:
        """Ask the same beside a tensor of ``shape`` without labels, along ``dims``."""
        fixed = [d for d in dims if shape[d] > 1]
        if fixed:
            sizes = [s if d in fixed else 1 for d, s in enumerate(field.shape)]
            self.defer(field, FIXED.expand(sizes), reason)

    def join(self, field: Field, sizes: Sequence[Any]) -> None:
        """Ask that at most one dimension of a field loses positions."""
        if len(varying(field)) > 1:
            self._joint.append((field, sizes))

    def number(self, fields: Sequence[Field], dim: int, size: int) -> int:
        """Return the number of a dimension, for expressions that use its size."""
        self._axes.append(_Axis(fields, dim, size))
        return len(self._axes) - 1

    def size(self, value: Any, fields: Sequence[Field], dim: int, size: int) -> None:
        """Note that ``value`` sizes a dimension."""
        if isinstance(value, TracedInt) and fields:
            self._uses.append((expression_of(value), _Axis(fields, dim, size)))

    def compared(self, size: Expression, value: Expression) -> None:
        """Note that a model checks the size of a dimension against ``value``, which it equals."""
        if isinstance(size, AxisSize) and isinstance(value, Attribute):
            self._uses.append((value, self._axes[size.number]))

    def equal(self, first: Sequence[Field], second: Sequence[Field], dim: int, size: int) -> None:
        """Ask that two equally wide pieces lose the same positions."""
        self._equal.append((_Axis(first, dim, size), _Axis(second, dim, size)))

    def fixed(self, fields: Sequence[Field], dim: int, size: int, positions: range) -> None:
        """Note that a model counts on these positions of a dimension: none or all of them stay."""
        if any(f.shape[dim] > 1 for f in fields):
            self._fixed.append((_Axis(fields, dim, size), positions))

    def run_over(
        self, ordinal: int, fields: Sequence[Field], dims: Sequence[int], *noted: list[Run]
    ) -> None:
        """Note in ``mixers``, ``norms`` or the like that a call runs over ``dims`` of a tensor."""
        for d in dims:
            mine = [f for f in fields if f.shape[d] > 1]
            if mine:
                for runs in noted:
                    runs.append((ordinal, _Axis(mine, d, mine[0].shape[d])))
                for f in mine:
                    self.join(f, f.shape)

    # ---- what follows from it ---------------------------------------------------------------

    def settle(self) -> None:
        """Apply all constraints until nothing changes."""
        while True:
            before = self._atoms.num_unions
            self._deferred = [d for d in self._deferred if not self._meet(*d)]
            for first, second in self._equal:
                self._unite_axes(first, second, "is a chunk as wide as one that must stay")
            self._tie_attributes()
            for expression, axis in self._uses:
                if isinstance(expression, AxisSize):
                    self._unite_axes(axis, self._axes[expression.number], _RESHAPED)
            if self._atoms.num_unions == before:
                self._tie_quotients()
            if self._atoms.num_unions == before:
                self._hold()
            if self._atoms.num_unions == before and not self._choose():
                break

    def uses(self) -> list[tuple[Expression, Tensor]]:
        """Return the dimensions that attributes size: by which expression, the atoms along them."""
        lines = [(expression, self._line(axis)) for expression, axis in self._uses]
        return [
            (expression, line)
            for expression, line in lines
            if line is not None and any(attributes(expression))
        ]

    def axis_atoms(self, number: int) -> Tensor:
        """Return the atoms of the dimension with this number."""
        axis = self._axes[number]
        line = self._line(axis)
        return torch.zeros(axis.size, dtype=torch.long) if line is None else line

    def lines(self, runs: Sequence[Run]) -> list[tuple[int, int, Tensor]]:
        """Return (ordinal, dimension, atoms along it) of those that run over labelled channels."""
        lines = [(ordinal, axis.dim, self._line(axis)) for ordinal, axis in runs]
        return [(i, dim, line) for i, dim, line in lines if line is not None and _differ(line)]

    def _line(self, axis: _Axis) -> Tensor | None:
        """Return the atoms along a dimension (0: fixed); ``None`` while fields vary jointly."""
        atoms = torch.zeros(axis.size, dtype=torch.long)
        for field in axis.fields:
            if field.shape[axis.dim] == 1:
                continue
            simple = self._atoms.simplify(field)
            if simple.shape[axis.dim] == 1:
                continue
            if len(varying(simple)) > 1:
                return None
            line = simple.reshape(-1)
            if (atoms > 0).any():
                self._atoms.unite(atoms, line, "")
            atoms = line
        return self._atoms.roots(atoms)

    def _meet(self, field: Field, other: Field, reason: str) -> bool:
        """Return whether two fields could be united where both vary, and do so."""
        a, b = self._atoms.simplify(field), self._atoms.simplify(other)
        fixed = not bool((other > 0).any())
        va, vb = set(varying(a)), set(varying(other if fixed else b))
        if va == vb and not fixed:
            self._atoms.unite(a, b, reason)
            return True
        if len(va) > 1 or (len(vb) > 1 and not fixed):
            return False
        common = set(varying(field)) & set(varying(other))
        if va & common:
            self._atoms.unite(a, FIXED, reason)
        if vb & common:
            self._atoms.unite(b, FIXED, reason)
        return True

    def _unite_axes(self, first: _Axis, second: _Axis, reason: str) -> None:
        a, b = self._line(first), self._line(second)
        if a is not None and b is not None:
            self._atoms.unite(a, b, reason)

    def _tie_attributes(self) -> None:
        """One attribute has one value: what it sizes in several places shrinks alike."""
        sized: dict[Attribute, list[Tensor]] = defaultdict(list)
        for expression, axis in self._uses:
            if isinstance(expression, Attribute) and (line := self._line(axis)) is not None:
                sized[expression].append(line)
        for attribute, (first, *others) in sized.items():
            whole = f"{attribute.module}.{attribute.name}"
            for line in others:
                self._atoms.unite(first, line, f"is as wide as {whole}, which sizes what must stay")

    def _tie_quotients(self) -> None:
        """Unite for sizes such as ``x.view(B, N, self.num_heads, C // self.num_heads)``."""
        for expression, axis in self._uses:
            if isinstance(expression, Operation) and expression.op == "floordiv":
                line = self._line(axis)
                if line is not None and isinstance(expression.left, AxisSize):
                    self._tie_quotient(expression.left, expression.right, line)

    def _tie_quotient(self, left: AxisSize, right: Expression, line: Tensor) -> None:
        source = self._line(self._axes[left.number])
        if source is None or len(source) % len(line):
            return
        blocks = source.reshape(-1, len(line))
        if _differ(line):
            if not _same_shares(source, line):
                self._atoms.unite(blocks, line[None, :], _RESHAPED)
            return
        sized = None
        for expression, axis in self._uses:
            if isinstance(right, Attribute) and expression == right:
                sized = self._line(axis)
                if sized is not None and _differ(sized):
                    break
        if sized is not None and len(sized) == len(blocks):
            if not _same_shares(source, sized):
                self._atoms.unite(blocks, sized[:, None], _RESHAPED)
        elif not isinstance(right, Attribute):
            self._atoms.unite(blocks, FIXED, _RESHAPED)

    def _hold(self) -> None:
        """Unite the positions that a model counts on, unless the axis also follows another size."""
        for axis, positions in self._fixed:
            line = self._line(axis)
            if line is not None and _differ(line):
                part = line[list(positions)]
                whole = len(part) == len(line)
                self._atoms.unite(part, part[:1] if whole else FIXED, "is counted on by position")

    def _choose(self) -> bool:
        """Return whether a field still varied jointly; decide for the first."""
        for i, (field, sizes) in enumerate(self._joint):
            simple = self._atoms.simplify(field)
            dims = varying(simple)
            if len(dims) < 2 or self._atoms.is_pinned(simple):
                continue
            follow = [d for d in dims if isinstance(sizes[d], TracedInt) or sizes[d] == -1]
            free = max(follow or dims, key=lambda d: simple.shape[d])
            before = self._atoms.num_unions
            unite_all_but(self._atoms, simple, [free], "is reshaped beside fixed inputs")
            if self._atoms.num_unions == before:  # one along no single dimension: it stays
                self._atoms.unite(simple, FIXED, "varies over several dimensions at once")
            if self._atoms.num_unions == before:
                continue
            del self._joint[:i]
            return True
        return False


def _differ(line: Tensor) -> bool:
    return bool((line != line[0]).any())


def _same_shares(source: Tensor, line: Tensor) -> bool:
    """Return whether every channel owns the same share of both axes: then their ratio is kept."""
    whole, owners = source.unique(return_counts=True)
    part, counts = line.unique(return_counts=True)
    return torch.equal(whole, part) and torch.equal(owners * len(line), counts * len(source))
