"""When what a module was called with is read for the last time, though its callers still hold it.

A network that waits in the middle holds, frame by frame, the arguments of all modules that it is
in: the image, the output of the stem, the input of the stage. Most of them nobody reads again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from tpvprune.groups.tracing.fields import flatten
from tpvprune.passes.operations import CONTRACTIONS, function_name
from tpvprune.passes.running import evaluating, on_device, tensors_of


def last_reads(model: nn.Module, names: Collection[str], x: Tensor) -> dict[str, int]:
    """Find after which contraction the arguments of a module are read no more.

    A second run, in which they are NaN from there on, must give the same outputs.

    Returns module -> number of the last contraction (of all, in the order of execution, from 0) up
    to which one of its arguments is read. Left out are modules that run several times, or whose
    arguments are not all of floating point or outlive the forward; all of them, where the second
    run gives something else.
    """
    reads = _Reads(model)
    x = on_device(x, model)
    with evaluating(model), torch.no_grad():
        with reads, _watched(model, names, reads.note):
            wanted = model(x.clone())
        found = reads.found()  # the outputs keep what they share
        spoiled = _Spoiled(found)
        with spoiled, _watched(model, found, spoiled.waiting.__setitem__):
            again = model(x.clone())
    same = map(_same, tensors_of(wanted), tensors_of(again))
    return found if all(same) else {}


class _Reads(TorchFunctionMode):
    """Notes when the memory of arguments is read; it holds them, so that no other takes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._call = -1
        self._last: dict[int, int] = {}
        own = (*model.parameters(), *model.buffers())
        self._left_out = {_pointer(t) for t in own if _is_strided(t)}
        self._args: dict[str, list[Tensor]] = {}

    def note(self, name: str, tensors: list[Tensor]) -> None:
        if name in self._args or not all(t.is_floating_point() for t in tensors):
            self._left_out.update(map(_pointer, (*tensors, *self._args.get(name, ()))))
        self._args[name] = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._call += function_name(func) in CONTRACTIONS
        read = filter(_is_strided, flatten((args, kwargs)))
        self._last |= dict.fromkeys(map(_pointer, read), self._call)
        return func(*args, **(kwargs or {}))

    def found(self) -> dict[str, int]:
        storages = {
            name: {_pointer(t): StorageWeakRef(t.untyped_storage()) for t in tensors}
            for name, tensors in self._args.items()
            if tensors
        }
        self._args.clear()
        return {
            name: max(self._last.get(pointer, -1) for pointer in own)
            for name, own in storages.items()
            if self._left_out.isdisjoint(own) and all(ref.expired() for ref in own.values())
        }


class _Spoiled(TorchFunctionMode):
    """Overwrites arguments, ``waiting``, once nothing should read them any more."""

    def __init__(self, last: dict[str, int]) -> None:
        super().__init__()
        self._call, self._last = -1, last
        self.waiting: dict[str, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function_name(func) in CONTRACTIONS:
            self._call += 1
            for name in [n for n in self.waiting if self._last[n] < self._call]:
                for tensor in self.waiting.pop(name):
                    tensor.fill_(torch.nan)
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(
    model: nn.Module, names: Collection[str], note: Callable[[str, list[Tensor]], None]
) -> Iterator[None]:
    """Call ``note(name, tensors of the arguments)`` before each forward of some modules."""

    def before(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        note(name, [t for t in flatten((args, kwargs)) if _is_strided(t)])

    with ExitStack() as hooks:
        for name in names:
            add = model.get_submodule(name).register_forward_pre_hook
            hooks.enter_context(add(partial(before, name), with_kwargs=True))
        yield


def _is_strided(value: Any) -> bool:
    """Return whether a value is a tensor with memory of its own kind: not a sparse one."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same(a: Tensor, b: Tensor) -> bool:
    # A tolerance for devices that do not add in the same order twice.
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
