"""Find the branches of a network: sums x + F(x), of which F can go, and layers of a chain.

Nothing is known by the class of a module: the terms of every sum are followed back to where both
come from the same tensor. Outside of them a layer can go, with the norm and activation behind it,
if its input has the shape of its output, which it then takes the place of, as in a VGG. Each branch
is proved on given inputs: the network without it gives what the network gives if zeros are added in
its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from tpvprune.depth.additions import without_branches
from tpvprune.depth.records import Branch, Removal
from tpvprune.depth.removal import SEQUENCES, remove_branches
from tpvprune.depth.trace import Trace, traced
from tpvprune.groups.verification import jittered
from tpvprune.passes.operations import CONTRACTIONS
from tpvprune.passes.outputs import Outputs
from tpvprune.passes.running import on_device

_TOLERANCE = 1e-5  # of the largest change that zeros in its place make


def find_branches(
    model: nn.Module, x: Tensor, *, outputs: Outputs | None = None
) -> tuple[Branch, ...]:
    """Find the residual branches, and the layers of chains, that can go, and prove each.

    Of branches inside of each other the inner ones are found; layers inside of one are not.

    ``x``: inputs [B, ...]; B = 2 tells more than 1. ``outputs``: what counts of what it returns;
    None: all real outputs of this call. Returns the branches in the order of a forward. A block
    whose branches can only go together, as it would change what else it does, is not among them.
    """
    trace = traced(model, on_device(x, model))
    candidates = list(_candidates(model, trace))
    insides = [inside for _, inside in candidates]
    found = [b for b, inside in candidates if not any(other < inside for other in insides)]
    found += _layers(model, trace, frozenset().union(*insides))
    proof = _Proof(model, x, outputs)
    of_block: dict[str, list[Branch]] = defaultdict(list)
    for branch in found:
        if branch.block is not None:
            of_block[branch.block].append(branch)
    whole = set(proof.holding(of_block))
    blocks = [
        replace(b, name=b.block) for b in found if b.block in whole and len(of_block[b.block]) == 1
    ]
    taken = {b.block for b in blocks}
    rest = [b for b in found if b.block not in taken]
    proved = set(proof.holding({b.name: [replace(b, block=None)] for b in rest}))
    # A block goes as a whole where nothing of it is left.
    parted = {k for k in whole if all(b.name in proved for b in of_block[k])}
    single = [b if b.block in parted else replace(b, block=None) for b in rest if b.name in proved]
    return tuple(sorted([*blocks, *single], key=lambda b: b.end))


def _candidates(model: nn.Module, trace: Trace) -> Iterator[tuple[Branch, frozenset[int]]]:
    """Yield sums of a tensor and what is computed from it alone, with the nodes of that."""
    readers, ran = trace.readers(), trace.ran()
    for addition in trace.additions:
        for identity in (0, 1):
            start, end = addition.terms[identity], addition.terms[1 - identity]
            inside = trace.between(start, end)
            if any(readers[n] - inside - {addition.node} for n in inside):
                continue
            contractions = [n for n in sorted(inside) if trace.nodes[n].name in CONTRACTIONS]
            modules = _outermost(trace, inside, ran)
            if not contractions or any(n not in modules for n in contractions):
                continue
            names = tuple(dict.fromkeys(modules[n] for n in sorted(modules)))
            around = reversed(trace.nodes[addition.node].modules)
            block = next((name for name in around if _is_member(model, name)), None)
            name = modules[contractions[-1]]
            dim = trace.nodes[contractions[0]].channel_dim
            yield Branch(name, block, names, addition.node, dim, addition.number, identity), inside
            break


def _layers(model: nn.Module, trace: Trace, taken: frozenset[int]) -> list[Branch]:
    """Return layers that all lies behind: their outputs have the shape of their inputs."""
    readers, ran = trace.readers(), trace.ran()
    sums = {addition.node for addition in trace.additions}
    found = []
    for number, node in enumerate(trace.nodes):
        if node.name not in CONTRACTIONS or len(node.inputs) != 1 or not trace.is_narrow(number):
            continue
        (start,) = node.inputs
        shape = trace.nodes[start].shape
        inside, best, last = {number}, dict[int, str](), number
        while True:
            modules = _outermost(trace, inside, ran)
            if len(modules) == len(inside) and trace.nodes[last].shape == shape:
                best = modules
            if len(readers[last]) != 1:
                break
            (after,) = readers[last]
            then = trace.nodes[after]
            if then.inputs != {last} or after in sums or then.name in CONTRACTIONS:
                break
            inside.add(after)
            last = after
        if not best or start == 0 or taken & best.keys() or _is_grouped(model, best[number]):
            continue
        names = tuple(dict.fromkeys(best[n] for n in sorted(best)))
        members = tuple(name for name in names if _is_member(model, name))
        dim = node.channel_dim
        found.append(Branch(best[number], None, names, max(best), dim, members=members))
    return found


def _is_grouped(model: nn.Module, name: str) -> bool:
    """Tell whether a module has layers of several groups: what they do no linear map does."""
    return any(getattr(m, "groups", 1) != 1 for m in model.get_submodule(name).modules())


def _is_member(model: nn.Module, name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    return bool(name) and isinstance(model.get_submodule(parent), SEQUENCES)


def _outermost(trace: Trace, inside: Set[int], ran: Mapping[str, set[int]]) -> dict[int, str]:
    """Find the largest modules that do nothing but what a branch does.

    Returns node -> module; nodes that lie in none are left out.
    """
    found = {}
    for number in inside:
        for name in trace.nodes[number].modules:
            if ran[name] <= inside and trace.calls[name] == 1:
                found[number] = name
                break
    return found


# ---- proof ----------------------------------------------------------------------------------


class _Proof:
    """Compares a network whose branches count as zero with that without them, on some inputs.

    In float64 where the network runs in it, its parameters disturbed: a branch that is scaled to
    nothing hides nothing.
    """

    def __init__(self, model: nn.Module, x: Tensor, outputs: Outputs | None) -> None:
        self._outputs = outputs
        try:
            self._start(model, x, torch.float64, _TOLERANCE)
        except Exception:  # a norm in float32, a state made in the forward
            self._start(model, x, torch.float32, 100 * _TOLERANCE)

    def _start(self, model: nn.Module, x: Tensor, dtype: torch.dtype, tolerance: float) -> None:
        self._model, self._x = jittered(model, dtype), x.detach().cpu().to(dtype)
        self._tolerance, self._whole = tolerance, self._run(self._model)

    def holding(self, parts: Mapping[str, Sequence[Branch]]) -> list[str]:
        """Return which of several parts of the network, each of some branches, can go.

        Every second one is tried at a time, one by one only where that fails.
        """
        names = list(parts)
        halves = (names[::2], names[1::2])
        if all(self._holds([b for n in half for b in parts[n]]) for half in halves if half):
            return names
        return [n for n in names if self._holds(parts[n])]

    def _holds(self, gone: Sequence[Branch]) -> bool:
        """Tell whether the network without branches gives what it should."""
        with without_branches(self._model, gone):
            masked = self._run(self._model)
        removed = None
        with suppress(Exception):  # whatever a forward makes of modules that are not there
            removal = Removal.of(gone, [b.name for b in gone])
            removed = self._run(remove_branches(self._model, removal, share=True))
        if removed is None or removed.shape != masked.shape:
            return False
        change = float((masked - self._whole).abs().max())
        return bool((removed - masked).abs().max() <= self._tolerance * change)

    @torch.no_grad()
    def _run(self, model: nn.Module) -> Tensor:
        returned = model(self._x)
        num = len(self._x)
        outputs = self._outputs or Outputs.among(returned, num)
        return outputs.joined(returned, num).double()
