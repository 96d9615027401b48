"""Scores to compare against that need gradients of the cross-entropy by the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tpvprune.batches import unlabeled
from tpvprune.groups import ChannelGroups, ParamSlice
from tpvprune.running import evaluating, on_device
from tpvprune.scores import Scores


def taylor_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    variant: Literal["fixed", "torch_pruning"] = "fixed",
    seed: int = 0,
) -> Scores:
    """Score channels by the first-order change of the labelled loss. Needs labels.

    `fixed`: S_c = |Σ w·∂L/∂w| over the weights that read channel c, L the mean
    cross-entropy over all images. This is |∂L/∂gate_c|, each channel counted once.

    `torch_pruning`: S_c = Σ |w·g| over the weights of convolutions, linear layers and
    LayerNorms on both sides, g the sum over batches of the gradient of the batch-mean
    loss: `GroupTaylorImportance(group_reduction="sum", normalizer=None)` of version
    1.6.1, which by a mix-up of handlers never scores BatchNorm and leaves out
    depthwise convolutions.

    Args:
        model: Classifier with outputs [N, K].
        groups: Channel groups to score.
        batches: Labelled batches: pairs of inputs and class indices [N].
        variant: Which formula.
        seed: Ignored; the criterion is deterministic.

    Returns:
        Scores, float64 [C] per group, in units of the loss.

    Raises:
        ValueError: If the batches carry no labels, or there are none.

    Reference:
        Molchanov et al. 2019, "Importance estimation for neural network pruning",
        https://arxiv.org/abs/1906.10771
    """
    fixed = variant == "fixed"
    scored = _scored_by_torch_pruning(model, (nn.LayerNorm,))
    parts = {
        group.name: [
            part
            for part in group.slices
            if (part.side == "consumer" if fixed else part.param in scored)
        ]
        for group in groups
    }
    names = {part.param for owned in parts.values() for part in owned}
    gradients: dict[str, Tensor] = {}
    num_samples = 0
    with evaluating(model):
        for batch in batches:
            inputs, targets = (on_device(t, model) for t in _labelled(batch))
            weight = len(inputs) if fixed else 1
            for name, gradient in _loss_gradients(model, names, inputs, targets):
                step = gradient.double() * weight
                gradients[name] = gradients[name] + step if name in gradients else step
            num_samples += len(inputs)
    if not num_samples:
        raise ValueError("taylor needs at least one labelled batch, found none")

    parameters = dict(model.named_parameters())
    values = {}
    for group in groups:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for part in parts[group.name]:
            product = parameters[part.param].detach() * gradients[part.param]
            product = product / num_samples if fixed else product.abs()
            owned = _by_position(product, part.dim)[part.index.cpu()]
            total.index_add_(0, part.channel.cpu(), owned)
        values[group.name] = total.abs()
    return Scores(
        values,
        num_samples=num_samples,
        criterion="taylor" if fixed else "taylor_torch_pruning",
        used_labels=True,
    )


def jbr_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Tensor],
    *,
    confidence: float = 0.9,
    dense: nn.Module | None = None,
    seed: int = 0,
) -> Scores:
    """Score channels by Jacobian-based rebalancing, as its reference code does.

    S_c = Σ_m Σ_b (Σ w·∂L_b/∂w)², over the layers m of the group and the batches b:
    convolutions and linear layers by their outputs (with bias) and by their inputs,
    BatchNorm and LayerNorm by the pair (scale, bias). L_b is the *mean* cross-entropy
    of a batch on the dense model's own predictions, for images with a softmax above
    `confidence`. The square is taken per position of the layer, so a channel that is
    flattened into several inputs adds their squares. As in the reference, depthwise
    convolutions and bare parameters are not scored. This differs from it in:
    1. batches are refilled with confident images in the order given, not shuffled;
    2. grouped convolutions are scored, where the reference stops with an IndexError.

    Args:
        model: Classifier with outputs [N, K].
        groups: Channel groups to score.
        batches: Unlabeled inputs; the size of the first is the size of every L_b.
        confidence: Softmax that an image must exceed, in [0, 1).
        dense: Model whose predictions are the pseudo-labels; by default `model`.
        seed: Ignored; the criterion is deterministic.

    Returns:
        Scores, float64 [C] per group; `num_samples` counts the confident images.

    Raises:
        ValueError: If no image is predicted with enough confidence.

    Reference:
        Arpit 2026, "Test prediction variance", https://arxiv.org/abs/2512.11089, and
        its repository devansharpit/TPV, `applications/benchmark_pruning.py`.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    scored = _scored_by_torch_pruning(model, norms)
    parts = [p for group in groups for p in group.slices if p.param in scored]
    biases = {_bias(part) for part in parts} & dict(model.named_parameters()).keys()
    names = {part.param for part in parts} | biases
    sides = {(part.param, part.dim, part.side): part for part in parts}
    parameters = dict(model.named_parameters())
    squares: dict[tuple[str, int, str], Tensor] = defaultdict(
        lambda: torch.zeros((), dtype=torch.float64)
    )
    num_samples = 0
    teacher = model if dense is None else dense
    with evaluating(model, teacher):
        for inputs, predictions in _confident(teacher, batches, confidence):
            gradients = dict(_loss_gradients(model, names, inputs, predictions))
            products = {
                name: parameters[name].detach().double() * gradient
                for name, gradient in gradients.items()
            }
            for key, part in sides.items():
                change = _by_position(products[part.param], part.dim)
                if part.side == "producer" and _bias(part) in biases:
                    change = change + products[_bias(part)].cpu()
                squares[key] = squares[key] + change.square()
            num_samples += len(inputs)
    if not num_samples:
        raise ValueError(
            f"jbr needs images that the model predicts with confidence > {confidence}, "
            "found none: lower the confidence, give more images or train the model"
        )

    values = {}
    for group in groups:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for part in group.slices:
            if part.param in scored:
                square = squares[part.param, part.dim, part.side]
                total.index_add_(0, part.channel.cpu(), square[part.index.cpu()])
        values[group.name] = total
    return Scores(
        values,
        num_samples=num_samples,
        criterion="jbr",
        used_labels=False,
    )


def _loss_gradients(
    model: nn.Module, names: Collection[str], inputs: Tensor, targets: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of the mean cross-entropy by each of the named parameters.

    The parameters are swapped for leaves that share their storage, so that frozen
    parameters work and neither `requires_grad` nor `.grad` of the caller's is touched.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {
            name: parameter.detach().requires_grad_()
            for name, parameter in model.named_parameters()
            if name in names
        }
        # Tensors made in inference mode cannot enter autograd; their clones can.
        inputs, targets = (t.clone() if t.is_inference() else t for t in (inputs, targets))
        outputs = functional_call(model, leaves, (inputs,))
        loss = F.cross_entropy(_logits(outputs), targets)
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    yield from zip(leaves, gradients, strict=True)


def _confident(
    teacher: nn.Module, batches: Iterable[Tensor], confidence: float
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
            top = _logits(teacher(inputs)).softmax(1).max(1)
        sure = top.values > confidence
        images = [torch.cat([*images, inputs[sure]])]
        classes = [torch.cat([*classes, top.indices[sure]])]
        while len(images[0]) >= size:
            yield images[0][:size], classes[0][:size]
            images, classes = [images[0][size:]], [classes[0][size:]]
    if images and len(images[0]):
        yield images[0], classes[0]


def _logits(outputs: object) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs)
        raise ValueError(
            f"cross-entropy needs class scores [N, K], found {found}: "
            "use a criterion without a loss, such as tpv"
        )
    return outputs


def _labelled(batch: object) -> tuple[Tensor, Tensor]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        "taylor needs labelled batches, pairs (inputs, classes), "
        f"found {type(batch).__name__}: pass labelled data or a label-free criterion"
    )


def _scored_by_torch_pruning(model: nn.Module, norms: tuple[type[nn.Module], ...]) -> set[str]:
    """Return the names of the weights that torch-pruning's gradient criteria look at."""
    mixing = (nn.modules.conv._ConvNd, nn.Linear)
    names = set()
    for name, module in model.named_modules():
        depthwise = 1 < getattr(module, "groups", 1) == getattr(module, "out_channels", 0)
        if isinstance(module, mixing + norms) and not depthwise:
            names.add(f"{name}.weight")
    return names


def _bias(part: ParamSlice) -> str:
    return f"{part.param.rpartition('.')[0]}.bias"


def _by_position(values: Tensor, dim: int) -> Tensor:
    # Float64 [size of dim]: everything but the dimension itself is summed.
    return values.double().movedim(dim, 0).reshape(values.shape[dim], -1).sum(1).cpu()
