"""The TPV paper's pruning figures as a table: step by step to a tenth of the channels.

    python benchmarks/paper_pruning.py --model cifar_resnet56 --checkpoint FILE \
        --train-dir cifar10-train.tar --test-dir cifar10-test.tar

Channels leave in steps of equal number, whichever layer they are in, by a ranking taken anew on the
network as it is; every group keeps one. No weight is refitted: nothing is repaired, or BatchNorm is
recalibrated after each step (``--repair``). The eight criteria of the paper as its code has them,
ranked by score alone, and TPV: ranked likewise, and with widths by joint curves. A seed draws the
images, the probes and the random scores; where nothing depends on it there is one run. One CSV row
per measured step, written when the whole run is done; runs that exist are skipped, so a
measurement that was stopped goes on. Ends with the table and a chart, mean ± sd over the seeds.

Other than in the paper's code the images of a seed stay the same from step to step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import write_environment
from errors import in_one_line
from paper_chart import chart, table
from rows import add_output_folder, append, read
from torch import Tensor, nn

from tpvprune import find_groups, keep_freed_memory
from tpvprune.groups import ChannelGroup, ChannelGroups, with_blocked
from tpvprune.groups.axes import Axis
from tpvprune.groups.budget import LatencyTable, Term
from tpvprune.groups.removal import remove_channels
from tpvprune.images.loading import choose_images, in_memory
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.passes.clock import Clock
from tpvprune.passes.evaluation import evaluate
from tpvprune.passes.running import evaluating, on_device
from tpvprune.pipeline.setup import stand_in
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.saved.models import load_model
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS, Labelled, with_labels
from tpvprune.scores.taps import Probing
from tpvprune.widths.limits import Limits
from tpvprune.widths.ranking import RankBy

PAPER = ("jacobian", "jbr", "magnitude_l1", "random", "bn_scale", "fpgm", "whc",
         "taylor_torch_pruning")  # fmt: skip
OURS = ("tpv", "tpv_curves")
WEIGHTS_ALONE = frozenset({"magnitude", "magnitude_l1", "lamp", "bn_scale", "fpgm", "whc"})
NO_IMAGES = WEIGHTS_ALONE | {"random"}
KEY = ["model", "criterion", "repair", "ratio", "steps", "num_images", "num_test", "seed"]
SETTINGS = KEY[3:-1]  # one file, one setting: what is left of them is compared
COLUMNS = [*KEY, "step", "labels", "channels_kept", "macs_kept", "params_kept"]
COLUMNS += ["top1", "dense_top1", "seconds"]
LAST = torch.channels_last  # 2 times as fast where a layer keeps an odd number of channels
CONFIDENCE = 0.9  # softmax of the images that JBR sees, as in the paper's code

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ChannelCount(LatencyTable):
    """A budget of channels: each takes one "millisecond", in whichever layer it is."""

    def terms(self, groups: ChannelGroups) -> list[tuple[Term, tuple[Axis, ...]]]:
        """Return the channels that are left of each group, by the share that it keeps."""
        return [(partial(_share, g.num_channels), (_all_of(g),)) for g in groups]


def _share(size: int, shares: Sequence[float]) -> float:
    return size * shares[0]


def _all_of(group: ChannelGroup) -> Axis:
    every = torch.arange(group.num_channels)
    return Axis(group.num_channels, ((group.name, every, every),))


CHANNELS = ChannelCount({}, 0.0, 0.0, 1, 1, "channels")


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table and draw the chart."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"paper-pruning-{args.model}-{args.num_images}.csv"
    done = read(path, KEY)
    if problem := other_settings(args, path):
        print(problem, file=sys.stderr)
        return 2
    missing = [key for key in runs(args) if tuple(map(str, key.values())) not in done]
    if missing:
        measure(args, missing, path)
        write_environment(path.with_suffix(".json"), args)
    print(table(path))
    path.with_suffix(".svg").write_text(chart(path), "utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--train-dir", required=True, help="labelled images to prune with")
    parser.add_argument("--test-dir", required=True)
    known = [*SCORERS, "tpv_curves"]
    parser.add_argument("--criteria", nargs="+", default=[*OURS, *PAPER], choices=known)
    parser.add_argument("--repair", nargs="+", default=["none", "bn"], choices=["none", "bn"])
    parser.add_argument("--ratio", type=float, default=0.9, help="of the channels, that leaves")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--every", type=int, default=3, help="measured: every so many steps")
    parser.add_argument("--num-images", type=int, default=6400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-test", type=int, help="of the test images; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="seeds")
    parser.add_argument("--threads", type=int, default=1)
    add_output_folder(parser)
    args = parser.parse_args(argv)
    if not 0 < args.ratio < 1:
        parser.error(f"--ratio: expected a fraction between 0 and 1, found {args.ratio}")
    return args


def other_settings(args: argparse.Namespace, path: Path) -> str | None:
    """Return what a file was measured with, if that is not what is asked for."""
    wanted = tuple(str(next(runs(args))[name]) for name in SETTINGS)
    for found in read(path, SETTINGS):
        if found != wanted:
            held, asked = (
                ", ".join(f"{name} {value}" for name, value in zip(SETTINGS, values, strict=True))
                for values in (found, wanted)
            )
            return f"{path}: holds rows of {held}; found {asked}: choose another --output"
    return None


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the keys of all runs, all criteria of one seed before the next."""
    for seed in range(args.repeats):
        for repair in args.repair:
            for criterion in args.criteria:
                if seed and repair == "none" and criterion in WEIGHTS_ALONE:
                    continue
                values = (args.model, criterion, repair, args.ratio, args.steps,
                          args.num_images, args.num_test or "all", seed)  # fmt: skip
                yield dict(zip(KEY, values, strict=True))


def measure(args: argparse.Namespace, missing: Sequence[dict[str, Any]], path: Path) -> None:
    """Measure runs and write the rows of each when it is done."""
    dense, _ = load_model(args.model, checkpoint=args.checkpoint)
    dense = dense.to(memory_format=LAST)
    test = images(args, dense, args.test_dir, args.num_test, 0)
    dense_top1 = evaluate(dense, test).top1
    drawn: dict[int, Pairs] = {}
    for key in missing:
        seed = key["seed"]
        if seed not in drawn:
            drawn = {seed: images(args, dense, args.train_dir, args.num_images, seed)}
        rows = list(measured_run(dense, drawn[seed], test, key, args.every))
        for row in rows:
            append(path, row | {"dense_top1": f"{100 * dense_top1:.2f}"}, COLUMNS)
        said = " ".join(row["top1"] for row in rows)
        print(f"{key['criterion']} {key['repair']} seed {seed}: {said}", flush=True)


def images(
    args: argparse.Namespace, model: nn.Module, folder: str, num: int | None, seed: int
) -> Pairs:
    """Return labelled batches held in memory, channels last; ``num`` images, or all."""
    chosen = choose_images(
        open_images(folder, labelled=True), resolve_preprocessing(model), num_images=num,
        seed=seed, batch_size=args.batch_size, workers=1, labelled=True,
    )  # fmt: skip
    return [(x.contiguous(memory_format=LAST), y) for x, y in in_memory(chosen)]


def measured_run(
    dense: nn.Module, labelled: Pairs, test: Pairs, key: dict[str, Any], every: int
) -> Iterator[dict[str, Any]]:
    """Prune step by step, and yield the row of every so many steps."""
    before, start, apart = evaluate(dense, test[:1]), time.perf_counter(), 0.0
    for step, share, model in steps_down(dense, labelled, key, every):
        if step % every and step != key["steps"]:
            continue
        stopped = time.perf_counter()
        found = evaluate(model, test)
        yield key | {
            "step": step,
            "labels": "yes" if key["criterion"] in NEEDS_LABELS else "no",
            "channels_kept": f"{share:.4f}",
            "macs_kept": f"{found.macs / before.macs:.4f}",
            "params_kept": f"{found.params / before.params:.4f}",
            "top1": f"{100 * found.top1:.2f}",
            "seconds": f"{stopped - start - apart:.1f}",
        }
        apart += time.perf_counter() - stopped


def steps_down(
    dense: nn.Module, labelled: Pairs, key: dict[str, Any], every: int
) -> Iterator[tuple[int, float, nn.Module]]:
    """Yield (step, share of the channels that is left, network) after every step."""
    inputs = [x for x, _ in labelled]
    whole = groups = find_groups(dense, inputs[0][:1])
    total, model, steps = _channels(whole), dense, key["steps"]
    pairs = pseudo_labelled(dense, inputs) if key["criterion"] == "jbr" else labelled
    left = total
    for step in range(1, steps + 1):
        # Groups of one channel are no longer listed: theirs count, and stay.
        alone = left - _channels(groups)
        wanted = max(round(total * (1 - key["ratio"] * step / steps)) - alone, 1)
        ranking = ranked_by(key, pairs, step).ranked(model, groups, inputs, Clock(None))
        keep = wanted / _channels(groups)
        kept = ranking.choose(groups, keep=keep, of=CHANNELS, limits=Limits(round_to=1))
        left = alone + sum(int(mask.sum()) for mask in kept.values())
        model = remove_channels(model, groups, kept).to(memory_format=LAST)
        measured = step % every == 0 or step == steps
        # A ranking without images does not depend on the statistics in between.
        if key["repair"] == "bn" and (measured or key["criterion"] not in NO_IMAGES):
            model = recalibrate_batchnorm(model, inputs)
        groups = regrouped(model, whole, inputs[0][:1])
        yield step, left / total, model


def ranked_by(key: dict[str, Any], pairs: Pairs, step: int) -> RankBy:
    """Return how one step ranks; ``pairs`` are for criteria that read labels, and for JBR."""
    name = key["criterion"]
    allocation, criterion = ("curves", "tpv") if name == "tpv_curves" else ("plain", name)
    scorer = with_labels(criterion, pairs) if name != "jbr" else Labelled("jacobian", pairs)
    probing = Probing(seed=key["seed"] * key["steps"] + step)
    return RankBy(scorer, allocation, CHANNELS, stand_in(key["repair"]), probing)


@torch.no_grad()
def pseudo_labelled(dense: nn.Module, inputs: Sequence[Tensor]) -> Pairs:
    """Return the images of which the dense network is sure, with its classes: JBR's labels.

    With them JBR is the Jacobian criterion; they stay those of the dense network at every step.
    """
    with evaluating(dense):
        top = torch.cat([dense(on_device(x, dense)).softmax(1) for x in inputs]).max(1)
    sure = top.values > CONFIDENCE
    x, y, size = torch.cat(list(inputs))[sure], top.indices[sure], len(inputs[0])
    return list(zip(x.split(size), y.split(size), strict=True))


def regrouped(model: nn.Module, whole: ChannelGroups, x: Tensor) -> ChannelGroups:
    """Return the groups of a pruned network, of those that were proved on the whole one."""
    found = find_groups(model, x, verify=False)
    return with_blocked(found, {g.name: "blocked before" for g in found if g.name not in whole})


def _channels(groups: ChannelGroups) -> int:
    return sum(group.num_channels for group in groups)


if __name__ == "__main__":
    raise SystemExit(main())
