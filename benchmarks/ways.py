"""Ways from a fine-tuned network to a smaller one, each in so many minutes; see own_task.py."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import onnxruntime
import torch
from teachers import Task, classes, with_classes
from torch import Tensor, nn

from tpvprune import export_int8, prune
from tpvprune.groups import find_groups
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.costs import count_macs, count_params
from tpvprune.passes.difference import Reference
from tpvprune.passes.running import evaluating
from tpvprune.repairs.distillation import distill
from tpvprune.repairs.finetuning import finetune
from tpvprune.repairs.interpolation import FRACTIONS, nearest_between
from tpvprune.repairs.training import Recipe
from tpvprune.runtimes.calls import graph_call, model_call, threads
from tpvprune.saved.models import load_model
from tpvprune.scores.baselines.stock import stock_prune
from tpvprune.scores.criteria import with_labels

_NOT_OF_MODELS = ("mean", "std")


class Smaller(NamedTuple):
    """A pretrained network that is about as small as a share of the MACs.

    ``options`` are arguments of the model as text, and ``mean`` and ``std`` of its inputs.
    """

    keep: float
    name: str
    checkpoint: str
    options: Mapping[str, str]


class Made(NamedTuple):
    """What a way made.

    ``outputs`` is the network itself, or a file of it, whose bytes are ``content``; ``minutes``
    are those that were used, ``cutting`` those of them before any training.
    """

    way: str
    outputs: Callable[[Tensor], Tensor]
    network: nn.Module
    minutes: float = 0.0
    cutting: float = 0.0
    name: str = ""
    content: bytes = b""


# ---- training, the same for all -------------------------------------------------------------


def taught(task: Task, student: nn.Module, kind: str, minutes: float) -> nn.Module:
    """Train a network as its kind is trained; measuring on held-back images is in the minutes.

    Without labels these choose between the network as it was and what training made of it.
    """
    loss, rate, *frozen = task.args.training[kind].split(":")
    how: dict[str, Any] = {"lr": float(rate), "freeze_batchnorm": bool(frozen), "seed": task.seed}
    batches, augment = task.training(labelled=kind == "labels")
    if kind == "labels":
        recipe = Recipe(minutes=_some(minutes), **how)
        return finetune(student, batches, recipe=recipe, augment=augment)
    start = monotonic()
    reference = Reference(task.teacher, task.held)
    before = reference.difference(student)
    measuring = len(FRACTIONS) * (monotonic() - start) / 60
    trained = distill(
        student,
        task.teacher,
        batches,
        minutes=_some(minutes - measuring),
        loss=loss,  # type: ignore[arg-type]
        augment=augment,
        **how,
    )
    return nearest_between(student, trained, reference, before).model


def _some(minutes: float) -> float:
    if minutes <= 0:
        raise ValueError(
            "--minutes: expected more than cutting and measuring take, found "
            f"{-minutes:.2g} less than those: pass more"
        )
    return minutes


def _finished(task: Task, way: str, cut: nn.Module, start: float, name: str) -> Made:
    """Train what a cut left for the rest of the minutes."""
    cutting = (monotonic() - start) / 60
    trained = taught(task, cut, WAYS[way], task.args.minutes - cutting)
    return Made(way, trained, trained, (monotonic() - start) / 60, cutting, name)


# ---- the ways -------------------------------------------------------------------------------


def dense(task: Task, _: float) -> Iterator[Made]:
    """The teacher itself, and in int8."""
    yield Made("dense", task.teacher, task.teacher, name=task.args.model)
    yield quantized(task, "int8", Made("", task.teacher, task.teacher, name=task.args.model))


def by_tpv(task: Task, keep: float) -> Iterator[Made]:
    """Prune without labels; distil; quantize."""
    start = monotonic()
    cut = _pruned(task, "tpv", keep)
    minutes = (monotonic() - start) / 60
    yield Made("prune", cut, cut, minutes, minutes, task.args.model)
    # What is measured in between does not count.
    found = _finished(task, "prune + distill", cut, monotonic() - 60 * minutes, task.args.model)
    yield found
    yield quantized(task, "prune + distill + int8", found)


def by(criterion: str) -> Job:
    """Return the same way with another criterion."""

    def job(task: Task, keep: float) -> Iterator[Made]:
        start = monotonic()
        cut = _pruned(task, criterion, keep)
        way = f"{criterion} + distill"
        yield _finished(task, way, cut, start, task.args.model)

    return job


def _pruned(task: Task, criterion: str, keep: float) -> nn.Module:
    batches = list(unlabeled(task.calibration))
    return prune(
        task.teacher,
        batches,
        keep=keep,
        criterion=with_labels(criterion, task.calibration),
        num_images=None,
        seed=task.seed,
    ).model


def by_torch_pruning(task: Task, keep: float) -> Iterator[Made]:
    """torch-pruning's own pruner and Taylor importance, then fine-tuning: labels for both."""
    start = monotonic()
    example = task.calibration[0][0][:1]
    groups = find_groups(task.teacher, example)
    cut = stock_prune(
        task.teacher, groups, example, "tp:taylor", task.calibration, keep=keep, seed=task.seed
    ).model
    yield _finished(task, "torch-pruning + finetune", cut, start, task.args.model)


def smaller(task: Task, keep: float) -> Iterator[Made]:
    """A pretrained network about as small, taught by the same teacher."""
    found = next(found for found in task.args.smaller if found.keep == keep)
    options = {k: v for k, v in found.options.items() if k not in _NOT_OF_MODELS}
    pretrained = found.checkpoint == "pretrained"
    model, _ = load_model(
        found.name,
        pretrained=pretrained,
        checkpoint=None if pretrained else found.checkpoint,
        model_kwargs=options,
    )
    assert task.source.num_classes is not None
    own = _own_inputs(task, with_classes(model, task.source.num_classes, task.seed), found.options)
    yield _finished(task, "smaller + distill", own, monotonic(), found.name)


class _Rescaled(nn.Module):
    """A network that is given another's inputs."""

    def __init__(self, network: nn.Module, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.network = network
        self.num_classes = network.num_classes
        self.register_buffer("gain", gain[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: Tensor) -> Any:
        return self.network(x * self.gain + self.shift)


def _own_inputs(task: Task, network: nn.Module, options: Mapping[str, str]) -> nn.Module:
    """Let a network see the teacher's inputs with the mean and deviation that it was trained on."""
    given = {name: [float(options[name])] for name in _NOT_OF_MODELS if name in options}
    own = resolve_preprocessing(network, **given).config
    theirs = task.preprocessing.config
    (m, s), (mean, std) = (
        (torch.tensor(config["mean"]), torch.tensor(config["std"])) for config in (theirs, own)
    )
    gain, shift = s / std, (m - mean) / std
    if torch.equal(gain, torch.ones(3)) and not shift.count_nonzero():
        return network
    return _Rescaled(network, gain, shift)


def quantized(task: Task, way: str, found: Made) -> Made:
    """Export a network in int8 with ranges chosen on the unlabeled images; run what comes out."""
    start = monotonic()
    batches = list(unlabeled(task.calibration))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "int8.onnx"
        export_int8(found.network.eval(), batches, file, latency_repeats=0, seed=task.seed)
        content = file.read_bytes()
    minutes = found.minutes + (monotonic() - start) / 60
    return Made(
        way, in_onnxruntime(content), found.network, minutes, found.cutting, found.name, content
    )


def in_onnxruntime(content: bytes) -> Callable[[Tensor], Tensor]:
    """Return inputs [B, ...] -> outputs [B, K] of an ONNX file for one input, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def outputs(x: Tensor) -> Tensor:
        found = [session.run(None, {given.name: one[None].numpy()})[0] for one in x]
        return torch.cat([torch.from_numpy(one) for one in found])

    return outputs


Job = Callable[[Task, float], Iterator[Made]]
DENSE: Mapping[Job, Sequence[str]] = {dense: ("dense", "int8")}
CUTS: Mapping[Job, Sequence[str]] = {
    by_tpv: ("prune", "prune + distill", "prune + distill + int8"),
    smaller: ("smaller + distill",),
    by("magnitude"): ("magnitude + distill",),
    by("taylor"): ("taylor + distill",),
    by_torch_pruning: ("torch-pruning + finetune",),
}
"""What is done -> the ways that come of it."""
WAYS = {
    "dense": "",
    "int8": "",
    "prune": "",
    "prune + distill": "pruned",
    "prune + distill + int8": "pruned",
    "smaller + distill": "smaller",
    "magnitude + distill": "pruned",
    "taylor + distill": "pruned",
    "torch-pruning + finetune": "labels",
}
"""Way -> what kind of training it takes."""
LABELLED = {"taylor + distill": "to rank", "torch-pruning + finetune": "to rank, to train"}


# ---- what came of it ------------------------------------------------------------------------


def quality(task: Task, made: Made) -> dict[str, str]:
    """Return the measured part of a row; all images of the test set count alike."""
    found = classes(made.outputs, [x for x, _ in task.test])
    labels = torch.cat([y for _, y in task.test])
    held = classes(made.outputs, task.held) == classes(task.teacher, task.held)
    example = task.held[0][:1]
    macs = [count_macs(model, example) for model in (made.network, task.teacher)]
    num_bytes = len(made.content) or 4 * count_params(made.network)
    return {
        "network": made.name.partition(".")[0],
        "labels": LABELLED.get(made.way, "no"),
        "top1": _percent(found == labels),
        "dense_top1": _percent(task.classes == labels),
        "agreement": _percent(found == task.classes),
        "held_agreement": _percent(held),
        "macs_kept": f"{macs[0] / macs[1]:.4f}",
        "ms_kept": f"{time_ratio(task.teacher, made, example):.3f}",
        "mb": f"{num_bytes / 1e6:.2f}",
        "minutes": f"{made.minutes:.2f}",
        "minutes_cutting": f"{made.cutting:.2f}",
    }


def time_ratio(teacher: nn.Module, made: Made, x: Tensor, rounds: int = 25) -> float:
    """Time what was made and the teacher by turns: ONNX Runtime, one thread; median of ratios."""
    with threads(1), evaluating(teacher, made.network):
        calls = [
            model_call("onnxruntime", teacher, x),
            graph_call("onnxruntime", made.content, x)
            if made.content
            else model_call("onnxruntime", made.network, x),
        ]
        times = [[_seconds(call) for call in calls] for _ in range(rounds + 2)][2:]
    return statistics.median(after / before for before, after in times)


def _seconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _percent(right: Tensor) -> str:
    return f"{100 * right.double().mean().item():.2f}"
