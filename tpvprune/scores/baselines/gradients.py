"""Gradients by the weights, without traces, and how they become a number per channel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tpvprune.groups import ChannelGroup, ChannelGroups, ParamSlice, Reader
from tpvprune.passes.outputs import Chosen, Outputs, logits_of
from tpvprune.passes.running import on_device

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def weight_gradients(
    model: nn.Module,
    names: Collection[str],
    inputs: Tensor,
    objective: Callable[[Any], Tensor],
) -> dict[str, Tensor]:
    """Return the gradient of ``objective(what the model returns)`` by each named parameter.

    The parameters are swapped for leaves that share their storage, so that frozen
    parameters work and neither `requires_grad` nor `.grad` of the caller's is touched.
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
    """Return the gradient of the mean cross-entropy by each of the named parameters.

    ``targets``: class indices [B]. ``outputs``: what counts, see :func:`class_scores`.
    """

    def loss(returned: Any) -> Tensor:
        return F.cross_entropy(class_scores(returned, outputs), _usable(targets))

    return weight_gradients(model, names, inputs, loss)


def _usable(tensor: Tensor) -> Tensor:
    # Tensors made in inference mode cannot enter autograd; their clones can.
    return tensor.clone() if tensor.is_inference() else tensor


def class_scores(returned: Any, outputs: Outputs | Chosen | None = None) -> Tensor:
    """Return the class scores [B, K]: the first output that counts. ValueError for other shapes."""
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
    """Yield inputs [B, ...] and class indices [B] of labelled batches, on the model's device.

    ``criterion``: who asks, for the message. ValueError if there are no batches, or no labels.
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


def add_to(sums: dict[Any, Tensor], terms: Mapping[Any, Tensor]) -> None:
    """Add tensors to the sums of the same keys."""
    for key, term in terms.items():
        sums[key] = sums[key] + term if key in sums else term


def scored_by_torch_pruning(model: nn.Module, norms: tuple[type[nn.Module], ...]) -> set[str]:
    """Return the names of the weights that torch-pruning's criteria look at.

    They are those of convolutions, linear layers and ``norms``; depthwise convolutions are left
    out, which torch-pruning cuts but does not score.
    """
    mixing = (nn.modules.conv._ConvNd, nn.Linear)
    names = set()
    for name, module in model.named_modules():
        depthwise = 1 < getattr(module, "groups", 1) == getattr(module, "out_channels", 0)
        if isinstance(module, mixing + norms) and not depthwise:
            names.add(f"{name}.weight")
    return names


def slices_where(
    groups: ChannelGroups, counts: Callable[[ParamSlice], bool]
) -> tuple[dict[str, list[ParamSlice]], set[str]]:
    """Return the slices of every group that count, and the names of their parameters."""
    parts = {group.name: [part for part in group.slices if counts(part)] for group in groups}
    return parts, {part.param for owned in parts.values() for part in owned}


def per_channel(
    group: ChannelGroup, parts: Iterable[ParamSlice], values: Mapping[str, Tensor]
) -> Tensor:
    """Sum a number per weight over the weights of each channel: float64 [C].

    ``parts``: the slices that count. ``values``: by parameter, of its shape.
    """
    return channel_sums(group, ((p, per_position(values[p.param], p.dim)) for p in parts))


def channel_sums(
    group: ChannelGroup, pieces: Iterable[tuple[ParamSlice | Reader, Tensor]]
) -> Tensor:
    """Sum a number per position of slices or readers over those of each channel: float64 [C]."""
    total = torch.zeros(group.num_channels, dtype=torch.float64)
    for piece, values in pieces:
        total.index_add_(0, piece.channel.cpu(), values.cpu()[piece.index.cpu()])
    return total


def per_position(values: Tensor, dim: int) -> Tensor:
    """Sum over everything but one dimension, in float64."""
    return values.double().movedim(dim, 0).reshape(values.shape[dim], -1).sum(1)
