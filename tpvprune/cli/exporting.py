"""`export`: a saved pruned model, or any other, as one file for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpvprune.cli.console import bar, counted, percent, running, say, stages, table
from tpvprune.cli.first_checks import has_images
from tpvprune.cli.flag_groups import check_unset
from tpvprune.cli.session import Outcome, Subject, open_evaluated, provenance
from tpvprune.cli.session_images import choose, open_data
from tpvprune.disk.path_checks import check_file
from tpvprune.images.fitted import Fits, said_of_seen
from tpvprune.images.loading import in_memory, permutation
from tpvprune.images.sources import ImageSource
from tpvprune.passes.difference import Difference
from tpvprune.passes.loss import Loss, agreement_interval
from tpvprune.repairs.guard import facts
from tpvprune.reports.report import read_report
from tpvprune.saved.export import Exported, export_model
from tpvprune.saved.int8 import Quantized, Run, export_int8, num_measuring
from tpvprune.saved.quantization import RANGES, WEIGHT_BITS, check_bits, check_ranges

_NUM_IMAGES, _NUM_INT8_IMAGES = 64, 512
_WIDE = 10.0
"""Points: an interval wider than this leaves open whether the file works."""
_NOTES = ("model", "model_kwargs", "weights", "preprocessing", "versions")


def run_export(args: argparse.Namespace) -> Outcome:
    """Export, compare, and say how close the file's outputs are."""
    given = has_images(args)
    _check(args, given=given)
    name = f"model-int8.{args.format}" if args.int8 else f"model.{args.format}"
    file = args.output or Path(args.folder) / name
    check_file(file, overwrite=args.overwrite)
    args.device = "cpu"
    args.num_images = args.num_images or (_NUM_INT8_IMAGES if args.int8 else _NUM_IMAGES)
    subject, dense = open_evaluated(args, compared=args.int8)
    batches, measuring = _images(args, subject) if given else ((), None)
    document: dict[str, Any] = provenance(args, subject)
    how = {
        "dynamic_batch": args.dynamic_batch,
        "overwrite": args.overwrite,
        "metadata": {name: document[name] for name in _NOTES},
    }
    document |= {"output": str(file), "format": args.format}
    if args.int8:
        document |= _int8(args, subject, batches, file, dense=dense, eval_images=measuring, **how)
    else:
        document |= _float(args, subject, batches, file, **how)
    say(f"saved: {file}")
    return 0, document


def _check(args: argparse.Namespace, *, given: bool) -> None:
    if args.output is None and args.folder is None:
        raise ValueError("--output F: expected the name of the file to write")
    if args.int8 and args.format != "onnx":
        raise ValueError(f"--int8: expected --format onnx, found {args.format}")
    if args.int8 and not given:
        raise ValueError("--int8: expected images to calibrate with: pass --data-dir D")
    if not args.int8:
        check_unset(
            args, dict.fromkeys(("dense", "ranges", "weight_bits")), "expected only with --int8"
        )
    check_bits(args.weight_bits or WEIGHT_BITS)
    check_ranges(args.ranges or RANGES)


def _images(args: argparse.Namespace, subject: Subject) -> tuple[Any, Any]:
    """Return images to export with, and those that measure int8 if these are to be others.

    For int8 the last of the draw, since an earlier `prune` took the first, and as far as there are
    any those that measure are what neither it nor a training was fitted to.
    """
    images = open_data(args, labelled=False)
    report = {} if subject.folder is None else read_report(subject.folder)
    if not args.int8 or images.count is None:
        if args.int8:
            _note_seen(report, images, range(args.num_images), "of them")
        chosen = choose(args, subject, images, args.num_images)
        return in_memory(chosen, progress=bar("reading images")), None
    unseen = Fits.of_report(report, images).unseen(images.count, seed=args.seed)
    last = set(unseen)
    order = [*(p for p in permutation(images.count, args.seed) if p not in last), *unseen]
    order = order[-args.num_images :]
    num = num_measuring(len(order), _batch_size(args))
    first = len(order) - num
    _note_seen(report, images, order[first:], f"of the {num} that measure int8")

    def read(places: list[int]) -> Any:
        chosen = choose(args, subject, images, None, places=places)
        return in_memory(chosen, progress=bar("reading images"))

    return read(order[:first]), read(order[first:]) if num else None


def _note_seen(
    report: Mapping[str, Any], images: ImageSource, places: Sequence[int], which: str
) -> None:
    what = said_of_seen(report, images, places, which)
    if what:
        say(f"note: {what}: on those the model is closer to the dense one than on others")


def _float(
    args: argparse.Namespace, subject: Subject, batches: Any, file: Path, **how: Any
) -> dict[str, Any]:
    x = subject.example[:1].expand(_batch_size(args), -1, -1, -1)
    with running("exporting"):
        exported = export_model(subject.model, x, file, format=args.format, batches=batches, **how)
    num_bytes = exported.file.stat().st_size
    _show(exported, num_bytes)
    return {
        "bytes": num_bytes,
        "input_shape": exported.input_shape,
        "num_random": exported.num_random,
        "num_images": exported.num_given,
        "difference": exported.difference,
    }


def _int8(
    args: argparse.Namespace, subject: Subject, batches: Any, file: Path, **how: Any
) -> dict[str, Any]:
    with stages() as progress:
        found = export_int8(
            subject.model,
            batches,
            file,
            ranges=args.ranges or RANGES,
            weight_bits=args.weight_bits or WEIGHT_BITS,
            batch_size=_batch_size(args),
            latency_repeats=args.latency_repeats,
            seed=args.seed,
            progress=progress,
            **how,
        )
    _show_int8(found)
    return {
        "bytes": found.runs["int8"].num_bytes,
        "input_shape": found.input_shape,
        "ranges": found.ranges,
        "tried": {name: facts(entry)["agreement"] for name, entry in found.tried.items()},
        "weights": asdict(found.weights),
        "tried_weights": {str(way): entry.share for way, entry in found.tried_weights.items()},
        "num_calibration": found.num_calibration,
        "num_choosing": found.num_choosing,
        "num_images": found.num_measured,
        "agreement": facts(found.difference)["agreement"],
        "variance_share": found.difference.share,
        "broken": found.difference.is_broken,
        "slower": found.slower is not None,
        "latency_batch_size": found.batch_size,
        "runs": {name: asdict(run) for name, run in found.runs.items()},
    }


def _batch_size(args: argparse.Namespace) -> int:
    return args.batch_size if args.batch_size and not args.dynamic_batch else 1


def _show_int8(found: Quantized) -> None:
    if found.warning:
        say(found.warning)
    other = "dense float32" if "dense float32" in found.runs else "float32"
    what = "agreement with" if found.difference.has_classes else "of the variance from"
    rows = [("", f"{what} {other}", "MB", f"ms, batch of {found.batch_size}")]
    for name, run in found.runs.items():
        near = f"{run.variance_share:.2g}" if run.agreement is None else percent(run.agreement)
        rows.append((name, near, f"{run.num_bytes / 1e6:.2f}", _spread(run)))
    table(rows)
    if found.slower:
        say(f"warning: {found.slower}", indent="  ")
    tried = ", ".join(f"{name} {_near(entry)}" for name, entry in found.tried.items())
    _show_agreement(found)
    say(
        f"ranges of activations from {found.num_calibration} images: {found.ranges}, the best on "
        f"{found.num_choosing} others ({tried})"
    )
    shares = "; ".join(f"{way}: {entry.share:.2g}" for way, entry in found.tried_weights.items())
    say(
        f"weights of {found.weights}, on this processor the closest on those {found.num_choosing} "
        f"(share of the variance: {shares})"
    )
    if len({way.bits for way in found.tried_weights}) > 1:
        say("for another processor choose the bits: --weight-bits 8 with VNNI, 7 without")
    say("ONNX Runtime, one thread; ms: median (quartiles)")


def _show_agreement(found: Quantized) -> None:
    """Say how sure the agreement is, and how many images would tell it; of features how near."""
    agreement, num = found.difference.agreement, found.num_measured
    if not found.difference.has_classes:
        say(
            f"int8 differs from its float32 on {counted(num, 'image')} held back by "
            f"{found.difference.share:.2g} of the outputs' variance (squared difference)"
        )
        return
    loss = Loss.of_agreement((1 - agreement) * num, num)
    say(
        f"int8 agrees with its float32 on {percent(agreement)} of {num} images held back "
        f"({agreement_interval(agreement, num, 1)}; squared "
        f"difference {found.difference.share:.2g} of the outputs' variance)"
    )
    if loss.width > _WIDE:
        total = found.num_calibration + found.num_choosing + num
        more = total + 2 * (loss.needed(_WIDE) - num)  # half of those above choose
        say(f"{num} images are few to tell: about --num-images {more} give {_WIDE:.0f} points")


def _near(found: Difference) -> str:
    return percent(found.agreement) if found.has_classes else f"{found.share:.2g}"


def _spread(run: Run) -> str:
    if run.latency_ms is None or run.latency_range_ms is None:
        return "-"
    low, high = run.latency_range_ms
    return f"{run.latency_ms:.2f} ({low:.2f} to {high:.2f})"


def _show(exported: Exported, num_bytes: int) -> None:
    shape = " x ".join("batch" if size is None else str(size) for size in exported.input_shape)
    say(f"inputs {shape}, preprocessing of the model; {num_bytes / 1e6:.1f} MB")
    images = f" and {exported.num_given} images" if exported.num_given else ""
    random = counted(exported.num_random, "random input")
    say(
        f"outputs compared on {random}{images}: largest difference {exported.difference:.2g} "
        "of the largest output"
    )
    if not exported.num_given:
        say("note: no images were compared: --data-dir D adds some")
