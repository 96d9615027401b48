"""TPV on training images against held-out images, trace form against Monte-Carlo form.

    python benchmarks/stability.py --model cifar_resnet20 --checkpoint FILE \
        --train-dir cifar10-train.tar --test-dir cifar10-test.tar

One row per perturbation and form (`tpvprune.diagnostics.tpv.stability_rows`), and a scatter plot
of every parameter's E||J||^2 on both sets. No label is read.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence

import torch
from environment import write_environment
from errors import in_one_line
from rows import add_output_folder
from torch import Tensor, nn

from tpvprune import keep_freed_memory
from tpvprune.diagnostics.jacobian_norms import jacobian_norms
from tpvprune.diagnostics.tpv import parameter_points, stability_rows
from tpvprune.images.loading import choose_images
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.reports.charts import scatter_chart
from tpvprune.reports.page import page
from tpvprune.saved.models import load_model


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    model, _ = load_model(args.model, checkpoint=args.checkpoint)
    train, test = (images(args, model, folder) for folder in (args.train_dir, args.test_dir))
    label_noise = {"num_draws": args.label_draws} if args.label_draws else None
    rows = []
    for step_of in ("model", "tensor"):
        found = stability_rows(
            model, train, test, bits=args.bits, step_of=step_of, num_draws=args.num_draws,
            label_noise=label_noise if step_of == "model" else None, seed=args.seed,
        )  # fmt: skip
        new = found if step_of == "model" else found[2:]  # SGD noise has no step
        rows += [{"model": args.model, "step_of": step_of, **row} for row in new]
    path = args.output / f"stability-{args.model}.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    for row in rows:
        print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    points = parameter_points(jacobian_norms(model, train), jacobian_norms(model, test))
    chart = scatter_chart(points, "training images", "held-out images")
    title = f"<h1>{args.model}: E||J||² of every parameter</h1>"
    path.with_suffix(".html").write_text(page(args.model, [title, chart]), encoding="utf-8")
    write_environment(path.with_suffix(".json"), args)
    return 0


def images(args: argparse.Namespace, model: nn.Module, folder: str) -> list[Tensor]:
    """Return batches of unlabeled images held in memory."""
    chosen = choose_images(
        open_images(folder),
        resolve_preprocessing(model),
        num_images=args.num_images,
        seed=args.seed,
        batch_size=250,
        workers=1,
    )
    return list(chosen)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--train-dir", required=True)
    parser.add_argument("--test-dir", required=True)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--bits", type=int, nargs="+", default=[8])
    parser.add_argument("--num-draws", type=int, default=30)
    parser.add_argument("--label-draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    add_output_folder(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
