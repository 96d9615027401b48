"""What five papers claim, tried on small networks: figures with intervals, and verdicts.

    python benchmarks/papers.py [--data-dir TRAIN --test-dir TEST] [--docs docs/claims.md]

Networks without BatchNorm are trained to a loss of 0.01 on scikit-learn's digits in many ways:
initialisations of several sizes, labels that are wrong at first, for good or on additional images,
several sizes of training set, SGD at two rates and Adam. Where folders or tars of labelled images
are named (CIFAR-10), some are trained on 1,000 of them, and small ResNets on more. Every measure is
taken of each network, and of what pruning leaves of it (results/papers-models.csv, to which a run
that was stopped, or one of more seeds, adds what is missing). A claim is held where the bootstrap
intervals of its figures lie on the right side of its thresholds, not held where one lies on the
wrong side, else undecided (results/papers-claims.csv).
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from environment import write_environment
from paper_claims import Claim, claims
from paper_models import (
    BATCH,
    CHAIN_CURVES,
    Images,
    Way,
    cut_to,
    digits,
    folder,
    measured,
    trained,
)
from paper_prediction import section
from paper_statistics import Row
from titles import markdown
from tqdm import tqdm

from tpvprune import agreement, distill, keep_freed_memory
from tpvprune.diagnostics.trajectory import Trajectory, input_lipschitz

RESULTS = Path(__file__).parent / "results"
MODELS = "papers-models.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure what is missing, then print the table of claims."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    start = time.perf_counter()
    rows = [row for images, chosen in pools(args) for row in taken(args, images, chosen)]
    students = [row for seed in range(args.seeds) for row in distilled(digits(), seed)]
    found = claims(rows, students)
    write(args, found)
    table = markdown(Claim._fields, found)
    print(table)
    print(section(rows))
    print(f"\n{len(rows)} networks, {time.perf_counter() - start:.0f} s")
    if args.docs:
        args.docs.write_text(page(table, rows, args))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder or tar of labelled training images")
    parser.add_argument("--test-dir", help="the same to test on")
    parser.add_argument("--num-images", type=int, default=1000, help="of each, for chains")
    parser.add_argument("--resnet", default="resnet8", help="resnet8, resnet20, ... or none")
    parser.add_argument("--resnet-images", type=int, default=5000, help="to train it on")
    parser.add_argument("--resnet-epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="write the table of claims here")
    return parser.parse_args(argv)


# ---- the sets -------------------------------------------------------------------------------


def pools(args: argparse.Namespace) -> Iterator[tuple[Images, list[Way]]]:
    """Yield images and the ways of training on them."""
    yield digits(), ways(args.seeds)
    if args.data_dir and args.test_dir:
        places = args.data_dir, args.test_dir
        # At the digits' rate of 0.05 layers die on larger images.
        chains = [
            replace(way, lr=0.01) for way in init_ways((0.7, 1.0, 2.0), (0.0, 1.0), args.seeds)
        ]
        yield folder("CIFAR-10", *places, (args.num_images,) * 2), chains
        if args.resnet != "none":
            size = args.resnet_images
            yield folder(f"CIFAR-10, {size:,}", *places, (size, 2000)), resnet_ways(args)


def resnet_ways(args: argparse.Namespace) -> list[Way]:
    """Ways of training a ResNet that lead to different accuracies."""
    differences: tuple[dict[str, Any], ...] = (
        {},
        {"mirrored": True},
        {"lr": 0.01},
        {"weight_decay": 0.0, "lr": 0.02},
        {"weight_decay": 5e-3},
        {"opt": "adam", "lr": 2e-3, "weight_decay": 1e-2},
        {"wrong": 0.2},
        {"num_train": args.resnet_images // 4, "max_epochs": 4 * args.resnet_epochs},
    )
    basis = {"lr": 0.1, "weight_decay": 5e-4, "max_epochs": args.resnet_epochs,
             "num_train": args.resnet_images, "arch": args.resnet}  # fmt: skip
    return [
        Way("resnet", seed=seed, **basis | other)
        for seed in range(args.seeds)
        for other in differences
    ]


def taken(args: argparse.Namespace, images: Images, chosen: Sequence[Way]) -> list[Row]:
    """Read the rows of an earlier run and measure the networks that it lacks, row by row."""
    path = args.output / MODELS
    known: dict[tuple[str, ...], Row] = {}
    if path.exists():
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            if lacking := {field.name for field in fields(Way)} - {*(table.fieldnames or ())}:
                raise SystemExit(f"{path}: lacks {min(lacking)!r}, it is older: move it away")
            known = {_key(row): row for row in table}
    rows = []
    for way in tqdm(chosen, desc=images.name, unit="network"):
        key = _key({"images": images.name, **asdict(way)})
        if key not in known:
            try:
                found = measured(images, way)
            except ValueError as error:  # large initialisations may end with dead layers
                print(f"left out: {way}: {error}")
                continue
            known[key] = {
                k: f"{v:.8g}" if isinstance(v, float) else str(v) for k, v in found.items()
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("a", newline="") as file:
                models = csv.DictWriter(file, list(known[key]))
                if new:
                    models.writeheader()
                models.writerow(known[key])
        rows.append({k: _number(v) for k, v in known[key].items()})
    return rows


def _key(row: Row) -> tuple[str, ...]:
    names = ("images", *(field.name for field in fields(Way)))
    return tuple(str(_number(str(row[name]))) for name in names)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def init_ways(scales: Sequence[float], wrongs: Sequence[float], seeds: int) -> list[Way]:
    return [
        Way("init", seed=seed, init_scale=scale, pretrain_wrong=wrong)
        for scale, wrong, seed in product(scales, wrongs, range(seeds))
    ]


def ways(seeds: int) -> list[Way]:
    """Every way of training on the digits."""
    every = range(seeds)
    found = [
        *init_ways((0.5, 0.7, 1.0, 1.5, 2.0), (0.0, 0.5, 1.0), seeds),
        *(
            Way("attack", seed=s, num_train=500, attack=n, opt=opt, lr=lr)
            for n, (opt, lr), s in product(
                (0, 50, 100, 200, 350, 500), (("sgd", 0.05), ("adam", 1e-3)), every
            )
        ),
        *(Way("noise", seed=s, wrong=w) for w, s in product((0, 0.1, 0.2, 0.4, 0.7, 1.0), every)),
        *(
            Way("curve", seed=s, num_train=n, opt=opt, lr=lr)
            for n, (opt, lr), s in product((125, 250, 500, 1000), CHAIN_CURVES, every)
        ),
        *(
            Way("random", seed=s, num_train=n, wrong=1.0)
            for n, s in product((125, 250, 500, 1000), every)
        ),
    ]
    return sorted(found, key=lambda way: way.seed)


def distilled(images: Images, seed: int) -> list[Row]:
    """Prune one network to several sizes without repair and let the dense one teach each."""
    dense, _, (x, _), _ = trained(images, Way("dense", seed=seed))
    batches, test = list(x.split(BATCH)), list(images.test[0].split(BATCH))
    rows = []
    for keep in (0.8, 0.6, 0.4, 0.2):
        small = cut_to(keep, dense, batches, seed).model
        watch = Trajectory(small, x[:2])
        student = distill(small, dense, batches, epochs=20, lr=0.02, watch=watch, seed=seed)
        rows.append(
            {
                "keep": keep,
                "seed": seed,
                "before": input_lipschitz(small, batches[:4]).value,
                "lipschitz": input_lipschitz(student, batches[:4]).value,
                "length": watch.weights.length,
                "distance": watch.weights.distance,
                "agreement": agreement(student, dense, test),
            }
        )
    return rows


# ---- what is written ------------------------------------------------------------------------


def page(table: str, rows: Sequence[Row], args: argparse.Namespace) -> str:
    """Return the page of the claims."""
    names = "; ".join(dict.fromkeys(row["images"] for row in rows))
    own = " --data-dir … --test-dir …" if args.data_dir else ""
    own += f" --resnet {args.resnet}" if args.resnet != "resnet8" else ""
    return (
        "# Five papers' claims, tried here\n\n"
        f"{len(rows)} small networks on {names}; seeds: {args.seeds}, one thread; "
        "every number by\n\n"
        f"    python benchmarks/papers.py --seeds {args.seeds}{own} --docs docs/claims.md\n\n"
        "which also writes one row per network to `benchmarks/results/papers-models.csv`. In "
        "brackets are 95 % intervals of a\nbootstrap over networks, or, where ways of training "
        "are compared, over the seeds of each way. A claim is *held* where the\nintervals of all "
        "its figures lie within its thresholds, set beforehand, *not held* where one lies "
        "outside, else *undecided*: for\nnetworks of this size, on these images, and no further. "
        "Correlations are Spearman's. Where a paper measures something that\nis out of reach "
        "here, the line says what was taken instead.\nOne measure was changed after it was seen: "
        "of TPV's ratios of test and training images the quantiles count,\nas a bootstrap is no "
        "guide to extremes; these lay within the same thresholds.\n\n"
        f"{table}\n\n{section(rows)}"
    )


def write(args: argparse.Namespace, found: Sequence[Claim]) -> None:
    """Write the claims and what they were measured with."""
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "papers-claims.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(Claim._fields)
        lines.writerows(found)
    write_environment(args.output / "papers.json", args)


if __name__ == "__main__":
    raise SystemExit(main())
