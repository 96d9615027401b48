"""Milliseconds as the budget against MACs as the budget: speed by the clock, and agreement.

    python benchmarks/latency.py --model cifar_resnet56 --checkpoint FILE \
        --train-dir cifar10-train.tar --test-dir cifar10-test.tar
    python benchmarks/latency.py --model resnet50 --macs-keep 0.5 --num-images 512 \
        --num-test 64 --train-dir cifar10-train.tar --test-dir cifar10-test.tar

Every model is timed by turns with the dense one, with `--latency-runtime` in that runtime.
Agreement with the dense model is measured on unlabeled images of the test set; without a
checkpoint the weights are random and it means little.
Between the models that were cut to MACs, agreement is interpolated to the latency that the one
cut to milliseconds has: which of the two budgets leaves a better model at the same speed?
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch
from environment import write_environment
from errors import in_one_line
from rows import add_output_folder, append, interpolated
from unlabeled import images_of, opened_model

from tpvprune.cli.flag_groups import Parser, add_model, add_preprocessing
from tpvprune.cli.flag_values import count, fraction
from tpvprune.passes.evaluation import agreement
from tpvprune.pipeline import PruningResult, prune
from tpvprune.runtimes.names import RUNTIMES
from tpvprune.widths.limits import Limits
from tpvprune.widths.speed import compare_latency

COLUMNS = [
    "model", "image_size", "batch_size", "of", "keep", "macs_kept", "dense_ms", "pruned_ms",
    "ratio", "ratio_low", "ratio_high", "agreement", "seconds", "peak_gib",
]  # fmt: skip


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    model = opened_model(args)
    train = images_of(args, model, args.train_dir, args.num_images, batch_size=args.batch_size)
    test = images_of(args, model, args.test_dir, args.num_test, batch_size=args.batch_size)
    rows: list[dict[str, Any]] = []
    where = "" if args.latency_runtime == "eager" else f"-{args.latency_runtime}"
    path = args.output / f"latency-{args.model}{where}.csv"
    path.unlink(missing_ok=True)

    def measured(of: str, keep: float, sizes: Sequence[int]) -> None:
        start = time.perf_counter()
        limits = Limits(round_to="auto" if of == "latency" else 1)
        where = {"latency_runtime": args.latency_runtime} if of == "latency" else {}
        result = prune(
            model, train, keep=keep, of=of, granularity=("channel",),
            latency_batch_size=sizes[0], seed=args.seed, limits=limits, **where,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        same = agreement(result.model, model, test)
        for size in sizes:
            rows.append(row(result, size, same, seconds))
            append(path, rows[-1], COLUMNS)
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)

    def row(result: PruningResult, size: int, same: float, seconds: float) -> dict[str, Any]:
        batch = torch.cat(test)[:1].repeat_interleave(size, 0)
        speed = compare_latency(
            model, result.model, batch, rounds=args.rounds, runtime=args.latency_runtime
        )
        return {
            "model": args.model,
            "image_size": batch.shape[-1],
            "batch_size": size,
            "of": result.report["of"],
            "keep": result.report["keep"],
            "macs_kept": f"{result.groups.macs(result.kept) / result.groups.macs():.3f}",
            "dense_ms": f"{speed.dense_ms:.2f}",
            "pruned_ms": f"{speed.pruned_ms:.2f}",
            "ratio": f"{speed.ratio:.3f}",
            "ratio_low": f"{speed.ratio_low:.3f}",
            "ratio_high": f"{speed.ratio_high:.3f}",
            "agreement": f"{100 * same:.2f}",
            "seconds": f"{seconds:.0f}",
            "peak_gib": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}",
        }

    for keep in args.macs_keep:
        measured("macs", keep, args.batch_sizes)
    for size in args.batch_sizes:
        measured("latency", args.keep, [size])
    for size in args.batch_sizes:
        print(verdict([r for r in rows if r["batch_size"] == size]))
    write_environment(path.with_suffix(".json"), args)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    add_preprocessing(parser)
    run = parser.section("run")
    run.add_argument("--train-dir", required=True, metavar="D", help="folder or .tar to prune with")
    run.add_argument("--test-dir", required=True, metavar="D", help="likewise, for the agreement")
    run.add_argument("--keep", type=fraction, default=0.6, help="of the milliseconds (0.6)")
    run.add_argument(
        "--macs-keep", type=fraction, nargs="+", default=[0.6, 0.45, 0.35, 0.25, 0.15, 0.1]
    )
    run.add_argument("--batch-sizes", type=count, nargs="+", default=[1, 32], help="timed (1 32)")
    run.add_argument("--batch-size", type=count, default=125, help="of the passes (125)")
    run.add_argument("--latency-runtime", choices=RUNTIMES, default="eager")
    run.add_argument("--num-images", type=count, default=1000)
    run.add_argument("--num-test", type=count, default=None)
    run.add_argument("--rounds", type=count, default=25)
    run.add_argument("--threads", type=count, default=2)
    run.add_argument("--seed", type=int, default=0)
    add_output_folder(run)
    return parser.parse_args(argv)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Return how models cut to MACs, at the latency of the one cut to milliseconds, compare."""
    ours = next(r for r in rows if r["of"] == "latency")
    head = f"batch {ours['batch_size']}: ratio {ours['ratio']}, agreement {ours['agreement']}"
    points = sorted((float(r["ratio"]), float(r["agreement"])) for r in rows if r is not ours)
    same = interpolated(points, float(ours["ratio"]))
    if same is not None:
        return f"{head}; cut to MACs at this ratio {same:.2f}"
    return f"{head}; cut to MACs: ratios from {points[0][0]} to {points[-1][0]} only"


if __name__ == "__main__":
    raise SystemExit(main())
