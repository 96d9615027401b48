r"""The score of a branch: output variance caused by leaving it out (TPV).

A sum x + F(x) without F is the perturbation that sets the branch to zero. To first order the output
changes by :math:`u(x) = J_F(x)\, r(x)`, r = F(x); what a linear map of the channels of x predicts
of F(x) the layers that read the sum can take over when they are refitted, so that with it
r = F(x) - A x - c is what is lost. :math:`TPV = E_x \|u(x)\|^2 = E_x E_v (v^T u(x))^2`, for all
branches in the same passes. Nothing has to stand in: the smaller of both counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.depth.additions import BranchMode
from tpvprune.depth.records import Branch
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, fast_layout, frozen, on_device
from tpvprune.processes.shares import summed, total
from tpvprune.repairs.least_squares import LeastSquares
from tpvprune.scores.taps import probe_directions

_ROWS_PER_IMAGE = 32
_HELD = 4  # every so manieth image judges the ridge


def branch_scores(
    model: nn.Module,
    branches: Sequence[Branch],
    batches: Iterable[Any],
    *,
    gone: Sequence[Branch] = (),
    compensated: bool = True,
    num_probes: int = 4,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> dict[str, float]:
    """Score branches by the output variance that their removal causes.

    ``batches``: re-iterable of unlabeled input tensors [B, ...]. ``seed``: of the directions, and
    of the positions that the maps are fitted on. ``outputs``: what counts of what the model
    returns; None: all, alike. Returns name of the branch -> score, in squared output units.

    Reference:
        Arpit, Test prediction variance, ICML 2026, https://arxiv.org/abs/2512.11089.
    """
    inputs, branches = unlabeled(batches), sorted(branches, key=lambda b: b.end)
    counted = Outputs.measured(model, inputs, outputs)
    dims = _batch_dims(model, branches, inputs, gone)
    maps = _stand_ins(model, branches, inputs, gone, dims=dims, seed=seed) if compensated else {}
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(2 if maps else 1, len(branches), dtype=torch.float64)
    with evaluating(model), frozen(model), torch.enable_grad():
        for batch in inputs:
            x = fast_layout(on_device(batch.detach(), model), model).requires_grad_()
            watched = _Watched(frozenset(b.name for b in gone), maps)
            with BranchMode(model, [*branches, *gone], watched.see):
                returned = counted.joined(model(x), len(x))
            directions = probe_directions(returned, "logits", num_probes, generator)
            changes = [watched.changes(returned, v, dims) for v in directions]
            squares += torch.stack(changes).square().mean(0).sum(2).cpu()
    means = summed(squares)[0].amin(0) / total(sum(map(len, inputs)))
    return {b.name: float(mean) for b, mean in zip(branches, means, strict=True)}


Map = tuple[Tensor, Tensor]  # A [C, C], c [C]: x A + c


class _Watched:
    """What the branches of one forward add, and what of it no map of x predicts."""

    def __init__(self, gone: Collection[str], maps: Mapping[str, Map]) -> None:
        self._gone, self._maps = gone, maps
        self._added: dict[str, Tensor] = {}
        self._lost: dict[str, list[Tensor]] = {}

    def see(self, branch: Branch, x: Tensor, added: Tensor) -> Tensor:
        if branch.name in self._gone:
            return x.clone()
        added = added.clone()
        lost = [added.detach()]
        if branch.name in self._maps:
            change, shift = self._maps[branch.name]
            rows = x.detach().movedim(branch.channel_dim, -1)
            predicted = rows @ change.to(rows) + shift.to(rows)
            lost.append(added.detach() - predicted.movedim(-1, branch.channel_dim))
        self._added[branch.name], self._lost[branch.name] = added, lost
        return x + added

    def changes(self, returned: Tensor, v: Tensor, dims: Mapping[str, int]) -> Tensor:
        """Return how the outputs [B, K] change along v without each branch.

        ``v``: directions [B, K]. ``dims``: see :func:`_batch_dims`. Returns [1 or 2, branches, B]:
        without it, and with what stands in.
        """
        grads = torch.autograd.grad(returned, list(self._added.values()), v, retain_graph=True)
        num = len(returned)  # of images: those of a branch may be patches, [B * P, ...]

        def by_image(products: Tensor, name: str) -> Tensor:
            rows = products.movedim(dims[name], 0).reshape(num, -1)
            return rows.sum(1, dtype=torch.float64)

        changes = [
            torch.stack([by_image(g * r, name) for r in self._lost[name]])
            for name, g in zip(self._added, grads, strict=True)
        ]
        return torch.stack(changes, 1)


@torch.no_grad()
def _batch_dims(
    model: nn.Module, branches: Sequence[Branch], inputs: Iterable[Tensor], gone: Sequence[Branch]
) -> dict[str, int]:
    """Return which dimension of what a branch adds grows with the number of images."""
    shapes: dict[str, list[torch.Size]] = {b.name: [] for b in branches}

    def see(branch: Branch, x: Tensor, added: Tensor) -> Tensor | None:
        if branch.name not in shapes:
            return x.clone()
        shapes[branch.name].append(added.shape)
        return None

    first = on_device(next(iter(inputs))[:1], model)
    with evaluating(model):
        for num in (1, 2):
            with BranchMode(model, [*branches, *gone], see):
                model(first.repeat_interleave(num, 0))
    return {
        name: next(
            (dim for dim, sizes in enumerate(zip(*found, strict=True)) if len(set(sizes)) > 1), 0
        )
        for name, found in shapes.items()
    }


def _stand_ins(
    model: nn.Module,
    branches: Sequence[Branch],
    inputs: Iterable[Tensor],
    gone: Sequence[Branch],
    *,
    dims: Mapping[str, int],
    seed: int,
) -> dict[str, Map]:
    """Fit F(x) by a linear map of the channels of x, at some positions of every input.

    Returns name of the branch -> map.
    """
    generator = torch.Generator().manual_seed(seed)
    problems = {b.name: LeastSquares(free=True) for b in branches}

    def see(branch: Branch, x: Tensor, added: Tensor) -> Tensor | None:
        if branch.name not in problems:
            return x.clone()
        where = (dims[branch.name], branch.channel_dim)
        x, added = (t.movedim(where, (0, -1)) for t in (x, added))
        x, added = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, added))
        held = torch.arange(len(x)) % _HELD == _HELD - 1
        picked = torch.randperm(x.shape[1], generator=generator)[:_ROWS_PER_IMAGE].to(x.device)
        for judge in (False, True):
            rows = (t[held == judge][:, picked].flatten(0, 1)[None] for t in (x, added))
            problems[branch.name].add(*rows, held=judge)
        return None

    with evaluating(model), torch.no_grad():
        for batch in inputs:
            # Before: what asks whether a model takes this layout runs it.
            x = fast_layout(on_device(batch, model), model)
            with BranchMode(model, [*branches, *gone], see):
                model(x)
    fits = {name: problem.solve() for name, problem in problems.items()}
    return {name: (fit.change[0], fit.intercept[0, 0]) for name, fit in fits.items()}
