"""How well each criterion ranks channels by what their removal really does to the outputs.

    python benchmarks/fidelity.py --model cifar_resnet20 --checkpoint FILE --data-dir TRAIN.tar
    python benchmarks/fidelity.py ... --granularity branch --num-images 128

The truth is brute force: every channel removed alone, E_x ‖f without it − f‖² over the images.
Each criterion then scores the same channels from the same images, and Spearman's rank correlation
with the truth is reported over all channels of the network and as the mean within a group; once
for all groups and once for the groups inside blocks, without the residual streams. Criteria that
need labels get them and are marked. Residual branches are measured likewise, each removed alone.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from environment import write_environment
from errors import in_one_line
from rows import add_output_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tpvprune import keep_freed_memory
from tpvprune.depth import Branch, Removal, branch_scores, find_branches, remove_branches
from tpvprune.diagnostics import ablation_scores, spearman
from tpvprune.groups import ChannelGroup, ChannelGroups, find_groups
from tpvprune.images.loading import choose_images, in_memory
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.evaluation import output_variance
from tpvprune.saved.models import load_model
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS

COLUMNS = [
    "model", "criterion", "labels", "groups", "num_groups", "num_channels", "num_measured",
    "num_images", "spearman", "within_group", "seconds", "seed",
]  # fmt: skip
# What removing one channel does, uncompensated, is what the truth measures.
CRITERIA: dict[str, Callable[..., Any]] = SCORERS | {
    "tpv": partial(SCORERS["tpv"], compensated=False),
    "tpv_8_probes": partial(SCORERS["tpv"], compensated=False, num_probes=8),
    "tpv_compensated": SCORERS["tpv"],
}
BRANCH_CRITERIA: dict[str, Callable[..., dict[str, float]]] = {
    "tpv": partial(branch_scores, compensated=False),
    "tpv_compensated": branch_scores,
}
Parts = Sequence[ChannelGroup] | Sequence[Branch]


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, _ = load_model(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint)
    model.to(args.device)
    batches = load_images(args, model)
    images = list(unlabeled(batches))
    parts: ChannelGroups | Sequence[Branch]
    if args.granularity == "branch":
        parts = find_branches(model, images[0][:2])
        truth = known(args, lambda: remove_each(model, parts, images))
        chosen_parts: dict[str, Parts] = {"branches": parts}
    else:
        parts = find_groups(model, images[0][:2])
        truth = known(args, lambda: measure(args, model, parts, images))
        chosen_parts = scopes(model, parts)

    rows = []
    scores: dict[str, dict[str, Tensor]] = {}
    for name in args.criteria:
        start = time.perf_counter()
        try:
            scores[name] = score(args, name, model, parts, batches)
        except ValueError as error:
            print(f"{name}: left out: {error}")
            continue
        seconds = time.perf_counter() - start
        for scope, chosen in chosen_parts.items():
            rows.append(
                {
                    "model": args.model,
                    "criterion": name,
                    "labels": "yes" if name in NEEDS_LABELS else "no",
                    "groups": scope,
                    "num_groups": len(chosen),
                    "num_images": args.num_images,
                    "seconds": f"{seconds:.1f}",
                    "seed": args.seed,
                    **compare(truth, scores[name], chosen),
                }
            )
    report(rows)
    write(args, rows, truth, scores)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar_resnet20", help="timm's name")
    parser.add_argument("--checkpoint", help="weights; random weights without")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--data-dir", required=True, help="folder or tar of labelled images")
    parser.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    parser.add_argument("--crop-pct", type=float)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--granularity", choices=("channel", "branch"), default="channel")
    parser.add_argument("--criteria", default="all", help="names with commas between, or all")
    parser.add_argument("--max-channels", type=int, help="measure at most so many per group")
    parser.add_argument("--truth", type=Path, help="read the truth from here, or save it here")
    parser.add_argument("--batch-size", "-b", type=int, default=125)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    add_output_folder(parser)
    args = parser.parse_args(argv)
    usable = BRANCH_CRITERIA if args.granularity == "branch" else CRITERIA
    args.criteria = list(usable) if args.criteria == "all" else args.criteria.split(",")
    if unknown := [name for name in args.criteria if name not in usable]:
        parser.error(f"unknown criteria {unknown}: choose from {', '.join(usable)}")
    return args


def load_images(args: argparse.Namespace, model: nn.Module) -> list[Any]:
    labelled = args.granularity == "channel"
    batches = choose_images(
        open_images(args.data_dir, labelled=labelled),
        resolve_preprocessing(model, input_size=args.input_size, crop_pct=args.crop_pct),
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        workers=1,
        labelled=labelled,
    )
    if not labelled:
        return [x.to(args.device) for x in unlabeled(in_memory(batches))]
    return [(x.to(args.device), y.to(args.device)) for x, y in in_memory(batches)]


def known(args: argparse.Namespace, measured: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the truth, read from a file if it is there."""
    if args.truth and args.truth.exists():
        return load_file(args.truth)
    truth = measured()
    if args.truth:
        args.truth.parent.mkdir(parents=True, exist_ok=True)
        save_file(truth, args.truth)
    return truth


def remove_each(
    model: nn.Module, branches: Sequence[Branch], images: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return E‖f without the branch − f‖² of every branch, each as a tensor of one."""
    truth = {}
    for branch in tqdm(branches, desc="removing branches"):
        smaller = remove_branches(model, Removal.of(branches, [branch.name]), share=True)
        truth[branch.name] = torch.tensor([output_variance(smaller, model, images)])
    return truth


def score(
    args: argparse.Namespace, name: str, model: nn.Module, parts: Any, batches: list[Any]
) -> dict[str, Tensor]:
    """Return the scores of the channels of each group, or of each branch as a tensor of one."""
    if args.granularity == "branch":
        found = BRANCH_CRITERIA[name](model, parts, batches, seed=args.seed)
        return {branch: torch.tensor([value]) for branch, value in found.items()}
    given = batches if name in NEEDS_LABELS else list(unlabeled(batches))
    scored = CRITERIA[name](model, parts, given, seed=args.seed)
    return {group.name: scored[group.name].cpu().double() for group in parts}


def measure(
    args: argparse.Namespace, model: nn.Module, groups: ChannelGroups, images: Iterable[Tensor]
) -> dict[str, Tensor]:
    progress = tqdm(unlabeled(images), desc="removing channels, batch", total=len(list(images)))
    scores = ablation_scores(
        model, groups, progress, max_channels=args.max_channels, seed=args.seed
    )
    return {group.name: scores[group.name] for group in groups}


def scopes(model: nn.Module, groups: ChannelGroups) -> dict[str, list[ChannelGroup]]:
    """A residual stream is what more than one layer writes."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def writers(group: ChannelGroup) -> int:
        return sum(
            part.side == "producer"
            and len(shapes.get(part.param, ())) > 1
            and shapes[part.param][1] > 1  # a depthwise convolution only passes channels on
            for part in group.slices
        )

    return {"all": list(groups), "inside blocks": [g for g in groups if writers(g) == 1]}


def compare(truth: dict[str, Tensor], scores: dict[str, Tensor], groups: Parts) -> dict[str, Any]:
    names = [group.name for group in groups]
    every = torch.cat([truth[name] for name in names])
    within = [spearman(scores[name], truth[name]) for name in names]
    within = [r for r in within if not math.isnan(r)]
    return {
        "num_channels": len(every),
        "num_measured": int((~every.isnan()).sum()),
        "spearman": f"{spearman(torch.cat([scores[name] for name in names]), every):.4f}",
        "within_group": f"{sum(within) / len(within):.4f}" if within else "",
    }


def report(rows: list[dict[str, Any]]) -> None:
    for scope in dict.fromkeys(row["groups"] for row in rows):
        mine = [row for row in rows if row["groups"] == scope]
        first = mine[0]
        what = (
            f"{first['num_groups']} branches"
            if scope == "branches"
            else (
                f"{scope} groups: {first['num_groups']} groups, "
                f"{first['num_measured']} of {first['num_channels']} channels measured"
            )
        )
        print(f"\n{first['model']}, {what}, {first['num_images']} images")
        print(f"{'criterion':22} {'labels':6} {'Spearman':>9} {'in group':>9} {'seconds':>8}")
        for row in sorted(mine, key=lambda row: -float(row["spearman"])):
            print(
                f"{row['criterion']:22} {row['labels']:6} {row['spearman']:>9} "
                f"{row['within_group']:>9} {row['seconds']:>8}"
            )


def write(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    truth: dict[str, Tensor],
    scores: dict[str, dict[str, Tensor]],
) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    stem, each = args.output / f"fidelity-{args.model}", "channels"
    if args.granularity == "branch":
        stem, each = args.output / f"fidelity-branches-{args.model}", "each"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    with Path(f"{stem}-{each}.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["group", "channel", "ablation", *scores])
        for name, values in truth.items():
            for channel, value in enumerate(values.tolist()):
                found = [f"{scores[c][name][channel].item():.6g}" for c in scores]
                lines.writerow([name, channel, f"{value:.6g}", *found])
    write_environment(stem.with_suffix(".json"), args)


if __name__ == "__main__":
    raise SystemExit(main())
