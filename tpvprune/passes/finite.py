"""Numbers that are not finite: where they come from, and a second try where float16 overflows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tpvprune.passes.running import evaluating
from tpvprune.processes.membership import num_processes

Result = TypeVar("Result")


class NotFiniteError(ValueError):
    """An activation, a score or a curve is NaN or infinite."""


@torch.no_grad()
def check_outputs(
    model: nn.Module, inputs: Tensor, outputs: Tensor, *, batch: int | None = None
) -> None:
    """Check that a model's outputs are finite; if not, run it again to see where that began.

    ``batch``: which batch this is, for the message; None for inputs that are no images.
    """
    if bool(outputs.isfinite().all()):
        return
    layer, value, image = _first(model, inputs)
    where = "" if batch is None else f", image {image} of batch {batch}"
    raise NotFiniteError(
        f"expected finite activations, found {value} in {layer}{where}: "
        f"check the weights{' and the image' if where and value == 'infinity' else ''}"
    )


def _first(model: nn.Module, inputs: Tensor) -> tuple[str, str, int]:
    """Return the first layer whose output is not finite, NaN or infinity, and the image."""
    found: list[tuple[str, str, int]] = []

    def look(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if found or not isinstance(output, Tensor) or bool(output.isfinite().all()):
            return
        samples = output.flatten(1) if output.ndim > 1 and len(output) == len(inputs) else None
        image = 0 if samples is None else int((~samples.isfinite()).any(1).nonzero()[0])
        layer = f"layer {name!r}" if name else "the outputs"
        found.append((layer, "NaN" if bool(output.isnan().any()) else "infinity", image))

    with ExitStack() as hooks, evaluating(model):
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(partial(look, name)).remove)
        model(inputs)
    return found[0] if found else ("the outputs", "NaN or infinity", 0)


def retried_in_single(model: nn.Module, compute: Callable[[nn.Module], Result]) -> Result:
    """Compute with a model; if float16 overflows (NotFiniteError), with a float32 copy of it."""
    is_half = any(p.dtype == torch.float16 for p in model.parameters())
    # An image of one process may overflow, and what they add up must be of the same kind.
    if is_half and num_processes() > 1:
        return compute(copy.deepcopy(model).float())
    try:
        return compute(model)
    except NotFiniteError as error:
        if not is_half:
            raise
        warnings.warn(f"float16 overflows ({error}): computed in float32", stacklevel=3)
    return compute(copy.deepcopy(model).float())
