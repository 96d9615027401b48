"""What scoring costs: `tpv_scores` against one labelled Taylor pass, side by side.

    python benchmarks/cost.py --models cifar_resnet20 cifar_resnet56 --num-images 1024
    python benchmarks/cost.py --models resnet18:128 vit_small_patch16_224:224 --num-images 64

The Taylor pass is what torch-pruning's users run before its importance: forward, cross-entropy,
full backward. All procedures see the same images in the same batches; their repeats take turns in
one process. Peak memory comes from one fresh process per procedure.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from environment import write_environment
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune.cifar_resnet  # noqa: F401  (registers them with timm)
from tpvprune.groups import ChannelGroups, find_groups
from tpvprune.scores import tpv_scores

RESULTS = Path(__file__).parent / "results"
MODELS = [
    "cifar_resnet20",
    "cifar_resnet56",
    "resnet18:128",
    "resnet50:128",
    "mobilenetv2_100:128",
    "convnext_tiny:128",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
]
COLUMNS = [
    "model", "image_size", "num_images", "batch_size", "threads", "repeats", "procedure",
    "cpu_seconds", "cpu_low", "cpu_high", "wall_seconds", "peak_mib", "time_ratio", "memory_ratio",
]  # fmt: skip
Batches = list[tuple[Tensor, Tensor]]


# ---- the procedures -------------------------------------------------------------------------


def forward(model: nn.Module, groups: ChannelGroups, batches: Batches) -> None:
    with torch.no_grad():
        for x, _ in batches:
            model(x)


def bare_backward(model: nn.Module, groups: ChannelGroups, batches: Batches) -> None:
    """Forward and backward by the activations alone, with nothing measured."""
    model.requires_grad_(False)
    for x, _ in batches:
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        torch.autograd.grad(out, leaf, torch.ones_like(out))
        del leaf, out
    model.requires_grad_(True)


def taylor(model: nn.Module, groups: ChannelGroups, batches: Batches) -> None:
    model.zero_grad()
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()


def tpv(model: nn.Module, groups: ChannelGroups, batches: Batches, **options: Any) -> None:
    tpv_scores(model, groups, [x for x, _ in batches], **options)


def tpv_plain(model: nn.Module, groups: ChannelGroups, batches: Batches) -> None:
    tpv(model, groups, batches, compensated=False)


def tpv_plain_4_probes(model: nn.Module, groups: ChannelGroups, batches: Batches) -> None:
    tpv(model, groups, batches, compensated=False, num_probes=4)


PROCEDURES: dict[str, Callable[[nn.Module, ChannelGroups, Batches], None]] = {
    "taylor": taylor,
    "forward": forward,
    "bare_backward": bare_backward,
    "tpv_plain": tpv_plain,
    "tpv_compensated": tpv,
    "tpv_plain_4_probes": tpv_plain_4_probes,
}


# ---- the run --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(args, args.models[0], args.memory_of))
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for spec in args.models:
        # Memory first: this process must not hold the model while its children are measured.
        peaks = {name: child_memory(args, spec, name) for name in args.procedures}
        rows += compare(args, spec, peaks)
        report(rows[-len(args.procedures) :])
        write(args.output, rows)
    write_environment(args.output.with_suffix(".json"), args)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="name or name:image size")
    parser.add_argument("--num-images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--procedures", nargs="+", default=list(PROCEDURES), choices=PROCEDURES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "cost.csv")
    parser.add_argument("--memory-of", choices=PROCEDURES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def name_and_size(spec: str) -> tuple[str, int]:
    """Split "name:size"; the size the model was made for is the default."""
    name, _, size = spec.partition(":")
    return name, int(size or timm.get_pretrained_cfg_value(name, "input_size")[-1])


def prepare(args: argparse.Namespace, spec: str) -> tuple[nn.Module, ChannelGroups, Batches]:
    """Return a model with random weights, its groups and random images: cost knows no values."""
    name, size = name_and_size(spec)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(args.num_images, 3, size, size)
    y = torch.randint(0, model.num_classes, (args.num_images,))
    batches = list(zip(x.split(args.batch_size), y.split(args.batch_size), strict=True))
    return model, find_groups(model, x[:1], verify=False), batches


def compare(args: argparse.Namespace, spec: str, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Time all procedures of one model, their repeats taking turns."""
    model, groups, batches = prepare(args, spec)
    cpu: dict[str, list[float]] = {name: [] for name in args.procedures}
    wall: dict[str, list[float]] = {name: [] for name in args.procedures}
    for name in args.procedures:
        PROCEDURES[name](model, groups, batches[:1])  # warm up
    for _ in range(args.repeats):
        for name in args.procedures:
            start = time.process_time(), time.perf_counter()
            PROCEDURES[name](model, groups, batches)
            cpu[name].append(time.process_time() - start[0])
            wall[name].append(time.perf_counter() - start[1])
            model.zero_grad()
    name, size = name_and_size(spec)
    rows = []
    for procedure in args.procedures:
        # Ratios within a round: what else the machine does hits both alike.
        ratios = [a / b for a, b in zip(cpu[procedure], cpu[args.procedures[0]], strict=True)]
        rows.append(
            {
                "model": name,
                "image_size": size,
                "num_images": args.num_images,
                "batch_size": args.batch_size,
                "threads": args.threads,
                "repeats": args.repeats,
                "procedure": procedure,
                "cpu_seconds": f"{statistics.median(cpu[procedure]):.3f}",
                "cpu_low": f"{min(cpu[procedure]):.3f}",
                "cpu_high": f"{max(cpu[procedure]):.3f}",
                "wall_seconds": f"{statistics.median(wall[procedure]):.3f}",
                "peak_mib": f"{peaks[procedure]:.1f}",
                "time_ratio": f"{statistics.median(ratios):.3f}",
                "memory_ratio": f"{peaks[procedure] / peaks[args.procedures[0]]:.3f}",
            }
        )
    return rows


def child_memory(args: argparse.Namespace, spec: str, procedure: str) -> float:
    command = [sys.executable, __file__, "--models", spec, "--memory-of", procedure]
    command += ["--num-images", str(min(args.num_images, 4 * args.batch_size))]
    command += ["--batch-size", str(args.batch_size), "--threads", str(args.threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_memory(args: argparse.Namespace, spec: str, procedure: str) -> float:
    """Return by how many MiB the peak of this process rises during one run."""
    model, groups, batches = prepare(args, spec)
    before = reset_peak()
    PROCEDURES[procedure](model, groups, batches)
    return peak() - before


def reset_peak() -> float:
    """Set the process's peak to what it holds now, and return that, in MiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()  # elsewhere than on Linux the peak of the preparation stays in
    return peak()


def peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return float(lines[0].split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def report(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"\n{first['model']}, {first['num_images']} images of {first['image_size']} px, batches of "
        f"{first['batch_size']}, {first['threads']} thread(s), median of {first['repeats']}"
    )
    print(f"{'procedure':20} {'CPU s':>8} {'low-high':>15} {'x':>6} {'peak MiB':>9} {'x':>6}")
    for row in rows:
        spread = f"{float(row['cpu_low']):.2f}-{float(row['cpu_high']):.2f}"
        print(
            f"{row['procedure']:20} {float(row['cpu_seconds']):8.2f} {spread:>15} "
            f"{row['time_ratio']:>6} {row['peak_mib']:>9} {row['memory_ratio']:>6}",
            flush=True,
        )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of the models measured now; those of other models stay."""
    measured = {row["model"] for row in rows}
    others = []
    if path.exists():
        with path.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if row["model"] not in measured]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(others + rows)


if __name__ == "__main__":
    raise SystemExit(main())
