"""One-shot accuracy: prune, repair, evaluate on the full test set. No labels, no gradient step.

    python benchmarks/oneshot.py --model cifar_resnet56 --checkpoint FILE \
        --train-dir cifar10-train.tar --test-dir cifar10-test.tar --keep 0.7 0.5 0.3 --seeds 3
    python benchmarks/oneshot.py ... --keep 0.5 --calibration noise digits
    python benchmarks/oneshot.py ... --keep 0.5 --calibration train mirrored
    python benchmarks/oneshot.py ... --keep 0.5 --num-images 64
    python benchmarks/oneshot.py ... --keep 0.47 --num-images 3000 --repair reconstruct \
        --reconstructions 3

A seed draws the unlabeled images and the probes. One CSV row per (model, criterion, allocation,
repair, steps, images, what they show, reconstructions, keep, seed); rows that exist are skipped, so
a run that was stopped goes on. Ends with a Markdown table, mean ± sd over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import write_environment
from errors import in_one_line
from rows import add_output_folder, append, grouped, mean_and_sd, read
from sklearn.datasets import load_digits
from torch.nn import functional as F

from tpvprune import keep_freed_memory
from tpvprune.images.loading import choose_images, in_memory
from tpvprune.images.preprocessing import Preprocessing, resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.passes.evaluation import evaluate, model_outputs
from tpvprune.pipeline import prune
from tpvprune.saved.models import load_model
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS, with_labels
from tpvprune.widths.limits import Limits

KEY = ["model", "criterion", "allocation", "repair", "steps", "num_images", "calibration"]
KEY += ["reconstructions", "keep", "seed"]
COLUMNS = [*KEY, "labels", "macs_kept", "params_kept", "top1", "dense_top1", "agreement", "seconds"]


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"oneshot-{args.model}.csv"
    done = read(path, KEY)
    model, _ = load_model(args.model, checkpoint=args.checkpoint)
    test = images(args, model, args.test_dir, None, 0)
    dense: float | None = None
    answers: list[torch.Tensor] = []
    for seed in range(args.seeds):
        wanted = [w for w in settings(args, seed) if tuple(map(str, w)) not in done]
        if not wanted:
            continue
        if dense is None:
            dense, answers = evaluate(model, test).top1, model_outputs(model, test)
        shown = {kind: CALIBRATIONS[kind](args, model, seed) for kind in args.calibration}
        for values in wanted:
            key = dict(zip(KEY, values, strict=True))
            row = measure(model, shown[key["calibration"]], (test, answers), key)
            row["dense_top1"] = f"{100 * dense:.2f}"
            append(path, row, COLUMNS)
            setting = f"{row['criterion']} {row['calibration']} keep {row['keep']} seed {seed}"
            print(f"{setting}: {row['top1']}", flush=True)
    write_environment(path.with_suffix(".json"), args)
    print(markdown(path))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description="one-shot pruning accuracy")
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--train-dir", required=True)
    parser.add_argument("--test-dir", required=True)
    parser.add_argument("--input-size", type=int, nargs=3, default=None)
    parser.add_argument("--crop-pct", type=float, default=None)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--criteria", nargs="+", default=["tpv"], choices=list(SCORERS))
    parser.add_argument("--allocation", choices=["curves", "rank"], default=None)
    parser.add_argument("--repair", default="compensate")
    parser.add_argument("--reconstructions", type=int, default=1, help="the mean of so many")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=["train"],
        choices=CALIBRATIONS,
        help="what pruning sees: training images, also with their mirror images, uniform noise, or "
        "resized handwritten digits",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_output_folder(parser)
    args = parser.parse_args(argv)
    labelled = sorted(NEEDS_LABELS.intersection(args.criteria))
    if labelled and not set(args.calibration) <= {"train", "mirrored"}:
        parser.error(f"criteria {', '.join(labelled)} need labels: of training images alone")
    return args


def settings(args: argparse.Namespace, seed: int) -> list[tuple[Any, ...]]:
    """Return the keys of all rows of one seed."""
    return [
        (
            args.model,
            criterion,
            args.allocation or ("curves" if criterion == "tpv" else "rank"),
            args.repair,
            args.steps,
            args.num_images,
            calibration,
            args.reconstructions,
            keep,
            seed,
        )
        for calibration in args.calibration
        for criterion in args.criteria
        for keep in args.keep
    ]


def images(args: argparse.Namespace, model: Any, folder: str, num: int | None, seed: int) -> Any:
    """Return labelled batches held in memory; ``num`` of them, or all."""
    return in_memory(
        choose_images(
            open_images(folder, labelled=True),
            resolve_preprocessing(model, input_size=args.input_size, crop_pct=args.crop_pct),
            num_images=num,
            seed=seed,
            batch_size=125,
            workers=2,
            labelled=True,
        )
    )


def training_images(args: argparse.Namespace, model: Any, seed: int) -> Any:
    """Return what the model was made for."""
    return images(args, model, args.train_dir, args.num_images, seed)


def noise(args: argparse.Namespace, model: Any, seed: int) -> Any:
    """Return images whose every value is uniform in [0, 1]."""
    how = resolve_preprocessing(model, input_size=args.input_size, crop_pct=args.crop_pct)
    generator = torch.Generator().manual_seed(seed)
    return normalised(torch.rand(args.num_images, *how.input_size, generator=generator), how)


def digits(args: argparse.Namespace, model: Any, seed: int) -> Any:
    """Return scikit-learn's grey 8 x 8 digits, resized to the model's inputs."""
    how = resolve_preprocessing(model, input_size=args.input_size, crop_pct=args.crop_pct)
    found = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    size = how.input_size
    chosen = F.interpolate(found[order[: args.num_images]], size=size[1:], mode="bilinear")
    return normalised(chosen.expand(-1, size[0], -1, -1), how)


def normalised(pixels: torch.Tensor, how: Preprocessing) -> list[torch.Tensor]:
    """Return batches as the model takes them, of pixels [N, C, H, W] in [0, 1]."""
    mean, std = (torch.tensor(how.config[key])[:, None, None] for key in ("mean", "std"))
    return list(((pixels - mean) / std).split(125))


CALIBRATIONS = {
    "train": training_images, "mirrored": training_images, "noise": noise, "digits": digits,
}  # fmt: skip


def measure(model: Any, train: Any, proof: Any, key: dict[str, Any]) -> dict[str, Any]:
    """Prune once and return the finished row; ``proof`` is the test set and the dense answers."""
    test, answers = proof
    start = time.perf_counter()
    result = prune(
        model,
        train,
        keep=key["keep"],
        criterion=with_labels(key["criterion"], train),
        allocation=key["allocation"],
        repair=key["repair"],
        reconstructions=key["reconstructions"],
        steps=key["steps"],
        mirrored=key["calibration"] == "mirrored",
        limits=Limits(round_to=1),
        seed=key["seed"],
    )
    seconds = time.perf_counter() - start
    found = evaluate(result.model, test, dense=answers)
    before, after = result.report["dense"], result.report["pruned"]
    macs, params = (after[k] / before[k] for k in ("macs", "params"))
    if macs > key["keep"] + 1e-9:
        raise RuntimeError(f"budget missed: {macs:.4f} of the MACs for keep {key['keep']}")
    return key | {
        "labels": "yes" if key["criterion"] in NEEDS_LABELS else "no",
        "macs_kept": f"{macs:.4f}",
        "params_kept": f"{params:.4f}",
        "top1": f"{100 * found.top1:.2f}",
        "agreement": f"{100 * (found.agreement or 0):.2f}",
        "seconds": f"{seconds:.1f}",
    }


def markdown(path: Path) -> str:
    """Return the table of a result file: mean ± sd of top-1 over the seeds."""
    lines = [
        "| model | criterion | widths | repair | steps | images | of | mean of | MACs kept "
        "| top-1 | dense | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in grouped(path, KEY[:-1]).items():
        macs = statistics.mean(float(r["macs_kept"]) for r in rows)
        cells = [*key[:8], f"{macs:.3f}", mean_and_sd(rows, "top1")]
        lines.append("| " + " | ".join([*cells, rows[0]["dense_top1"], str(len(rows))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
