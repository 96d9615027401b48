"""What one call of a model costs: multiply-accumulates, parameters, milliseconds."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tpvprune.passes.crossing import sent
from tpvprune.passes.running import evaluating, frozen


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass in milliseconds: median and standard deviation over repeats."""

    median_ms: float
    sd_ms: float
    repeats: int
    batch_size: int
    device: str
    num_threads: int


@torch.no_grad()
def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Count the multiply-accumulates of one input (1 MAC = 1 fused multiply-add).

    Counted are the products of matrices that really run: convolutions, linear layers,
    attention (fused or not), recurrent layers; not normalisations, activations or sums.

    Args:
        model: Model to run once, in eval mode.
        example_inputs: A batch [B, ...] or a tuple of arguments; only the first input
            of each batch is run, since some costs do not depend on the batch size.

    Returns:
        MACs of one input.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    # The fused path of nn.MultiheadAttention hides its products from the counter.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Nor does it know every fused attention kernel of every torch.
        with evaluating(model), frozen(model), sdpa_kernel(SDPBackend.MATH), counter:
            model(*_one_input(model, example_inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops()) // 2


def count_params(model: nn.Module) -> int:
    """Count the elements of all parameters, shared ones once; buffers do not count.

    Args:
        model: Any module.

    Returns:
        Number of elements.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero_params(model: nn.Module) -> int:
    """Count the parameters but for the zeros in weights of two or more axes (removed weights)."""
    return count_params(model) - sum(
        parameter.numel() - int(parameter.count_nonzero())
        for parameter in model.parameters()
        if parameter.ndim > 1
    )


@torch.no_grad()
def measure_latency(
    model: nn.Module, example_inputs: Any, *, repeats: int = 20, warmup: int = 3
) -> Latency:
    """Time forward passes, each one alone, the device synchronised before and after.

    Args:
        model: Model to time, in eval mode on the device that it is on.
        example_inputs: A batch [B, ...] or a tuple of arguments, run as it is.
        repeats: Timed calls, >= 2.
        warmup: Calls before them that are not timed, >= 0.

    Returns:
        Median and standard deviation over the repeats, in milliseconds per call.

    Raises:
        ValueError: If ``repeats`` or ``warmup`` is too small.
    """
    if repeats < 2 or warmup < 0:
        raise ValueError(
            f"expected repeats >= 2 and warmup >= 0, found {repeats} and {warmup}: "
            "a standard deviation needs two times"
        )
    arguments = call_arguments(model, example_inputs)
    device = _device(model)
    times = []
    with evaluating(model):
        for _ in range(warmup):
            model(*arguments)
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            model(*arguments)
            synchronize(device)
            times.append(1e3 * (time.perf_counter() - start))
    return Latency(
        median_ms=statistics.median(times),
        sd_ms=statistics.stdev(times),
        repeats=repeats,
        batch_size=_batch_size(arguments),
        device=str(device),
        num_threads=torch.get_num_threads(),
    )


def call_arguments(model: nn.Module, example_inputs: Any) -> tuple[Any, ...]:
    """Return what to call a model with, moved to its device and floats to its type."""
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    device = _device(model)
    floats = [tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()]

    def moved(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        dtype = floats[0] if floats and argument.is_floating_point() else None
        return sent(argument, device, dtype)

    return tuple(moved(argument) for argument in arguments)


def _one_input(model: nn.Module, example_inputs: Any) -> tuple[Any, ...]:
    arguments = call_arguments(model, example_inputs)
    size = _batch_size(arguments)
    return tuple(
        a[:1] if isinstance(a, Tensor) and a.ndim and len(a) == size else a for a in arguments
    )


def _batch_size(arguments: tuple[Any, ...]) -> int:
    sizes = [len(part) for part in arguments if isinstance(part, Tensor) and part.ndim]
    return sizes[0] if sizes else 1


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked to."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _matrix_vector_flops(*shapes: Any, **_: Any) -> int:
    return 2 * int(torch.Size(shapes[-2]).numel())  # of the matrix; behind a bias, if there is one


def _recurrent_flops(inputs: Any, weight_input: Any, weight_hidden: Any, *_: Any, **__: Any) -> int:
    # One direction of one layer: both weights once per step of inputs [T, B, C].
    weights = torch.Size(weight_input).numel() + torch.Size(weight_hidden).numel()
    return 2 * int(inputs[0] * inputs[1] * weights)


# Products that the counter of torch 2.15 passes over in silence.
_UNCOUNTED = {
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten.dot: _matrix_vector_flops,
    torch.ops.aten.addmv: _matrix_vector_flops,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
}
