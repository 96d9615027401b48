"""What do several sizes of one model cost together, and what each by itself?

    python benchmarks/sizes.py --model mobilenetv2_100 --checkpoint FILE --data-dir photos \
        --num-images 1000 --keep 0.8 0.7 0.6

Prunes to every size with `tpvprune.Sizes`, as `tpvprune prune --keep 0.8 0.7 0.6` does, and again
with one `tpvprune.prune` for each. Prints both in seconds of wall time and of CPU time, and writes
them; exit code 1 if a model of the one kind differs from that of the other in any bit. Reading the
images does not count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from environment import write_environment
from errors import in_one_line
from rows import add_output_folder, append
from unlabeled import images_of, opened_model

import tpvprune
from tpvprune.cli.flag_groups import Parser, add_model, add_preprocessing
from tpvprune.cli.flag_values import count, fraction
from tpvprune.pipeline import PruningResult

COLUMNS = ["model", "num_images", "way", "keep", "seconds", "cpu_seconds"]


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    tpvprune.keep_freed_memory()
    model = opened_model(args)
    batches = images_of(args, model, args.data_dir, args.num_images, batch_size=args.batch_size)
    path = args.output / f"sizes-{args.model}.csv"
    path.unlink(missing_ok=True)
    total: dict[str, float] = {}

    def timed(way: str, keep: float | None, run: Callable[..., Any]) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        found = run() if keep is None else run(keep=keep)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        total[way] = total.get(way, 0.0) + cpu
        row = {"model": args.model, "num_images": args.num_images, "way": way, "keep": keep or ""}
        row |= {"seconds": f"{wall:.1f}", "cpu_seconds": f"{cpu:.1f}"}
        append(path, row, COLUMNS)
        print(f"{way}, keep {keep or 'any'}: {wall:.1f} s, {cpu:.1f} s of CPU", flush=True)
        return found

    options = {"num_images": None, "seed": args.seed}
    sizes = timed("together", None, partial(tpvprune.Sizes, model, batches, **options))
    together = [timed("together", keep, sizes.prune) for keep in args.keep]
    del sizes
    alone = partial(tpvprune.prune, model, batches, **options)
    each = [timed("each", keep, alone) for keep in args.keep]
    write_environment(path.with_suffix(".json"), args)
    print(f"together / each, CPU time: {total['together'] / total['each']:.3f}")
    same = all(is_same(a, b) for a, b in zip(together, each, strict=True))
    print("the models are the same, bit for bit" if same else "THE MODELS DIFFER")
    return 0 if same else 1


def is_same(a: PruningResult, b: PruningResult) -> bool:
    """Tell whether two models are the same, bit for bit."""
    one, other = (result.model.state_dict() for result in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    add_preprocessing(parser)
    run = parser.section("run")
    run.add_argument("--data-dir", required=True, metavar="D", help="folder or .tar of images")
    run.add_argument("--num-images", type=count, default=1000, metavar="N", help="(1000)")
    run.add_argument("--batch-size", type=count, default=16, metavar="N", help="(16)")
    run.add_argument(
        "--keep", type=fraction, nargs="+", default=[0.8, 0.7, 0.6], help="(0.8 0.7 0.6)"
    )
    run.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    run.add_argument("--threads", type=count, default=1, metavar="N", help="(1)")
    add_output_folder(run)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
