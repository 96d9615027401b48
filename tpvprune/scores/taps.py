"""The passes: one forward that gives every cut its own input, backward by activations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, Reader
from tpvprune.passes.crossing import random_signs, sent
from tpvprune.passes.finite import check_outputs
from tpvprune.passes.observer import Observer
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.recomputation import recomputed, segments_of
from tpvprune.passes.running import evaluating, fast_layout, frozen, on_device
from tpvprune.processes.membership import num_processes
from tpvprune.processes.shares import own

Metric = Literal["logits", "pseudo", "fisher", "features"]


@dataclass(frozen=True)
class Probing:
    """How the passes are run; see :func:`tpvprune.scores.tpv.tpv_scores`.

    ``num_probes`` directions per sample, drawn with ``seed`` for a ``metric``; in mixed precision
    of type ``amp``; with ``grad_checkpointing`` the inside of blocks is computed again in the
    backward pass instead of being kept. ``outputs`` are those that count: all, if None.

    Raises:
        ValueError: If ``num_probes`` is below 1, or ``amp`` another type.
    """

    metric: Metric = "logits"
    num_probes: int = 1
    amp: torch.dtype | None = None
    grad_checkpointing: bool = False
    seed: int = 0
    outputs: Outputs | Chosen | None = None

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(f"num_probes: expected at least 1, found {self.num_probes}.")
        if self.amp not in (None, torch.bfloat16):
            raise ValueError(f"amp: expected torch.bfloat16 or None, found {self.amp}")


def passes(
    model: nn.Module, groups: Iterable[ChannelGroup], inputs: Iterable[Tensor], probing: Probing
) -> Iterator[tuple[Tensor, list[Tensor], InputTap]]:
    """Run the forwards, batch by batch, with the model frozen and in eval mode.

    ``inputs``: batches [B, ...]. Yields (inputs, directions v [B, K], tap). The tap is closed when
    the next batch is asked for.
    """
    generator = torch.Generator().manual_seed(probing.seed)
    chosen = probing.outputs
    if num_processes() > 1:  # all take part, those without inputs too
        chosen = Outputs.measured(model, inputs, chosen)
    calls = set(reader_plan(groups))
    cloned: set[int | nn.Module] = set()
    segments = segments_of(model) if probing.grad_checkpointing else []
    with evaluating(model), frozen(model), torch.enable_grad():
        for number, batch in enumerate(inputs):
            x = fast_layout(on_device(batch.detach(), model), model)
            chosen = outputs = Outputs.measured(model, inputs, chosen, first=batch)
            if probing.metric in {"pseudo", "fisher"}:  # classes of one output
                outputs = outputs.first
            tap = InputTap(
                model, x, calls, cloned, outputs=outputs, amp=probing.amp, segments=segments
            )
            check_outputs(model, x, tap.outputs, batch=number)
            directions = probe_directions(
                tap.outputs, probing.metric, probing.num_probes, generator
            )
            try:
                yield x, directions, tap
            finally:
                tap.close()  # whoever still holds it must not hold two graphs at a time


def probe_directions(
    outputs: Tensor, metric: Metric, num_probes: int, generator: torch.Generator
) -> list[Tensor]:
    """Draw directions v [B, K] with E[v v^T] = I, or those that a metric sets for outputs [B, K].

    ValueError if the metric is unknown.
    """
    outputs = outputs.detach()
    # Sample by sample, so that the directions depend neither on how the inputs are batched nor on
    # how many processes share them.
    num, width = outputs.shape
    if metric in {"logits", "features"}:
        return list(random_signs((num, num_probes, width), generator, outputs).unbind(1))
    if metric not in {"pseudo", "fisher"}:
        raise ValueError(f"metric: expected logits, pseudo, fisher or features, found {metric!r}.")
    p = outputs.softmax(-1)
    if metric == "pseudo":
        return [p - nn.functional.one_hot(p.argmax(-1), width)]
    num = num * num_processes()
    uniform = own(torch.rand(num, num_probes, generator=generator, dtype=torch.float64))
    uniform = sent(uniform.contiguous(), p.device)
    drawn = torch.searchsorted(p.double().cumsum(-1), uniform).clamp_max(width - 1)
    return [p - nn.functional.one_hot(y, width).to(p) for y in drawn.T]


class InputTap:
    """One forward that gives every reader call its own autograd copy of its input.

    The gradient of such a copy is that reader's own contribution: a residual stream read by ten
    layers is then a sum over ten readers, each counted once.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        calls: set[int],
        cloned: set[int | nn.Module],
        *,
        outputs: Outputs,
        amp: torch.dtype | None,
        segments: Sequence[nn.Module],
    ) -> None:
        """Run the model; ``cloned`` (which learns) has the calls and segments that need clones."""
        self._model, self._x, self._calls, self._cloned = model, x, calls, cloned
        self._counted, self._amp, self._segments = outputs, amp, segments
        self._forward()

    def _forward(self) -> None:
        # The hooks know the inputs alone: a graph that knew itself would never be freed.
        self._inputs = inputs = _Inputs(self._cloned, widen=self._amp is not None)
        mixed = torch.autocast(self._x.device.type, self._amp, enabled=self._amp is not None)
        calls = self._calls
        observer = Observer(calls, inputs.copy)

        def again() -> Observer:
            return Observer(calls, inputs.recall, start=observer.count)

        with mixed, observer, recomputed(self._segments, again, inputs.entering):
            outputs = self._counted.joined(self._model(self._x), len(self._x))
        self.outputs = outputs if self._amp is None else outputs.float()

    def backward(
        self, v: Tensor, collect: Callable[[int, Tensor, Tensor], None], *, last: bool = False
    ) -> None:
        """Call ``collect(call, activation, gradient of v^T f)`` for every reader call.

        With ``last`` the graph is given up on the way, layer by layer.
        """
        if stale := self._inputs.stale():
            # The model wrote into the activation after it was read; keep private copies instead.
            self._cloned |= stale
            self._inputs.forget()
            self._forward()
        outputs, sources = self.outputs, self._inputs.sources
        if last:
            self.outputs = outputs.detach()
        if not sources:  # nothing that could go is read
            return
        with self._inputs.shown_to(collect, last=last):
            torch.autograd.grad(outputs, sources, v, retain_graph=not last, allow_unused=True)

    def close(self) -> None:
        """Let go of the graph and of every activation."""
        self._inputs.forget()
        self.outputs = self.outputs.detach()


class _Inputs:
    """The inputs of the reader calls of one forward; with recomputation those of one segment."""

    def __init__(self, cloned: set[int | nn.Module], *, widen: bool) -> None:
        self._cloned, self._widen = cloned, widen
        self.sources: list[Tensor] = []  # what backward runs down to
        self._recomputing = False
        self._held: dict[int, Tensor] = {}
        self._again: set[int] = set()  # the calls whose inputs every backward pass computes again
        self._versions: dict[int | nn.Module, list[tuple[Tensor, int]]] = {}
        self._collect: Callable[[int, Tensor, Tensor], None] | None = None
        self._last = False

    def copy(self, call: int, a: Tensor) -> Tensor:
        """Return the copy that the reader gets in the place of ``a``."""
        copied = a.clone() if call in self._cloned else a.view_as(a)
        if not copied.requires_grad:
            copied = copied.detach().requires_grad_()
            self.sources.append(copied)
        elif not self.sources:
            self.sources.append(copied)
        copied.register_hook(partial(self._show, call))
        if not self._recomputing:
            self._held[call] = copied.detach()
            self._note(call, self._held[call])
        return copied

    def recall(self, call: int, a: Tensor) -> Tensor:
        """Return such a copy when a segment is computed again, and keep it."""
        copied = a.clone()  # whatever is written into `a` later
        self._again.add(call)
        self._held[call] = copied.detach()
        return copied if copied.requires_grad else self._held[call].requires_grad_()

    @contextmanager
    def entering(self, segment: nn.Module, args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Let a segment run on inputs that it will be computed again from."""
        if segment in self._cloned:
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        for a in args:
            if isinstance(a, Tensor):
                self._note(segment, a.detach())
        self._recomputing = True
        try:
            yield args
        finally:
            self._recomputing = False

    def _note(self, key: int | nn.Module, a: Tensor) -> None:
        self._versions.setdefault(key, []).append((a, a._version))

    def stale(self) -> set[int | nn.Module]:
        """Return the calls and segments whose input was overwritten after it was read."""
        return {
            key
            for key, noted in self._versions.items()
            if any(a._version != version for a, version in noted)
        }

    def forget(self) -> None:
        """Let go of everything: hooks that know this hold on to the graph, which it knows."""
        self.sources, self._held, self._versions = [], {}, {}

    @contextmanager
    def shown_to(
        self, collect: Callable[[int, Tensor, Tensor], None], *, last: bool
    ) -> Iterator[None]:
        """Let ``collect`` see every input and its gradient during a backward pass."""
        self._collect, self._last = collect, last
        if last:
            self.sources, self._versions = [], {}
        try:
            yield
        finally:
            self._collect = None

    def _show(self, call: int, grad: Tensor) -> None:
        if self._collect is None:
            return
        done = self._last or call in self._again
        a = (self._held.pop(call) if done else self._held[call]).detach()
        if self._widen:  # sums over positions are taken in full precision
            a, grad = a.float(), grad.float()
        self._collect(call, a, grad)


# ---- small pieces ---------------------------------------------------------------------------


def reader_plan(
    groups: Iterable[ChannelGroup], device: torch.device | None = None
) -> dict[int, list[tuple[ChannelGroup, Reader]]]:
    """Return who reads at each call: call -> [(group, reader)], its indices on the device."""
    plan: dict[int, list[tuple[ChannelGroup, Reader]]] = {}
    for group in groups:
        for r in group.readers:
            there = replace(r, index=r.index.to(device), channel=r.channel.to(device))
            plan.setdefault(r.call, []).append((group, there))
    return plan
