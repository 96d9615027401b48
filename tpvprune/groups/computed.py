"""Weights that parametrizations or hooks compute in each forward, folded into plain ones.

A channel of such a weight is no part of a parameter, and the tensors that hooks of the old kind
keep cannot even be copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from tpvprune.passes.running import evaluating, relative_gap

_EQUAL = 1e-5  # relative: kernels may round otherwise


def _remove_spectral_norm(module: nn.Module, name: str) -> None:
    remove_spectral_norm(module, name)
    # torch 2 wraps this hook, no longer knows it, and leaves it: no state dict would load then.
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        own = getattr(hook, "hook", hook)
        if isinstance(own, SpectralNormLoadStateDictPreHook) and own.fn.name == name:
            del module._load_state_dict_pre_hooks[key]


# Hook -> where it keeps the name of the weight, and how torch takes it away.
_HOOKS: dict[type, tuple[str, Callable[[nn.Module, str], Any]]] = {
    WeightNorm: ("name", remove_weight_norm),
    SpectralNorm: ("name", _remove_spectral_norm),
    prune.BasePruningMethod: ("_tensor_name", prune.remove),
}


def computed_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that parametrizations or hooks compute."""
    return [
        f"{name}.{weight}".lstrip(".")
        for name, module in model.named_modules()
        for weight in [*_parametrized(module), *(hooked for hooked, _ in _hooked(module))]
    ]


def fold_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every weight that is computed is a parameter.

    The values are those of evaluation mode; what they were computed from is gone, so the copy
    trains as a network without the reparametrization does. A parameter asks for gradients if what
    it was computed from did.

    Args:
        model: Any module; untouched.

    Returns:
        The copy.
    """
    tensors = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor))
    copied = copy.deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})
    with evaluating(copied):
        for module in list(copied.modules()):
            _drop_parametrizations(module)
            for name, remove in _hooked(module):
                _drop_hook(module, name, remove)
    return copied


def folded_if_equal(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """Return a copy with its computed weights folded, or the model if outputs would differ.

    And what is to be said of it, a line at most.
    """
    names = computed_weights(model)
    if not names:
        return model, []
    which = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
    folded = fold_weights(model)
    with evaluating(model, folded), torch.no_grad():
        gap = float(relative_gap(folded(x), model(x)))
    if not gap <= _EQUAL:
        return model, [
            f"{which}: computed from other parameters, and left so: folded, the outputs would "
            f"differ by {gap:.1e} (relative)"
        ]
    return folded, [
        f"{which}: computed from other parameters (weight_norm, spectral_norm or the like), and "
        "folded into plain ones with equal outputs: of the dense model fold_weights makes the same"
    ]


def _parametrized(module: nn.Module) -> list[str]:
    return list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]


def _hooked(module: nn.Module) -> list[tuple[str, Callable[[nn.Module, str], Any]]]:
    """Return each weight of a module that a hook computes, and what takes the hook away."""
    return [
        (getattr(hook, attribute), remove)
        for hook in module._forward_pre_hooks.values()
        for kind, (attribute, remove) in _HOOKS.items()
        if isinstance(hook, kind)
    ]


def _drop_parametrizations(module: nn.Module) -> None:
    """Put every parametrized tensor of a copied module in the place of its parametrization."""
    # ``remove_parametrizations`` would change the class, which the original shares.
    names = _parametrized(module)
    if not names:
        return
    lists: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in names}
    originals = {name: list(lists[name].parameters(recurse=False)) for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        if found := originals[name]:
            setattr(module, name, nn.Parameter(value, any(p.requires_grad for p in found)))
        else:
            module.register_buffer(name, value)


def _drop_hook(module: nn.Module, name: str, remove: Callable[[nn.Module, str], Any]) -> None:
    before = dict.fromkeys(module.parameters())
    remove(module, name)
    gone = before.keys() - set(module.parameters())
    # What it was computed from may be frozen; torch makes a parameter to be trained all the same.
    if gone and not any(p.requires_grad for p in gone):
        module.get_parameter(name).requires_grad_(False)
