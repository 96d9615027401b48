"""Single weights removed: criteria at equal repair, without labels and without a gradient step.

    python benchmarks/weights.py --model cifar_resnet56 --checkpoint FILE \
        --train-dir cifar10-train.tar --test-dir cifar10-test.tar --seeds 3

A seed draws the unlabeled training images and the probes. Magnitude, which can rank weights across
layers and within them, is given both; 2:4 ranks within four neighbours, in tpv's case with all
others of the row standing in. One CSV row per (model, granularity, criterion, scope, repair, keep,
images, seed); rows that exist are skipped, so a run that was stopped goes on. Ends with a Markdown
table, mean ± sd over the seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import write_environment
from errors import in_one_line
from oneshot import images
from rows import add_output_folder, append, grouped, mean_and_sd, read

from tpvprune import keep_freed_memory
from tpvprune.passes.evaluation import evaluate, model_outputs
from tpvprune.saved.models import load_model
from tpvprune.weights.pruning import prune_weights

KEY = ["model", "granularity", "criterion", "scope", "repair", "keep", "num_images", "seed"]
COLUMNS = [*KEY, "density", "top1", "dense_top1", "agreement", "output_variance", "seconds"]
PATTERNED = [("tpv", "joint"), ("magnitude", "neighbours"), ("wanda", "neighbours")]
FREE = [("tpv", "joint"), ("magnitude", "global"), ("magnitude", "layer"), ("wanda", "row")]


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"weights-{args.model}.csv"
    done = read(path, KEY)
    model, _ = load_model(args.model, checkpoint=args.checkpoint)
    test = images(args, model, args.test_dir, None, 0)
    dense: float | None = None
    answers: list[torch.Tensor] = []
    for seed in range(args.seeds):
        wanted = [key for key in settings(args, seed) if tuple(map(str, key)) not in done]
        if not wanted:
            continue
        if dense is None:
            dense, answers = evaluate(model, test).top1, model_outputs(model, test)
        train = images(args, model, args.train_dir, args.num_images, seed)
        for key in wanted:
            row = measure(model, train, (test, answers), dict(zip(KEY, key, strict=True)))
            append(path, row | {"dense_top1": f"{100 * dense:.2f}"}, COLUMNS)
            print(" ".join(map(str, key)), row["top1"], flush=True)
    write_environment(path.with_suffix(".json"), args)
    print(markdown(path))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--train-dir", required=True)
    parser.add_argument("--test-dir", required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5])
    parser.add_argument("--repair", nargs="+", default=["compensate"])
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--input-size", type=int, nargs=3, default=None)
    parser.add_argument("--crop-pct", type=float, default=None)
    parser.add_argument("--threads", type=int, default=1)
    add_output_folder(parser)
    return parser.parse_args(argv)


def settings(args: argparse.Namespace, seed: int) -> list[tuple[Any, ...]]:
    """Return the keys of all rows of one seed."""
    patterned = [("2:4", c, scope, 0.5) for c, scope in PATTERNED]
    free = [("weight", c, scope, keep) for keep in args.keep for c, scope in FREE]
    return [
        (args.model, granularity, criterion, scope, repair, keep, args.num_images, seed)
        for repair in args.repair
        for granularity, criterion, scope, keep in patterned + free
    ]


def measure(model: Any, train: Any, proof: Any, key: dict[str, Any]) -> dict[str, Any]:
    """Prune once and return the finished row; ``proof`` is the test set and the dense answers."""
    test, answers = proof
    start = time.perf_counter()
    free = key["granularity"] == "weight"
    result = prune_weights(
        model,
        train,
        keep=key["keep"],
        pattern=None if free else key["granularity"],
        criterion=key["criterion"],
        scope=None if key["scope"] == "neighbours" else key["scope"],
        repair=key["repair"],
        seed=key["seed"],
    )
    seconds = time.perf_counter() - start
    found = evaluate(result.model, test, dense=answers)
    before, after = (result.report[which]["weights"] for which in ("dense", "pruned"))
    return key | {
        "density": f"{after / before:.4f}",
        "top1": f"{100 * found.top1:.2f}",
        "agreement": f"{100 * (found.agreement or 0):.2f}",
        "output_variance": f"{found.output_variance:.4f}",
        "seconds": f"{seconds:.1f}",
    }


def markdown(path: Path) -> str:
    """Return the table of a result file: mean ± sd over the seeds."""
    lines = [
        "| model | removed | criterion | ranked in | repair | keep | top-1 | variance | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in grouped(path, KEY[:-1]).items():
        measured = (mean_and_sd(rows, column) for column in ("top1", "output_variance"))
        cells = [*key[:6], *measured]
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
