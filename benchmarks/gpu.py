"""Is everything right on a GPU, and what does it cost there? After eight minutes no row begins.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --model vit_small_patch16_224 --check-model deit_tiny_patch16_224:64
    python benchmarks/gpu.py --device cpu --model resnet18:64 --check-model cifar_resnet20:32 \
        --num-images 16 --batch-size 8 --check-images 32 # the same code where there is no GPU

First scores, chosen widths and repaired weights of a small network are compared with those of the
CPU, in float32 without TF32; then bfloat16 and float16 with float32. Then scoring, selection and
compensation of a larger one are timed beside the labelled Taylor pass, in the precision that torch
has by default; and a product with 2:4 sparse weights beside the dense one. Random weights, random
images: cost knows no values. Prints one table. Exit code 1: a check failed, or time ran out; 2:
there is no such device.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cost import Material, compensation, selection, taylor, tpv  # isort: skip  (after torch)
from tpvprune.diagnostics.ablation import spearman
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.costs import synchronize
from tpvprune.passes.evaluation import difference
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.repairs.compensation import compensate_weights
from tpvprune.scores.curves import variance_curves
from tpvprune.scores.tpv import tpv_scores
from tpvprune.weights.masks import select_n_of_m
from tpvprune.widths.allocation import allocate

# What rounding in another order may do. Near-ties may turn a choice over; a repair is compared by
# what the two networks return.
MOST_IN_SCORES = 1e-3  # of a score, or of a group's mean score where that is larger
MOST_IN_CUTS = 0.02  # of the channels
MOST_IN_REPAIRS = 1e-4  # of the variance of the outputs
LEAST_CORRELATION = {torch.bfloat16: 0.9, torch.float16: 0.95}  # of scores with those in float32
MOST_IN_SPARSE = 1e-2  # of the norm of the product


class Row(NamedTuple):
    """One line of the table; ``passed`` is None for what is only measured."""

    what: str
    found: str
    beside: str
    passed: bool | None = None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        device = torch.device(args.device)
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(
            f"gpu.py: expected a GPU that torch can use, found none at --device {args.device} "
            f"({reason}): pass --device cpu to try the code without one",
            file=sys.stderr,
        )
        return 2
    rows: list[Row] = []
    end = time.monotonic() + args.limit
    for row in measured(args, device):
        print(f"{row.what}: {row.found}", file=sys.stderr, flush=True)
        rows.append(row)
        if time.monotonic() > end:
            rows.append(Row("the rest", "left out", f"after {args.limit:g} s", passed=False))
            break
    print(table(args, device, rows))
    return 1 if any(row.passed is False for row in rows) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="resnet50:224", help="timed: name or name:image size")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-model", default="resnet18:64", help="compared with the CPU")
    parser.add_argument("--check-images", type=int, default=64)
    parser.add_argument("--sparse", type=int, nargs=3, default=[12544, 768, 3072],
                        metavar=("ROWS", "IN", "OUT"), help="sizes of the 2:4 product")  # fmt: skip
    parser.add_argument("--limit", type=float, default=480, help="seconds; then no row begins")
    return parser.parse_args(argv)


def measured(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    size = {"num_images": args.check_images, "batch_size": min(32, args.check_images)}
    small = lively(args.check_model, **size)
    with exact_products():
        yield from against_the_cpu(small, device)
        yield from in_half(on(small, device))
    yield from timings(
        on(lively(args.model, num_images=args.num_images, batch_size=args.batch_size), device),
        device,
        args.repeats,
    )
    yield sparse_product(*args.sparse, device=device, repeats=args.repeats)


# ---- material -------------------------------------------------------------------------------


def lively(spec: str, **size: int) -> Material:
    """Return a network with random weights in which every channel matters, and random images."""
    material = Material(argparse.Namespace(**size), spec, [])
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    for module in material.model.modules():
        if isinstance(module, norms) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    material.model = recalibrate_batchnorm(material.model, material.inputs[:2])
    material.pruned = remove_channels(material.model, material.groups, material.kept)
    return material


def on(m: Material, device: torch.device, dtype: torch.dtype | None = None) -> Material:
    """Return a copy on a device, its images too; in another precision if asked."""
    moved = copy.copy(m)
    moved.model = copy.deepcopy(m.model).to(device, dtype)
    moved.pruned = copy.deepcopy(m.pruned).to(device, dtype)
    moved.batches = [(x.to(device), y.to(device)) for x, y in m.batches]
    return moved


@contextmanager
def exact_products() -> Iterator[None]:
    """Switch off TF32, which keeps 10 bits of the factors of a product."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = False
        yield
    finally:
        for part, flag in zip(parts, before, strict=True):
            part.allow_tf32 = flag


# ---- checks ---------------------------------------------------------------------------------


def against_the_cpu(here: Material, device: torch.device) -> Iterator[Row]:
    there = on(here, device)
    a, b = (tpv_scores(m.model, m.groups, m.inputs) for m in (here, there))
    apart = max(float(((a[n] - b[n]).abs() / a[n].clamp_min(a[n].mean())).max()) for n in a)
    yield check("scores, against the CPU's", apart, MOST_IN_SCORES)
    curves = [variance_curves(m.model, m.groups, m.inputs) for m in (here, there)]
    cuts = [allocate(here.groups, found, keep=0.5) for found in curves]
    same = torch.cat([cuts[0][n] == cuts[1][n] for n in cuts[0]])
    yield check("channels that are cut, against the CPU's", 1 - float(same.double().mean()),
                MOST_IN_CUTS)  # fmt: skip
    repaired = [
        compensate_weights(m.pruned, m.model, m.inputs, groups=m.groups, kept=m.kept).cpu()
        for m in (here, there)
    ]
    apart = difference(repaired[1], repaired[0], here.inputs).share
    yield check("outputs after compensation, against the CPU's", apart, MOST_IN_REPAIRS)


def check(what: str, apart: float, most: float) -> Row:
    return Row(what, f"{apart:.1e} apart", f"at most {most:g}", passed=apart <= most)


def in_half(m: Material) -> Iterator[Row]:
    """Compare plain scores in half precision with those in float32, by rank."""
    plain = partial(tpv_scores, groups=m.groups, batches=m.inputs, compensated=False)
    whole = torch.cat(list(plain(m.model).values()))
    half = on(m, m.batches[0][0].device, torch.float16)
    for dtype, scores in (
        (torch.bfloat16, plain(m.model, amp=torch.bfloat16)),
        (torch.float16, plain(half.model)),
    ):
        found, least = spearman(torch.cat(list(scores.values())), whole), LEAST_CORRELATION[dtype]
        yield Row(f"rank correlation of plain scores, {name_of(dtype)} and float32", f"{found:.3f}",
                  f"at least {least:g}", passed=found >= least)  # fmt: skip


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- times ----------------------------------------------------------------------------------


def timings(m: Material, device: torch.device, repeats: int) -> Iterator[Row]:
    """Time what pruning does beside a Taylor pass over the same images."""
    half = on(m, device, torch.float16)
    procedures: dict[str, Callable[[], None]] = {
        "Taylor pass": partial(taylor, m),
        "scoring, plain": partial(tpv, m, compensated=False),
        "scoring, plain, bfloat16": partial(tpv, m, compensated=False, amp=torch.bfloat16),
        "scoring, plain, float16": partial(tpv, half, compensated=False),
        "scoring, compensated": partial(tpv, m),
        "selection (curves, widths)": partial(selection, m),
        "compensation": partial(compensation, m),
    }
    unit = None
    for name, run in procedures.items():
        seconds, peak = timed(run, device, repeats)
        unit = seconds if unit is None else unit
        memory = f", {peak / 2**20:.0f} MiB at the peak" if device.type == "cuda" else ""
        yield Row(name, f"{1000 * seconds:.1f} ms{memory}", f"{seconds / unit:.2f} Taylor passes")


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, int]:
    """Return the median of some runs after one more, in seconds, and the peak of the memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return statistics.median(seconds[1:]), peak


def sparse_product(
    rows: int, inputs: int, outputs: int, *, device: torch.device, repeats: int
) -> Row:
    """Time a linear layer in float16 with 2:4 weights, in torch's compressed form and as zeros."""
    what = f"2:4, linear layer {inputs} to {outputs}, {rows} rows, float16"
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, inputs, generator=generator) for n in (outputs, rows))
    w = w * select_n_of_m({"w": w.abs()})["w"]
    w, x = (t.to(device, torch.float16) for t in (w, x))
    try:
        packed = torch.sparse.to_sparse_semi_structured(w)
        product = F.linear(x, packed)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0][:100]
        return Row(what, "makes nothing faster", f"torch has no such product here: {reason}")
    dense = F.linear(x, w)
    if norm(product - dense) > MOST_IN_SPARSE * norm(dense):
        return Row(what, "is another product", f"at most {MOST_IN_SPARSE:g} apart", passed=False)
    slow, fast = (timed(partial(times, 20, x, t), device, repeats)[0] for t in (w, packed))
    verdict = "" if fast < slow else ": makes nothing faster"
    return Row(what, f"{50 * fast:.3f} ms", f"{fast / slow:.2f} dense products{verdict}")


def times(num: int, x: Tensor, weight: Tensor) -> None:
    for _ in range(num):
        F.linear(x, weight)


def norm(t: Tensor) -> float:
    return float(t.double().norm())


# ---- the table ------------------------------------------------------------------------------


def table(args: argparse.Namespace, device: torch.device, rows: Sequence[Row]) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    verdicts = {None: "", True: "ok", False: "FAILED"}
    lines = [
        f"{name}, torch {torch.__version__}; checks: {args.check_model}, {args.check_images} "
        f"images; times: {args.model}, {args.num_images} images in batches of {args.batch_size}, "
        f"median of {args.repeats}",
        "",
        "| | found | beside | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.what} | {r.found} | {r.beside} | {verdicts[r.passed]} |" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
