"""State dicts in files: plain tensors, without the versions that torch keeps beside them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors as a safetensors file; copies: it refuses those that share memory."""
    copies = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    save_file(copies, path, metadata=metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError if there is none, or it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: expected safetensors, found none or damage ({error}): save or copy it again"
        ) from error


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors strictly, as those of the version that the classes of the module have now.

    Files of tensors do not hold versions, and some classes refuse a state dict of none (MNASNet of
    torchvision).
    """
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(module.state_dict(), "_metadata", {})
    module.load_state_dict(state, strict=True)
