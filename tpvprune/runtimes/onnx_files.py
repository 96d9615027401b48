"""A network, or a single layer, as ONNX."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.costs import call_arguments

INPUT = "images"
_OPSET, _IR_VERSION = 17, 8  # of single layers; read by every runtime since 2022


def onnx_program(model: nn.Module, example: Tensor, *, dynamic: bool = False) -> Any:
    """Return a model as a ``torch.onnx.ONNXProgram``; ``example``: a batch [B, ...]."""
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        dynamic_shapes=({0: "batch"},) if dynamic else None,
    )
    assert program is not None
    return program


def onnx_bytes(model: nn.Module, x: Tensor) -> tuple[bytes, Tensor]:
    """Return a model as ONNX, and inputs as it takes them; ValueError if it cannot be exported."""
    still = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    example = call_arguments(still, x.cpu())[0]
    with quiet():
        try:
            return onnx_program(still, example).model_proto.SerializeToString(), example
        except Exception as error:  # whatever the exporter makes of a model
            raise ValueError(f"cannot be exported to onnx ({reason(error)})") from error


def onnx_node(
    kind: str, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any] | None = None
) -> bytes:
    """Return an ONNX file of one node, all of whose numbers are ones."""
    helper: Any = importlib.import_module("onnx.helper")
    numpy_helper: Any = importlib.import_module("onnx.numpy_helper")
    kind_of_float: int = importlib.import_module("onnx").TensorProto.FLOAT
    names = [INPUT, *(f"constant{i}" for i in range(1, len(shapes)))]
    constants = [
        numpy_helper.from_array(torch.ones(tuple(shape)).numpy(), name)
        for name, shape in zip(names[1:], shapes[1:], strict=True)
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, names, ["output"], **dict(attributes or {}))],
        "layer",
        [helper.make_tensor_value_info(INPUT, kind_of_float, list(shapes[0]))],
        [helper.make_tensor_value_info("output", kind_of_float, None)],
        constants,
    )
    versions = [helper.make_opsetid("", _OPSET)]
    file = helper.make_model(graph, opset_imports=versions, ir_version=_IR_VERSION)
    return bytes(file.SerializeToString())


def onnx_session(file: str | bytes, *, threads: int | None = None) -> Any:
    """Return a session of ONNX Runtime on the CPU, for a file or what is in it."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors, which are raised, too
    return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters and quantizers say of their own insides from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def reason(error: Exception) -> str:
    """Return the first line of what lies behind an error, at most 160 characters."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines or [type(cause).__name__])[0][:160]
