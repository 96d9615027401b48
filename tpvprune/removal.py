"""Cut channels out of a model, or mask them so that the shapes stay.

Both read the same records, but in different ways: a *mask* zeroes the channels where they are
read, a *removal* takes them out of every parameter. That the two give the same outputs is what
:mod:`tpvprune.verification` checks before any group may be cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.groups import Axis, ChannelGroups
from tpvprune.tracking import CONTRACTIONS, NORMS, function_name

Attributes = dict[str, dict[str, Any]]
"""Module path -> plain attributes (ints, floats, tuples of ints) and their values."""


def remove_channels(model: nn.Module, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> nn.Module:
    """Return a smaller copy of the model in which only the kept channels are left.

    Args:
        model: The model that ``groups`` was found on; untouched.
        groups: Its channel groups.
        kept: Group name -> BoolTensor [C], ``True`` = stays. Groups not named stay whole.

    Returns:
        The smaller model, same modes and ``requires_grad`` as the argument.

    Raises:
        ValueError: If ``kept`` names an unknown group, has a wrong length, or empties a group.
    """
    check_kept(groups, kept)
    small = copy.deepcopy(model)
    for name, axes in groups.param_axes.items():
        for dim, axis in axes:
            mask = axis.kept(kept)
            if not mask.all():
                _take(small, name, dim, mask.nonzero().squeeze(1))
    _refresh_attributes(small)
    for pad in groups.pads:
        _refresh_pad(small.get_submodule(pad.module), pad.front, pad.back, kept)
    return small


def check_kept(groups: ChannelGroups, kept: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless ``kept`` fits the groups and leaves a channel in each."""
    for name, mask in kept.items():
        if name not in groups:
            raise ValueError(f"kept: expected names of prunable groups, found {name!r}.")
        size = groups[name].num_channels
        if mask.dtype != torch.bool or mask.shape != (size,):
            raise ValueError(
                f"kept[{name!r}]: expected a bool tensor of shape ({size},), "
                f"found {mask.dtype} {tuple(mask.shape)}."
            )
        if not bool(mask.any()):
            raise ValueError(f"kept[{name!r}] removes every channel; at least one must stay.")


def attribute_changes(dense: nn.Module, pruned: nn.Module) -> Attributes:
    """List the plain attributes (widths, head counts, paddings) that a removal changed.

    Args:
        dense: The model before.
        pruned: The same model after.

    Returns:
        Module path -> attribute -> new value; JSON-ready, and what :func:`shrink_to` takes.
    """
    before, changes = dict(dense.named_modules()), {}
    for path, module in pruned.named_modules():
        old = vars(before[path])
        new = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(module).items()
            if not key.startswith("_") and _is_plain(value) and key in old and old[key] != value
        }
        if new:
            changes[path] = new
    return changes


def shrink_to(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give a dense skeleton the shapes and attributes of a pruned model, in place.

    Args:
        model: A freshly built dense model; its changed parameters are left uninitialised.
        shapes: Parameter or buffer name -> shape.
        attributes: As :func:`attribute_changes` returns them.

    Raises:
        ValueError: If a name is unknown, or an attribute has another type than the model's.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"expected a parameter or buffer of the model, found {name!r}.")
        if tuple(tensors[name].shape) != tuple(shape):
            _put(model, name, torch.empty(shape, dtype=tensors[name].dtype, device=tensors[name].device))
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for key, value in values.items():
            old = vars(module).get(key)
            value = tuple(value) if isinstance(old, tuple) else value
            if old is None or type(old) is not type(value):
                raise ValueError(f"expected {path}.{key} to be a {type(old).__name__}, found {value!r}.")
            setattr(module, key, value)


class MaskedChannels(TorchFunctionMode):
    """Run a dense model as if channels had been removed: zero them where they are read.

    LayerNorm-like calls over labelled channels are restricted to the kept ones, which is what
    removal does to them. Use as ``with MaskedChannels(groups, kept): model(x)``.
    """

    def __init__(self, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._masks: dict[int, tuple[int, Tensor]] = {}
        axes: dict[int, tuple[int, list[tuple[Tensor, Tensor]]]] = {}
        for group in groups:
            for r in group.readers if group.name in kept else ():
                gone = r.index[~kept[group.name].cpu()[r.channel]]
                axes.setdefault(r.call, (r.channel_dim, []))[1].append((gone, gone))
        for call, (dim, parts) in axes.items():
            self._masks[call] = (dim, torch.cat([g for g, _ in parts]))
        self._norms = {i: m for i, a in groups.norms.items() if not (m := a.kept(kept)).all()}
        self._calls = self._num_norms = 0

    def __torch_function__(  # type: ignore[no-untyped-def]  # noqa: D105
        self, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        name = function_name(func)
        if name in CONTRACTIONS:
            if self._calls in self._masks:
                dim, gone = self._masks[self._calls]
                args = (args[0].index_fill(dim, gone.to(args[0].device), 0), *args[1:])
            self._calls += 1
        elif name in NORMS:
            self._num_norms += 1
            if self._num_norms - 1 in self._norms:
                return _restricted_norm(func, self._norms[self._num_norms - 1], args, kwargs)
        return func(*args, **kwargs)


def _restricted_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Normalise over the kept channels only; the others come out as zeros."""
    x, _, *rest = args
    mask = mask.to(x.device)

    def part(v: Any) -> Any:
        return v[mask] if isinstance(v, Tensor) else v

    kwargs = {k: part(v) for k, v in kwargs.items() if k != "normalized_shape"}
    out = torch.zeros_like(x)
    out[..., mask] = func(x[..., mask], [int(mask.sum())], *[part(r) for r in rest], **kwargs)
    return out


# ---- surgery --------------------------------------------------------------------------------


def _take(model: nn.Module, name: str, dim: int, index: Tensor) -> None:
    path, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), key)
    _put(model, name, tensor.detach().index_select(dim, index.to(tensor.device)))


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, also where it is shared with another module."""
    path, _, key = name.rpartition(".")
    old = getattr(model.get_submodule(path), key)
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for k, v in table.items():
                if v is old:
                    table[k] = new  # type: ignore[assignment]


def _refresh_attributes(model: nn.Module) -> None:
    """Set the widths that modules cache from the shapes of their parameters.

    The one place, besides tracking, that names layer types.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.modules.conv._ConvNd):
            _refresh_conv(module)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            stats = weight if weight is not None else module.running_mean
            module.num_features = module.num_features if stats is None else len(stats)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or hasattr(module, "normalized_shape"):
            if isinstance(weight, Tensor):
                module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.GroupNorm) and weight is not None and len(weight) != module.num_channels:
            module.num_groups = module.num_groups * len(weight) // module.num_channels
            module.num_channels = len(weight)
    for module in model.modules():
        _refresh_heads(module)


def _refresh_conv(conv: Any) -> None:
    first, second = conv.weight.shape[:2]
    if conv.transposed:
        conv.in_channels, conv.out_channels = first, second * conv.groups
        return
    if conv.groups > 1:
        # Whole convolution groups go, so each keeps its width.
        conv.groups = first // (conv.out_channels // conv.groups)
    conv.out_channels, conv.in_channels = first, second * conv.groups


def _refresh_heads(module: Any) -> None:
    """Give attention modules of timm's kind (qkv, num_heads, head_dim) their new head count."""
    qkv, dim = getattr(module, "qkv", None), getattr(module, "head_dim", None)
    if not (isinstance(qkv, nn.Linear) and isinstance(dim, int) and hasattr(module, "num_heads")):
        return
    heads = qkv.out_features // (3 * dim)
    if heads != module.num_heads and hasattr(module, "attn_dim"):
        module.attn_dim = heads * dim
    module.num_heads = heads


def _refresh_pad(module: Any, front: Axis, back: Axis, kept: Mapping[str, Tensor]) -> None:
    for key, axis in (("front", front), ("back", back)):
        if isinstance(vars(module).get(key), int):
            setattr(module, key, int(axis.kept(kept).sum()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(v, int) for v in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
