"""Scoring with one process of one thread against two of them: the same scores, in half the time.

    python benchmarks/processes.py --model cifar_resnet56 --num-images 2000

Starts itself with torchrun (gloo, CPU), by turns with one process. Random weights, random images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torch
from environment import write_environment
from rows import add_output_folder, append

import tpvprune.cifar_resnet  # noqa: F401  (registers them with timm)
from tpvprune.groups import find_groups
from tpvprune.processes.membership import is_first, joined
from tpvprune.processes.shares import shard
from tpvprune.scores.tpv import tpv_scores

COLUMNS = [
    "model", "num_images", "batch_size", "compensated", "processes", "repeats",
    "seconds", "seconds_low", "seconds_high", "speed_up", "difference",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Time both by turns, print and write; or be one of the processes."""
    args = parse(argv)
    torch.set_num_threads(1)
    if args.leave is not None:
        with joined():
            score(args)
        return 0
    path = args.output / f"processes-{args.model}.csv"
    path.unlink(missing_ok=True)
    for compensated in (False, True):
        rounds = [{n: started(args, n, compensated) for n in (1, 2)} for _ in range(args.repeats)]
        for n in (1, 2):
            times = [r[n][0] for r in rounds]
            row = {
                "model": args.model,
                "num_images": args.num_images,
                "batch_size": args.batch_size,
                "compensated": compensated,
                "processes": n,
                "repeats": args.repeats,
                "seconds": f"{statistics.median(times):.2f}",
                "seconds_low": f"{min(times):.2f}",
                "seconds_high": f"{max(times):.2f}",
                "speed_up": f"{statistics.median(r[1][0] / r[n][0] for r in rounds):.2f}",
                "difference": f"{max(distance(r[1][1], r[n][1]) for r in rounds):.1e}",
            }
            append(path, row, COLUMNS)
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    write_environment(path.with_suffix(".json"), args)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar_resnet56")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    add_output_folder(parser)
    parser.add_argument("--leave", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--compensated", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def started(
    args: argparse.Namespace, num: int, compensated: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the seconds that scoring took in so many processes, and the scores."""
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "scores.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num)]
        command += [__file__, "--model", args.model, "--size", str(args.size)]
        command += ["--num-images", str(args.num_images), "--batch-size", str(args.batch_size)]
        command += ["--leave", str(left), *(["--compensated"] if compensated else [])]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds, scores = torch.load(left, weights_only=True)
        return seconds, scores


def score(args: argparse.Namespace) -> None:
    """Score once to warm up, once by the clock; the first process leaves what it found."""
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    images = torch.randn(args.num_images, 3, args.size, args.size)
    groups = find_groups(model, images[:1], verify=False)
    batches = list(shard(images.split(args.batch_size)))
    tpv_scores(model, groups, batches[:1], compensated=False)
    start = time.perf_counter()
    scores = tpv_scores(model, groups, batches, compensated=args.compensated)
    seconds = time.perf_counter() - start
    if is_first():
        torch.save((seconds, dict(scores)), args.leave)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference of a group's scores."""
    return max(float((one[n] - other[n]).norm() / one[n].norm()) for n in one)


if __name__ == "__main__":
    raise SystemExit(main())
