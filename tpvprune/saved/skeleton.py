"""The dense model that a saved pruned one is rebuilt from: built and checked with distrust."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tpvprune.groups import fold_weights, fused_attention, unfuse_attention
from tpvprune.groups.computed import computed_weights
from tpvprune.images.preprocessing import INTERPOLATIONS

# Keyword arguments of timm.create_model that name files or devices or change its code.
_RESERVED = frozenset(
    {"checkpoint_path", "cache_dir", "device", "dtype", "scriptable", "exportable", "no_jit"}
)
_MAX_DEPTH = 8
_MAX_NUMBER = 2**53


def build(name: str, kwargs: Mapping[str, Any], *, max_elements: int) -> nn.Module:
    """Build a registered timm model without weights and without touching the random state."""
    timm = import_module("timm")
    import_module("tpvprune.cifar_resnet")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name) or not timm.is_model(name):
        raise ValueError(
            f"expected the name of a timm model, found {name!r:.80}: "
            "install the timm version that has it"
        )
    refused = [key for key in kwargs if key in _RESERVED or key.startswith("pretrained")]
    if refused:
        raise ValueError(f"model_kwargs: expected architecture options, found {refused[0]!r:.80}")
    plain(dict(kwargs), "model_kwargs")
    try:
        with torch.random.fork_rng(devices=[]), _AllocationLimit(max_elements):
            model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
    except Exception as error:  # whatever a constructor makes of strange arguments
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"timm cannot build {name!r} with {dict(kwargs)!r:.80}: {reason:.200}"
        ) from error
    return model


def prepared_as_saved(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return a dense model, or a copy: weights folded and attention unfused as in the saved one."""
    known = set(names)
    folded = any(name in known for name in computed_weights(model))
    model = fold_weights(model) if folded else model
    fused = fused_attention(model)
    return unfuse_attention(model) if any(f"{n}.q.weight" in known for n in fused) else model


def check_fits(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, torch.dtype] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Check that a dense model can be shrunk to what was saved."""
    tensors = tensors_of(model)
    strange = sorted(tensors.keys() ^ shapes.keys())
    if strange:
        side = "saved weights" if strange[0] in tensors else "dense model"
        raise ValueError(
            f"expected the same parameters on both sides, the {side} lacks {strange[0]!r:.120}"
        )
    for name, tensor in tensors.items():
        dense, saved = tuple(tensor.shape), tuple(shapes[name])
        if len(saved) != len(dense) or any(
            not min(1, most) <= size <= most for size, most in zip(saved, dense, strict=True)
        ):
            raise ValueError(f"{name}: expected a shape within {dense}, found {saved}")
        wanted = tensor.dtype if types is None else types.get(name)
        if wanted is None or wanted.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a type like {tensor.dtype}, found {wanted}")
    modules = dict(model.named_modules())
    for path, values in (attributes or {}).items():
        if path not in modules or not isinstance(values, dict):
            raise ValueError(f"attributes: expected module paths of the model, found {path!r:.80}")
        for key, value in values.items():
            _check_attribute(f"{path}.{key}", vars(modules[path]).get(key), value)


def _check_attribute(name: str, dense: Any, saved: Any) -> None:
    fits = False
    if type(dense) is float:
        fits = type(saved) in (int, float) and math.isfinite(saved)
    elif type(dense) is int:
        fits = type(saved) is int and 0 <= saved <= dense
    elif isinstance(dense, tuple | list) and all(type(part) is int for part in dense):
        same = is_sizes(saved) and len(saved) == len(dense)
        fits = same and all(map(operator.le, saved, dense))
    if not fits:
        known = dense if isinstance(dense, (int, float, tuple, list)) else "no number"
        raise ValueError(
            f"attributes: expected {name:.120} to be of the kind of {known!r:.40} and not above "
            f"it, found {saved!r:.40}"
        )


def set_types(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Give every parameter and buffer its saved type, in place, shared ones staying shared."""
    for name, tensor in tensors_of(model).items():
        if tensor.dtype != types[name]:
            tensor.data = tensor.data.to(types[name])


def put_preprocessing(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Let a model's ``pretrained_cfg`` name the saved preprocessing, as timm reads it."""
    own = getattr(model, "pretrained_cfg", {})
    if not isinstance(own, dict):  # a name that means something else in the user's own
        return
    entries: dict[str, Any] = {}
    for key, (fits, expected) in _PREPROCESSING.items():
        value = saved.get(key)
        if value is None:
            continue
        if not fits(value):
            raise ValueError(f"pretrained_cfg: expected {key} {expected}, found {value!r:.60}")
        entries[key] = tuple(value) if isinstance(value, list) else value
    for name in ("pretrained_cfg", "default_cfg") if own or entries else ():
        setattr(model, name, {**own, **entries})


def _are_colours(value: Any, least: float) -> bool:
    return isinstance(value, list) and all(
        type(part) in (int, float) and least <= part <= 255 for part in value
    )


_MAX_SIDE = 4096
_PREPROCESSING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (
        lambda v: is_sizes(v) and len(v) == 3 and min(v) > 0 and max(v) <= _MAX_SIDE,
        f"of three whole numbers from 1 to {_MAX_SIDE}",
    ),
    "mean": (lambda v: _are_colours(v, 0), "of numbers from 0 to 255"),
    "std": (lambda v: _are_colours(v, 1e-4), "of numbers from 0.0001 to 255"),
    "interpolation": (lambda v: v in INTERPOLATIONS, f"of {', '.join(INTERPOLATIONS)}"),
    "crop_pct": (lambda v: type(v) in (int, float) and 0.05 <= v <= 2, "from 0.05 to 2"),
    "crop_mode": (lambda v: v in ("center", "squash", "border"), "of center, squash, border"),
}


def tensors_of(model: nn.Module, *, persistent: bool = True) -> dict[str, Tensor]:
    """Return parameters and buffers by name, shared ones under each of their names."""
    tensors = dict(model.state_dict(keep_vars=True))
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name}: expected tensors in state_dict, found {type(value).__name__}"
            )
    if not persistent:
        tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def is_sizes(value: Any) -> bool:
    """Tell whether a value read from JSON is a list of whole numbers >= 0."""
    return isinstance(value, list) and all(
        type(part) is int and 0 <= part <= _MAX_NUMBER for part in value
    )


def plain(value: Any, name: Any, *, depth: int = 0) -> Any:
    """Return a value as JSON can hold it, tuples as lists."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name!s:.80}: expected at most {_MAX_DEPTH} levels, found more")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and abs(value) <= _MAX_NUMBER:
        return value
    if isinstance(value, (list, tuple)):
        return [plain(part, name, depth=depth + 1) for part in value]
    if isinstance(value, Mapping):
        return {str(key): plain(part, key, depth=depth + 1) for key, part in value.items()}
    raise ValueError(
        f"{name!s:.80}: expected plain JSON values, found {value!r:.60} ({type(value).__name__}): "
        "pass names and finite numbers"
    )


def plain_entries(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold: timm's record has entries for loaders, too."""
    kept = {}
    for key, value in record.items():
        with suppress(ValueError):
            kept[str(key)] = plain(value, key)
    return kept


class _AllocationLimit(TorchDispatchMode):
    """Refuse to allocate more tensor elements in all than a stated number.

    Without it a few bytes of ``model_kwargs`` could ask for all the memory there is.
    """

    def __init__(self, max_elements: int) -> None:
        super().__init__()
        self._left = max_elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = _COUNTS.get(func.overloadpacket)
        if count is not None and args:
            # Modules and tensors without elements cost memory and time, too.
            self._left -= max(_LEAST_ELEMENTS, int(count(*args)))
            if self._left < 0:
                raise ValueError("it would need far more memory than the saved weights")
        return func(*args, **(kwargs or {}))


_LEAST_ELEMENTS = 2**14


def _of_steps(*arguments: Any) -> float:  # arange: end, or start, end and perhaps step
    start, end, step = (0, *arguments, 1) if len(arguments) == 1 else (*arguments, 1)[:3]
    return abs((end - start) / step) if step else 0


_ATEN = torch.ops.aten
_FILLED = (
    *(_ATEN.empty, _ATEN.zeros, _ATEN.ones, _ATEN.full),
    *(_ATEN.rand, _ATEN.randn, _ATEN.empty_strided),
)
_COUNTS: dict[Any, Any] = {
    **dict.fromkeys(_FILLED, lambda size, *_: math.prod(size)),
    _ATEN.arange: _of_steps,
    # A value for each layer, read one by one.
    _ATEN.linspace: lambda _start, _end, steps, *_: 1024 * steps,
}
