"""Run a model without leaving traces: its modes, its device, the output that counts."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tpvprune.passes.crossing import sent

_TINY = torch.finfo(torch.float64).tiny
_TAKES_CHANNELS_LAST: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@cache
def prepare_forward_mode() -> None:
    """Let torch load what forward-mode derivatives need, without a warning about torch itself."""
    # The first of a process compiles with ``torch.jit.script``, which torch calls deprecated.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.script", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def check_not_compiled(model: nn.Module) -> None:
    """Refuse what torch.compile made: its calls cannot be followed, and widths are built in."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "expected a module that is not compiled, found one behind torch.compile: pass the "
            "module itself (model._orig_mod) and compile what comes out"
        )
    parts = (n for n, m in model.named_modules() if getattr(m, "_compiled_call_impl", None))
    if (name := next(parts, None)) is not None:
        raise ValueError(
            f"expected a module that is not compiled, found {name or 'it'!r} after .compile(): "
            "load the model anew and compile what comes out"
        )


def check_gradients_allowed() -> None:
    """Refuse to run where no tensor can ever have a gradient."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "expected a call outside of torch.inference_mode(), under which scores and repairs "
            "have no gradients: leave it, or use torch.no_grad()"
        )


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Put models (where not None) into eval mode, and every module's own mode back at the end."""
    modules = [module for model in models if model is not None for module in model.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules, with the same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def clear_caches(model: nn.Module) -> None:
    """Empty what modules remember from earlier forwards, in place: tables of biases in LeViT."""
    for module in model.modules():
        for key, value in vars(module).items():
            if key.startswith("_") or not isinstance(value, dict):
                continue
            if value and all(isinstance(v, Tensor) for v in value.values()):
                value.clear()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch off the gradients of all parameters, and restore each flag afterwards."""
    check_gradients_allowed()
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
    return sent(x, p.device, p.dtype if x.is_floating_point() else None)


def fast_layout(x: Tensor, model: nn.Module) -> Tensor:
    """Return images [B, C, H, W] in channels-last memory if the model can be run so.

    Convolutions are 1.4 to 3 times as fast so, on CPUs as on GPUs with tensor cores.
    """
    fast = x.ndim == 4 and len(x) and takes_channels_last(model, x)
    return x.contiguous(memory_format=torch.channels_last) if fast else x


def takes_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Tell whether a model runs on images in channels-last memory; not if it views maps as vectors.

    One image tells, once per model: do not ask while something counts the calls of the model.
    """
    if model not in _TAKES_CHANNELS_LAST:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                model(x[:1].contiguous(memory_format=torch.channels_last))
                _TAKES_CHANNELS_LAST[model] = True
            except (RuntimeError, ValueError):
                _TAKES_CHANNELS_LAST[model] = False
    return _TAKES_CHANNELS_LAST[model]


def first_output(outputs: Any) -> Tensor:
    """Take the first tensor of real numbers of what a model returns; ValueError if none."""
    for tensor in tensors_of(outputs):
        if tensor.is_floating_point():
            return tensor
    raise ValueError(
        f"expected a model that returns a tensor of real numbers, found {type(outputs).__name__}: "
        "wrap the model so that it returns its logits"
    )


def relative_gap(found: Any, wanted: Any) -> Tensor:
    """Return the largest difference over the largest value of any output, or NaN."""
    pairs = zip(tensors_of(found), tensors_of(wanted), strict=True)
    gaps = [
        (a - b).abs().max().double() / b.abs().max().double().clamp_min(_TINY)
        for a, b in pairs
        if b.is_floating_point() and b.numel()
    ]
    return torch.stack([*gaps, torch.zeros((), dtype=torch.float64)]).max()


def named_outputs(returned: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of what a model returns, in order, with its keys or places as its name."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(returned, Tensor):
        yield name or "output", returned
    elif isinstance(returned, Mapping):
        parts = returned.items()
    elif isinstance(returned, (tuple, list)):
        parts = enumerate(returned)
    elif dataclasses.is_dataclass(returned):
        parts = ((f.name, getattr(returned, f.name)) for f in dataclasses.fields(returned))
    for key, value in parts:
        yield from named_outputs(value, f"{name}.{key}" if name else str(key))


def tensors_of(outputs: Any) -> Iterator[Tensor]:
    """Return every tensor of what a model returns, in order."""
    return (tensor for _, tensor in named_outputs(outputs))


def by_image(outputs: Tensor, num: int) -> Tensor:
    """Return a model's outputs [B, ...] as one row for every image, [num, K], or ValueError."""
    if outputs.ndim < 2 or len(outputs) != num:
        raise ValueError(
            f"expected outputs with one entry per image along dimension 0, found shape "
            f"{list(outputs.shape)} for {num} images: wrap the model so that it returns its "
            "logits, or say what it should compute (tpvprune.with_forward)"
        )
    return outputs.reshape(num, -1)
