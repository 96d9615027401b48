"""ONNX Runtime's static quantizer: ranges, bits and biases are tried, the closest file is kept."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.evaluation import Difference, difference
from tpvprune.runtimes.onnx_files import INPUT, onnx_session, quiet, reason
from tpvprune.saved.bias_correction import correct_biases

# Name -> CalibrationMethod of onnxruntime, and its options.
_RANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "min-max": ("MinMax", {}),
    "percentile": ("Percentile", {"CalibPercentile": 99.99, "CalibTensorRangeSymmetric": False}),
    "entropy": ("Entropy", {}),
}
RANGES = tuple(_RANGES)
WEIGHT_BITS = (8, 7)
# Of the outputs' variance: nearer than this to float32, other bits are not worth their minutes.
_CLOSE = 0.01
# Where there are any of these only products are quantized, else nothing is left of a ViT.
_DELICATE = {"Softmax", "LayerNormalization"}
_PRODUCTS = ["Conv", "Gemm", "MatMul"]


def check_bits(weight_bits: Sequence[int]) -> None:
    """Raise a ValueError unless these are bits of weights that can be tried, each once."""
    known = set(weight_bits) <= set(WEIGHT_BITS)
    if not (weight_bits and known and len(set(weight_bits)) == len(weight_bits)):
        found = ", ".join(map(str, weight_bits)) or "none"
        raise ValueError(f"weight_bits: expected 8, 7 or both, found {found}")


def check_ranges(ranges: Sequence[str]) -> None:
    """Raise a ValueError unless these are ways to find ranges of activations."""
    unknown = sorted(set(ranges) - set(RANGES))
    if unknown or not ranges:
        found = ", ".join(unknown) or "none"
        raise ValueError(f"ranges: expected some of {', '.join(RANGES)}, found {found}")


@dataclass(frozen=True)
class WeightChoice:
    """How weights are rounded."""

    bits: int  # of a weight, 8 or 7
    biases_corrected: bool  # they take back what the rounding adds to a layer's mean

    def __str__(self) -> str:
        return f"{self.bits} bits{', biases corrected' if self.biases_corrected else ''}"


@dataclass(frozen=True)
class Tried:
    """The int8 file that was kept, and how far from the float32 file each that was tried is."""

    file: Path
    ranges: Mapping[str, Difference]  # weights rounded in the first way
    weights: Mapping[WeightChoice, Difference]  # with the best ranges

    @property
    def best_ranges(self) -> str:
        """What agrees best; of equals, and of features, what is closest."""

        def quality(name: str) -> tuple[float, float]:
            found = self.ranges[name]
            return found.agreement if found.has_classes else 0.0, -found.share

        return max(self.ranges, key=quality)

    @property
    def best_weights(self) -> WeightChoice:
        """What is closest."""
        return min(self.weights, key=lambda choice: self.weights[choice].share)


def tried_files(
    whole: Path,
    calibration: Sequence[Tensor],
    choosing: Sequence[Tensor],
    ranges: Sequence[str],
    weight_bits: Sequence[int],
    *,
    num_classes: int | None,
    step: Callable[[int, int], AbstractContextManager[None]],
) -> Tried:
    """Quantize a float32 ONNX file in several ways, beside it in its folder.

    ``calibration``: inputs [B, ...] that ranges, and the shifts of biases, are measured on.
    ``choosing``: others, to compare the files with the float32 one on. ``weight_bits``: tried in
    this order, until one differs by no more than 1 % of the outputs' variance. ``num_classes``: of
    the model; 0: it has features. ``step``: (number of a file, of at most so many) -> what its
    making runs in.
    """
    reference, numbers = OnnxModule(whole, num_classes), itertools.count(1)
    most = len(ranges) + 2 * len(weight_bits) - 1
    files: dict[tuple[str, WeightChoice], Path] = {}

    def apart(source: Path, name: str, choice: WeightChoice) -> Difference:
        corrected = "-corrected" if choice.biases_corrected else ""
        small = whole.with_name(f"{whole.stem}-{name}-{choice.bits}{corrected}.onnx")
        with step(next(numbers), most):
            _quantize(source, small, calibration, name, choice.bits)
            files[name, choice] = small
            return difference(OnnxModule(small), reference, choosing)

    first = WeightChoice(weight_bits[0], biases_corrected=False)
    by_range = {name: apart(whole, name, first) for name in ranges}
    best = Tried(whole, by_range, {}).best_ranges
    by_weights = {first: by_range[best]}
    for bits in weight_bits:
        if bits != first.bits and min(d.share for d in by_weights.values()) <= _CLOSE:
            break
        plain = WeightChoice(bits, biases_corrected=False)
        if plain not in by_weights:
            by_weights[plain] = apart(whole, best, plain)
        source = whole.with_name(f"{whole.stem}-{bits}-corrected-float32.onnx")
        if correct_biases(whole, files[best, plain], source, calibration):
            choice = WeightChoice(bits, biases_corrected=True)
            by_weights[choice] = apart(source, best, choice)
    tried = Tried(whole, by_range, by_weights)
    return Tried(files[best, tried.best_weights], by_range, by_weights)


def _quantize(
    whole: Path, small: Path, calibration: Sequence[Tensor], ranges: str, weight_bits: int
) -> None:
    tools = importlib.import_module("onnxruntime.quantization")
    method, options = _RANGES[ranges]
    kinds = {node.op_type for node in importlib.import_module("onnx").load(whole).graph.node}
    with quiet():
        try:
            tools.quantize_static(
                whole,
                small,
                _reader(calibration),
                op_types_to_quantize=_PRODUCTS if kinds & _DELICATE else None,
                per_channel=True,
                reduce_range=weight_bits == 7,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                calibrate_method=tools.CalibrationMethod[method],
                # One batch after the other: histograms of all at once would need all activations.
                extra_options={"CalibStridedMinMax": 1, **options},
            )
        except Exception as error:  # whatever the quantizer makes of a graph
            if isinstance(error, OSError):  # that is the disk
                raise
            raise ValueError(f"cannot be quantized ({reason(error)})") from error


def _reader(calibration: Sequence[Tensor]) -> Any:
    """Return the images in the form that the quantizer asks for."""
    tools = importlib.import_module("onnxruntime.quantization")

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
        left: Iterator[Tensor] = iter(())

        def __len__(self) -> int:
            return len(calibration)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(calibration[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {INPUT: batch.numpy()}

    return Reader()


class OnnxModule(nn.Module):
    """An ONNX file as a module: ONNX Runtime, one thread of the CPU."""

    def __init__(self, file: Path, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._session = onnx_session(str(file), threads=1)
        size = self._session.get_inputs()[0].shape[0]
        self._size = size if isinstance(size, int) else None
        # Says where, and in what type, it runs.
        self._parameter = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, images: Tensor) -> Any:
        """Run the file on images [B, ...], those beyond its own batch size in further calls."""
        size = self._size or len(images)
        short = images[:1].expand(-len(images) % size, *images.shape[1:])  # nothing, mostly
        calls = [
            self._session.run(None, {INPUT: part.contiguous().numpy()})
            for part in torch.cat([images, short]).split(size)
        ]
        outputs = tuple(
            torch.cat(list(map(torch.from_numpy, parts)))[: len(images)]
            for parts in zip(*calls, strict=True)
        )
        return outputs[0] if len(outputs) == 1 else outputs
