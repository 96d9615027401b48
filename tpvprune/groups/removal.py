"""Cut channels out of a model: a removal takes them out of every parameter.

:mod:`tpvprune.groups.masking` zeroes them where they are read, from the same records; that the two
give the same outputs is what :mod:`tpvprune.groups.verification` checks before any group may be
cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups.axes import Axis
from tpvprune.groups.records import ChannelGroups
from tpvprune.groups.tracing.sizes import set_attribute, solve
from tpvprune.passes.running import clear_caches, sharing_copy

Attributes = dict[str, dict[str, Any]]
"""Module path -> plain attributes (ints, floats, tuples and lists of ints) and their values."""


def remove_channels(
    model: nn.Module, groups: ChannelGroups, kept: Mapping[str, Tensor]
) -> nn.Module:
    """Return a smaller copy of the model in which only the kept channels are left.

    Args:
        model: The model that ``groups`` was found on; untouched.
        groups: Its channel groups.
        kept: Group name -> BoolTensor [C], ``True`` = stays. Groups not named stay whole.

    Returns:
        The smaller model, same modes and ``requires_grad`` as the argument.

    Raises:
        ValueError: If ``kept`` names an unknown group, has a wrong length, or empties a group
            or a parameter (see :func:`restore_empty`).
    """
    check_kept(groups, kept)
    return _removed(copy.deepcopy(model), groups, kept)


def removed_view(model: nn.Module, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> nn.Module:
    """Return what :func:`remove_channels` does, but share parameters that stay whole."""
    check_kept(groups, kept)
    return _removed(sharing_copy(model), groups, kept)


def _removed(small: nn.Module, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> nn.Module:
    attributes = solve(groups.sizes, kept, small)
    owners = _owners(small)
    for name, axes in groups.param_axes.items():
        path, _, key = name.rpartition(".")
        for dim, axis in axes:
            mask = axis.kept(kept)
            if not mask.all():
                tensor = getattr(small.get_submodule(path), key)
                index = mask.nonzero().squeeze(1).to(tensor.device)
                _put(tensor, tensor.detach().index_select(dim, index), owners)
    _refresh_attributes(small)
    for attribute, value in attributes.items():
        set_attribute(small, attribute, value)
    clear_caches(small)
    for pad in groups.pads:
        module = small.get_submodule(pad.module)
        for key, axis in (("front", pad.front), ("back", pad.back)):
            if isinstance(vars(module).get(key), int):
                setattr(module, key, int(axis.kept(kept).sum()))
    return small


def restore_empty(
    groups: ChannelGroups, kept: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Put channels back wherever a selection would leave a parameter without any.

    Of branches that are concatenated each makes some channels of a group, and needs at least one.
    ``scores``: group name -> Tensor [C], bigger = put back first; None: the first channel.
    """
    filled = {name: mask.clone() for name, mask in kept.items()}
    for axis, least in _least(groups):
        while int(axis.kept(filled).sum()) < least:
            gone = [(n, c[~filled[n][c]]) for n, _, c in axis.members if n in filled]
            name, channel = next((n, c) for n, c in gone if len(c))
            best = 0 if scores is None else int(scores[name].cpu()[channel].argmax())
            filled[name][channel[best]] = True
    return filled


def _least(groups: ChannelGroups) -> Iterator[tuple[Axis, int]]:
    """Yield the axes that must not become too short, and how many positions they need."""
    yield from ((axis, 1) for axes in groups.param_axes.values() for _, axis in axes)
    yield from ((rule.axis, 1) for rule in groups.sizes if rule.axis.members)
    yield from ((axis, min(2, axis.size)) for axis in groups.standardised)


def check_kept(groups: ChannelGroups, kept: Mapping[str, Tensor]) -> None:
    """Check that a selection fits the groups and leaves a channel in each."""
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
    for axis, least in _least(groups):
        if int(axis.kept(kept).sum()) < least:
            raise ValueError(
                f"kept leaves fewer than {least} of {axis.size} channels of a layer in "
                f"{axis.members[0][0]!r}; pass it through restore_empty() first."
            )


def attribute_changes(dense: nn.Module, pruned: nn.Module) -> Attributes:
    """Return the attributes (widths, heads, paddings) that a removal changed; JSON-ready."""
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
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Give a dense skeleton the shapes and attributes of a pruned model, in place.

    Changed parameters are left uninitialised. ValueError if a name is unknown, or an attribute has
    another type than the model's.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    owners = _owners(model)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"expected a parameter or buffer of the model, found {name!r}.")
        old, new = tensors[name], tuple(shape)
        if tuple(old.shape) != new:
            # Buffers that no state_dict holds are constant along channels: a slice is their value.
            part = old.detach()[tuple(slice(n) for n in new)].clone()
            _put(old, part if tuple(part.shape) == new else part.new_empty(new), owners)
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for key, value in values.items():
            present = vars(module).get(key)
            new_value = tuple(value) if isinstance(present, tuple) else value
            if present is None or type(present) is not type(new_value):
                raise ValueError(
                    f"expected {path}.{key} to be a {type(present).__name__}, found {value!r}."
                )
            setattr(module, key, new_value)
    clear_caches(model)
    _refresh_recurrent(model)


# ---- surgery --------------------------------------------------------------------------------


_Owners = dict[int, list[tuple[dict[str, Any], str]]]


def _owners(model: nn.Module) -> _Owners:
    """Return where each parameter and buffer is held: in several modules if it is shared."""
    owners: _Owners = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                owners.setdefault(id(tensor), []).append((table, key))
    return owners


def _put(old: Tensor, value: Tensor, owners: _Owners) -> None:
    """Replace a parameter or buffer, also where it is shared with another module."""
    is_parameter = isinstance(old, nn.Parameter)
    new = nn.Parameter(value, old.requires_grad) if is_parameter else value
    held = owners.pop(id(old), [])
    for table, key in held:
        table[key] = new
    owners[id(new)] = held


def _refresh_attributes(model: nn.Module) -> None:
    """Set the widths that modules cache from the shapes of their parameters."""
    _refresh_recurrent(model)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.modules.conv._ConvNd):
            _refresh_conv(module)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            stats = weight if weight is not None else module.running_mean
            module.num_features = module.num_features if stats is None else len(stats)
        elif hasattr(module, "normalized_shape") and isinstance(weight, Tensor):
            module.normalized_shape = tuple(weight.shape)  # type: ignore[assignment]
        elif isinstance(module, nn.GroupNorm) and weight is not None:
            module.num_channels = len(weight)  # num_groups is set by a rule of sizes
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape


def _refresh_recurrent(model: nn.Module) -> None:
    """Let recurrent layers, which hold their weights twice, hold the same ones."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
            module.input_size = module.get_parameter("weight_ih_l0").shape[1]


def _refresh_conv(conv: Any) -> None:
    first, second = conv.weight.shape[:2]
    if conv.groups > 1:
        # Whole convolution groups go, so each keeps its width.
        dense = conv.in_channels if conv.transposed else conv.out_channels
        conv.groups = first // (dense // conv.groups)
    if conv.transposed:
        conv.in_channels, conv.out_channels = first, second * conv.groups
        return
    conv.out_channels, conv.in_channels = first, second * conv.groups


def _is_plain(value: Any) -> bool:
    if isinstance(value, torch.Size):  # of what a module saw last, as heads of detectors keep it
        return False
    if isinstance(value, tuple | list):
        return all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
