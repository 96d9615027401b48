"""Which weights stay: selection under a budget, unstructured or N of every M, and the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Scope = Literal["global", "layer", "row"]
MASK_FILE = "masks.safetensors"
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
_MAX_ELEMENTS = 2**36


def select_weights(
    scores: Mapping[str, Tensor], *, keep: float, scope: Scope = "global"
) -> dict[str, Tensor]:
    """Keep the highest scores; of equal ones, some, so that the budget is met exactly.

    ``keep``: fraction of the weights that stays, in (0, 1]. ``scope``: what is ranked together:
    ``"global"`` all weights, ``"layer"`` those of one layer, ``"row"`` those of one output (Wanda's
    choice). Returns masks, True = stays, in the shapes of the scores; every layer keeps a weight at
    least. ValueError if an argument is out of range or there is no score.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a fraction in (0, 1], found {keep}")
    if scope not in {"global", "layer", "row"}:
        raise ValueError(f"scope: expected 'global', 'layer' or 'row', found {scope!r}")
    if not scores:
        raise ValueError("scores: expected weights to choose from, found none")
    if scope == "global":
        sizes = [s.numel() for s in scores.values()]
        flat = torch.cat([s.flatten().double() for s in scores.values()])
        for part in flat.split(sizes):
            # An empty layer would cut the network: its best weight goes first.
            part[part.argmax()] = math.inf
        parts = _best_share(flat[None], keep)[0].split(sizes)
        return {n: p.reshape(s.shape) for (n, s), p in zip(scores.items(), parts, strict=True)}
    rows = {n: s.reshape(1 if scope == "layer" else len(s), -1) for n, s in scores.items()}
    return {n: _best_share(r.double(), keep).reshape(scores[n].shape) for n, r in rows.items()}


def select_n_of_m(scores: Mapping[str, Tensor], *, pattern: str = "2:4") -> dict[str, Tensor]:
    """Keep the n highest scores of every m neighbours along the input channels.

    Hardware that skips zeros (NVIDIA's sparse tensor cores take 2:4) reads the weights of one
    output and kernel entry in that order. Returns masks; those of layers whose number of input
    channels m does not divide keep all. ValueError if the pattern is not one.
    """
    n, m = pattern_of(pattern)
    masks = {}
    for name, score in scores.items():
        if score.shape[1] % m:
            masks[name] = torch.ones_like(score, dtype=torch.bool)
            continue
        last = score.movedim(1, -1)
        masks[name] = highest(last.reshape(-1, m), n).reshape(last.shape).movedim(-1, 1)
    return masks


def pattern_of(pattern: str) -> tuple[int, int]:
    """Read "n:m"; ValueError if it is not of that form with 0 < n < m <= 1024."""
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m <= 1024:
        raise ValueError(f"pattern: expected n:m with 0 < n < m, such as 2:4, found {pattern!r}")
    return n, m


def highest(rows: Tensor, num: int) -> Tensor:
    """Return a mask of the highest numbers, so many of each row [rows, n]."""
    found = rows.topk(num, 1).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, found, True)


def _best_share(rows: Tensor, keep: float) -> Tensor:
    return highest(rows, max(1, round(keep * rows.shape[1])))


def density(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction of weights that stays."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


# ---- the file -------------------------------------------------------------------------------


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks, a bit a weight, as safetensors; shapes are in its JSON header."""
    bits = {name: _packed(mask) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    save_file(bits, path, metadata={"shapes": json.dumps(shapes)})


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read what :func:`save_masks` wrote; no pickle is read.

    ``path``: the file, or the folder of a saved pruned model. Returns BoolTensors by parameter
    name. ValueError if the file is missing, damaged, or not of this form.
    """
    path = Path(path)
    path = path / MASK_FILE if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {})["shapes"])
            names = set(file.keys())
            if not isinstance(shapes, dict) or names != set(shapes):
                raise ValueError("other names than shapes")
            return {name: _unpacked(file.get_tensor(name), shapes[name]) for name in shapes}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected masks that tpvprune saved, found none or damage ({error})"
        ) from error


def _packed(mask: Tensor) -> Tensor:
    flat = mask.flatten().to("cpu", torch.uint8)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    return (padded.reshape(-1, 8) * _BITS).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, shape: object) -> Tensor:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("a shape that is none")
    size = math.prod(shape)
    if packed.dtype != torch.uint8 or size > _MAX_ELEMENTS or packed.shape != (-(-size // 8),):
        raise ValueError("another size than its shape")
    bits = (packed[:, None] & _BITS) != 0
    return bits.flatten()[:size].reshape(shape)
