"""The passes: one forward that gives every cut its own input, backward by activations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.distributed import own
from tpvprune.finite import check_outputs
from tpvprune.groups import ChannelGroup, ChannelGroups, Reader
from tpvprune.membership import num_processes
from tpvprune.running import evaluating, fast_layout, first_output, frozen, on_device
from tpvprune.tracing.tracking import CONTRACTIONS, function_name

Metric = Literal["logits", "pseudo", "fisher", "features"]


def passes(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    metric: Metric,
    num_probes: int,
    seed: int,
    amp: torch.dtype | None = None,
) -> Iterator[tuple[Tensor, list[Tensor], InputTap]]:
    """Run the forwards, batch by batch, with the model frozen and in eval mode.

    Args:
        model: The network.
        groups: Its channel groups.
        inputs: Batches [B, ...].
        metric: See :func:`tpvprune.scores.tpv_scores`.
        num_probes: Directions per sample.
        seed: Of the directions.
        amp: Type of the mixed precision, or None.

    Yields:
        (inputs, directions v [B, K], tap). The tap is closed when the next batch is asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    calls = set(reader_plan(groups))
    cloned: set[int] = set()
    with evaluating(model), frozen(model), torch.enable_grad():
        for number, batch in enumerate(inputs):
            x = fast_layout(on_device(batch.detach(), model), model)
            tap = InputTap(model, x, calls, cloned, amp)
            check_outputs(model, x, tap.outputs, batch=number)
            yield x, probe_directions(tap.outputs, metric, num_probes, generator), tap
            tap.close()  # whoever still holds it must not hold two graphs at a time


def probe_directions(
    outputs: Tensor, metric: Metric, num_probes: int, generator: torch.Generator
) -> list[Tensor]:
    """Draw directions v with E[v v^T] = I, or those that a metric sets.

    Args:
        outputs: Of the model, [B, K].
        metric: See :func:`tpvprune.scores.tpv_scores`.
        num_probes: Directions per sample.
        generator: Source of randomness.

    Returns:
        Directions v [B, K].

    Raises:
        ValueError: If the metric is unknown.
    """
    outputs = outputs.detach()
    # Sample by sample, so that the directions depend neither on how the inputs are batched nor on
    # how many processes share them.
    num = len(outputs) * num_processes()
    if metric in {"logits", "features"}:
        width = outputs.shape[1]
        signs = own(torch.randint(0, 2, (num, num_probes, width), generator=generator) * 2 - 1)
        return list(signs.to(outputs).unbind(1))
    if metric not in {"pseudo", "fisher"}:
        raise ValueError(f"metric: expected logits, pseudo, fisher or features, found {metric!r}.")
    p = outputs.softmax(-1)
    if metric == "pseudo":
        return [p - nn.functional.one_hot(p.argmax(-1), p.shape[-1])]
    uniform = own(torch.rand(num, num_probes, generator=generator, dtype=torch.float64))
    edges = p.cpu().double().cumsum(-1)
    drawn = torch.searchsorted(edges, uniform.contiguous()).clamp_max(p.shape[-1] - 1)
    return [p - nn.functional.one_hot(y, p.shape[-1]).to(p) for y in drawn.T.to(p.device)]


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
        cloned: set[int] | None = None,
        amp: torch.dtype | None = None,
    ) -> None:
        """Run the model; ``cloned`` names (and learns) the calls whose input must be cloned."""
        self._model, self._x, self._calls, self._amp = model, x, calls, amp
        self._cloned = set() if cloned is None else cloned
        self._forward()

    def _forward(self) -> None:
        self._copies: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        mixed = torch.autocast(self._x.device.type, self._amp, enabled=self._amp is not None)
        with mixed, Observer(self._calls, self._copy):
            outputs = first_output(self._model(self._x)).flatten(1)
        self.outputs = outputs if self._amp is None else outputs.float()

    def _copy(self, call: int, a: Tensor) -> Tensor:
        copied = a.clone() if call in self._cloned else a.view_as(a)
        if not copied.requires_grad:
            copied = copied.detach().requires_grad_()
        self._copies[call] = copied
        self._versions[call] = copied._version
        return copied

    def backward(
        self, v: Tensor, collect: Callable[[int, Tensor, Tensor], None], *, last: bool = False
    ) -> None:
        """Call ``collect(call, activation, gradient of v^T f)`` for every reader call.

        With ``last`` the graph is given up on the way, layer by layer.
        """
        stale = {c for c, t in self._copies.items() if t._version != self._versions[c]}
        if stale:
            # The model wrote into the activation after it was read; keep private copies instead.
            self._cloned |= stale
            self._forward()
        held = {call: copied.detach() for call, copied in self._copies.items()}

        def show(call: int, grad: Tensor) -> None:
            a = held.pop(call) if last else held[call]
            if self._amp is not None:  # sums over positions are taken in full precision
                a, grad = a.float(), grad.float()
            collect(call, a, grad)

        hooks = [t.register_hook(partial(show, call)) for call, t in self._copies.items()]
        copies, outputs = list(self._copies.values()), self.outputs
        leaves = [t for t in copies if t.is_leaf] or copies[:1]
        del copies
        if last:
            self.close()
        try:
            torch.autograd.grad(outputs, leaves, v, retain_graph=not last, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()

    def close(self) -> None:
        """Let go of the graph and of every activation."""
        self._copies, self.outputs = {}, self.outputs.detach()


class Observer(TorchFunctionMode):
    """Show the inputs of the given convolution and linear calls to ``see``; it may replace them."""

    def __init__(self, calls: set[int], see: Callable[[int, Tensor], Tensor | None]) -> None:
        super().__init__()
        self._calls, self._see, self._count = calls, see, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function_name(func) in CONTRACTIONS:
            call, self._count = self._count, self._count + 1
            if call in self._calls:
                replaced = self._see(call, args[0])
                if replaced is not None:
                    args = (replaced, *args[1:])
        elif function_name(func) == "batch_norm" and torch.is_grad_enabled():
            return _normalize(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _normalize(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # With fixed statistics it is one affine map, whose backward needs no input.
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "-", "eps")
    v = {"training": False, "eps": 1e-5, **dict(zip(names, args, strict=False)), **kwargs}
    x, mean, weight, bias = v["input"], v["running_mean"], v.get("weight"), v.get("bias")
    fixed = [t for t in (mean, v["running_var"], weight, bias) if t is not None]
    if v["training"] or mean is None or any(t.requires_grad or t.dtype != x.dtype for t in fixed):
        return func(*args, **kwargs)
    scale = (v["running_var"] + v["eps"]).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))


# ---- small pieces ---------------------------------------------------------------------------


def reader_plan(groups: ChannelGroups) -> dict[int, list[tuple[ChannelGroup, Reader]]]:
    """Return who reads at each call: call -> [(group, reader)]."""
    plan: dict[int, list[tuple[ChannelGroup, Reader]]] = {}
    for group in groups:
        for reader in group.readers:
            plan.setdefault(reader.call, []).append((group, reader))
    return plan
