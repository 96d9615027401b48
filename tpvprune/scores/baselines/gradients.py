"""Gradients by the weights, without traces, and how they become a number per channel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tpvprune.groups import ChannelGroups, ParamSlice
from tpvprune.passes.outputs import Chosen, Outputs, logits_of
from tpvprune.passes.running import on_device


def weight_gradients(
    model: nn.Module,
    names: Collection[str],
    inputs: Tensor,
    objective: Callable[[Any], Tensor],
) -> dict[str, Tensor]:
    """Compute the gradient of a number by each of the named parameters.

    The parameters are swapped for leaves that share their storage, so that frozen
    parameters work and neither `requires_grad` nor `.grad` of the caller's is touched.

    Args:
        model: Any model, on the device of the inputs.
        names: Qualified names of parameters.
        inputs: One batch [B, ...].
        objective: From what the model returns to the number.

    Returns:
        Parameter name -> gradient, of the parameter's shape.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {
            name: parameter.detach().requires_grad_()
            for name, parameter in model.named_parameters()
            if name in names
        }
        if not leaves:
            return {}
        value = objective(functional_call(model, leaves, (_usable(inputs),)))
        gradients = torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(leaves, gradients, strict=True))


def loss_gradients(
    model: nn.Module,
    names: Collection[str],
    inputs: Tensor,
    targets: Tensor,
    *,
    outputs: Outputs | Chosen | None = None,
) -> dict[str, Tensor]:
    """Compute the gradient of the mean cross-entropy by each of the named parameters.

    Args:
        model: Classifier with outputs [B, K].
        names: Qualified names of parameters.
        inputs: One batch [B, ...].
        targets: Class indices [B].
        outputs: What counts, of which the first are the class scores; None: the first.

    Returns:
        Parameter name -> gradient, of the parameter's shape.
    """

    def loss(returned: Any) -> Tensor:
        return F.cross_entropy(class_scores(returned, outputs), _usable(targets))

    return weight_gradients(model, names, inputs, loss)


def _usable(tensor: Tensor) -> Tensor:
    # Tensors made in inference mode cannot enter autograd; their clones can.
    return tensor.clone() if tensor.is_inference() else tensor


def class_scores(returned: Any, outputs: Outputs | Chosen | None = None) -> Tensor:
    """Return the class scores of what a classifier returned: the first output that counts.

    Args:
        returned: What a model returned.
        outputs: What counts; None: the first tensor of real numbers.

    Returns:
        Class scores [B, K].

    Raises:
        ValueError: If they are anything else.
    """
    scores = logits_of(returned, outputs)
    if scores.ndim != 2:
        raise ValueError(
            f"cross-entropy needs class scores [N, K], found {tuple(scores.shape)}: "
            "use a criterion without a loss, such as tpv"
        )
    return scores


def labelled_pairs(
    criterion: str, model: nn.Module, batches: Iterable[Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over labelled batches, on the model's device.

    Args:
        criterion: Who asks, for the message.
        model: Says where the tensors go.
        batches: Pairs of inputs and class indices [B].

    Yields:
        Inputs [B, ...], class indices [B].

    Raises:
        ValueError: If the batches carry no labels, or there are none.
    """
    found = False
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"{criterion} needs labelled batches, pairs (inputs, classes), "
                f"found {type(batch).__name__}: pass labelled data or a label-free criterion"
            )
        found = True
        yield on_device(batch[0], model), on_device(batch[1], model)
    if not found:
        raise ValueError(f"{criterion} needs at least one labelled batch, found none")


def scored_by_torch_pruning(model: nn.Module, norms: tuple[type[nn.Module], ...]) -> set[str]:
    """Return the names of the weights that torch-pruning's criteria look at.

    Args:
        model: Any model.
        norms: The normalisation layers among them.

    Returns:
        Names of weights of convolutions, linear layers and `norms`; depthwise
        convolutions are left out, which torch-pruning cuts but does not score.
    """
    mixing = (nn.modules.conv._ConvNd, nn.Linear)
    names = set()
    for name, module in model.named_modules():
        depthwise = 1 < getattr(module, "groups", 1) == getattr(module, "out_channels", 0)
        if isinstance(module, mixing + norms) and not depthwise:
            names.add(f"{name}.weight")
    return names


def per_channel(
    groups: ChannelGroups,
    parts: Mapping[str, Sequence[ParamSlice]],
    values: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Sum a number per weight over the weights of each channel.

    Args:
        groups: Channel groups.
        parts: Group name -> the slices that count.
        values: Parameter name -> number per weight, of the parameter's shape.

    Returns:
        Group name -> sums, float64 [C].
    """
    sums = {}
    for group in groups:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for part in parts[group.name]:
            owned = per_position(values[part.param], part.dim).cpu()[part.index.cpu()]
            total.index_add_(0, part.channel.cpu(), owned)
        sums[group.name] = total
    return sums


def per_position(values: Tensor, dim: int) -> Tensor:
    """Sum over everything but one dimension.

    Args:
        values: A number per weight.
        dim: The dimension that stays.

    Returns:
        Float64 [size of dim].
    """
    return values.double().movedim(dim, 0).reshape(values.shape[dim], -1).sum(1)
