"""Gradients of every weight for every sample, from one forward and one backward per direction.

The gradient of a convolution's or linear layer's weight for one sample is a product of what
autograd holds anyway, sum_p delta(p) a(p)^T over the positions p, with a the inputs (patches) of
the layer and delta the gradient of its output. The two factors are handed on unmultiplied: squared
norms, squares and products with a matrix each have their own cheapest order. Norms (batch, layer,
group) have element-wise gradients. What a layer table cannot know (a weight that is used twice or
standardised, a position embedding) is found by comparing with autograd on one sample, and
differentiated by torch.func instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tpvprune.passes.batch_norms import BatchNormCall
from tpvprune.passes.operations import function_name
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.patches import window_of
from tpvprune.passes.running import evaluating, frozen, on_device
from tpvprune.scores.taps import Metric, probe_directions

_CHUNK = 1 << 22  # elements of unfolded inputs, or of products, at a time: they stay near the cache
_LARGE_MAP = 256  # positions from which products entry by entry beat copied patches
_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
}


@dataclass(frozen=True)
class SampleGradients:
    """Gradients of one parameter, one per sample: left @ right, summed over positions.

    Attributes:
        shape: Of the parameter.
        left: [B, groups, outputs per group, positions].
        rights: One right factor [B, groups, positions, inputs per group] for all entries of the
            kernel together, or one for each of them.
    """

    shape: torch.Size
    left: Tensor
    rights: tuple[Tensor, ...]

    def dense(self) -> Tensor:
        """Return the gradients themselves, [B, *shape]."""
        products = [self.left @ right for right in self.rights]
        joined = products[0] if len(products) == 1 else torch.stack(products, -1)
        return joined.reshape(len(self.left), *self.shape)

    def squared_norms(self) -> Tensor:
        """Return the squared norm of every sample's gradient, [B]; the cheaper of two ways.

        The products over positions take P O I multiplications; the Gram matrices of the two
        factors, P^2 (O + I), never hold a gradient.
        """
        (outputs, positions), inputs = self.left.shape[2:], self.rights[0].shape[3]
        if len(self.rights) == 1 and positions * (outputs + inputs) < outputs * inputs:
            left = self.left.transpose(2, 3) @ self.left
            right = self.rights[0] @ self.rights[0].transpose(2, 3)
            return (left * right).sum((1, 2, 3))
        norms = [(self.left @ r).flatten(1).square().sum(1) for r in self.rights]
        return torch.stack(norms).sum(0)


Collect = Callable[[str, int, slice, SampleGradients], None]
"""Called as ``collect(parameter, probe, samples of the batch, gradients)``."""


def sample_gradients(
    model: nn.Module,
    inputs: Iterable[Tensor],
    collect: Collect,
    *,
    metric: Metric = "logits",
    num_probes: int = 1,
    seed: int = 0,
    only: Iterable[str] | None = None,
    outputs: Outputs | Chosen | None = None,
) -> Iterator[int]:
    """Show the gradient of v^T f by every parameter, for every sample and direction v.

    Costs one forward, one backward by activations per direction, and the products that
    ``collect`` asks for; parameters that no layer owns alone cost a forward and backward more.

    ``model``: run in eval mode with its parameters frozen; restored afterwards. ``inputs``: batches
    [B, ...]. ``only``: names of the parameters looked at; None for all. ``outputs``: of a model
    with several outputs those that count, or how much each counts, in units of its own second
    moment; None: all, alike. Yields the size of each batch when all of its gradients have been
    shown.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if only is not None:
        wanted = {name: wanted[name] for name in only}
    by_layer: set[str] | None = None
    counted = Outputs.measured(model, inputs, outputs)
    with evaluating(model), frozen(model), torch.enable_grad():
        for batch in inputs:
            x = on_device(batch.detach(), model)
            if by_layer is None:
                by_layer = _known(model, wanted, x, counted)
            watch = _Watch({id(wanted[name]): name for name in by_layer}, len(x))
            with watch:
                joined = counted.joined(model(x), len(x))
            directions = probe_directions(joined, metric, num_probes, generator)
            rest = {name: p.detach() for name, p in wanted.items() if name not in by_layer}
            for probe, v in enumerate(directions):
                watch.backward(joined, v, partial(_numbered, collect, probe), directions[-1] is v)
                for name, dense in _by_autograd(model, rest, x, v, counted).items():
                    collect(name, probe, slice(0, len(x)), _undivided(dense))
            del joined, watch  # and the graph with them, before the next one is made
            yield len(x)


class _Watch(TorchFunctionMode):
    """Notes the inputs of layers, and listens for the gradients of their outputs.

    ``names``: of the parameters, which require no gradients, by identity.
    """

    def __init__(self, names: Mapping[int, str], num_samples: int) -> None:
        super().__init__()
        self._names, self._num = names, num_samples
        self._collect: Callable[[str, slice, SampleGradients], None]
        self._anchor = torch.empty(0)

    def backward(
        self,
        outputs: Tensor,
        v: Tensor,
        collect: Callable[[str, slice, SampleGradients], None],
        last: bool,
    ) -> None:
        """Call ``collect(parameter, samples, gradients of v^T outputs)`` for every parameter."""
        self._collect = collect
        if outputs.requires_grad:
            torch.autograd.grad(outputs, self._anchor, v, retain_graph=not last, allow_unused=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function_name(func)
        out = func(*args, **kwargs)
        if name == "batch_norm":
            v = vars(BatchNormCall.of(args, kwargs))
            if v["training"]:  # by the images beside it: each is differentiated alone
                return out
        elif name in _ARGUMENTS:
            v = {**dict(zip(_ARGUMENTS[name], args, strict=False)), **kwargs}
        else:
            return out
        owned = {role: self._names.get(id(v.get(role))) for role in ("weight", "bias")}
        if not any(owned.values()) or len(out) % self._num:
            return out
        if not out.requires_grad:
            # The first layer: nothing before it needs a gradient, but its own output does.
            if not self._anchor.numel():
                self._anchor = out.new_zeros((1,)).requires_grad_()
            out = out + self._anchor
        out.register_hook(partial(self._on_gradient, name, v, owned))
        return out

    def _on_gradient(
        self, name: str, v: Mapping[str, Any], owned: Mapping[str, str | None], delta: Tensor
    ) -> None:
        weight = v.get("weight")
        taps = 1 if weight is None else math.prod(weight.shape[2:])
        step = max(1, self._num * _CHUNK // (v["input"].numel() * taps))
        per_sample = len(delta) // self._num
        for start in range(0, self._num, step):
            samples = slice(start, min(start + step, self._num))
            rows = slice(samples.start * per_sample, samples.stop * per_sample)
            part = {**v, "input": v["input"].detach()[rows]}
            num = samples.stop - samples.start
            if owned["weight"] is not None:
                if name.endswith("norm"):
                    found = _summed(name, v["weight"].shape, delta[rows] * _normed(name, part), num)
                else:
                    found = _contraction_gradients(part, delta[rows], num)
                self._collect(owned["weight"], samples, found)
            if owned["bias"] is not None:
                found = _summed(name, v["bias"].shape, delta[rows], num)
                self._collect(owned["bias"], samples, found)


def _contraction_gradients(v: Mapping[str, Any], delta: Tensor, num: int) -> SampleGradients:
    a, weight, groups = v["input"], v["weight"], v.get("groups", 1)
    window = window_of((), v)
    if window is None:
        rows = a.reshape(num, 1, -1, a.shape[-1])
        left = delta.reshape(num, 1, -1, delta.shape[-1]).transpose(2, 3)
        return SampleGradients(weight.shape, left, (rows,))
    (up, before), (down, after) = window.before, window.after
    padded = F.pad(a.unsqueeze(2) if a.ndim == 3 else a, (before, after, up, down))
    high, wide = window.outputs(a)
    split = (len(a), groups, len(weight) // groups)
    if window.stride == (1, 1) and high * wide >= _LARGE_MAP:
        # On rows of the padded width every kernel entry is a shift: no patches are copied.
        size = padded.shape[3]
        outputs = F.pad(delta.reshape(*split, high, wide), (0, size - wide)).flatten(3)
        flat = F.pad(padded.reshape(len(a), groups, weight.shape[1], -1), (0, size))
        starts = [
            i * window.dilation[0] * size + j * window.dilation[1]
            for i, j in product(*map(range, window.kernel))
        ]
        taps = [_joined(flat[..., start : start + high * size], num) for start in starts]
        rights = tuple(tap.transpose(2, 3) for tap in taps)
    else:
        outputs = delta.reshape(*split, -1)
        patches = F.unfold(padded, window.kernel, dilation=window.dilation, stride=window.stride)
        patches = patches.reshape(len(a), groups, weight[0].numel(), -1)
        rights = (_joined(patches, num).transpose(2, 3),)
    return SampleGradients(weight.shape, _joined(outputs, num), rights)


def _joined(t: Tensor, num: int) -> Tensor:
    """Return [B, groups, C, positions] from [L, groups, C, P] where a sample has several rows."""
    if len(t) == num:
        return t
    return t.reshape(num, -1, *t.shape[1:]).movedim(1, 3).flatten(3)


def _normed(name: str, v: Mapping[str, Any]) -> Tensor:
    """Return the input of a norm, normalised."""
    if name == "layer_norm":
        return F.layer_norm(v["input"], v["normalized_shape"], eps=v.get("eps", 1e-5))
    if name == "group_norm":
        return F.group_norm(v["input"], v["num_groups"], eps=v.get("eps", 1e-5))
    shape = (-1, *[1] * (v["input"].ndim - 2))
    scale = (v["running_var"] + v["eps"]).rsqrt()
    return (v["input"] - v["running_mean"].reshape(shape)) * scale.reshape(shape)


def _summed(name: str, shape: torch.Size, terms: Tensor, num: int) -> SampleGradients:
    """Return what a norm's weight, or a bias, of this shape gets from the outputs of a layer."""
    if name in {"linear", "layer_norm"}:
        return _undivided(terms.reshape(num, -1, *shape).sum(1))
    return _undivided(terms.reshape(num, len(terms) // num, terms.shape[1], -1).sum((1, 3)))


def _undivided(dense: Tensor) -> SampleGradients:
    """Return gradients [B, *shape] as one position that reads a one."""
    left = dense.reshape(len(dense), 1, -1, 1)
    return SampleGradients(dense.shape[1:], left, (left.new_ones(len(dense), 1, 1, 1),))


def _numbered(
    collect: Collect, probe: int, name: str, samples: slice, found: SampleGradients
) -> None:
    collect(name, probe, samples, found)


# ---- what layers do not know ----------------------------------------------------------------


def _known(model: nn.Module, wanted: Mapping[str, Tensor], x: Tensor, counted: Outputs) -> set[str]:
    """Return the parameters whose gradients layer by layer are those of autograd, on one sample."""
    two = x[:2] if len(x) > 1 else torch.cat([x, x])
    found: dict[str, list[Tensor]] = {}

    def note(name: str, samples: slice, gradients: SampleGradients) -> None:
        found.setdefault(name, []).append(gradients.dense()[: 1 if samples.start == 0 else 0])

    watch = _Watch({id(p): name for name, p in wanted.items()}, len(two))
    with watch:
        joined = counted.joined(model(two), len(two))
    v = probe_directions(joined, "logits", 1, torch.Generator().manual_seed(0))[0]
    watch.backward(joined, v, note, last=True)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in wanted.items()}
    outputs = counted.joined(functional_call(model, leaves, (two[:1],)), 1)
    exact = torch.autograd.grad(outputs, list(leaves.values()), v[:1], allow_unused=True)
    known = set()
    for name, truth in zip(leaves, exact, strict=True):
        parts = [part[0] for part in found.get(name, ()) if len(part)]
        if truth is None and not parts:  # what counts does not depend on it
            known.add(name)
        if len(parts) != 1 or truth is None:
            continue
        error, size = (parts[0] - truth).norm(), truth.norm()
        if bool(error <= 4 * torch.finfo(truth.dtype).eps ** 0.5 * size):
            known.add(name)
    return known


def _by_autograd(
    model: nn.Module, rest: Mapping[str, Tensor], x: Tensor, v: Tensor, counted: Outputs
) -> dict[str, Tensor]:
    if not rest:
        return {}

    def projected(parameters: dict[str, Tensor], one: Tensor, along: Tensor) -> Tensor:
        return counted.joined(functional_call(model, parameters, (one[None],)), 1)[0] @ along

    try:
        return dict(vmap(grad(projected), (None, 0, 0))(dict(rest), x, v))
    except RuntimeError:  # an operation without a batching rule
        rows = [grad(projected)(dict(rest), one, along) for one, along in zip(x, v, strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in rest}
