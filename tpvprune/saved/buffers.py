"""Buffers that ``state_dict`` leaves out: what a cut or a forward made of them is saved beside it.

Tables of positions, filters of a blur, biases that are always zero: a removal narrows some of them,
and some modules fill theirs in the first forward. A model that is built anew has neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tpvprune.disk.path_checks import BUFFER_FILE
from tpvprune.disk.tensors import read_state_dict


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers by name that ``state_dict`` leaves out."""
    saved = model.state_dict(keep_vars=True)
    return {k: b for k, b in model.named_buffers(remove_duplicate=False) if k not in saved}


def changed_buffers(pruned: nn.Module, loaded: nn.Module) -> dict[str, Tensor]:
    """Return those of them that a model has not got again when it was loaded without them."""
    before = unsaved_buffers(loaded)
    return {
        name: buffer
        for name, buffer in unsaved_buffers(pruned).items()
        if not is_equal(buffer.cpu(), before.get(name))
    }


def read_buffers(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read those that ``config.json`` names; ValueError if the folder has others."""
    path = folder / BUFFER_FILE
    if not names:
        return {}
    found = read_state_dict(path)
    if found.keys() != set(names):
        raise ValueError(
            f"{path}: expected the buffers that config.json names, found others: the files are not "
            "from one save"
        )
    return found


def put_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Set them in place; ValueError if the model has none of a name, or one of another kind."""
    modules = dict(model.named_modules())
    for name, value in buffers.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if module is None or leaf not in module._non_persistent_buffers_set:
            raise ValueError(f"buffers: expected some of the model, found {name!r:.120}")
        own = module._buffers[leaf]
        if own is not None and (own.ndim, own.dtype) != (value.ndim, value.dtype):
            raise ValueError(
                f"buffers: expected {own.ndim} dimensions of {own.dtype} for {name:.120}, found "
                f"{value.ndim} of {value.dtype}"
            )
        module._buffers[leaf] = value


def is_equal(saved: Tensor, loaded: Tensor | None) -> bool:
    """Tell whether two tensors are the same bit for bit, so that NaN equals NaN."""
    if loaded is None or saved.shape != loaded.shape or saved.dtype != loaded.dtype:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (saved, loaded)))
