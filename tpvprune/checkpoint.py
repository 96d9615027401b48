"""Save a pruned model as a folder, and rebuild it: safetensors and JSON, never pickle."""

from __future__ import annotations

import copy
import json
import math
import platform
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tpvprune.atomic import check_folder, written_folder
from tpvprune.removal import attribute_changes, shrink_to
from tpvprune.report import report_data, write_report

FORMAT_VERSION = 1
_MAX_CONFIG_BYTES = 64 * 2**20
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# Keyword arguments of timm.create_model that name files, devices or downloads.
_RESERVED = frozenset(
    {"checkpoint_path", "cache_dir", "device", "dtype", "scriptable", "exportable", "no_jit"}
)
_FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str, type(None)),
    "model_kwargs": (dict,),
    "pretrained_cfg": (dict,),
    "kept": (dict,),
    "attributes": (dict,),
    "shapes": (dict,),
    "provenance": (dict,),
}


def save_pruned(
    result_or_model: Any,
    folder: str | Path,
    *,
    overwrite: bool = False,
    dense: nn.Module | None = None,
    model_name: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pruned model to a folder that ``load_pruned`` rebuilds bit for bit.

    The folder gets ``model.safetensors`` and ``config.json``, with a report also
    ``report.json`` and ``report.html``. It is written beside its place, read back and
    compared, then renamed: a crash leaves the old folder or the new one, never half.

    Args:
        result_or_model: A ``PruningResult`` or a pruned module.
        folder: Where to write; its parents are made.
        overwrite: Replace a saved pruned model that is there already.
        dense: The model before pruning; needed where timm cannot build it.
        model_name: timm's name of it; by default what the model says of itself.
        model_kwargs: Keyword arguments of ``timm.create_model``; plain JSON values.
        pretrained_cfg: timm's preprocessing record; by default the model's own.
        provenance: Command, seed and the like; date and versions are added.
        report: Data of the report; by default the result's own, if there is one.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder cannot be written or replaced, the dense model is not
            known, a value is not plain JSON, or the model would not load back as it is.
    """
    is_model = isinstance(result_or_model, nn.Module)
    pruned: nn.Module = result_or_model if is_model else result_or_model.model
    kept = {} if is_model else result_or_model.kept
    if not is_model:
        dense = getattr(result_or_model, "dense", None) if dense is None else dense
        report = report_data(result_or_model) if report is None else report
    folder = check_folder(folder, overwrite=overwrite)
    name, kwargs, skeleton = _skeleton(pruned, model_name, model_kwargs, dense)
    own_cfg = getattr(pruned, "pretrained_cfg", None) or {}
    config = {
        "format_version": FORMAT_VERSION,
        "model": name,
        "model_kwargs": kwargs,
        "pretrained_cfg": _plain_entries(dict(pretrained_cfg or own_cfg)),
        "kept": {group: mask.nonzero().flatten().tolist() for group, mask in kept.items()},
        "attributes": attribute_changes(skeleton, pruned),
        "shapes": {key: list(value.shape) for key, value in _state(pruned).items()},
        "provenance": {**_provenance(), **(provenance or {})},
    }
    text = _as_json(config)
    with written_folder(folder) as unfinished:
        (unfinished / "config.json").write_text(text, encoding="utf-8")
        # Copies: safetensors refuses tensors that share memory.
        tensors = {
            key: value.cpu().clone(memory_format=torch.contiguous_format)
            for key, value in _state(pruned).items()
        }
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        if report is not None:
            write_report(dict(report), unfinished)
        loaded = load_pruned(unfinished, model=None if name else skeleton)
        _check_same(pruned, loaded)
    return folder


def load_pruned(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a saved pruned model, in eval mode on the CPU.

    timm builds the dense architecture without weights, its parameters are shrunk to the
    saved shapes, then the weights are loaded strictly. Everything read is checked first:
    a folder from a stranger can at worst be refused. No pickle is read.

    Args:
        folder: What ``save_pruned`` wrote.
        model: The dense model, for a model that timm does not build; left as it is.

    Returns:
        The pruned model; timm models carry the saved preprocessing in ``pretrained_cfg``.

    Raises:
        ValueError: If the folder is incomplete, damaged, of another format version, or
            does not fit the dense model.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights = folder / "model.safetensors"
    types = _saved_types(weights, config["shapes"])
    if model is not None:
        loaded = copy.deepcopy(model)
    elif config["model"] is None:
        raise ValueError(
            f"{folder}: expected a timm model, found one that timm does not build: "
            "pass load_pruned(..., model=the dense model)"
        )
    else:
        limit = max(2**28, 1000 * weights.stat().st_size)
        loaded = _build(config["model"], config["model_kwargs"], limit)
    _check_shapes(loaded, config["shapes"], types)
    _check_attributes(loaded, config["attributes"])
    shapes = {name: tuple(shape) for name, shape in config["shapes"].items()}
    shrink_to(loaded, shapes, config["attributes"])
    for name, tensor in _state(loaded).items():
        if tensor.dtype != types[name]:
            _retype(loaded, name, types[name])
    loaded.load_state_dict(load_file(weights), strict=True)
    _put_preprocessing(loaded, config["pretrained_cfg"])
    return loaded.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check the ``config.json`` of a saved pruned model.

    Args:
        folder: What ``save_pruned`` wrote.

    Returns:
        ``model``, ``model_kwargs``, ``pretrained_cfg``, ``kept`` (group -> channel indices),
        ``attributes``, ``shapes``, ``provenance`` and ``format_version``.

    Raises:
        ValueError: If the file is missing, not JSON, or not of this format.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected config.json of a saved pruned model, found none")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_CONFIG_BYTES} bytes, found more")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found damage ({error}): save again") from error
    found = config.get("format_version") if isinstance(config, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {found!r}: "
            "save again with this version of tpvprune"
        )
    for field, types in _FIELDS.items():
        if field not in config or type(config[field]) not in types:
            raise ValueError(
                f"{path}: expected {field!r} to be {' or '.join(t.__name__ for t in types)}, "
                f"found {type(config.get(field)).__name__}: save again"
            )
    for name, indices in config["kept"].items():
        if not _is_sizes(indices):
            raise ValueError(f"{path}: expected channel indices for {name!r}: save again")
    for name, shape in config["shapes"].items():
        if not _is_sizes(shape) or len(shape) > 8:
            raise ValueError(f"{path}: expected a shape for {name!r}, found {shape!r:.60}")
    return config
