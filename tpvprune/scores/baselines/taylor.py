"""First-order change of the labelled loss, to compare against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn

from tpvprune.groups import ChannelGroups
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating
from tpvprune.scores.baselines.gradients import (
    add_to,
    labelled_pairs,
    loss_gradients,
    per_channel,
    scored_by_torch_pruning,
    slices_where,
)
from tpvprune.scores.tpv import Scores


def taylor_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    variant: Literal["fixed", "torch_pruning"] = "fixed",
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Scores:
    """Score channels by the first-order change of the labelled loss, in its units. Needs labels.

    `fixed`: S_c = |Σ w·∂L/∂w| over the weights that read channel c, L the mean
    cross-entropy over all images. This is |∂L/∂gate_c|, each channel counted once.

    `torch_pruning`: S_c = Σ |w·g| over the weights of convolutions, linear layers and
    LayerNorms on both sides, g the sum over batches of the gradient of the batch-mean
    loss: `GroupTaylorImportance(group_reduction="sum", normalizer=None)` of version
    1.6.1, which by a mix-up of handlers never scores BatchNorm and leaves out
    depthwise convolutions.

    Batches without labels, or none at all, are a ValueError.

    Reference:
        Molchanov et al. 2019, "Importance estimation for neural network pruning",
        https://arxiv.org/abs/1906.10771
    """
    fixed = variant == "fixed"
    scored = scored_by_torch_pruning(model, (nn.LayerNorm,))
    parts, names = slices_where(
        groups, lambda part: part.side == "consumer" if fixed else part.param in scored
    )
    gradients: dict[str, Tensor] = {}
    num_samples = 0
    with evaluating(model):
        for inputs, targets in labelled_pairs("taylor", model, batches):
            weight = len(inputs) if fixed else 1
            found = loss_gradients(model, names, inputs, targets, outputs=outputs)
            add_to(gradients, {name: g.double() * weight for name, g in found.items()})
            num_samples += len(inputs)

    parameters = dict(model.named_parameters())
    changes = {name: parameters[name].detach() * g for name, g in gradients.items()}
    changes = {name: c / num_samples if fixed else c.abs() for name, c in changes.items()}
    return Scores(
        {g.name: per_channel(g, parts[g.name], changes).abs() for g in groups},
        num_samples=num_samples,
        criterion="taylor" if fixed else "taylor_torch_pruning",
        used_labels=True,
    )
