"""Follow the branches of a forward: the additions of two tensors that end them, by their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.depth.records import Branch
from tpvprune.passes.operations import function_name


def is_addition(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether a call adds two tensors.

    Of any shapes: a batch of one image meets an embedding in its own shape, as no other batch does,
    and the order of the additions must not depend on that.
    """
    if function_name(func) != "add" or len(args) != 2 or kwargs:
        return False
    return all(isinstance(term, Tensor) for term in args)


class BranchMode(TorchFunctionMode):
    """Shows every branch of one forward to ``see``, which may replace what it ends in.

    ``see``: (branch, x, F(x)) -> what takes the place of x + F(x), or None for that itself. One
    mode at a time: what it does to replace a sum, another one would take for additions.
    """

    def __init__(
        self,
        model: nn.Module,
        branches: Sequence[Branch],
        see: Callable[[Branch, Tensor, Tensor], Tensor | None],
    ) -> None:
        super().__init__()
        self._model, self._see, self._number, self._is_inside = model, see, -1, False
        self._sums = {b.addition: b for b in branches if b.addition is not None}
        self._layers = [b for b in branches if b.addition is None]
        self._inputs: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> BranchMode:
        for branch in self._layers:
            first, last = (self._model.get_submodule(branch.modules[i]) for i in (0, -1))
            enter, leave = (partial(step, branch) for step in (self._enter, self._leave))
            self._hooks.callback(first.register_forward_pre_hook(enter).remove)
            self._hooks.callback(last.register_forward_hook(leave).remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def _enter(self, branch: Branch, _: Any, args: Any) -> None:
        self._inputs[branch.name] = args[0]

    def _leave(self, branch: Branch, _module: Any, _args: Any, y: Tensor) -> Tensor | None:
        x = self._inputs.pop(branch.name)
        self._is_inside = True  # these are no additions of the network
        try:
            return self._see(branch, x, y - x)
        finally:
            self._is_inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_inside or not is_addition(func, args, kwargs):
            return func(*args, **kwargs)
        self._number += 1
        branch, found = self._sums.get(self._number), None
        if branch is not None:
            found = self._see(branch, args[branch.identity], args[1 - branch.identity])
        if found is None:
            return func(*args, **kwargs)
        # Of x += y the result is read, of x.add_(y) perhaps only x.
        return args[0].copy_(found) if func.__name__ == "add_" else found


def without_branches(model: nn.Module, branches: Sequence[Branch]) -> BranchMode:
    """Return a mode in which the network gives what it gives without some branches."""
    return BranchMode(model, branches, lambda _branch, x, _added: x.clone())
