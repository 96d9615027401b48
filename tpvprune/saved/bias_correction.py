"""Biases that give back what the rounding of weights adds to the mean of a layer's outputs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvprune.runtimes.onnx_files import INPUT, onnx_session

_LARGEST = 1 << 30  # bytes: half of what one ONNX file can hold


@dataclass(frozen=True)
class _Layer:
    """A layer whose weights were rounded, and the node and input that hold its bias."""

    node: Any
    error: Tensor
    holder: Any
    position: int


def correct_biases(whole: Path, rounded: Path, file: Path, calibration: Sequence[Tensor]) -> int:
    """Write a float32 ONNX file with biases for the weights of its int8 file.

    Where weights W of a layer are rounded to W', its outputs move by (W' - W) x on average, and a
    depthwise layer, whose every output sums few products, has nothing to average that out. The mean
    over ``calibration``, at the inputs x of the float32 file, is taken from the bias ("bias
    correction", Nagel et al., ICCV 2019, section 4.2). Convolutions and Gemm get a bias if they
    have none; a product with constant weights is corrected if nothing but a bias follows it.

    ``rounded``: what ONNX Runtime quantized ``whole`` to, QDQ format. ``file``: where to write.
    Returns how many layers were corrected; if none, nothing is written. A file of more than 1 GiB
    is left as it is: with the errors of its weights beside them ONNX could not hold it.
    """
    onnx = importlib.import_module("onnx")
    model = onnx.load(whole)
    too_large = model.ByteSize() > _LARGEST
    layers = [] if too_large else _layers(model.graph, onnx.load(rounded).graph)
    if not layers:
        return 0
    for layer, shift in zip(layers, _shifts(model, layers, calibration), strict=True):
        name = f"{layer.node.name}_corrected_bias"
        bias = _constant(model.graph, layer.holder, layer.position)
        corrected = -shift if bias is None else bias.double() - shift
        _add_constant(model.graph, name, corrected)
        inputs = layer.holder.input
        inputs.extend([""] * (layer.position + 1 - len(inputs)))
        inputs[layer.position] = name
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, file)
    return len(layers)


def _layers(graph: Any, rounded: Any) -> list[_Layer]:
    weights = _rounded_weights(rounded)
    found = []
    for node in graph.node:
        weight = _constant(graph, node, 1)
        if node.name not in weights or weight is None:
            continue
        holder, position = _bias_of(graph, node)
        if holder is not None:
            error = weights[node.name] - weight.double()
            found.append(_Layer(node, error, holder, position))
    return found


def _rounded_weights(graph: Any) -> dict[str, Tensor]:
    """Return the name of a layer -> its weights as int8 has them, in float64."""
    made_by = {name: node for node in graph.node for name in node.output}
    found = {}
    for node in graph.node:
        source = made_by.get(node.input[1]) if node.op_type in _AXES else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        values = _constant(graph, source, 0)
        scale = _constant(graph, source, 1)
        if values is None or scale is None:  # the product of two activations
            continue
        if scale.numel() > 1:
            axis = next((a.i for a in source.attribute if a.name == "axis"), 1) % values.ndim
            scale = scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        found[node.name] = values.double() * scale.double()
    return found


def _bias_of(graph: Any, node: Any) -> tuple[Any, int]:
    """Return the node that adds the bias, and which of its inputs that is; None if none does."""
    if node.op_type != "MatMul":
        return node, 2
    readers = [other for other in graph.node if node.output[0] in other.input]
    results = {output.name for output in graph.output}
    if len(readers) != 1 or readers[0].op_type != "Add" or node.output[0] in results:
        return None, 0
    add = readers[0]
    position = 1 - list(add.input).index(node.output[0])
    bias, width = _constant(graph, add, position), _constant(graph, node, 1)
    fits = bias is not None and width is not None and bias.shape == width.shape[-1:]
    return (add, position) if fits else (None, 0)


# Axes of outputs to take the mean over inside of the file; the others are few.
_AXES = {"Conv": (0, 2, 3, 4), "Gemm": (0,), "MatMul": (0,)}


def _shifts(model: Any, layers: Sequence[_Layer], calibration: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean over inputs of (W' - W) x of each layer [channels], in float64."""
    onnx = importlib.import_module("onnx")
    errors = onnx.ModelProto()
    errors.CopyFrom(model)
    graph = errors.graph
    del graph.output[:]
    names = []
    for index, layer in enumerate(layers):
        node, result = layer.node, f"mean_error{index}"
        axes = [axis for axis in _AXES[node.op_type] if axis == 0 or axis < layer.error.ndim]
        _add_constant(graph, f"{result}_weight", layer.error)
        _add_constant(graph, f"{result}_axes", torch.tensor(axes))
        product = onnx.NodeProto()
        product.CopyFrom(node)
        product.name = f"{result}_product"
        product.input[:] = [node.input[0], f"{result}_weight"]
        product.output[:] = [product.name]
        mean = onnx.helper.make_node(
            "ReduceMean", [product.name, f"{result}_axes"], [result], keepdims=0
        )
        graph.node.extend([product, mean])
        graph.output.append(
            onnx.helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)
        )
        names.append(result)
    session = onnx_session(errors.SerializeToString(), threads=1)
    sums: list[Any] = [0] * len(names)
    for batch in calibration:
        found = session.run(names, {INPUT: batch.numpy()})
        for index, value in enumerate(map(torch.from_numpy, found)):
            sums[index] += value.double().reshape(-1, value.shape[-1]).mean(0) * len(batch)
    num = sum(map(len, calibration))
    return [total / num for total in sums]


def _constant(graph: Any, node: Any, position: int) -> Tensor | None:
    """Return an input of a node; None if it has none, or one that is computed."""
    numpy_helper = importlib.import_module("onnx.numpy_helper")
    name = node.input[position] if len(node.input) > position else ""
    stored = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    return None if stored is None else torch.from_numpy(numpy_helper.to_array(stored).copy())


def _add_constant(graph: Any, name: str, value: Tensor) -> None:
    numpy_helper = importlib.import_module("onnx.numpy_helper")
    stored = value.float() if value.is_floating_point() else value
    graph.initializer.append(numpy_helper.from_array(stored.numpy(), name))
