"""A fingerprint of tensors, models and settings, to tell whether two are the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def digest_of(*parts: Any) -> bytes:
    """Compute the SHA-256 of values; names, order and every bit of the tensors count.

    ``*parts``: strings, tensors, modules, mappings of tensors, or values with a ``repr``.
    """
    digest = hashlib.sha256()
    for part in parts:
        entries = part.state_dict() if isinstance(part, nn.Module) else part
        if isinstance(entries, Tensor):
            entries = {"": entries}
        if not hasattr(entries, "items"):
            digest.update((entries if isinstance(entries, str) else repr(entries)).encode())
            continue
        for name, value in entries.items():
            digest.update(str(name).encode())
            if not isinstance(value, Tensor):  # what a module adds to its state by itself
                digest.update(repr(value).encode())
                continue
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(plain.numpy().data)
    return digest.digest()


def file_digest(path: str | Path) -> str:
    """Compute the SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
