"""What does int8 cost a pruned model, and what the dense one?

    tpvprune prune --model cifar_resnet56 --checkpoint FILE --data-dir cifar10-train.tar \
        --num-images 512 --keep 0.5 --round-to 1 --output r56
    python benchmarks/int8.py r56 --dense FILE --data-dir cifar10-test.tar --num-images 2064

Runs `tpvprune export FOLDER --int8` with whatever flags follow the folder, and writes its table as
`int8-MODEL.csv`, one row per file. Agreement is in %, on `num_images` images that neither
calibrated nor chose a range: with the dense float32 file, and of int8 with the float32 file of the
same model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from environment import write_environment
from rows import add_output_folder, append

from tpvprune.cli.entry import main as tpvprune

COLUMNS = [
    "model", "file", "ranges", "num_images", "agreement_dense", "mb", "ms", "ms_low", "ms_high",
    "int8_agrees_with_float32", "onnxruntime",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Export, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what `tpvprune prune` wrote")
    add_output_folder(parser)
    args, flags = parser.parse_known_args(argv)
    document = exported(args.folder, flags)
    path = args.output / f"int8-{document['model']}.csv"
    path.unlink(missing_ok=True)
    for name in document["runs"]:
        append(path, row(document, name), COLUMNS)
    args.flags = [word.rpartition("/")[2] for word in flags]
    write_environment(path.with_suffix(".json"), args)
    return 0


def exported(folder: str, flags: Sequence[str]) -> dict[str, Any]:
    """Return what the command says of a folder; its file is not kept."""
    found = io.StringIO()
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(found):
        argv = ["export", folder, "--int8", "--json", "--output", f"{temporary}/x.onnx", *flags]
        if code := tpvprune(argv):
            raise SystemExit(code)
    return json.loads(found.getvalue())


def row(document: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the row of one file."""
    run = document["runs"][name]
    low, high = run["latency_range_ms"]
    return {
        "model": document["model"],
        "file": name,
        "ranges": document["ranges"] if name == "int8" else "",
        "num_images": document["num_images"],
        "agreement_dense": f"{100 * run['agreement']:.2f}",
        "mb": f"{run['num_bytes'] / 1e6:.2f}",
        "ms": f"{run['latency_ms']:.2f}",
        "ms_low": f"{low:.2f}",
        "ms_high": f"{high:.2f}",
        "int8_agrees_with_float32": f"{100 * document['agreement']:.2f}" if name == "int8" else "",
        "onnxruntime": version("onnxruntime"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
