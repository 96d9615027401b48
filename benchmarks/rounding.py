"""What do multiples of 8 or 16 in the widths cost in accuracy, and what do they save in time?

    python benchmarks/rounding.py --round-to 1 16 auto --runtimes eager onnxruntime \
        --model tf_efficientnet_lite0 --checkpoint FILE --calib-dir photos --class-map FILE \
        --test-dir labelled --keep 0.8 0.6

All other flags are those of `photographs.py`. One ranking by TPV curves serves every
size; each is compensated, measured on the labelled images and timed by turns with the dense
network, one image a call. Writes results/rounding-MODEL.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from typing import Any

import torch
from environment import write_environment
from errors import in_one_line
from photograph_flags import add_flags, parsed
from photographs import RESULTS, Cut, calibration, opened, quality

from tpvprune import Limits, keep_freed_memory, prune
from tpvprune.cli.flag_groups import Parser
from tpvprune.cli.flag_values import count_or_auto
from tpvprune.passes.batches import unlabeled
from tpvprune.runtimes.names import RUNTIMES
from tpvprune.widths.speed import compare_latency

MEASURED = ("macs_kept", "params_kept", "top1", "dense_top1", "agreement", "variance_ratio")
TIMED = ("dense_ms", "pruned_ms", "ratio", "ratio_low", "ratio_high")
COLUMNS = ("model", "num_images", "seed", "round_to", "keep", *MEASURED, "runtime", *TIMED)


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args, how = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    subject = opened(args)
    batches = calibration(args, subject.model, args.seed, labelled=False)
    image = next(iter(unlabeled(subject.tests[0].batches)))[:1]
    ranking = None
    path = args.output or RESULTS / f"rounding-{args.model.partition('.')[0]}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for keep in args.keep:
            for round_to in how["round_to"]:
                found = prune(
                    subject.model, batches, keep=keep, limits=Limits(round_to=round_to),
                    num_images=None, ranking=ranking, seed=args.seed,
                )  # fmt: skip
                ranking = found.ranking
                measured = quality(subject, Cut(found.model, "compensate", {}, ()))
                row = {"model": args.model, "num_images": args.num_images, "seed": args.seed}
                row |= {"round_to": round_to, "keep": keep}
                row |= {name: measured[name] for name in MEASURED}
                for runtime in how["runtimes"]:
                    speed = compare_latency(
                        subject.model, found.model, image, runtime=runtime, num_threads=args.threads
                    )
                    row |= {"runtime": runtime}
                    row |= {name: f"{getattr(speed, name):.3f}" for name in TIMED}
                    writer.writerow(row)
                    file.flush()
                    print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    write_environment(path.with_suffix(".json"), argparse.Namespace(**(vars(args) | how)))
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the arguments of photographs.py, and our own; wrong ones are a ValueError."""
    parser = Parser(
        prog="rounding.py", description=str(__doc__).partition("\n")[0], conflict_handler="resolve"
    )
    add_flags(parser)
    own = parser.section("rounding")
    own.add_argument(
        "--round-to", nargs="+", type=count_or_auto, default=[1, 16, "auto"], metavar="N",
        help="multiples of widths, or auto (1 16 auto)",
    )  # fmt: skip
    own.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=["eager"], help="to time in (eager)"
    )
    args = parsed(parser, argv)
    how = {"round_to": args.round_to, "runtimes": args.runtimes}
    args.round_to = None  # of photographs.py's it is one number
    return args, how


if __name__ == "__main__":
    sys.exit(main())
