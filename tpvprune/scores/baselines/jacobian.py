"""Jacobian criteria: squares of the first-order change of each layer, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups, ParamSlice
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device
from tpvprune.scores.baselines.gradients import (
    NORMS,
    add_to,
    channel_sums,
    class_scores,
    labelled_pairs,
    loss_gradients,
    per_position,
    scored_by_torch_pruning,
    slices_where,
)
from tpvprune.scores.tpv import Scores


def jacobian_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Scores:
    """Score channels by the Jacobian criterion of Optimal Brain Connection. Needs labels.

    S_c = Σ_m w_mᵀ (J_mᵀ J_m) w_m = Σ_m Σ_b (Σ w·∂L_b/∂w)², over the layers m of the
    group and the batches b, L_b the *mean* cross-entropy of a batch with its labels. Both
    sides of the cut count, once per layer: convolutions and linear layers by their outputs
    (with bias) and by their inputs, BatchNorm and LayerNorm by the pair (scale, bias). As
    in the authors' code, depthwise convolutions and bare parameters are not scored, the
    square is taken per position of the layer, and the batch size matters. This differs from
    it in one point: grouped convolutions are scored, where it stops with an IndexError.

    In squared units of the loss. Batches without labels, or none at all, are a ValueError.

    Reference:
        Chen et al. 2025, "Optimal Brain Connection", https://arxiv.org/abs/2508.05521, and
        its repository ShaowuChen/Optimal_Brain_Connection
        (`GroupJacobianImportance_accumulate` with `group_reduction="sum"`, `normalizer=None`).
    """
    with evaluating(model):
        values, num_samples = _batch_squares(
            model, groups, labelled_pairs("jacobian", model, batches), outputs
        )
    return Scores(values, num_samples=num_samples, criterion="jacobian", used_labels=True)


def jbr_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Tensor],
    *,
    confidence: float = 0.9,
    dense: nn.Module | None = None,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Scores:
    """Score channels by Jacobian-based rebalancing, as its reference code does.

    The formula of :func:`jacobian_scores`, with the dense model's own predictions for
    labels, on images with a softmax above `confidence` only. This differs from the
    reference in: 1. batches are refilled with confident images in the order given, not
    shuffled; 2. grouped convolutions are scored.

    ``batches``: the size of the first is the size of every L_b. ``confidence``: softmax that an
    image must exceed, in [0, 1). ``dense``: model whose predictions are the pseudo-labels; by
    default ``model``. `num_samples` counts the confident images; without any it is a ValueError.

    Reference:
        Arpit 2026, "Test prediction variance", https://arxiv.org/abs/2512.11089, and
        its repository devansharpit/TPV, `applications/benchmark_pruning.py`.
    """
    teacher = model if dense is None else dense
    with evaluating(model, teacher):
        values, num_samples = _batch_squares(
            model, groups, _confident(teacher, batches, confidence, outputs), outputs
        )
    if not num_samples:
        raise ValueError(
            f"jbr needs images that the model predicts with confidence > {confidence}, "
            "found none: lower the confidence, give more images or train the model"
        )
    return Scores(values, num_samples=num_samples, criterion="jbr")


def _batch_squares(
    model: nn.Module,
    groups: ChannelGroups,
    pairs: Iterable[tuple[Tensor, Tensor]],
    outputs: Outputs | Chosen | None,
) -> tuple[dict[str, Tensor], int]:
    """Return Σ_m Σ_b (Σ w·∂L_b/∂w)² per group, float64 [C], and the number of images."""
    scored = scored_by_torch_pruning(model, NORMS)
    parts, names = slices_where(groups, lambda part: part.param in scored)
    parameters = dict(model.named_parameters())
    sides = {(p.param, p.dim, p.side): p for owned in parts.values() for p in owned}
    biases = {_bias(part) for part in sides.values()} & parameters.keys()
    squares: dict[tuple[str, int, str], Tensor] = {}
    num_samples = 0
    for inputs, targets in pairs:
        gradients = loss_gradients(model, names | biases, inputs, targets, outputs=outputs)
        products = {n: parameters[n].detach().double() * g for n, g in gradients.items()}
        for key, part in sides.items():
            change = per_position(products[part.param], part.dim)
            if part.side == "producer" and _bias(part) in biases:
                change = change + products[_bias(part)]
            add_to(squares, {key: change.square()})
        num_samples += len(inputs)

    return {
        group.name: channel_sums(
            group,
            ((p, squares[p.param, p.dim, p.side]) for p in parts[group.name] if num_samples),
        )
        for group in groups
    }, num_samples


def _bias(part: ParamSlice) -> str:
    return f"{part.param.rpartition('.')[0]}.bias"


def _confident(
    teacher: nn.Module,
    batches: Iterable[Tensor],
    confidence: float,
    outputs: Outputs | Chosen | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield full batches of confident images and their predicted classes.

    Like the reference code, images below the confidence are left out and the rest
    moves up, so that every batch but the last has the size of the first one given.
    """
    size = 0
    images: list[Tensor] = []
    classes: list[Tensor] = []
    for batch in unlabeled(batches):
        inputs = on_device(batch, teacher)
        size = size or len(inputs)
        with torch.no_grad():
            top = class_scores(teacher(inputs), outputs).softmax(1).max(1)
        sure = top.values > confidence
        images = [torch.cat([*images, inputs[sure]])]
        classes = [torch.cat([*classes, top.indices[sure]])]
        while len(images[0]) >= size:
            yield images[0][:size], classes[0][:size]
            images, classes = [images[0][size:]], [classes[0][size:]]
    if images and len(images[0]):
        yield images[0], classes[0]
