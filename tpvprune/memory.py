"""What a lack of memory looks like, and what can be done about it."""

from __future__ import annotations

import gc

import torch

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_lack_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, on whatever device.

    Args:
        error: What was raised.

    Returns:
        True if so.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def release_memory() -> None:
    """Give back what nobody holds any more; to be called when the error is forgotten, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
