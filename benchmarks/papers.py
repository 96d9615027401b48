"""What five papers claim, tried on small networks: figures with intervals, and verdicts.

    python benchmarks/papers.py [--data-dir TRAIN --test-dir TEST] [--docs docs/claims.md]

Networks without BatchNorm are trained to a loss of 0.01 on scikit-learn's digits in many ways:
initialisations of several sizes, labels that are wrong at first, for good or on additional images,
several sizes of training set, SGD at two rates and Adam. Where folders or tars of labelled images
are named (CIFAR-10), some are trained on 1,000 of them, and small ResNets on more. Every measure is
taken of each network, and of what pruning leaves of it (results/papers-models.csv, to which a run
that was stopped, or one of more seeds, adds what is missing; likewise results/papers-students.csv).
A claim is held where the bootstrap intervals of its figures lie on the right side of its
thresholds, not held where one lies on the wrong side, else undecided (results/papers-claims.csv).
With --rows-only nothing is trained: all is made anew from the rows of these two files.
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
from errors import in_one_line
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
from paper_statistics import Row, configuration, distinct
from rows import add_output_folder, append
from titles import markdown
from tqdm import tqdm

from tpvprune import agreement, distill, keep_freed_memory
from tpvprune.diagnostics.trajectory import Trajectory, input_lipschitz

MODELS = "papers-models.csv"
STUDENTS = "papers-students.csv"


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure what is missing, then print the table of claims."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    start = time.perf_counter()
    if args.rows_only:
        rows, students = (kept(args.output / name) for name in (MODELS, STUDENTS))
        if not rows:
            raise ValueError(f"{args.output / MODELS}: expected rows of an earlier run, found none")
    else:
        rows = [row for images, chosen in pools(args) for row in taken(args, images, chosen)]
        students = [row for seed in range(args.seeds) for row in taught(args, seed)]
    found = claims(rows, students)
    write(args, found)
    table = markdown(Claim._fields, found)
    print(table)
    print(section(rows))
    print(f"\n{len(distinct(rows))} networks, {time.perf_counter() - start:.0f} s")
    if args.docs:
        args.docs.write_text(page(table, rows), "utf-8")
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
    add_output_folder(parser)
    parser.add_argument("--rows-only", action="store_true", help="train nothing: read its rows")
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
    known = {_key(row): row for row in kept(path)}
    rows = []
    for way in tqdm(chosen, desc=images.name, unit="network"):
        key = _key({"images": images.name, **asdict(way)})
        if key not in known:
            try:
                found = measured(images, way)
            except ValueError as error:  # large initialisations may end with dead layers
                print(f"left out: {way}: {error}")
                continue
            known[key] = written(path, found)
        rows.append(known[key])
    return rows


def taught(args: argparse.Namespace, seed: int) -> list[Row]:
    """Read the students of one dense network, or teach them."""
    path = args.output / STUDENTS
    known = [row for row in kept(path) if row["seed"] == seed]
    return known or [written(path, row) for row in distilled(digits(), seed)]


def kept(path: Path) -> list[Row]:
    """Return the rows of an earlier run."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        needed = {field.name for field in fields(Way)} if path.name == MODELS else {"length"}
        if lacking := needed - {*(table.fieldnames or ())}:
            raise ValueError(f"{path}: lacks {min(lacking)!r}, it is older: move it away")
        return [{k: _number(v) for k, v in row.items()} for row in table]


def written(path: Path, row: Row) -> Row:
    """Append a row to a file, and return it as it will be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {k: f"{v:.8g}" if isinstance(v, float) else str(v) for k, v in row.items()}
    append(path, texts, list(texts))
    return {k: _number(v) for k, v in texts.items()}


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


def page(table: str, rows: Sequence[Row]) -> str:
    """Return the page of the claims."""
    networks = distinct(rows)
    names = "; ".join(dict.fromkeys(row["images"] for row in rows))
    ways, seeds = len({*map(configuration, networks)}), len({row["seed"] for row in rows})
    resnets = [row["arch"] for row in rows if row["arch"] != "chain"]
    own = "" if names == "digits" else " --data-dir … --test-dir …"
    own += f" --resnet {resnets[0]}" if {*resnets} - {"resnet8"} else ""
    return (
        "# Five papers' claims, tried here\n\n"
        f"{len(networks)} small networks of {ways} configurations on {names}; seeds: {seeds}, one "
        "thread; every number by\n\n"
        f"    python benchmarks/papers.py --seeds {seeds}{own} --docs docs/claims.md\n\n"
        "which also writes one row per network to `benchmarks/results/papers-models.csv` (a "
        "network of several sets has a row in\neach and counts once) and one per student to "
        "`papers-students.csv`. `--rows-only --docs docs/claims.md` makes this page\nfrom those "
        "rows and trains nothing.\n\n"
        "In brackets are 95 % intervals of a bootstrap. What is drawn are configurations, each "
        "with all of its seeds, as seeds\nof one configuration are alike; where given ways of "
        "training are compared (the three claims of Zhang and Louis), the\nseeds of each way; for "
        "students, the dense networks that they come from. Where these are few, say eight and "
        "less, an\ninterval is a rough guide, and rather too narrow. Draws repeat networks, and "
        "that moves a rank correlation: an interval\nreaches over the quantiles of the draws, and "
        "over the same less the draws' median bias, so that it contains the figure.\n\n"
        "A claim is *held* where the intervals of all its figures lie within its thresholds, set "
        "beforehand, *not held* where one\nlies outside, else *undecided*: for networks of this "
        "size, on these images, and no further. Correlations are Spearman's.\nWhere a paper "
        "measures something that is out of reach here, the line says what was taken instead.\n\n"
        "Two things were changed after results were seen. Of TPV's ratios of test and training "
        "images the quantiles count, as a\nbootstrap is no guide to extremes; these lay within "
        "the same thresholds. And networks were drawn at first, as if their\nseeds were "
        "independent, which made intervals too narrow.\n\n"
        f"{table}\n\n{section(rows)}"
    )


def write(args: argparse.Namespace, found: Sequence[Claim]) -> None:
    """Write the claims and what they were measured with."""
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "papers-claims.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(Claim._fields)
        lines.writerows(found)
    if not args.rows_only:  # the versions that the rows were measured with stay
        write_environment(args.output / "papers.json", args)


if __name__ == "__main__":
    raise SystemExit(main())
