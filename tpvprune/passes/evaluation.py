"""What a model costs and how well it does: the only label-reading code besides baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.batches import private_randomness, unlabeled
from tpvprune.passes.costs import Latency, count_macs, count_params, measure_latency
from tpvprune.passes.difference import (
    Difference,
    Reference,
    agreement,
    comparison,
    difference,
    output_variance,
    over_all,
    returned,
    top_classes,
)
from tpvprune.passes.outputs import Chosen, Outputs, logits_of
from tpvprune.passes.running import evaluating

__all__ = [
    "Difference",
    "Evaluation",
    "Latency",
    "Reference",
    "agreement",
    "count_macs",
    "count_params",
    "difference",
    "evaluate",
    "measure_latency",
    "model_outputs",
    "output_variance",
]


@dataclass(frozen=True)
class Evaluation:
    """Quality and cost of one model; ``None`` where a number was not asked for.

    Attributes:
        num_images: Labelled images evaluated.
        top1: Fraction whose most likely class is the label, in [0, 1].
        top5: Fraction whose label is among the five most likely; ``None`` below 5 classes.
        agreement: Fraction of equal top-1 with the dense model, in [0, 1].
        output_variance: E‖f_pruned − f_dense‖², in squared output units; of several outputs the
            sum, each in units of its second moment.
        macs: Multiply-accumulates for one input.
        params: Number of parameters.
        latency_ms: Median time of one call, in milliseconds.
        latency_sd_ms: Standard deviation of those times.
        latency_batch_size: Inputs of one such call.
    """

    num_images: int
    top1: float
    top5: float | None
    agreement: float | None
    output_variance: float | None
    macs: int
    params: int
    latency_ms: float | None = None
    latency_sd_ms: float | None = None
    latency_batch_size: int | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    labelled_batches: Iterable[tuple[Tensor, Tensor]],
    *,
    dense: nn.Module | Sequence[Mapping[str, Tensor]] | None = None,
    latency_repeats: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Evaluation:
    """Measure accuracy and cost of a model on labelled images.

    An image whose outputs are not all finite counts as wrong. Of a model with several outputs
    the first that counts are the logits: top-1, top-5 and agreement are theirs. Sums run in
    float64.

    Args:
        model: Classifier with outputs [B, K].
        labelled_batches: Pairs of inputs [B, ...] and class indices [B].
        dense: Model to compare with, or its :func:`model_outputs` on these batches where several
            models are compared with it; gives ``agreement`` and ``output_variance``.
        latency_repeats: Timed calls on the first batch, >= 2; 0 leaves the time out.
        outputs: What counts of what the model returns; see :func:`difference`.

    Returns:
        An ``Evaluation``.

    Raises:
        ValueError: If there is no batch, a batch is not a pair, the labels are not class
            indices of this model, or the outputs are not [B, K].
    """
    first: Tensor | None = None
    totals = torch.zeros(4, dtype=torch.float64)  # top-1, top-5, agreement, variance
    num_images, num_classes = 0, 0
    reference, held = (dense, None) if isinstance(dense, nn.Module) else (None, dense)
    if reference is not None:
        outputs = Outputs.measured(reference, unlabeled(labelled_batches), outputs)
    elif held is not None:
        outputs = Outputs.of_sizes(held, outputs)
    with evaluating(model, reference):
        for number, batch in enumerate(private_randomness(labelled_batches)):
            inputs, labels = _labelled(batch)
            first = inputs if first is None else first
            answer = returned(model, inputs)
            found = logits_of(answer, outputs).double()
            labels = class_indices(labels, found)
            num_classes = found.shape[1]
            ranked = top_classes(found, min(5, num_classes))
            hits = ranked == labels[:, None]
            totals = totals.to(found.device)
            totals[:2] += torch.stack([hits[:, 0].sum(), hits.sum()])
            if isinstance(outputs, Outputs) and dense is not None:
                theirs = (
                    outputs.of(returned(reference, inputs))
                    if reference is not None
                    else _of_batch(held or (), number)
                )
                totals[2:] += _compared(outputs, outputs.of(answer), theirs)
            num_images += len(labels)
    totals, num_images = over_all(totals.cpu(), num_images)
    if not num_images or first is None:
        raise ValueError(
            "labelled_batches: expected at least one batch, found none: check the data folder"
        )
    means = (totals / num_images).tolist()
    timed = measure_latency(model, first, repeats=latency_repeats) if latency_repeats else None
    return Evaluation(
        num_images=num_images,
        top1=means[0],
        top5=means[1] if num_classes >= 5 else None,
        agreement=means[2] if dense is not None else None,
        output_variance=means[3] if dense is not None else None,
        macs=count_macs(model, first),
        params=count_params(model),
        latency_ms=timed.median_ms if timed else None,
        latency_sd_ms=timed.sd_ms if timed else None,
        latency_batch_size=timed.batch_size if timed else None,
    )


@torch.no_grad()
def model_outputs(
    model: nn.Module, batches: Iterable[Any], *, outputs: Outputs | Chosen | None = None
) -> list[dict[str, Tensor]]:
    """Return what a model says to each batch, for :func:`evaluate`: name -> float64 [B, ...]."""
    inputs = unlabeled(batches)
    counted = Outputs.measured(model, inputs, outputs)
    with evaluating(model):
        found = [counted.of(returned(model, x)) for x in inputs]
    return [{name: output.double() for name, output in each.items()} for each in found]


def _of_batch(dense_outputs: Sequence[Mapping[str, Tensor]], number: int) -> Mapping[str, Tensor]:
    if number >= len(dense_outputs):
        raise ValueError(
            f"dense: expected outputs for every batch, found {len(dense_outputs)}: pass the "
            "outputs of the dense model on the same batches"
        )
    return dense_outputs[number]


def _compared(outputs: Outputs, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Return sums over the batch [2]: agreements of the first, squared changes of all."""
    found = torch.stack([comparison(ours[n].double(), theirs[n].double()) for n in outputs.scales])
    weights = torch.tensor(list(outputs.scales.values()), dtype=found.dtype).square()
    weights = weights.to(found.device)
    return torch.stack([found[0, 0], weights @ found[:, 1]])


def _labelled(batch: Any) -> tuple[Tensor, Tensor]:
    tensors = isinstance(batch, (tuple, list)) and [isinstance(p, Tensor) for p in batch[:2]]
    if tensors != [True, True]:
        raise ValueError(
            "labelled_batches: expected pairs (inputs, labels) of tensors, found "
            f"{type(batch).__name__}: evaluation needs a labelled set"
        )
    return batch[0], batch[1]


def class_indices(labels: Tensor, outputs: Tensor) -> Tensor:
    """Return labels [B] where the logits [B, K] are, if they are classes of theirs: ValueError."""
    if outputs.ndim != 2:
        raise ValueError(
            f"expected logits [batch, classes], found outputs of shape {tuple(outputs.shape)}: "
            "top-1 needs a classifier, which returns one row per input"
        )
    if labels.is_floating_point() or labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"expected one class index per image, shape {tuple(outputs.shape[:1])}, found labels "
            f"{labels.dtype} of shape {tuple(labels.shape)}: pass integer labels"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs.shape[1]:
        raise ValueError(
            f"expected labels in [0, {outputs.shape[1]}) as the model has outputs, found "
            f"{low} to {high}: check the class folders or the model's head"
        )
    return labels.to(outputs.device)
