"""The least squares of each layer: fed chunk by chunk, solved when all chunks have come to it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpvprune.passes.moments import in_single
from tpvprune.repairs.activation_fit import ActivationFit, rows_to_hold
from tpvprune.repairs.branches import Branch, Layer, Plan
from tpvprune.repairs.least_squares import LeastSquares
from tpvprune.repairs.targets import Targets

Constrain = Callable[[str, Tensor, Tensor], Tensor]
"""``constrain(layer, refitted weights, curvature)``; see ``compensation.refitted``."""


@dataclass
class Pending:
    """A layer whose refit waits for the addition or the norm behind it."""

    layer: Layer
    func: Any
    args: Any
    kwargs: Any
    patches: Tensor


@dataclass(frozen=True)
class _Fed:
    """The problem of a call: linear, and through the activation at some positions of each input.

    ``all_rows``: these are all that the linear one has.
    """

    pending: Pending
    branch: Branch
    linear: LeastSquares
    through: ActivationFit | None
    positions: int
    all_rows: bool


@dataclass
class Refits:
    """What all chunks share: targets, the problem that is being fed, and what was solved.

    ``rows`` says which outputs of each layer stayed; ``moved`` what the norm behind a call took up;
    calls before ``first`` need no fit.
    """

    plan: Plan
    targets: Targets
    rows: Mapping[str, Tensor | None]
    ridge: float | None
    constrain: Constrain | None = None
    linear: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    first: int = 0
    solved: set[int] = field(default_factory=set)
    moved: dict[int, Tensor] = field(default_factory=dict)
    _fed: dict[int, _Fed] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """How many calls are solved, or still have values to be fitted to."""
        waiting = {*self.targets.outputs, *self.targets.sums} - self.solved
        return len(self.solved) + sum(call >= self.first for call in waiting)

    def feed(
        self, pending: Pending, target: Tensor, branch: Branch, num_held: int, offset: Tensor
    ) -> None:
        """Add the rows of one chunk to the problem of a call.

        ``target``: pre-activations wanted [inputs, positions, outputs]. ``num_held``: how many of
        the inputs, the last ones, judge the ridge. ``offset``: what is added to the pre-activation,
        after the branch's scale, before it is read: a shortcut [inputs, positions, outputs], the
        shift of a BatchNorm [outputs], or [1].
        """
        module, patches = pending.layer.module, in_single(pending.patches)
        target, bias = in_single(target), pending.args[2]
        if bias is not None and bias is not module.bias:  # made elsewhere, as in Swin V2: it stays
            target = target - bias
            offset = offset + (bias if branch.scale is None else bias * branch.scale)
        groups, (num_inputs, per_input) = len(patches), target.shape[:2]
        if branch.call not in self._fed:
            self._fed[branch.call] = self._problem(pending, branch, per_input)
        fed = self._fed[branch.call]
        present, wanted = outputs_of(patches, module), by_group(target, groups)
        for held, part in _folds((patches, wanted - present), num_held * per_input):
            fed.linear.add(*part, held=held)
        if fed.through is None:
            return
        scale = fed.through.slope
        offset = by_group(in_single(offset).expand(*offset.shape[:-1], target.shape[-1]), groups)
        parts = (patches, scale * present + offset, scale * wanted + offset)
        some = [_first_positions(t, num_inputs, fed.positions) for t in parts]
        for held, part in _folds(some, num_held * fed.positions):
            fed.through.add(*part, held=held)

    def _problem(self, pending: Pending, branch: Branch, per_input: int) -> _Fed:
        module, num = pending.layer.module, self.plan.all_inputs * per_input
        groups, _, unknowns = pending.patches.shape
        free = module.bias is not None or branch.norm is not None
        few = num <= unknowns and self.constrain is None
        linear = LeastSquares(free=free, few_rows=few)
        most = rows_to_hold(num, groups, unknowns, len(module.weight) // groups)
        positions, through = most // self.plan.all_inputs, None
        activation = self.targets.activations.get(branch.call)
        inside = pending.layer.name.startswith(tuple(f"{name}." for name in self.linear))
        if activation is not None and positions and not inside:
            ones = module.weight.new_ones(len(module.weight))
            slope = in_single(ones if branch.scale is None else branch.scale)
            through = ActivationFit(activation, slope.reshape(groups, 1, -1), free)
        return _Fed(pending, branch, linear, through, positions, positions == per_input)

    @torch.no_grad()
    def solve(self, call: Hashable) -> None:
        """Refit the layer of a call with the rows of all chunks."""
        assert isinstance(call, int)
        fed = self._fed.pop(call)
        module, branch, problem = fed.pending.layer.module, fed.branch, fed.linear
        if self.constrain is None:
            fit = problem.solve(self.ridge)
            if fed.through is not None:
                known = problem.folds() if fed.all_rows else None
                fit = fed.through.improved(fit, given=self.ridge is not None, known=known)
            change, intercept = fit.change, fit.intercept
        else:
            change, intercept = self._constrained(fed.pending.layer, problem)
        module.weight.add_(change.mT.reshape(module.weight.shape).to(module.weight))
        shift = intercept.reshape(-1).to(module.weight)
        if module.bias is not None:
            module.bias.add_(shift)
        elif branch.norm is not None:
            branch.norm.sub_(shift)  # BN(y + b): the running mean takes up -b
            self.moved[call] = shift
        self.solved.add(call)
        self.targets.forget(call)

    def _constrained(self, layer: Layer, problem: LeastSquares) -> tuple[Tensor, Tensor]:
        assert self.constrain is not None
        fit, held = problem.folds()
        both = fit + held
        found = problem.solve(self.ridge)
        curvature = both.gram / both.count
        diagonal = curvature.diagonal(dim1=1, dim2=2)
        scale = diagonal.mean(1).clamp_min(1e-12)
        diagonal.add_((min(found.ridge, 10.0) * scale)[:, None])
        present = layer.module.weight.reshape(*both.cross.mT.shape).double()
        weights = self.constrain(layer.name, present + found.change.mT, curvature)
        change = (weights - present).mT
        return change, both.e_mean - both.x_mean @ change


def outputs_of(patches: Tensor, module: Any) -> Tensor:
    """Return the layer's outputs [groups, rows, outputs] of patches [groups, rows, unknowns]."""
    groups, _, unknowns = patches.shape
    weight = module.weight.reshape(groups, -1, unknowns).to(patches)
    outputs = patches @ weight.mT if groups == 1 else (weight @ patches.mT).mT
    if module.bias is None:
        return outputs
    return outputs + module.bias.to(patches).reshape(groups, 1, -1)


def by_group(outputs: Tensor, groups: int) -> Tensor:
    """Return outputs [..., C] as [groups, rows, C / groups], in memory as `patches_of` has them."""
    rows = outputs.reshape(-1, outputs.shape[-1])
    if groups == 1:
        return rows.unsqueeze(0)
    return rows.t().contiguous().view(groups, -1, len(rows)).mT


def _folds(parts: Sequence[Tensor], num_held: int) -> Iterator[tuple[bool, tuple[Tensor, ...]]]:
    """Yield the rows [g, n, u] to fit, and those held back, which are the last."""
    num_fit = parts[0].shape[1] - num_held
    yield False, tuple(t[:, :num_fit] for t in parts)
    yield True, tuple(t[:, num_fit:] for t in parts)


def _first_positions(rows: Tensor, num_inputs: int, num: int) -> Tensor:
    """Return the rows [g, n, u] of the first so many positions of every input: a view of all."""
    if len(rows) == 1:
        return rows.unflatten(1, (num_inputs, -1))[:, :, :num].flatten(1, 2)
    return rows.mT.unflatten(2, (num_inputs, -1))[..., :num].flatten(2).mT
