"""Models of torchvision and of transformers by name: ``torchvision/NAME``, ``hf:NAME``."""

from __future__ import annotations

import importlib
import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune.saved.downloads import offline_if_unreachable

TORCHVISION, TRANSFORMERS = "torchvision/", "hf:"


def is_registered(name: str) -> bool:
    """Tell whether a model's name is that of another library than timm."""
    return name.startswith((TORCHVISION, TRANSFORMERS))


def registered_model(name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Make a model of torchvision or transformers, which are asked for only here.

    ``name``: torchvision/NAME of torchvision's own list, or hf:NAME, a repository of the hub or a
    folder that ``save_pretrained`` has written. ``pretrained``: with torchvision's best weights, or
    those beside the configuration. ``kwargs``: of torchvision's builder; or entries of the
    configuration, and ``architecture``, the class (default: the first that the configuration
    names). Code that comes with a repository is never run.
    """
    if name.startswith(TORCHVISION):
        return _of_torchvision(name.removeprefix(TORCHVISION), pretrained, kwargs)
    return _of_transformers(name.removeprefix(TRANSFORMERS), pretrained, kwargs)


def _of_torchvision(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise ValueError(f"torchvision.models.list_models() has no {name!r}")
    builder = models.get_model_builder(name)
    if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
        kwargs = {"weights_backbone": None, **kwargs}
    model: nn.Module = builder(weights="DEFAULT" if pretrained else None, **kwargs)
    return model


def _of_transformers(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    library, kwargs = _library("transformers"), dict(kwargs)
    kind = kwargs.pop("architecture", None)
    if "num_classes" in kwargs:
        kwargs["num_labels"] = kwargs.pop("num_classes")
    with nullcontext() if Path(name).is_dir() else offline_if_unreachable():
        try:
            config = library.AutoConfig.from_pretrained(name, **kwargs)
        except OSError as error:
            raise ValueError(
                f"expected a folder with config.json, or a repository of the hub that can be "
                f"reached or was downloaded before, found no {name}"
            ) from error
        kind = kind or next(iter(config.architectures or ()), None) or "AutoModel"
        found = getattr(library, kind, None)
        if found is None:
            raise ValueError(f"transformers has no class {kind!r}")
        if pretrained:
            loaded: nn.Module = found.from_pretrained(
                name, config=config, ignore_mismatched_sizes="num_labels" in kwargs
            )
            return loaded
        made: nn.Module = found.from_config(config) if "Auto" in kind else found(config)
        return made


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"expected {name} to be installed: pip install {name}") from error
