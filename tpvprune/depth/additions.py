"""Follow the additions of two tensors, by their order in a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
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


class AdditionMode(TorchFunctionMode):
    """Sees every addition of a forward; :meth:`on_addition` may replace its result.

    One at a time: what it does to replace a sum, another one would take for additions.
    """

    def __init__(self) -> None:
        super().__init__()
        self._number = -1

    def restart(self) -> None:
        """Count from the first again: another forward begins."""
        self._number = -1

    def on_addition(self, number: int, args: Any) -> Tensor | None:
        """Return the sum to take, or None for that of the terms."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_addition(func, args, kwargs):
            return func(*args, **kwargs)
        self._number += 1
        found = self.on_addition(self._number, args)
        if found is None:
            return func(*args, **kwargs)
        # Of x += y the result is read, of x.add_(y) perhaps only x.
        return args[0].copy_(found) if func.__name__ == "add_" else found


class WithoutBranches(AdditionMode):
    """While it is on, the sums that end these branches are what they are without them."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        super().__init__()
        self._identity = {b.addition: b.identity for b in branches}

    def on_addition(self, number: int, args: Any) -> Tensor | None:
        """Return x of the sum x + F(x) of a branch."""
        return args[self._identity[number]].clone() if number in self._identity else None
