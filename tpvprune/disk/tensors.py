"""Tensors in files: state dicts as they are, and the state of an unfinished run."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tpvprune.disk.atomic import written_file

_HEADER = "tpvprune_training"


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors as a safetensors file; copies: it refuses those that share memory."""
    copies = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    save_file(copies, path, metadata=metadata)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError if there is none, or it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: expected safetensors, found none or damage ({error}): save or copy it again"
        ) from error


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors strictly, as those of the version that the classes of the module have now."""
    # Files of tensors hold none, and some classes refuse that (MNASNet of torchvision).
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(module.state_dict(), "_metadata", {})
    module.load_state_dict(state, strict=True)


def save_state(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> None:
    """Write modules (such as the model and its moving average), optimizer and facts."""
    tensors = by_part({name: module.state_dict() for name, module in modules.items()})
    numbers: dict[str, dict[str, Any]] = {}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer:{index}:{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    header = {**facts, "optimizer": {"numbers": numbers, "groups": state["param_groups"]}}
    save_tensors(path, tensors, header)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts, in the place of an earlier state."""
    with written_file(path) as unfinished:
        write_tensors(tensors, unfinished, {_HEADER: json.dumps(facts)})


def by_part(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return "part:name" -> tensor for :func:`read_tensors`; no part has a colon in it."""
    return {f"{part}:{name}": t for part, found in parts.items() for name, t in found.items()}


def read_facts(path: Path) -> dict[str, Any]:
    """Return the facts of a saved state; ValueError if the file is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})[_HEADER]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the state of an unfinished run, found damage or another file "
            f"({type(error).__name__}): remove it to start anew"
        ) from error


def read_tensors(path: Path, parts: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a saved state: part -> name in it -> tensor, see :func:`by_part`."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            part, _, rest = key.partition(":")
            found[part][rest] = file.get_tensor(key)
    return found


def load_state(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Put what ``save_state`` wrote of the same build into modules and optimizer, in place."""
    saved = read_facts(path)["optimizer"]
    parts = read_tensors(path, (*modules, "optimizer"))
    for name, module in modules.items():
        load_tensors(module, parts[name])
    entries: dict[int, dict[str, Any]] = {int(i): dict(n) for i, n in saved["numbers"].items()}
    for key, value in parts["optimizer"].items():
        index, _, entry = key.partition(":")
        entries.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": entries, "param_groups": saved["groups"]})
