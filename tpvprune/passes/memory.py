"""What a lack of memory looks like, and what can be done about it."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from typing import Any

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


def return_free_memory() -> None:
    """Let the C library hand free pages back to the system, where it can (glibc).

    What many chunks of inputs have used by turns lies in pieces all over its heaps; kept there, it
    adds up to several times what is in use.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _libc() -> Any:
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None
    return libc
