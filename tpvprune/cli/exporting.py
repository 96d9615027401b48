"""`export`: a saved pruned model, or any other, as one file for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tpvprune.cli.console import bar, say
from tpvprune.cli.session import open_evaluated, provenance
from tpvprune.cli.session_images import choose, open_data
from tpvprune.disk.path_checks import check_file
from tpvprune.images.loading import in_memory
from tpvprune.saved.export import Exported, export_model


def run_export(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Export, compare, and say how close the file's outputs are."""
    if args.output is None and args.folder is None:
        raise ValueError("--output F: expected the name of the file to write")
    file = args.output or Path(args.folder) / f"model.{args.format}"
    check_file(file, overwrite=args.overwrite)
    args.device, args.dense = "cpu", None
    subject, _ = open_evaluated(args)
    batches: Any = ()
    if args.data_dir is not None or args.data_list is not None or args.dataset:
        images = open_data(args, labelled=False)
        batches = in_memory(
            choose(args, subject, images, args.num_images), progress=bar("reading images")
        )
    size = args.batch_size if args.batch_size and not args.dynamic_batch else 1
    document: dict[str, Any] = provenance(args, subject)
    notes = ("model", "model_kwargs", "weights", "preprocessing", "versions")
    exported = export_model(
        subject.model,
        subject.example[:1].expand(size, -1, -1, -1),
        file,
        format=args.format,
        dynamic_batch=args.dynamic_batch,
        batches=batches,
        overwrite=args.overwrite,
        metadata={name: document[name] for name in notes},
    )
    document |= {
        "output": str(exported.file),
        "format": exported.format,
        "bytes": exported.file.stat().st_size,
        "input_shape": exported.input_shape,
        "num_random": exported.num_random,
        "num_images": exported.num_given,
        "difference": exported.difference,
    }
    _show(exported, document["bytes"])
    return 0, document


def _show(exported: Exported, num_bytes: int) -> None:
    shape = " x ".join("batch" if size is None else str(size) for size in exported.input_shape)
    say(f"inputs {shape}, preprocessing of the model; {num_bytes / 1e6:.1f} MB")
    images = f" and {exported.num_given} images" if exported.num_given else ""
    say(
        f"outputs compared on {exported.num_random} random inputs{images}: largest difference "
        f"{exported.difference:.2g} of the largest output"
    )
    if not exported.num_given:
        say("note: no images were compared: --data-dir D adds some")
    say(f"saved: {exported.file}")
