"""A model as an int8 ONNX file: ranges from some images, chosen on others, measured on more."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.disk.atomic import written_file
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.evaluation import Difference, difference
from tpvprune.runtimes.onnx_files import reason
from tpvprune.saved.export import check_target, export_model

# Name -> CalibrationMethod of onnxruntime, and its options.
_RANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "min-max": ("MinMax", {}),
    "percentile": ("Percentile", {"CalibPercentile": 99.99, "CalibTensorRangeSymmetric": False}),
    "entropy": ("Entropy", {}),
}
RANGES = tuple(_RANGES)
WEIGHT_BITS = (8, 7)
# Where there are any of these only products are quantized, else nothing is left of a ViT.
_DELICATE = {"Softmax", "LayerNormalization"}
_PRODUCTS = ["Conv", "Gemm", "MatMul"]
_CALIBRATED = 64  # images at most: more take longer, and only widen the ranges of min-max


@dataclass(frozen=True)
class Run:
    """What one file costs and keeps, run by ONNX Runtime on one thread of the CPU.

    Attributes:
        agreement: Fraction of equal top-1 with the float32 dense model (without one: with the
            float32 model), in [0, 1], on images that no range was calibrated or chosen on.
        num_bytes: Size of the file.
        latency_ms: Median time of one call, in milliseconds; None if nothing was timed.
        latency_range_ms: First and third quartile of those times.
    """

    agreement: float
    num_bytes: int
    latency_ms: float | None = None
    latency_range_ms: tuple[float, float] | None = None


@dataclass(frozen=True)
class Quantized:
    """An int8 file, and what was measured to choose it and of it.

    Attributes:
        file: What was written.
        input_shape: Of one batch; the first entry is None where the batch size is free.
        ranges: How the ranges of activations were chosen: the best of ``tried``.
        num_calibration: Images that ranges were measured on.
        num_choosing: Others, on which ``ranges`` agreed best with the float32 model.
        num_measured: Others again, on which everything below was measured.
        tried: Ranges -> difference from the float32 file on the images to choose on.
        weight_bits: How many bits of a weight are used: the closest of ``tried_bits``.
        tried_bits: Likewise, bits -> difference, with the best ranges.
        difference: The int8 file against the float32 file of the same model.
        runs: ``"float32"`` and ``"int8"``, before them the same two of a dense model.
        batch_size: Images of one call that was timed.
    """

    file: Path
    input_shape: tuple[int | None, ...]
    ranges: str
    num_calibration: int
    num_choosing: int
    num_measured: int
    tried: Mapping[str, Difference]
    weight_bits: int
    tried_bits: Mapping[int, Difference]
    difference: Difference
    runs: Mapping[str, Run]
    batch_size: int

    @property
    def warning(self) -> str | None:
        """That the file is broken, and what to try; None if it is not."""
        if not self.difference.is_broken:
            return None
        kept = f"{100 * self.difference.agreement:.1f} % of the classes of float32"
        return (
            f"int8 is broken: {kept} are kept on {self.num_measured} images held back: try more "
            "images, like those it will meet; check mean, std and size; else deploy float32"
        )


def export_int8(
    model: nn.Module,
    batches: Iterable[Any],
    file: str | Path,
    *,
    dense: nn.Module | None = None,
    ranges: Sequence[str] = RANGES,
    weight_bits: Sequence[int] = WEIGHT_BITS,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    latency_repeats: int = 50,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Quantized:
    """Write a model as an ONNX file that computes in int8, and measure what that changes.

    The float32 file of :func:`tpvprune.export_model`, in which every BatchNorm behind a
    convolution is folded into it, is quantized by ONNX Runtime's static quantizer (QDQ format):
    weights to int8 with a scale per output channel, activations to uint8 (on x86 the faster kind)
    with one range per tensor. Ranges are the smallest and largest value (``"min-max"``), without
    the outer 0.01 % (``"percentile"``), or of least divergence (``"entropy"``), whichever agrees
    best with the float32 file. In a network with LayerNorm or softmax only convolutions and matrix
    products are quantized, else every operator that can be. Of the images a third, at most 64,
    calibrates, half of the others chooses ranges, the rest measures; a seed says which is which.

    x86 processors without VNNI add pairs of products in 16 bits, where large ones saturate: weights
    of 8 bits are wrong there, of 7 not, at equal speed. Both are tried on the processor that this
    runs on, and the closer one is taken; for a file that will run on another, say which.

    Weights are not equalised across layers, nor biases corrected.

    Args:
        model: What to export, in eval mode; untouched.
        batches: Unlabeled inputs [B, ...], labels are dropped; all are held in memory.
        file: Where to write.
        dense: The model that ``model`` was pruned from: is quantized and measured likewise.
        ranges: Which ranges to try, of :data:`RANGES`.
        weight_bits: Which bits of weights to try, of :data:`WEIGHT_BITS`.
        batch_size: Of the file, and of the calls that are timed.
        dynamic_batch: Leave the batch size of the file free.
        latency_repeats: Timed calls of each file, by turns; 0 for none, else at least 2.
        overwrite: Replace a file that is there.
        metadata: As of :func:`tpvprune.export_model`.
        seed: Which images calibrate, choose, and measure.

    Returns:
        The file, what was tried, and float32 and int8 side by side.

    Raises:
        ValueError: If a package is missing, the file may not be written, there are fewer images
            than three batches, the model cannot be exported, or ONNX Runtime cannot quantize it.
    """
    file = Path(file).expanduser()
    check_target(file, "onnx", overwrite=overwrite)
    check_bits(weight_bits)
    unknown = sorted(set(ranges) - set(RANGES))
    if unknown or not ranges or latency_repeats == 1 or latency_repeats < 0:
        raise ValueError(
            f"expected ranges of {', '.join(RANGES)} and latency_repeats of 0 or at least 2, found "
            f"{', '.join(unknown or ranges) or 'no ranges'} and {latency_repeats}"
        )
    calibration, choosing, measuring = _parts(batches, batch_size, seed)
    models = {"": model} if dense is None else {"dense ": dense, "": model}
    tried: dict[str, _Tried] = {}
    with tempfile.TemporaryDirectory() as temporary, written_file(file) as unfinished:
        folder, files = Path(temporary), dict[str, Path]()
        for name, network in models.items():
            whole = folder / f"{name}float32.onnx"
            exported = export_model(
                copy.deepcopy(network).float(),
                calibration[0],
                whole,
                dynamic_batch=dynamic_batch,
                batches=calibration[:1],
                metadata=metadata,
            )
            tried[name] = _tried(whole, calibration, choosing, ranges, weight_bits)
            files |= {f"{name}float32": whole, f"{name}int8": tried[name].file}
        sessions = {name: _Session(path) for name, path in files.items()}
        runs = _measured(sessions, files, measuring, latency_repeats)
        apart = difference(sessions["int8"], sessions["float32"], measuring)
        shutil.copyfile(files["int8"], unfinished)
    return Quantized(
        file=file,
        input_shape=exported.input_shape,
        ranges=_best(tried[""].ranges),
        num_calibration=sum(map(len, calibration)),
        num_choosing=sum(map(len, choosing)),
        num_measured=sum(map(len, measuring)),
        tried=tried[""].ranges,
        weight_bits=_closest(tried[""].bits),
        tried_bits=tried[""].bits,
        difference=apart,
        runs=runs,
        batch_size=len(measuring[0]),
    )


def _parts(batches: Iterable[Any], size: int, seed: int) -> list[list[Tensor]]:
    """Return full batches to calibrate, to choose and to measure on.

    ValueError if there are too few images.
    """
    inputs = torch.cat([batch.cpu().float() for batch in unlabeled(batches)])
    num = len(inputs) // size
    if num < 3:
        raise ValueError(
            f"batches: expected at least {3 * size} images to calibrate, choose and measure int8 "
            f"on, found {len(inputs)}: pass more"
        )
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    full = [inputs[some] for some in order[: num * size].split(size)]
    first = max(1, min(num // 3, _CALIBRATED // size))
    second = first + (num - first) // 2
    return [full[:first], full[first:second], full[second:]]


# ---- quantizing ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tried:
    """The file that was chosen, and how far from the float32 one each that was tried is."""

    file: Path
    ranges: dict[str, Difference]
    bits: dict[int, Difference]


def _tried(
    whole: Path,
    calibration: Sequence[Tensor],
    choosing: Sequence[Tensor],
    ranges: Sequence[str],
    weight_bits: Sequence[int],
) -> _Tried:
    """Return the file whose ranges agree best with the float32 one, with the closer weights."""
    reference, first = _Session(whole), weight_bits[0]
    files: dict[tuple[str, int], Path] = {}

    def apart(name: str, bits: int) -> Difference:
        files[name, bits] = small = whole.with_name(f"{whole.stem}-{name}-{bits}.onnx")
        _quantize(whole, small, calibration, name, bits)
        return difference(_Session(small), reference, choosing)

    by_range = {name: apart(name, first) for name in ranges}
    best = _best(by_range)
    by_bits = {first: by_range[best], **{bits: apart(best, bits) for bits in weight_bits[1:]}}
    return _Tried(files[best, _closest(by_bits)], by_range, by_bits)


def check_bits(weight_bits: Sequence[int]) -> None:
    """Raise a ValueError unless these are bits of weights that can be tried, each once."""
    known = set(weight_bits) <= set(WEIGHT_BITS)
    if not (weight_bits and known and len(set(weight_bits)) == len(weight_bits)):
        found = ", ".join(map(str, weight_bits)) or "none"
        raise ValueError(f"weight_bits: expected 8, 7 or both, found {found}")


def _closest(tried: Mapping[int, Difference]) -> int:
    return min(tried, key=lambda bits: tried[bits].share)


def _best(tried: Mapping[str, Difference]) -> str:
    """Return what agrees best; of equals what is closest."""
    return max(tried, key=lambda name: (tried[name].agreement, -tried[name].share))


def _quantize(
    whole: Path, small: Path, calibration: Sequence[Tensor], ranges: str, weight_bits: int
) -> None:
    tools = importlib.import_module("onnxruntime.quantization")
    method, options = _RANGES[ranges]
    kinds = {node.op_type for node in importlib.import_module("onnx").load(whole).graph.node}
    with _quiet():
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
            return None if batch is None else {"images": batch.numpy()}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the quantizer prints and logs from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


# ---- measuring -------------------------------------------------------------------------------


class _Session(nn.Module):
    """An ONNX file as a module: ONNX Runtime, one thread of the CPU."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = runtime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        size = self._session.get_inputs()[0].shape[0]
        self._size = size if isinstance(size, int) else None
        # Says where, and in what type, it runs.
        self._parameter = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, images: Tensor) -> Any:
        """Run the file on images [B, ...], those beyond its own batch size in further calls."""
        size = self._size or len(images)
        short = images[:1].expand(-len(images) % size, *images.shape[1:])  # nothing, mostly
        calls = [
            self._session.run(None, {"images": part.contiguous().numpy()})
            for part in torch.cat([images, short]).split(size)
        ]
        outputs = tuple(
            torch.cat(list(map(torch.from_numpy, parts)))[: len(images)]
            for parts in zip(*calls, strict=True)
        )
        return outputs[0] if len(outputs) == 1 else outputs


def _measured(
    sessions: Mapping[str, _Session], files: Mapping[str, Path], images: list[Tensor], repeats: int
) -> dict[str, Run]:
    reference = next(iter(sessions.values()))
    times = _timed(sessions, images[0], repeats)
    runs = {}
    for name, session in sessions.items():
        same = difference(session, reference, images).agreement
        runs[name] = Run(same, files[name].stat().st_size, *times[name])
    return runs


def _timed(sessions: Mapping[str, _Session], x: Tensor, repeats: int) -> dict[str, Sequence[Any]]:
    """Return median and quartiles of the milliseconds of one call, the files taking turns."""
    if not repeats:
        return dict.fromkeys(sessions, (None, None))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(repeats + 2):  # the first two are not counted
        for name, session in sessions.items():
            start = time.perf_counter()
            session(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    found: dict[str, Sequence[Any]] = {}
    for name, all_of in times.items():
        low, middle, high = statistics.quantiles(all_of[2:], n=4, method="inclusive")
        found[name] = (middle, (low, high))
    return found
