"""A call of a network, or of an ONNX graph, in a runtime, on as many threads as torch uses."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.running import on_device
from tpvprune.runtimes.names import Runtime
from tpvprune.runtimes.onnx_files import onnx_bytes, onnx_session, quiet, reason

Call = Callable[[], Any]


@contextmanager
def threads(num: int | None) -> Iterator[None]:
    """Let torch use so many threads, and the runtimes with it; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(num or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def runs_in_torch(runtime: Runtime) -> bool:
    """Tell whether a runtime is PyTorch itself, on the device of the model; others: the CPU."""
    return runtime in {"eager", "compile"}


def device_of(runtime: Runtime, device: torch.device) -> str:
    """Return what a time depends on besides the model: runtime, processor, number of threads."""
    package = "torch" if runs_in_torch(runtime) else runtime
    return f"{runtime} ({package} {version(package)}), {_processor(runtime, device)}"


def _processor(runtime: Runtime, device: torch.device) -> str:
    if device.type == "cuda" and runs_in_torch(runtime):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((li.partition(":")[2].strip() for li in lines if "model name" in li), name)
    num = torch.get_num_threads()
    return f"{name}, {num} thread{'s' if num > 1 else ''}"


def model_call(runtime: Runtime, model: nn.Module, x: Tensor) -> Call:
    """Return a call of a model on inputs [B, ...], ready to be timed, in eval mode.

    The model must stay as it is while it is called. ValueError if the runtime does not take it.
    """
    if runtime == "eager":
        return partial(model, on_device(x, model))
    if runtime == "compile":
        return _compiled(model, on_device(x, model))
    return graph_call(runtime, *onnx_bytes(model, x))


def graph_call(runtime: Runtime, file: bytes, x: Tensor) -> Call:
    """Return a call of an ONNX file on the CPU; ValueError if the runtime does not take it."""
    try:
        if runtime == "openvino":
            infer = _openvino_request(file).infer
            call = partial(infer, [x.numpy()], share_inputs=True, share_outputs=True)
        else:
            session = onnx_session(file, threads=torch.get_num_threads())
            call = partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})
        call()
    except Exception as error:  # whatever the runtime makes of a file
        raise ValueError(f"does not run in {runtime} ({reason(error)})") from error
    return call


def openvino_nodes_ms(file: bytes, x: Tensor) -> Callable[[], float]:
    """Return what calls an ONNX file in OpenVINO and tells the milliseconds of its nodes.

    What brings inputs and outputs from one memory layout into another does not count: a network
    does that at its ends, but a layer by itself twice, which may take longer than the layer.
    """
    request = _openvino_request(file, PERF_COUNT=True)

    def call() -> float:
        request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        nodes = [n for n in request.profiling_info if n.node_type != "Reorder"]
        return 1e3 * sum(n.real_time.total_seconds() for n in nodes)

    return call


def _openvino_request(file: bytes, **options: Any) -> Any:
    core: Any = importlib.import_module("openvino").Core()
    options |= {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return core.compile_model(core.read_model(file), "CPU", options).create_infer_request()


def _compiled(model: nn.Module, x: Tensor) -> Call:
    # Of an exported graph: torch.compile counts how often the code of one class is compiled, and
    # runs the ninth network of that class as it is.
    with quiet():
        try:
            graph = torch.export.export(model, (x,)).module()
            call = torch.compile(graph, fullgraph=True)
            with torch.no_grad():
                call(x)
        except Exception as error:  # whatever the compiler makes of a model
            raise ValueError(f"cannot be compiled ({reason(error)})") from error
    return partial(call, x)
