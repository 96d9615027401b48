"""E||J||^2 over the weights: batches against one backward pass per sample, side by side.

    python benchmarks/traces.py --models cifar_resnet20 test_vit:32 --num-images 256

The procedure that is compared with is the usual one (and that of the TPV paper's code): draw an
image and a random direction, run forward and backward, add up the squared gradients. Both see the
same images; what counts is the time until both have the same standard error, which grows with the
variance of one draw: time per draw times variance of a draw, in rounds that take turns.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from environment import write_environment
from rows import add_output_file
from torch import Tensor, nn

import tpvprune.cifar_resnet  # noqa: F401  (registers them with timm)
from tpvprune.diagnostics.jacobian_norms import jacobian_norms

MODELS = ["cifar_resnet20", "cifar_resnet56", "mobilenetv3_small_100:32", "test_vit:160"]
COLUMNS = [
    "model", "image_size", "num_images", "batch_size", "num_probes", "threads", "rounds",
    "trace_batched", "stderr_batched", "trace_single", "stderr_single",
    "ms_batched", "ms_single", "speed_up", "speed_up_low", "speed_up_high",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for spec in args.models:
        rows.append(compare(args, spec))
        print(", ".join(f"{key} {rows[-1][key]}" for key in COLUMNS), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    write_environment(args.output.with_suffix(".json"), args)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="name or name:image size")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-probes", type=int, default=1, help="of the batched procedure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_output_file(parser, "traces.csv")
    return parser.parse_args(argv)


def single(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return ||J(x)^T v||^2 of every image, one forward and one backward each."""
    weights = list(model.parameters())
    squares = []
    for x in images:
        out = model(x[None])
        v = (torch.randint(0, 2, out.shape, generator=generator) * 2 - 1).to(out)
        found = torch.autograd.grad((out * v).sum(), weights)
        squares.append(sum(g.square().sum() for g in found))
    return torch.stack([torch.as_tensor(s) for s in squares]).double()


def compare(args: argparse.Namespace, spec: str) -> dict[str, Any]:
    """Time both procedures by turns."""
    name, _, size = spec.partition(":")
    pixels = int(size or timm.get_pretrained_cfg_value(name, "input_size")[-1])
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(args.num_images, 3, pixels, pixels)
    generator = torch.Generator().manual_seed(1)
    few = images[: args.batch_size]
    jacobian_norms(model, [few])  # warm up
    single(model, few[:4], generator)
    times: tuple[list[float], list[float]] = ([], [])
    draws: tuple[list[Tensor], list[Tensor]] = ([], [])
    for seed in range(args.rounds):
        start = time.process_time()
        norms = jacobian_norms(
            model, images.split(args.batch_size), num_probes=args.num_probes, seed=seed
        )
        middle = time.process_time()
        draws[1].append(single(model, few, generator))
        times[1].append((time.process_time() - middle) / len(few))
        times[0].append((middle - start) / len(images))
        draws[0].append(norms.squares.sum(1))
    batched, one = torch.cat(draws[0]), torch.cat(draws[1])
    work = (batched[: len(one)].var() / one.var()).item()
    ratios = [slow / (fast * work) for fast, slow in zip(*times, strict=True)]
    return {
        "model": name,
        "image_size": pixels,
        "num_images": args.num_images,
        "batch_size": args.batch_size,
        "num_probes": args.num_probes,
        "threads": args.threads,
        "rounds": args.rounds,
        "trace_batched": f"{batched.mean():.5g}",
        "stderr_batched": f"{batched.std() / len(batched) ** 0.5:.3g}",
        "trace_single": f"{one.mean():.5g}",
        "stderr_single": f"{one.std() / len(one) ** 0.5:.3g}",
        "ms_batched": f"{1e3 * statistics.median(times[0]):.3f}",
        "ms_single": f"{1e3 * statistics.median(times[1]):.3f}",
        "speed_up": f"{statistics.median(ratios):.2f}",
        "speed_up_low": f"{min(ratios):.2f}",
        "speed_up_high": f"{max(ratios):.2f}",
    }


if __name__ == "__main__":
    raise SystemExit(main())
