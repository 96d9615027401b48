"""The whole way on timm's families: prune, check the budget, save, load, compare bit by bit.

    python benchmarks/timm_models.py

Random weights and random images: this shows that cuts, budgets and files are right on every
architecture, not how accurate the pruned models are.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from environment import write_environment
from rows import add_output_file

from tpvprune.pipeline import prune
from tpvprune.saved.checkpoint import load_pruned, save_pruned
from tpvprune.saved.models import load_model

MODELS = [
    "resnet18",
    "resnet50",
    "mobilenetv2_100",
    "efficientnet_b0",
    "convnext_atto",
    "densenet121",
    "regnety_002",
    "resnext50_32x4d",
    "vit_tiny_patch16_224",
]
COLUMNS = [
    "model", "groups", "blocked", "macs_kept", "params_kept", "in_budget", "bit_equal",
    "output_variance", "output_second_moment", "seconds", "error",
]  # fmt: skip
SLACK = 0.02  # MACs must land in [keep - SLACK, keep]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    print(
        f"{'model':22} {'groups':>6} {'blocked':>7} {'MACs':>7} {'params':>7} {'budget':>6} "
        f"{'reload':>8} {'seconds':>8}"
    )
    for name in args.models:
        row = attempt(args, name)
        rows.append(row)
        print(line(row), flush=True)
        with args.output.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, restval="")
            table.writeheader()
            table.writerows(rows)
    write_environment(args.output.with_suffix(".json"), args)
    return int(any(row["in_budget"] != "yes" or row["bit_equal"] != "yes" for row in rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--repair", default="compensate")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="print where an error came from")
    add_output_file(parser, "timm_models.csv")
    return parser.parse_args(argv)


def attempt(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A model that fails is a row of the table, not the end of the run."""
    start = time.perf_counter()
    try:
        row = measure(args, name)
    except Exception as error:
        if args.trace:
            traceback.print_exc()
        message = (str(error).splitlines() or [""])[0]
        row = {"in_budget": "no", "bit_equal": "no", "error": f"{type(error).__name__}: {message}"}
    return {"model": name, **row, "seconds": f"{time.perf_counter() - start:.1f}"}


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    size = (3, args.image_size, args.image_size)
    model, source = load_model(name, input_size=size, seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randn(args.num_images, *size, generator=generator).split(args.batch_size)
    result = prune(model, images, keep=args.keep, repair=args.repair, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_pruned(
            result, Path(folder) / name, model_name=source.name, model_kwargs=source.kwargs
        )
        loaded = load_pruned(saved)
    with torch.no_grad():
        same = torch.equal(result.model.eval()(images[0]), loaded(images[0]))
    report = result.report
    kept = {key: report["pruned"][key] / report["dense"][key] for key in ("macs", "params")}
    chosen = report["repair_chosen"]
    return {
        "groups": len(report["groups"]),
        "blocked": len(report["blocked"]),
        "macs_kept": f"{kept['macs']:.4f}",
        "params_kept": f"{kept['params']:.4f}",
        "in_budget": "yes" if args.keep - SLACK <= kept["macs"] <= args.keep + 1e-9 else "no",
        "bit_equal": "yes" if same else "no",
        "output_variance": f"{report['output_variance'][chosen]:.4g}",
        "output_second_moment": f"{report['output_second_moment']:.4g}",
    }


def line(row: dict[str, Any]) -> str:
    if row.get("error"):
        return f"{row['model']:22} {row['error']}"
    return (
        f"{row['model']:22} {row['groups']:6} {row['blocked']:7} {row['macs_kept']:>7} "
        f"{row['params_kept']:>7} {row['in_budget']:>6} {row['bit_equal']:>8} {row['seconds']:>8}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
