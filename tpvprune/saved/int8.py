"""A model as an int8 ONNX file: ranges from some images, chosen on others, measured on more."""

from __future__ import annotations

import copy
import math
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.disk.atomic import written_file
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.clock import Clock, Progress
from tpvprune.passes.evaluation import Difference, difference
from tpvprune.saved.export import check_target, export_model
from tpvprune.saved.quantization import (
    RANGES,
    WEIGHT_BITS,
    OnnxModule,
    Tried,
    WeightChoice,
    check_bits,
    check_ranges,
    tried_files,
)
from tpvprune.widths.speed import clock_of

_CALIBRATED = 64  # images at most: more take longer, and only widen the ranges of min-max


@dataclass(frozen=True)
class Run:
    """What one file costs and keeps, run by ONNX Runtime on one thread of the CPU.

    ``agreement`` is the fraction of equal top-1 with the float32 dense model (without one: with the
    float32 model), in [0, 1], on images that no range was calibrated or chosen on; None where the
    outputs are features. ``variance_share``: the squared difference there, as a share of the
    outputs' variance.
    """

    agreement: float | None
    num_bytes: int  # of the file
    latency_ms: float | None = None  # median time of one call; None if nothing was timed
    latency_range_ms: tuple[float, float] | None = None  # first and third quartile of those times
    variance_share: float = math.nan


@dataclass(frozen=True)
class Quantized:
    """An int8 file, and what was measured to choose it and of it."""

    file: Path
    input_shape: tuple[int | None, ...]  # of one batch; None first where the batch size is free
    ranges: str  # how the ranges of activations were chosen: the best of ``tried``
    num_calibration: int  # images that ranges were measured on
    num_choosing: int  # others, on which ``ranges`` agreed best with the float32 model
    num_measured: int  # others again, for ``difference`` and ``runs``
    tried: Mapping[str, Difference]  # by ranges, from the float32 file on the images to choose on
    weights: WeightChoice  # how weights were rounded: the closest of ``tried_weights``
    tried_weights: Mapping[WeightChoice, Difference]  # on those images, with ``ranges``
    difference: Difference  # the int8 file against the float32 file of the same model
    runs: Mapping[str, Run]  # "float32" and "int8", before them the same two of a dense model
    batch_size: int  # images of one call that was timed

    @property
    def warning(self) -> str | None:
        """That the file is broken, and what to try; None if it is not."""
        if not self.difference.is_broken:
            return None
        found = self.difference
        lost = (
            f"{100 * found.agreement:.1f} % of the classes of float32 are kept"
            if found.has_classes
            else f"a squared difference of {found.share:.2g} of the outputs' variance"
        )
        return (
            f"int8 is broken: {lost} on {self.num_measured} images held back: try more "
            "images, like those it will meet; check mean, std and size; else deploy float32"
        )

    @property
    def slower(self) -> str | None:
        """That the pruned model takes longer than the dense one, and what to try; None if not."""
        for kind in ("int8", "float32"):
            dense, pruned = self.runs.get(f"dense {kind}"), self.runs[kind]
            before, after = (run.latency_range_ms if run else None for run in (dense, pruned))
            if dense and before and after and after[0] > before[1]:
                return (
                    f"{kind} takes longer than the dense model's ({pruned.latency_ms:.2f} ms for "
                    f"{dense.latency_ms:.2f}): fewer channels are no faster where their number is "
                    "no multiple of what the processor computes at once: prune with --round-to 16, "
                    "or to milliseconds: --of latency --latency-runtime onnxruntime"
                )
        return None


def export_int8(
    model: nn.Module,
    batches: Iterable[Any],
    file: str | Path,
    *,
    eval_images: Iterable[Any] | None = None,
    dense: nn.Module | None = None,
    ranges: Sequence[str] = RANGES,
    weight_bits: Sequence[int] = WEIGHT_BITS,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    latency_repeats: int = 50,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quantized:
    """Write a model as an ONNX file that computes in int8, and measure what that changes.

    The float32 file of :func:`tpvprune.export_model`, in which every BatchNorm behind a
    convolution is folded into it, is quantized by ONNX Runtime's static quantizer (QDQ format):
    weights to int8 with a scale per output channel, activations to uint8 (on x86 the faster kind)
    with one range per tensor. Ranges are the smallest and largest value (``"min-max"``), without
    the outer 0.01 % (``"percentile"``), or of least divergence (``"entropy"``), whichever agrees
    best with the float32 file. In a network with LayerNorm or softmax only convolutions and matrix
    products are quantized, else every operator that can be. Of the images a third, at most 64,
    calibrates, half of the others chooses ranges, the rest measures, unless ``eval_images`` do; a
    seed says which is which.

    x86 processors without VNNI add pairs of products in 16 bits, where large ones saturate: weights
    of 8 bits are wrong there, of 7 not, at equal speed. Those of 7 are tried where those of 8
    differ by more than 1 % of the outputs' variance on the processor that this runs on, each with
    biases as they are and with the mean that rounding adds to a layer's outputs on the images to
    calibrate with taken from them (bias correction, Nagel et al., ICCV 2019); the closest is taken.
    For a file that will run on another processor, say which bits.

    Weights are not equalised across layers.

    Args:
        model: What to export, in eval mode; untouched.
        batches: Unlabeled inputs [B, ...], labels are dropped; all are held in memory.
        file: Where to write.
        eval_images: Unlabeled inputs that measure instead of a part of ``batches``, such as those
            that a pruned model was not fitted to.
        dense: The model that ``model`` was pruned from: is quantized and measured likewise.
        ranges: Which ranges to try, of :data:`RANGES`.
        weight_bits: Which bits of weights to try, of :data:`WEIGHT_BITS`, in this order.
        batch_size: Of the file, and of the calls that are timed.
        dynamic_batch: Leave the batch size of the file free.
        latency_repeats: Timed calls of each file, by turns; 0 for none, else at least 2.
        overwrite: Replace a file that is there.
        metadata: As of :func:`tpvprune.export_model`.
        seed: Which images calibrate, choose, and measure.
        progress: Called with (stage, done, total).

    Returns:
        The file, what was tried, and float32 and int8 side by side.

    Raises:
        ValueError: If a package is missing, the file may not be written, there are fewer images
            than three batches, the model cannot be exported, or ONNX Runtime cannot quantize it.
    """
    file = Path(file).expanduser()
    check_target(file, "onnx", overwrite=overwrite)
    check_bits(weight_bits)
    check_ranges(ranges)
    if latency_repeats == 1 or latency_repeats < 0:
        raise ValueError(f"latency_repeats: expected 0 or at least 2, found {latency_repeats}")
    calibration, choosing, measuring = _parts(batches, eval_images, batch_size, seed)
    models = {"": model} if dense is None else {"dense ": dense, "": model}
    tried: dict[str, Tried] = {}
    num_classes = getattr(model, "num_classes", None)
    clock = Clock(progress)
    with tempfile.TemporaryDirectory() as temporary, written_file(file) as unfinished:
        folder, files = Path(temporary), dict[str, Path]()
        for name, network in models.items():
            whole = folder / f"{name}float32.onnx"
            with clock(f"{name}export"):
                exported = export_model(
                    copy.deepcopy(network).float(),
                    calibration[0],
                    whole,
                    dynamic_batch=dynamic_batch,
                    batches=calibration[:1],
                    metadata=metadata,
                )
            step = partial(clock, f"{name}int8 files")
            tried[name] = tried_files(
                whole, calibration, choosing, ranges, weight_bits, num_classes=num_classes,
                step=step,
            )  # fmt: skip
            files |= {f"{name}float32": whole, f"{name}int8": tried[name].file}
        sessions = {name: OnnxModule(path, num_classes) for name, path in files.items()}
        with clock("measurement"):
            runs = _measured(sessions, files, measuring, latency_repeats)
            apart = difference(sessions["int8"], sessions["float32"], measuring)
        shutil.copyfile(files["int8"], unfinished)
    return Quantized(
        file=file,
        input_shape=exported.input_shape,
        ranges=tried[""].best_ranges,
        num_calibration=sum(map(len, calibration)),
        num_choosing=sum(map(len, choosing)),
        num_measured=sum(map(len, measuring)),
        tried=tried[""].ranges,
        weights=tried[""].best_weights,
        tried_weights=tried[""].weights,
        difference=apart,
        runs=runs,
        batch_size=len(measuring[0]),
    )


def num_measuring(num_images: int, batch_size: int = 1) -> int:
    """Return how many of so many images :func:`export_int8` measures on."""
    num = num_images // batch_size
    rest = num - _num_calibrating(num, batch_size)
    return batch_size * (rest - rest // 2)


def _num_calibrating(num: int, size: int) -> int:
    return max(1, min(num // 3, _CALIBRATED // size))


def _parts(
    batches: Iterable[Any], eval_images: Iterable[Any] | None, size: int, seed: int
) -> list[list[Tensor]]:
    """Return full batches to calibrate, choose and measure on; ValueError if images are too few."""
    inputs = _rows(batches)
    further = inputs[:0] if eval_images is None else _rows(eval_images)
    beside = len(further) // size
    num = len(inputs) // size + beside
    first = _num_calibrating(num, size)
    second = num - beside if beside else first + (num - first) // 2
    if num < 3 or second <= first or (eval_images is not None and not beside):
        given = f"{len(inputs)}" + ("" if eval_images is None else f" and {len(further)} others")
        raise ValueError(
            f"batches: expected at least {3 * size} images to calibrate, choose and measure int8 "
            f"on, found {given}: pass more"
        )
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    full = [inputs[some] for some in order[: (num - beside) * size].split(size)]
    full += further[: beside * size].split(size) if beside else ()
    return [full[:first], full[first:second], full[second:]]


def _rows(batches: Iterable[Any]) -> Tensor:
    return torch.cat([batch.cpu().float() for batch in unlabeled(batches)])


def _measured(
    sessions: Mapping[str, OnnxModule],
    files: Mapping[str, Path],
    images: list[Tensor],
    repeats: int,
) -> dict[str, Run]:
    reference = next(iter(sessions.values()))
    times = _timed(sessions, images[0], repeats)
    runs = {}
    for name, session in sessions.items():
        found = difference(session, reference, images)
        agreement = found.agreement if found.has_classes else None
        size, (middle, spread) = files[name].stat().st_size, times[name]
        runs[name] = Run(agreement, size, middle, spread, found.share)
    return runs


def _timed(sessions: Mapping[str, OnnxModule], x: Tensor, repeats: int) -> dict[str, Sequence[Any]]:
    """Return median and quartiles of the milliseconds of one call, the files taking turns."""
    if not repeats:
        return dict.fromkeys(sessions, (None, None))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    clock = clock_of(torch.device("cpu"), num_threads=1)  # as the sessions have
    for _ in range(repeats + 2):  # the first two are not counted
        for name, session in sessions.items():
            start = clock()
            session(x)
            times[name].append(1e3 * (clock() - start))
    quartiles = {n: statistics.quantiles(t[2:], n=4, method="inclusive") for n, t in times.items()}
    return {name: (middle, (low, high)) for name, (low, middle, high) in quartiles.items()}
