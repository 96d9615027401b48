"""A second device without the hardware: it computes on the CPU, and is as strict as a GPU.

Its tensors are of torch's device type "lazy", which has no kernels of its own. As on a GPU, tensors
of two devices do not meet in one operation, single numbers and indices aside, and it is counted
where the host must know a number, and so waits for all that the device was told to do. Results are
those of the CPU, bit for bit. What it does not show: other rounding, and memory that is written
again before a transfer out of it is done.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_MASKS = (torch.bool, torch.uint8)
_WAITING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_linalg_check_errors", "aten::unique_consecutive", "aten::unique_dim", "aten::_unique2",
    "aten::bincount", "aten::repeat_interleave",
}  # fmt: skip
_waits = Counter()


class Far(torch.Tensor):
    """A tensor of the device; ``held`` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        """Return a tensor with the shape, strides and type of another."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self):
        return f"Far({self.held!r})"

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = Far(self.held.clone()).requires_grad_(self.requires_grad)
        # Among them that it is a parameter.
        copied.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "held"}
        return copied

    def untyped_storage(self):
        """Return that of the numbers, which views share."""
        return self.held.untyped_storage()

    def data_ptr(self):
        """Return where the numbers are."""
        return self.held.data_ptr()

    def tolist(self):
        """Return the numbers."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


def _computed(func, args, kwargs):
    name, target = func._schema.name, kwargs.get("device")
    _check(name, args, kwargs)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    near_args, near_kwargs = tree_map(lambda t: t.held if _is_far(t) else t, (args, kwargs))
    out = func(*near_args, **near_kwargs)
    if target is not None and torch.device(target).type == "cpu":
        _waits[name] += 1
        return out
    if name == "aten::copy_" and not _is_far(args[0]):
        _waits[name] += 1
        return args[0]
    far = tree_map(lambda t: Far(t) if isinstance(t, torch.Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, far)


def _check(name, args, kwargs):
    if name == "aten::copy_":  # which is there to cross over
        return
    waits = name in _WAITING
    if name in _INDEXING:  # the indices may be on either
        waits = any(_is_far(t) and t.dtype in _MASKS for t in args[1])
        args = (args[0], *args[2:])
    near = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
    if not all(map(_is_far, near)):
        raise RuntimeError(f"expected all tensors on {DEVICE}, found one on the CPU in {name}")
    _waits[name] += waits


def _is_far(value):
    return isinstance(value, Far)


def _empty(size, dtype=None, memory_format=None, **_):
    return Far(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(size, stride, dtype=None, **_):
    return Far(torch.empty_strided(size, stride, dtype=dtype))


def _autocast(device_type, dtype=None, enabled=True):
    assert not enabled, "the simulated device has no mixed precision"
    return nullcontext()


@contextmanager
def simulated_device():
    """Let tensors be made on the device; yields how often the host waits, by operation."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "Lazy")
    library.impl("empty_strided", _empty_strided, "Lazy")
    _waits.clear()
    try:
        with patch("torch.autocast", _autocast):
            yield _waits
    finally:
        library._destroy()
