"""The score: output variance caused by removing each channel (test prediction variance, TPV).

Removing channel c of a group is the weight perturbation that zeroes it at its readers, so to
first order the output of sample x changes by u_c(x) = sum_m sum_p a_mc(x, p) d(f)/d a_mc(x, p),
over the readers m and their positions p, and TPV_c = E_x ||u_c(x)||^2. With random directions v,
E[v v^T] = I, the norm is E_v (v^T u_c)^2: one forward and one backward with respect to the
activations per direction; no gradient of any weight is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.batches import unlabeled
from tpvprune.groups import ChannelGroup, ChannelGroups, Reader
from tpvprune.positions import by_channel, contract, sampled_rows
from tpvprune.tracking import CONTRACTIONS, function_name

Metric = Literal["logits", "pseudo", "fisher", "features"]

# What stands in for a channel is fitted on so many samples: that pass is a forward of its own.
_MAP_SAMPLES = 256


@dataclass(frozen=True)
class Scores(Mapping[str, Tensor]):
    """Scores by group name; bigger = keep.

    ``stderr`` holds the standard error over samples where the criterion is a mean over samples
    (None otherwise), ``num_samples`` how many inputs it saw.
    """

    values_by_group: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor] | None = None
    num_samples: int = 0
    criterion: str = ""
    used_labels: bool = False

    def __getitem__(self, name: str) -> Tensor:
        return self.values_by_group[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_group)

    def __len__(self) -> int:
        return len(self.values_by_group)


def tpv_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Any],
    *,
    metric: Metric = "logits",
    compensated: bool = True,
    num_probes: int = 1,
    ridge: float = 1e-3,
    seed: int = 0,
) -> Scores:
    r"""Score channels by the output variance that their removal causes.

    .. math:: \mathrm{TPV}_c = E_x E_v \Big(\sum_m \sum_p r_{mc}(x,p)
        \frac{\partial\, v^T f(x)}{\partial a_{mc}(x,p)}\Big)^2

    with r = a (plain), or, compensated, the part of a_c that the other inputs of the same reader
    cannot predict linearly: r_c = (P (a - E a))_c / P_cc, P = (Cov a + lambda I)^-1.

    Args:
        model: The network; run in eval mode, restored afterwards.
        groups: Its channel groups.
        batches: Re-iterable of unlabeled input tensors [B, ...].
        metric: The direction v. ``"logits"``, ``"features"``: random signs over all outputs (TPV
            proper; the same estimator, named for what the model returns). ``"pseudo"``:
            p - onehot(argmax p). ``"fisher"``: p - onehot(y), y ~ p.
        compensated: Score what is left after the other channels stood in. Default: ``True``.
        num_probes: Directions per sample, >= 1; each costs one more backward. The deterministic
            ``"pseudo"`` uses one.
        ridge: lambda, relative to the mean variance of the reader's inputs.
        seed: Of the directions.

    Returns:
        Scores in squared output units, with standard errors over samples.

    Raises:
        ValueError: If an argument is out of range, or a score is not finite.

    Reference:
        Arpit, Test prediction variance, ICML 2026, https://arxiv.org/abs/2512.11089.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes: expected at least 1, found {num_probes}.")
    inputs = unlabeled(batches)
    maps = {}
    if compensated:
        maps = residual_maps(model, groups, inputs, ridge=ridge, max_samples=_MAP_SAMPLES)
    first = {g.name: torch.zeros(g.num_channels, dtype=torch.float64) for g in groups}
    second = {g.name: torch.zeros(g.num_channels, dtype=torch.float64) for g in groups}
    num_samples = 0

    for changes, num in output_changes(
        model, groups, inputs, metric=metric, num_probes=num_probes, seed=seed, maps=maps
    ):
        num_samples += num
        for name, u in changes.items():  # [probes, B, C]
            per_sample = u.double().square().mean(0)
            first[name] += per_sample.sum(0).cpu()
            second[name] += per_sample.square().sum(0).cpu()
    mean = {name: s / num_samples for name, s in first.items()}
    for name, value in mean.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"group {name!r}: expected finite scores, found NaN or infinity; "
                "check the inputs and the weights for non-finite values."
            )
    variance = {n: (second[n] / num_samples - mean[n].square()).clamp_min(0) for n in mean}
    stderr = {n: (v / max(num_samples - 1, 1)).sqrt() for n, v in variance.items()}
    return Scores(mean, stderr, num_samples, "tpv", used_labels=False)


# ---- the passes -----------------------------------------------------------------------------


def output_changes(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    metric: Metric = "logits",
    num_probes: int = 1,
    seed: int = 0,
    maps: Mapping[int, Tensor] | None = None,
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield, batch by batch, v^T u_c(x) for every channel: ({group: [probes, B, C]}, B)."""
    plan = reader_plan(groups)
    device = next(model.parameters()).device
    places = {
        call: [(g, r.index.to(device), r.channel.to(device)) for g, r in readers]
        for call, readers in plan.items()
    }
    maps = {call: (mean.to(device), m.to(device)) for call, (mean, m) in (maps or {}).items()}
    for x, directions, tap in passes(model, groups, inputs, metric, num_probes, seed):
        num = len(x)
        parts: list[dict[str, Tensor]] = []

        def collect(
            call: int, a: Tensor, grad: Tensor, num: int = num, parts: Any = parts
        ) -> None:
            dim = plan[call][0][1].channel_dim
            a, grad = by_channel(a, dim, num), by_channel(grad, dim, num)
            per_channel = contract(a, grad, num, maps.get(call))
            for group, index, channel in places[call]:
                u = parts[-1].setdefault(
                    group.name, per_channel.new_zeros(num, group.num_channels)
                )
                u.index_add_(1, channel, per_channel[:, index])

        for i, v in enumerate(directions, 1):
            parts.append({})
            tap.backward(v, collect, last=i == len(directions))
        yield {g.name: torch.stack([p[g.name] for p in parts]) for g in groups}, num


def residual_maps(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    ridge: float,
    max_samples: int | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, per reader call, (mean [n], M [n, n]) with residuals r = (a - mean) M.

    Column c of M is P[:, c] / P_cc for single channels; the inputs of one unit of several
    channels (a head) leave together, so M there is P[:, R] P_RR^-1.
    """
    maps = {}
    for call, (mean, covariance) in input_covariances(
        model, groups, inputs, max_samples=max_samples
    ).items():
        units = list(_blocks(reader_plan(groups)[call]))
        maps[call] = (mean, residual_map(ridge_inverse(covariance, ridge), units))
    return maps


def residual_map(precision: Tensor, units: Iterable[Tensor]) -> Tensor:
    """Return M [n, n] with (a - mean) M the part of each unit that the others cannot predict."""
    units = list(units)
    single = torch.cat([u for u in units if len(u) == 1] or [torch.zeros(0, dtype=torch.long)])
    matrix = torch.zeros_like(precision)
    matrix[:, single] = precision[:, single] / precision[single, single]
    for unit in units:
        if len(unit) > 1:
            p = precision[:, unit]
            matrix[:, unit] = torch.linalg.solve(p[unit], p.T).T
    return matrix


def ridge_inverse(covariance: Tensor, ridge: float) -> Tensor:
    """Return (covariance + ridge * mean variance * I)^-1."""
    scale = covariance.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex(covariance + ridge * scale * eye)
    if bool(failed.any()):  # rounding, or NaN, which the scores report
        return torch.linalg.inv(covariance + ridge * scale * eye)
    return torch.cholesky_inverse(factor)


def input_covariances(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    *,
    max_inputs: int = 4096,
    max_positions: int = 64,
    max_samples: int | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, per reader call, mean [n] and covariance [n, n] of its inputs over positions.

    Calls with more than ``max_inputs`` inputs (a flattened feature map) are left out: they are
    scored without compensation. At most ``max_positions`` positions of a sample are read, of the
    first ``max_samples`` samples; neither depends on how the samples are split into batches.
    """
    plan = reader_plan(groups)
    sums: dict[int, tuple[Tensor, Tensor, int]] = {}
    seen = num = 0

    def observe(call: int, a: Tensor) -> None:
        dim = plan[call][0][1].channel_dim
        if a.shape[dim] > max_inputs:
            return
        rows = sampled_rows(by_channel(a, dim, num), num, seen, max_positions)
        gram, total, count = sums.get(call, (0, 0, 0))
        sums[call] = (
            gram + (rows.T @ rows).double(), total + rows.sum(0).double(), count + len(rows)
        )

    with evaluating(model), torch.no_grad():
        for x in inputs:
            x = x if max_samples is None else x[: max_samples - seen]
            num = len(x)
            if not num:
                break
            with _Observer(set(plan), observe):
                model(on_device(x, model))
            seen += num
    out = {}
    for call, (gram, total, num) in sums.items():
        mean = total / num
        out[call] = (mean, gram / num - torch.outer(mean, mean))
    return out


def residual(a: Tensor, dim: int, mean: Tensor, matrix: Tensor) -> Tensor:
    """Return (a - mean) M along ``dim``."""
    mean, matrix = mean.to(a), matrix.to(a)
    flat = (a.movedim(dim, -1) - mean) @ matrix
    return flat.movedim(-1, dim)


def passes(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    metric: Metric,
    num_probes: int,
    seed: int,
) -> Iterator[tuple[Tensor, list[Tensor], InputTap]]:
    """Yield (inputs, directions, tap) batch by batch, with the model frozen and in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    calls = set(reader_plan(groups))
    cloned: set[int] = set()
    with evaluating(model), frozen(model), torch.enable_grad():
        for x in inputs:
            x = on_device(x.detach(), model)
            tap = InputTap(model, x, calls, cloned)
            yield x, probe_directions(tap.outputs, metric, num_probes, generator), tap
            tap.close()  # whoever still holds it must not hold two graphs at a time


def probe_directions(
    outputs: Tensor, metric: Metric, num_probes: int, generator: torch.Generator
) -> list[Tensor]:
    """Return directions v [B, K] for outputs [B, K]."""
    outputs = outputs.detach()
    if metric in {"logits", "features"}:
        num, width = outputs.shape
        # Sample by sample, so that the directions do not depend on how the inputs are batched.
        signs = torch.randint(0, 2, (num, num_probes, width), generator=generator) * 2 - 1
        return list(signs.to(outputs).unbind(1))
    if metric not in {"pseudo", "fisher"}:
        raise ValueError(f"metric: expected logits, pseudo, fisher or features, found {metric!r}.")
    p = outputs.softmax(-1)
    if metric == "pseudo":
        return [p - nn.functional.one_hot(p.argmax(-1), p.shape[-1])]
    drawn = torch.multinomial(p.cpu(), num_probes, replacement=True, generator=generator)
    return [p - nn.functional.one_hot(y, p.shape[-1]).to(p) for y in drawn.T]


class InputTap:
    """One forward that gives every reader call its own autograd copy of its input.

    The gradient of such a copy is that reader's own contribution: a residual stream read by ten
    layers is then a sum over ten readers, each counted once.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, calls: set[int], cloned: set[int] | None = None
    ) -> None:
        """Run the model; ``cloned`` names (and learns) the calls whose input must be cloned."""
        self._model, self._x, self._calls = model, x, calls
        self._cloned = set() if cloned is None else cloned
        self._forward()

    def _forward(self) -> None:
        self._copies: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        with _Observer(self._calls, self._copy):
            self.outputs = first_output(self._model(self._x)).flatten(1)

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
            collect(call, held.pop(call) if last else held[call], grad)

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


class _Observer(TorchFunctionMode):
    """Show the inputs of the given convolution and linear calls to ``see``; it may replace them."""

    def __init__(self, calls: set[int], see: Callable[[int, Tensor], Tensor | None]) -> None:
        super().__init__()
        self._calls, self._see, self._count = calls, see, 0

    def __torch_function__(  # type: ignore[no-untyped-def]  # noqa: D105
        self, func, types, args=(), kwargs=None
    ):
        if function_name(func) in CONTRACTIONS:
            call, self._count = self._count, self._count + 1
            if call in self._calls:
                replaced = self._see(call, args[0])
                if replaced is not None:
                    args = (replaced, *args[1:])
        elif function_name(func) == "batch_norm" and torch.is_grad_enabled():
            return _normalize(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _normalize(  # type: ignore[no-untyped-def]
    func, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """Batch-normalize; with fixed statistics as one affine map, which keeps no input for later."""
    fixed = [t for t in (mean, var, weight, bias) if t is not None]
    if training or mean is None or any(t.requires_grad or t.dtype != x.dtype for t in fixed):
        return func(x, mean, var, weight, bias, training, momentum, eps)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))


# ---- small pieces ---------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and give every module its own flag back afterwards."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch off the gradients of all parameters, and restore each flag afterwards."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


def on_device(x: Tensor, model: nn.Module) -> Tensor:
    """Return ``x`` on the device and in the dtype of the model's parameters."""
    p = next(model.parameters())
    return x.to(p.device, p.dtype) if x.is_floating_point() else x.to(p.device)


def first_output(value: Any) -> Tensor:
    """Return the first tensor of what a model returns (dict, tuple or tensor)."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def reader_plan(groups: ChannelGroups) -> dict[int, list[tuple[ChannelGroup, Reader]]]:
    """Return who reads at each call: call -> [(group, reader)]."""
    plan: dict[int, list[tuple[ChannelGroup, Reader]]] = {}
    for group in groups:
        for reader in group.readers:
            plan.setdefault(reader.call, []).append((group, reader))
    return plan


def _blocks(plan: list[tuple[ChannelGroup, Reader]]) -> Iterator[Tensor]:
    """Yield the input positions of every unit that one reader call reads."""
    for _, reader in plan:
        order = reader.channel.argsort(stable=True)
        counts = reader.channel[order].unique_consecutive(return_counts=True)[1]
        yield from reader.index[order].split(counts.tolist())
