"""A second device without the hardware: it computes on the CPU, and is as strict as a GPU.

Its tensors say that they are on the device type "lazy", whose own kernels are replaced here. As on
a GPU, tensors of two devices do not meet in one operation, but for single numbers and indices, and
what crosses over is counted: ``uploads``, and ``waits``, where the host must know a number and so
would wait for all that the device was told to do. Results are those of the CPU, bit for bit.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_WAITS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_linalg_check_errors", "aten::unique_consecutive", "aten::unique_dim", "aten::_unique2",
    "aten::bincount", "aten::repeat_interleave",
}  # fmt: skip
_crossings: Counter[str] = Counter()
_where: Counter[str] = Counter()


class Far(torch.Tensor):
    """A tensor of the device: ``held`` has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Far:
        """Return a tensor with the shape, strides and type of ``held``."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Far({self.held!r})"

    def __deepcopy__(self, memo: dict[int, object]) -> Far:
        copied = Far(self.held.clone()).requires_grad_(self.requires_grad)
        copied.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "held"}
        memo[id(self)] = copied
        return copied

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return that of the numbers, which views share."""
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        """Return where the numbers are."""
        return self.held.data_ptr()

    def tolist(self) -> object:
        """Return the numbers, which the host waits for."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    name = func._schema.name
    target = kwargs.get("device")
    _check(name, args, kwargs)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    near = tree_map(lambda t: t.held if isinstance(t, Far) else t, (args, kwargs))
    out = func(*near[0], **near[1])
    if name == "aten::_to_copy" and target is not None and torch.device(target).type == "cpu":
        _count("waits", name)
        return out
    if name == "aten::copy_" and not isinstance(args[0], Far):
        _count("waits", name)
        return args[0]
    far = tree_map(lambda t: Far(t) if isinstance(t, torch.Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, far)


def _check(name, args, kwargs) -> None:
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    near = [t for t in leaves if not isinstance(t, Far) and t.ndim]
    if name in _INDEXING:
        others = [args[0], *args[2:3]]
        if any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if isinstance(t, Far)):
            _count("waits", name)
        elif near:
            _count("uploads", name)
        near = [t for t in others if isinstance(t, torch.Tensor) and t.ndim]
        near = [t for t in near if not isinstance(t, Far)]
    if name == "aten::copy_":
        _crossings["uploads"] += bool(near) and isinstance(args[0], Far)
    elif near:
        raise RuntimeError(f"expected all tensors on {DEVICE}, found one on the CPU in {name}")
    if name in _WAITS:
        _count("waits", name)


def _count(kind, name) -> None:
    import traceback
    _crossings[kind] += 1
    fr = [f for f in traceback.extract_stack() if "tpvprune/" in f.filename]
    if fr: _where[f"{kind} {name} {fr[-1].filename.split('tpvprune/')[-1]}:{fr[-1].lineno}"] += 1


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Far(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Far(torch.empty_strided(size, stride, dtype=dtype))


def _autocast(device_type, dtype=None, enabled=True):
    assert not enabled, "the simulated device has no mixed precision"
    return nullcontext()


@contextmanager
def simulated_device() -> Iterator[Counter[str]]:
    """Let tensors be made on the device.

    Yields:
        How many crossings there were, by kind; may be cleared.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "Lazy", allow_override=True)
    library.impl("empty_strided", _empty_strided, "Lazy", allow_override=True)
    _crossings.clear()
    try:
        with patch("torch.autocast", _autocast):
            yield _crossings
    finally:
        library._destroy()
