"""What scoring and the stages of pruning cost, against labelled passes, side by side.

    python benchmarks/cost.py --models cifar_resnet20 cifar_resnet56 --num-images 1024
    python benchmarks/cost.py --models resnet18:128 vit_small_patch16_224:224 --num-images 64
    python benchmarks/cost.py --models resnet18:128 --procedures taylor verification compensation

The Taylor pass is what torch-pruning's users run before its importance: forward, cross-entropy,
full backward. All procedures see the same images in the same batches; their repeats take turns in
one process. Peak memory comes from one fresh process per procedure.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
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
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # compilation is measured anew

import timm
import torch
import torch_pruning as tp
from environment import write_environment
from rows import add_output_file
from torch import Tensor
from torch.nn import functional as F

import tpvprune.cifar_resnet  # noqa: F401  (registers them with timm)
from tpvprune.groups import ChannelGroups, find_groups
from tpvprune.groups.removal import remove_channels
from tpvprune.pipeline.choices import Choices
from tpvprune.pipeline.setup import Setup, set_up
from tpvprune.repairs.compensation import compensate_weights
from tpvprune.scores.baselines.jacobian import jbr_scores
from tpvprune.scores.tpv import tpv_scores

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


class Material:
    """A model with random weights, its groups and random images: cost knows no values."""

    def __init__(self, args: argparse.Namespace, spec: str, procedures: Sequence[str]) -> None:
        name, size = name_and_size(spec)
        torch.manual_seed(0)
        self.model = timm.create_model(name).eval()
        x = torch.randn(args.num_images, 3, size, size)
        y = torch.randint(0, self.model.num_classes, (args.num_images,))
        self.batches = list(zip(x.split(args.batch_size), y.split(args.batch_size), strict=True))
        self.groups: ChannelGroups = find_groups(self.model, x[:1], verify=False)
        self.kept = {g.name: torch.arange(g.num_channels) % 2 == 0 for g in self.groups}
        if "compensation" in procedures:
            self.pruned: torch.nn.Module = remove_channels(self.model, self.groups, self.kept)

    @property
    def inputs(self) -> list[Tensor]:
        """The images without labels."""
        return [x for x, _ in self.batches]

    @functools.cached_property
    def setup(self) -> Setup:
        """What `prune` makes of them before it ranks: a tenth of the images is held back."""
        return set_up(self.model, self.inputs, Choices(num_images=None))

    def first(self) -> Material:
        """Return the same with one batch only."""
        some = copy.copy(self)
        some.__dict__.pop("setup", None)
        some.batches = self.batches[:1]
        return some


# ---- the procedures -------------------------------------------------------------------------


def forward(m: Material) -> None:
    with torch.no_grad():
        for x in m.inputs:
            m.model(x)


def bare_backward(m: Material, layout: torch.memory_format = torch.contiguous_format) -> None:
    """Forward and backward by the activations alone, with nothing measured."""
    passes(m.model, m, layout)


def passes(
    run: Callable[[Tensor], Tensor],
    m: Material,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    m.model.requires_grad_(False)
    for x in m.inputs:
        leaf = x.clone(memory_format=layout).requires_grad_()
        out = run(leaf)
        torch.autograd.grad(out, leaf, torch.ones_like(out))
        del leaf, out
    m.model.requires_grad_(True)


@functools.cache
def compiled(model: torch.nn.Module) -> Any:
    return torch.compile(model)


def bare_backward_compiled(m: Material) -> None:
    """The bare passes through torch.compile; the warm-up has compiled them."""
    passes(compiled(m.model), m)


def compilation(m: Material) -> None:
    """What torch.compile takes once per model, and per size of batch; most of it outside of us."""
    torch.compiler.reset()
    passes(torch.compile(m.model), m.first())


def taylor(m: Material, layout: torch.memory_format = torch.contiguous_format) -> None:
    m.model.zero_grad()
    for x, y in m.batches:
        F.cross_entropy(m.model(x.contiguous(memory_format=layout)), y).backward()


def hessian_torch_pruning(m: Material) -> None:
    """As torch-pruning documents its GroupHessianImportance; one batch, the rest takes as long."""
    importance = tp.importance.GroupHessianImportance()
    x, y = m.batches[0]
    for loss in F.cross_entropy(m.model(x), y, reduction="none"):
        m.model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(m.model)


def jbr(m: Material) -> None:
    """The procedure of the TPV paper's reference code."""
    jbr_scores(m.model, m.groups, m.inputs, confidence=0)  # random weights are sure of nothing


def tpv(m: Material, **options: Any) -> None:
    tpv_scores(m.model, m.groups, m.inputs, **options)


def verification(m: Material) -> None:
    """Grouping with every cut proved: masked and removed give the same outputs."""
    find_groups(m.model, m.inputs[0][:1])


def grouping(m: Material) -> None:
    find_groups(m.model, m.inputs[0][:1], verify=False)


def curves(m: Material) -> None:
    """The default's scores: what any number of channels of every group changes when it goes."""
    m.setup.by.ranked(m.setup.dense, m.setup.groups, m.setup.fit, m.setup.clock)


def selection(m: Material) -> None:
    """All between the groups and the cut: curves, what the repair makes up for, widths."""
    setup = m.setup
    setup.ranked().choose(setup.groups, keep=0.5, of="macs", limits=setup.limits)


def removal(m: Material) -> None:
    remove_channels(m.model, m.groups, m.kept)


def compensation(m: Material) -> None:
    compensate_weights(m.pruned, m.model, m.inputs, groups=m.groups, kept=m.kept)


PROCEDURES: dict[str, Callable[[Material], None]] = {
    "taylor": taylor,
    "taylor_channels_last": functools.partial(taylor, layout=torch.channels_last),
    "forward": forward,
    "bare_backward": bare_backward,
    "bare_backward_channels_last": functools.partial(bare_backward, layout=torch.channels_last),
    "bare_backward_compiled": bare_backward_compiled,
    "compilation": compilation,
    "hessian_torch_pruning": hessian_torch_pruning,
    "jbr": jbr,
    "tpv_plain": functools.partial(tpv, compensated=False),
    "tpv_compensated": tpv,
    "tpv_plain_4_probes": functools.partial(tpv, compensated=False, num_probes=4),
    "tpv_compensated_4_probes": functools.partial(tpv, num_probes=4),
    "tpv_plain_amp": functools.partial(tpv, compensated=False, amp=torch.bfloat16),
    "tpv_plain_checkpointing": functools.partial(tpv, compensated=False, grad_checkpointing=True),
    "grouping": grouping,
    "verification": verification,
    "curves": curves,
    "selection": selection,
    "removal": removal,
    "compensation": compensation,
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
    add_output_file(parser, "cost.csv")
    parser.add_argument("--memory-of", choices=PROCEDURES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def name_and_size(spec: str) -> tuple[str, int]:
    """Split "name:size"; the size the model was made for is the default."""
    name, _, size = spec.partition(":")
    return name, int(size or timm.get_pretrained_cfg_value(name, "input_size")[-1])


def compare(args: argparse.Namespace, spec: str, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Time all procedures of one model, their repeats taking turns."""
    material = Material(args, spec, args.procedures)
    cpu: dict[str, list[float]] = {name: [] for name in args.procedures}
    wall: dict[str, list[float]] = {name: [] for name in args.procedures}
    for name in args.procedures:
        PROCEDURES[name](material.first())  # warm up
    for _ in range(args.repeats):
        for name in args.procedures:
            start = time.process_time(), time.perf_counter()
            PROCEDURES[name](material)
            cpu[name].append(time.process_time() - start[0])
            wall[name].append(time.perf_counter() - start[1])
            material.model.zero_grad()
    name, size = name_and_size(spec)
    rows = []
    for procedure in args.procedures:
        # Ratios within a round: what else the machine does hits both alike.
        ratios = [a / b for a, b in zip(cpu[procedure], cpu[args.procedures[0]], strict=True)]
        num = args.batch_size if procedure == "hessian_torch_pruning" else args.num_images
        rows.append(
            {
                "model": name,
                "image_size": size,
                "num_images": num,
                "batch_size": args.batch_size,
                "threads": args.threads,
                "repeats": args.repeats,
                "procedure": procedure,
                "cpu_seconds": f"{statistics.median(cpu[procedure]):.3f}",
                "cpu_low": f"{min(cpu[procedure]):.3f}",
                "cpu_high": f"{max(cpu[procedure]):.3f}",
                "wall_seconds": f"{statistics.median(wall[procedure]):.3f}",
                "peak_mib": f"{peaks[procedure]:.1f}",
                "time_ratio": f"{statistics.median(ratios) * args.num_images / num:.3f}",
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
    material = Material(args, spec, [procedure])
    before = reset_peak()
    PROCEDURES[procedure](material)
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
    print(f"{'procedure':28} {'CPU s':>8} {'low-high':>15} {'x':>6} {'peak MiB':>9} {'x':>6}")
    for row in rows:
        spread = f"{float(row['cpu_low']):.2f}-{float(row['cpu_high']):.2f}"
        print(
            f"{row['procedure']:28} {float(row['cpu_seconds']):8.2f} {spread:>15} "
            f"{row['time_ratio']:>6} {row['peak_mib']:>9} {row['memory_ratio']:>6}",
            flush=True,
        )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of the models and sizes measured now; others stay."""

    def setting(row: dict[str, Any]) -> tuple[str, ...]:
        keys = ("model", "image_size", "num_images", "batch_size", "threads")
        return tuple(str(row[k]) for k in keys)

    measured = {setting(row) for row in rows}
    others = []
    if path.exists():
        with path.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if setting(row) not in measured]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(others + rows)


if __name__ == "__main__":
    raise SystemExit(main())
