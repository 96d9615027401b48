"""What a model costs and how well it does: the only label-reading code besides baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.batches import private_randomness, unlabeled
from tpvprune.passes.costs import Latency, call_arguments, count_macs, count_params, measure_latency
from tpvprune.passes.moments import Moments
from tpvprune.passes.outputs import Chosen, Outputs, logits_of
from tpvprune.passes.running import evaluating, fast_layout
from tpvprune.processes.shares import summed, total

__all__ = [
    "Difference",
    "Evaluation",
    "Latency",
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
            returned = _returned(model, inputs)
            found = _logits(returned, outputs)
            num_classes = found.shape[-1]
            labels = class_indices(labels, found)
            ranked = _top_classes(found, min(5, num_classes))
            hits = ranked == labels[:, None]
            totals = totals.to(found.device)
            totals[:2] += torch.stack([hits[:, 0].sum(), hits.sum()])
            if isinstance(outputs, Outputs) and dense is not None:
                theirs = (
                    outputs.of(_returned(reference, inputs))
                    if reference is not None
                    else _of_batch(held or (), number)
                )
                totals[2:] += _compared(outputs, outputs.of(returned), theirs)
            num_images += len(labels)
    totals, num_images = _over_all(totals.cpu(), num_images)
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
    """Return what a model says to each batch, for :func:`evaluate`.

    ``batches``: inputs [B, ...]; labels are dropped. ``outputs``: what counts of what it returns;
    None: all. Returns for each batch, name of an output -> float64 [B, ...].
    """
    inputs = unlabeled(batches)
    counted = Outputs.measured(model, inputs, outputs)
    with evaluating(model):
        found = [counted.of(_returned(model, x)) for x in inputs]
    return [{name: output.double() for name, output in each.items()} for each in found]


def agreement(model: nn.Module, dense: nn.Module, batches: Iterable[Any]) -> float:
    """Compute the fraction of inputs on which two models choose the same class.

    mean_x [argmax f(x) = argmax f_dense(x)], over the output dimension 1 and, for outputs
    with positions, over the positions too. Outputs that are not finite never agree. Outputs
    of unequal shape, or no batch at all, are a ValueError.

    Args:
        model: Model to judge, usually the pruned one.
        dense: Model to agree with.
        batches: Inputs [B, ...]; labels are dropped.

    Returns:
        A fraction in [0, 1].
    """
    return difference(model, dense, batches).agreement


def output_variance(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    outputs: Outputs | Chosen | None = None,
) -> float:
    """Compute E_x‖f(x) − f_dense(x)‖², in squared output units.

    Outputs of unequal shape, or no batch at all, are a ValueError.

    ``batches``: inputs [B, ...]; labels are dropped. Returns the mean over inputs, >= 0; not finite
    if an output is not.
    """
    return difference(model, dense, batches, outputs=outputs).output_variance


@dataclass(frozen=True)
class Difference:
    """How far a model is from the dense one on images that it was not fitted to.

    Attributes:
        num_images: How many.
        agreement: Fraction of equal top-1, in [0, 1].
        chance: What the agreement would be if both chose their classes independently.
        output_variance: E‖f − f_dense‖², in squared output units.
        share: The same as a share of the variance of the dense outputs themselves, a common shift
            of all logits aside, which moves no class; 1 is as far as another image's outputs
            are from the mean.
        by_output: The share of each output by itself. Of several outputs agreement is that of the
            first, and output variance the sum over all, each in units of its second moment.
    """

    num_images: int
    agreement: float
    chance: float
    output_variance: float
    share: float
    by_output: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_broken(self) -> bool:
        """Whether the model is no longer the same function: most classes, or all variance, lost.

        Of one image there is no variance to lose.
        """
        shares = (self.share, *self.by_output.values()) if self.num_images > 1 else ()
        return not (self.agreement >= 0.5 and all(share <= 1.0 for share in shares))


@torch.no_grad()
def difference(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    outputs: Outputs | Chosen | None = None,
) -> Difference:
    """Compare two models on unlabeled images.

    ``batches``: inputs [B, ...]; labels are dropped. ``outputs``: what counts of what they return;
    None: all, each in units of its second moment. Returns the difference; ``share`` is infinite
    where the dense outputs do not vary but these do.
    """
    inputs = unlabeled(batches)
    outputs = Outputs.measured(dense, inputs, outputs)
    tally = _Tally(len(outputs.scales))
    with evaluating(model, dense):
        for x in inputs:
            ours, theirs = (outputs.of(_returned(m, x)).values() for m in (model, dense))
            tally.add([(o.double(), t.double()) for o, t in zip(ours, theirs, strict=True)])
    return tally.difference(outputs)


class _Tally:
    """Sums over images of how far outputs are apart; of the first of them, how often they agree."""

    def __init__(self, num_outputs: int) -> None:
        self._num, self._agree = 0, torch.zeros(1, dtype=torch.float64)
        self._changed = torch.zeros(2, num_outputs, dtype=torch.float64)  # without a shift, too
        self._chosen = torch.zeros(2, 0, dtype=torch.float64)
        self._spread: list[Moments] = []

    def add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take in the outputs [B, ...] of both models, the dense one's second."""
        device = pairs[0][0].device  # where the sums stay until all images have been seen
        self._changed, self._agree = self._changed.to(device), self._agree.to(device)
        for i, (ours, theirs) in enumerate(pairs):
            compared = _comparison(ours, theirs)
            rows = _without_shift(theirs).flatten(1)
            apart = (_without_shift(ours).flatten(1) - rows).square().sum()
            self._changed[:, i] += torch.stack([compared[1], apart])
            if len(self._spread) == i:
                self._spread.append(Moments(rows.shape[1], device=device))
            self._spread[i].add(rows)
            if i == 0:
                self._agree += compared[0]
                counts = [o.argmax(1).flatten().bincount(minlength=o.shape[1]) for o in pairs[0]]
                chosen = torch.stack(counts).double()
                self._chosen = chosen + self._chosen if self._num else chosen
                num = len(ours)
        self._num += num

    def difference(self, outputs: Outputs) -> Difference:
        """Return the means over the images of all processes."""
        self._changed, self._agree, self._chosen = (
            t.cpu() for t in (self._changed, self._agree, self._chosen)
        )
        for m in self._spread:
            m.mean, m.spread = m.mean.cpu(), m.spread.cpu()
        # A process may have no image at all, and learns here how many numbers there are.
        here = [self._chosen.shape[1], *(len(m.mean) for m in self._spread)] if self._num else []
        sizes = torch.zeros(2 + self._changed.shape[1], dtype=torch.float64)
        sizes[: len(here)] = torch.tensor(here, dtype=torch.float64)
        sizes[-1] = bool(here)
        widths = summed(sizes)[0]
        if not here:
            num_classes, *others = (round(float(w / widths[-1])) for w in widths[:-1])
            self._chosen = torch.zeros(2, num_classes, dtype=torch.float64)
            self._spread = [Moments(size) for size in others]
        changed, num = _over_all(self._changed, self._num)
        (squared, apart), (agree,) = changed / num, summed(self._agree)[0] / num
        chosen = summed(self._chosen)[0]
        odds = chosen / chosen.sum(1, keepdim=True)
        weights = torch.tensor(list(outputs.scales.values()), dtype=torch.float64).square()
        varies = torch.stack([m.over_processes()[2].sum() for m in self._spread])
        shares = map(_share, apart.tolist(), varies.tolist())
        return Difference(
            num,
            float(agree),
            float(odds.prod(0).sum()),
            float(weights @ squared),
            _share(float(weights @ apart), float(weights @ varies)),
            dict(zip(outputs.scales, shares, strict=True)),
        )


def _share(changed: float, variance: float) -> float:
    return changed / variance if variance > 0 else (0.0 if changed == 0 else float("inf"))


def _without_shift(outputs: Tensor) -> Tensor:
    """Return logits [B, K, ...] without what is common to all classes."""
    return outputs - outputs.mean(1, keepdim=True) if outputs.shape[1] > 1 else outputs


def _of_batch(dense_outputs: Sequence[Mapping[str, Tensor]], number: int) -> Mapping[str, Tensor]:
    if number >= len(dense_outputs):
        raise ValueError(
            f"dense: expected outputs for every batch, found {len(dense_outputs)}: pass the "
            "outputs of the dense model on the same batches"
        )
    return dense_outputs[number]


def _over_all(totals: Tensor, num: int) -> tuple[Tensor, int]:
    """Return sums, and the number of inputs, of all processes."""
    return summed(totals)[0], int(total(num))


def _compared(outputs: Outputs, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Return sums over the batch [2]: agreements of the first, squared changes of all."""
    found = torch.stack([_comparison(ours[n].double(), theirs[n].double()) for n in outputs.scales])
    weights = torch.tensor(list(outputs.scales.values()), dtype=found.dtype).square()
    weights = weights.to(found.device)
    return torch.stack([found[0, 0], weights @ found[:, 1]])


def _comparison(outputs: Tensor, dense_outputs: Tensor) -> Tensor:
    # Sums over the batch [2]: agreements, squared output changes.
    dense_outputs = dense_outputs.to(outputs.device)
    if outputs.shape != dense_outputs.shape:
        raise ValueError(
            f"expected outputs of the dense model's shape {tuple(dense_outputs.shape)}, found "
            f"{tuple(outputs.shape)}: compare models with the same head"
        )
    agree = (_top_classes(outputs, 1) == _top_classes(dense_outputs, 1)) & outputs.isfinite().all(
        1, keepdim=True
    )
    share = agree.double().flatten(1).mean(1).sum()
    return torch.stack([share, (outputs - dense_outputs).square().sum()])


def _top_classes(outputs: Tensor, num: int) -> Tensor:
    """Return the ``num`` most likely classes along dimension 1; -1 where outputs are not finite."""
    if num == 1:  # unlike topk, argmax takes the first of equals
        ranked = outputs.argmax(1, keepdim=True)
    else:
        ranked = outputs.topk(num, dim=1).indices
        ranked[:, 0] = outputs.argmax(1)
    return ranked.where(outputs.isfinite().all(1, keepdim=True), -1)


def _logits(returned: Any, outputs: Outputs | Chosen | None) -> Tensor:
    logits = logits_of(returned, outputs)
    if logits.ndim < 2:
        raise ValueError(
            f"expected model outputs [batch, outputs], found shape {tuple(logits.shape)}: "
            "wrap the model so that it returns one row per input"
        )
    return logits.double()


def _returned(model: nn.Module, inputs: Tensor) -> Any:
    (moved,) = call_arguments(model, inputs)
    return model(fast_layout(moved, model))


def _labelled(batch: Any) -> tuple[Tensor, Tensor]:
    if (
        not isinstance(batch, (tuple, list))
        or len(batch) < 2
        or not all(isinstance(part, Tensor) for part in batch[:2])
    ):
        raise ValueError(
            "labelled_batches: expected pairs (inputs, labels) of tensors, found "
            f"{type(batch).__name__}: evaluation needs a labelled set"
        )
    return batch[0], batch[1]


def class_indices(labels: Tensor, outputs: Tensor) -> Tensor:
    """Check that labels are classes of these outputs.

    ``labels``: class indices [B]. ``outputs``: logits [B, K].
    """
    if outputs.ndim != 2:
        raise ValueError(
            f"expected logits [batch, classes], found outputs of shape {tuple(outputs.shape)}: "
            "top-1 needs a classifier"
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
