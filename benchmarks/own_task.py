"""Your own fine-tuned network, its labels gone: which way to a smaller one pays, in equal minutes?

    python benchmarks/get_weights.py tf_efficientnet_lite1 lite1.safetensors
    python benchmarks/get_weights.py tf_efficientnet_lite0 lite0.safetensors
    python benchmarks/own_task.py --model tf_efficientnet_lite1 --checkpoint lite1.safetensors \
        --train-dir caltech101-train --test-dir caltech101-test --img-size 128 --crop-pct 1 \
        --smaller 0.7 tf_efficientnet_lite0 lite0.safetensors \
        --smaller 0.5 mobilenetv2_100 pretrained --seeds 3 --threads 1

The network is fine-tuned with labels on `--train-dir` (folder or tar with one folder per class,
such as Caltech-101), once for each seed, and kept in `--work`: the teacher. From there on every way
has the same unlabeled images, the same share of the MACs and the same minutes of wall time, in
which all must fit that it does after the teacher exists; loading weights, and what is read into
memory once, does not count. A smaller network (`--smaller KEEP NAME CHECKPOINT [K=V ...]`;
CHECKPOINT may be `pretrained`, K `mean` or `std`) starts from its ImageNet weights and a new
classifier, and learns from the teacher alone.

A seed draws images, classifiers and all that is random. One CSV row per way, share and seed is
appended as soon as it is measured; rows that exist are skipped. `held_agreement`, in % of images
that no way trains on, chooses rates: `--training pruned=logits:0.003` is another loss and learning
rate for `pruned` networks, `smaller` ones, or those trained with `labels`; with `:frozen` behind
them BatchNorm keeps its running statistics. Exit code 2: bad input, in one line.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from environment import processor, write_environment
from errors import in_one_line
from rows import add_output_file, append
from teachers import Task, opened
from ways import CUTS, DENSE, WAYS, Job, Smaller, quality

from tpvprune import keep_freed_memory
from tpvprune.cli.flag_groups import Parser, add_model, add_preprocessing
from tpvprune.cli.flag_values import count, fraction, positive

SETTINGS = ("weights", "images", "arguments")
"""Columns in which all rows of a file must agree."""
KEY = ("model", "way", "keep", "seed", "training")
COLUMNS = (
    *KEY, "network", "labels", "top1", "dense_top1", "agreement", "held_agreement", "macs_kept",
    "ms_kept", "mb", "minutes", "minutes_cutting", *SETTINGS, "versions", "hardware",
)  # fmt: skip
TRAINING = {
    "pruned": "divergence:0.01:frozen",
    "smaller": "divergence:0.03",
    "labels": "cross-entropy:0.01",
}
"""Of three tried each, that of the best ``held_agreement``: results/own-task-rates.csv."""
_LOSSES = {"pruned": ("logits", "divergence"), "smaller": ("logits", "divergence"),
           "labels": ("cross-entropy",)}  # fmt: skip
Row = dict[str, str]


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing."""
    args = parse(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for row in measured(args, finished(args.output)):
        append(args.output, row, COLUMNS)
        print(
            f"{row['way']}, {row['keep']} of MACs, seed {row['seed']}: top-1 {row['top1']}, "
            f"agreement {row['agreement']}, {row['minutes']} minutes",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    write_environment(args.output.with_suffix(".json"), args)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; wrong ones are a ValueError."""
    parser = Parser(prog="own_task.py", description=__doc__.splitlines()[0])
    add_model(parser)
    add_preprocessing(parser)
    images = parser.section("images")
    images.add_argument("--train-dir", required=True, metavar="D", help="one folder per class")
    images.add_argument("--test-dir", required=True, metavar="D", help="the same classes")
    images.add_argument("--num-train", type=count, metavar="N", help="take so many (all)")
    images.add_argument("--num-test", type=count, metavar="N", help="likewise")
    images.add_argument(
        "--num-images", type=count, default=512, metavar="N", help="to choose channels with (512)"
    )
    images.add_argument("-b", "--batch-size", type=count, default=32, metavar="N", help="(32)")
    how = parser.section("comparison")
    how.add_argument("--keep", type=fraction, nargs="+", default=[0.7, 0.5], help="(0.7 0.5)")
    how.add_argument("--minutes", type=positive, default=4.0, metavar="M", help="of a way (4)")
    how.add_argument("--epochs", type=count, default=5, metavar="N", help="of the teacher (5)")
    how.add_argument("--smaller", nargs="+", action="append", default=[], metavar="X")
    how.add_argument("--training", nargs="+", default=[], metavar="KIND=LOSS:RATE[:frozen]")
    how.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(all)")
    run = parser.section("run")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (0)")
    run.add_argument("--seeds", type=count, default=1, metavar="N", help="how many (1)")
    run.add_argument("--threads", type=count, default=1, metavar="N", help="(1)")
    run.add_argument("--work", type=Path, default=Path("own-task"), metavar="D", help="teachers")
    add_output_file(run, "own-task.csv")
    args = parser.parse_args(argv)
    args.smaller = [_smaller(words) for words in args.smaller]
    args.training = TRAINING | dict(map(_training, args.training))
    return args


def _smaller(words: Sequence[str]) -> Smaller:
    try:
        keep, name, checkpoint, *pairs = words
        options = dict(pair.split("=", 1) for pair in pairs)
        return Smaller(float(keep), name, checkpoint, options)
    except ValueError as error:
        raise ValueError(
            f"--smaller: expected KEEP NAME CHECKPOINT [K=V ...], found {' '.join(words)}"
        ) from error


def _training(text: str) -> tuple[str, str]:
    kind, _, how = text.partition("=")
    loss, _, more = how.partition(":")
    rate, _, frozen = more.partition(":")
    if loss not in _LOSSES.get(kind, ()) or not rate or frozen not in ("", "frozen"):
        raise ValueError(
            "--training: expected pruned|smaller=logits|divergence:RATE[:frozen] or "
            f"labels=cross-entropy:RATE[:frozen], found {text}"
        )
    positive(rate)
    return kind, how


def finished(path: Path) -> list[Row]:
    """Return the rows of a file; a ValueError if it is another kind of file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if list(table.fieldnames or ()) != list(COLUMNS):
            raise ValueError(f"{path}: expected rows of own_task.py: choose another --output")
        return list(table)


def measured(args: argparse.Namespace, done: Sequence[Row] = ()) -> Iterator[Row]:
    """Measure the rows that are not done.

    Raises:
        ValueError: If what is done was measured on something else.
    """
    settings = settings_of(args)
    for row in done:
        for name, value in settings.items():
            if row[name] != value:
                raise ValueError(
                    f"--output: its rows were measured with {name} {row[name]!r}, found "
                    f"{value!r}: choose another file"
                )
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    keys = {tuple(row[name] for name in KEY) for row in done}
    for seed in range(args.seed, args.seed + args.seeds):
        task: Task | None = None
        for keep, ways, job in jobs(args):
            missing = [
                way for way in ways if tuple(key_of(args, way, keep, seed).values()) not in keys
            ]
            if not missing:
                continue
            task = task or opened(args, seed)
            for made in job(task, keep):
                if made.way in missing:
                    key = key_of(args, made.way, keep, seed)
                    yield key | quality(task, made) | settings | surroundings()
                if made.way == missing[-1]:
                    break  # what comes after it was not asked for, or is known


def jobs(args: argparse.Namespace) -> Iterator[tuple[float, Sequence[str], Job]]:
    """Return what there is to do: share of the MACs, the ways that come of it, how."""
    for keep in (1.0, *args.keep):
        sizes = {found.keep for found in args.smaller}
        for job, made in (DENSE if keep == 1 else CUTS).items():
            ways = [way for way in made if way in args.ways]
            if "smaller + distill" not in made or keep in sizes:
                yield keep, ways, job


def key_of(args: argparse.Namespace, way: str, keep: float, seed: int) -> Row:
    """Return what tells a row from all others."""
    kind = WAYS[way]
    return {
        "model": args.model.partition(".")[0],
        "way": way,
        "keep": f"{keep:g}",
        "seed": str(seed),
        "training": args.training[kind] if kind else "",
    }


def settings_of(args: argparse.Namespace) -> Row:
    """Return what decides the rows besides what they say themselves; of paths the last part."""
    size = args.input_size or (args.img_size and [3, args.img_size, args.img_size])
    given = {
        "size": size and "x".join(map(str, size)),
        **{name: getattr(args, name) for name in ("mean", "std", "crop_pct", "interpolation")},
        **dict(args.model_kwargs),
        **{
            name: getattr(args, name)
            for name in ("epochs", "minutes", "num_train", "num_test", "num_images", "batch_size")
        },
    }
    return {
        "weights": Path(args.checkpoint).name if args.checkpoint else "pretrained",
        "images": f"{Path(args.train_dir).name}; {Path(args.test_dir).name}",
        "arguments": "; ".join(f"{k} {v}" for k, v in given.items() if v is not None),
    }


def surroundings() -> Row:
    """Return versions and hardware."""
    names = ("tpvprune", "torch", "timm", "torch-pruning", "onnxruntime")
    return {
        "versions": "; ".join(f"{name} {version(name)}" for name in names),
        "hardware": f"{processor()}; {torch.get_num_threads()} threads",
    }


if __name__ == "__main__":
    raise SystemExit(main())
