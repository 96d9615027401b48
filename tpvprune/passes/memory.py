"""How this process holds memory, what a lack of it looks like, and what can be done about it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")

# Of malloc.h. One heap, because those of further threads are cut into pieces of 64 MB.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEEPING = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _ARENA_MAX: 1}


def is_lack_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def spare_bytes(device: torch.device) -> int:
    """Return how many bytes may be filled to save time: a quarter of what is free, or 1 GiB."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = min(_available(), _below_limit())
    return max(1 << 30, free // 4)


def _available() -> int:
    """Return what the system could give to new processes without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(li.split()[1]) * 1024 for li in lines if li.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return 0


def _below_limit() -> int:
    """Return what the limit of a container leaves."""
    folder = Path("/sys/fs/cgroup")
    try:
        most, now = ((folder / f"memory.{end}").read_text().strip() for end in ("max", "current"))
        return sys.maxsize if most == "max" else int(most) - int(now)
    except (OSError, ValueError):
        return sys.maxsize


def release_memory() -> None:
    """Give back what nobody holds any more; to be called when the error is forgotten, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Let the C library (glibc, on Linux) keep what tensors leave behind for the next ones.

    Passes, repairs and training make and drop tensors of tens of megabytes all the time. By default
    each is mapped anew and handed back, and touching fresh pages takes up to half of the time on a
    CPU. This process then takes tensors of up to 1 GiB from one heap and holds up to 2 GiB of it
    that nobody uses, until it ends; elsewhere than on glibc nothing happens. Call it once, before
    the first pass, where the process is your own; every command that prunes or trains does.
    """
    libc = _libc()
    if libc is not None:
        for option, value in _KEEPING.items():
            libc.mallopt(option, value)


def return_free_memory() -> None:
    """Let the C library hand free pages back to the system (glibc), where memory gets short.

    Asking for them again costs time: so only where this process holds over half of what is left.
    """
    libc = _libc()
    if libc is not None and 2 * _resident() > min(_available(), _below_limit()):
        libc.malloc_trim(0)


def _resident() -> int:
    """Return the memory that this process holds; where the system does not tell, no end of it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return sys.maxsize


@cache
def _libc() -> Any:
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim, libc.mallopt  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None
    return libc
