"""A model under another forward: what is scored, verified and repaired may be a part of its call.

``with_forward(model, forward)`` is the same network, called as ``forward(model, x)``; layers,
weights and names are shared, so what is cut or fitted there is cut and fitted in the model itself.
"""

from __future__ import annotations

import importlib
from types import MethodType
from typing import Any, cast

from torch import nn

from tpvprune.passes.detection import Forward, detector_forward

_NAME = "_tpvprune_forward"


def with_forward(model: nn.Module, forward: Forward) -> nn.Module:
    """Return the model, its weights shared, whose call is ``forward(model, x)``.

    Args:
        model: Any module; untouched.
        forward: Called with the model, its own forward in place, and the inputs [B, ...].

    Returns:
        A module of the same class, layers and names; copies of it keep the forward.
    """
    shared = _shared(own_forward(model))
    setattr(shared, _NAME, forward)
    shared.__dict__["forward"] = MethodType(_call, shared)
    return shared


def own_forward(model: nn.Module) -> nn.Module:
    """Return the model under its own forward.

    Args:
        model: A module, of :func:`with_forward` or not.

    Returns:
        The same with shared weights, or the argument.
    """
    if _NAME not in model.__dict__:
        return model
    shared = _shared(model)
    del shared.__dict__["forward"], shared.__dict__[_NAME]
    return shared


def called_as(model: nn.Module, like: nn.Module) -> nn.Module:
    """Return a model under the forward that another was given, or its own if that has its own."""
    given = like.__dict__.get(_NAME)
    return own_forward(model) if given is None else with_forward(model, given)


def forward_of(model: nn.Module) -> Forward | None:
    """Return the forward that was given, or that a detector needs; None for a model's own."""
    given: Forward | None = model.__dict__.get(_NAME)
    return given or detector_forward(model)


def load_forward(name: str) -> Forward:
    """Import a forward, ``package.module:function``; ValueError if there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if function else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"forward {name}: cannot be imported ({error})") from error
    if not callable(found):
        raise ValueError(
            f"forward: expected package.module:function, called as function(model, x), found {name}"
        )
    return cast(Forward, found)


def said_of_forward(forward: Forward | None) -> list[str]:
    """Return what is to be said of a model that is not scored by what it returns."""
    if forward is None:
        return []
    left_out = getattr(forward, "left_out", None)
    name = getattr(forward, "__qualname__", repr(forward))
    more = f": left out are {left_out}" if left_out else ""
    return [f"scored, verified and repaired along {name}(model, x), not the model's own call{more}"]


def _shared(model: nn.Module) -> nn.Module:
    shared: nn.Module = model.__class__.__new__(model.__class__)
    shared.__dict__.update(model.__dict__)
    return shared


def _call(shared: nn.Module, *args: Any) -> Any:
    return shared.__dict__[_NAME](own_forward(shared), *args)
