"""Second-order criteria: squares of per-sample gradients by the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device
from tpvprune.scores.baselines.gradients import (
    NORMS,
    add_to,
    labelled_pairs,
    loss_gradients,
    per_channel,
    scored_by_torch_pruning,
    slices_where,
    weight_gradients,
)
from tpvprune.scores.tpv import Scores

HessianVariant = Literal["fixed", "torch_pruning", "obdc_torch_pruning"]
_NAMES: dict[HessianVariant, str] = {
    "fixed": "hessian",
    "torch_pruning": "hessian_torch_pruning",
    "obdc_torch_pruning": "obdc_torch_pruning",
}
_OBDC_FLOOR = 1e-10


def hessian_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    variant: HessianVariant = "fixed",
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Scores:
    """Score channels by Optimal Brain Damage with the diagonal empirical Fisher. Needs labels.

    `fixed`: S_c = Σ w² · 1/N Σ_n (∂L_n/∂w)², L_n the cross-entropy of image n, over the weights
    that go with channel c on both sides of the cut: convolutions, linear layers and the scales
    of BatchNorm and LayerNorm. The factor 1/2 of the expansion is left out.

    `torch_pruning`: the same weights, but S_c = Σ w² · (∂L_N/∂w)²: only the *last* image counts,
    because `GroupHessianImportance(group_reduction="sum", normalizer=None)` of version 1.6.1
    looks for its sum under another key than it is stored, and starts anew with every image.

    `obdc_torch_pruning`: S_c = Σ w² · (1/B Σ_n (∂L_n/∂w)² + 1e-10), B the number of batches,
    over the convolutions and linear layers that write channel c (the producer side):
    `OBDCImportance(group_reduction="sum", normalizer=None)` of version 1.6.1 by its formula:
    its own set-up fails on groups without attention, and its scoring at layers with a bias,
    which are scored here without it.

    In squared units of the loss. Images pass one by one. Batches without labels, or none at all,
    are a ValueError.

    Reference:
        LeCun et al. 1989, "Optimal brain damage"; Theis et al. 2018, "Faster gaze prediction
        with dense networks and Fisher pruning", https://arxiv.org/abs/1801.05787; Wang et al.
        2019, "EigenDamage" (OBD-C), https://arxiv.org/abs/1905.05934
    """
    is_obdc, last_only = variant == "obdc_torch_pruning", variant == "torch_pruning"
    scored = scored_by_torch_pruning(model, () if is_obdc else NORMS)
    parts, names = slices_where(
        groups, lambda p: p.param in scored and not (is_obdc and p.side == "consumer")
    )
    squares: dict[str, Tensor] = {}
    num_samples = num_batches = 0
    with evaluating(model):
        for inputs, targets in labelled_pairs(_NAMES[variant], model, batches):
            squares = {} if last_only else squares
            first = len(inputs) - 1 if last_only else 0
            for x, y in zip(inputs[first:].split(1), targets[first:].split(1), strict=True):
                add_to(squares, _squared(loss_gradients(model, names, x, y, outputs=outputs)))
            num_samples += len(inputs)
            num_batches += 1
    divisor = {"fixed": num_samples, "torch_pruning": 1, "obdc_torch_pruning": num_batches}
    floor = _OBDC_FLOOR if is_obdc else 0.0
    parameters = dict(model.named_parameters())
    changes = {
        name: parameters[name].detach().double().square() * (s / divisor[variant] + floor)
        for name, s in squares.items()
    }
    return Scores(
        {g.name: per_channel(g, parts[g.name], changes) for g in groups},
        num_samples=num_samples,
        criterion=_NAMES[variant],
        used_labels=True,
    )


def lfh_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Any],
    *,
    num_probes: int = 1,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Scores:
    """Score channels by the label-free Hessian: trace times mean squared weight.

    S_c = Σ_m ‖w_mc‖² / |w_mc| · Tr H_mc, H_mc = E_x[JᵀJ] with J the derivative of the outputs
    by the filter w_mc, over the convolutions and linear layers m that write channel c (the
    producer side; no bias, no normalisation, no depthwise convolution) and |w_mc| the number of
    weights of the filter. The trace is estimated as E_x E_v ‖∂(vᵀf)/∂w_mc‖², v random signs.
    This is TPV for noise of equal size on every weight of the filter, where `tpv` takes the very
    perturbation that removes the channel. Differs from the Model Compression Toolkit, which
    prunes chains only and so has one layer m a channel, and draws up to 100 probes for each of
    32 images. Images pass one by one.

    ``num_probes``: directions per image, each of which costs a forward and a backward; below 1 is a
    ValueError. In squared output units (of several outputs without unit).

    Reference:
        Model Compression Toolkit, structured pruning, importance metric LFH,
        https://github.com/SonySemiconductorSolutions/mct-model-optimization
        (`lfh_importance_metric.py`, `weights_hessian_scores_calculator_pytorch.py`).
    """
    if num_probes < 1:
        raise ValueError(f"num_probes: expected at least 1, found {num_probes}.")
    scored = scored_by_torch_pruning(model, ())
    parts, names = slices_where(groups, lambda p: p.side == "producer" and p.param in scored)
    generator = torch.Generator().manual_seed(seed)
    counted = Outputs.measured(model, unlabeled(batches), outputs)
    squares: dict[str, Tensor] = {}
    num_samples = 0

    def along_signs(returned: Any) -> Tensor:
        (f,) = counted.joined(returned, 1)
        signs = torch.randint(0, 2, (len(f),), generator=generator) * 2 - 1
        return f @ signs.to(f)

    with evaluating(model):
        for batch in unlabeled(batches):
            for x in on_device(batch, model).split(1):
                for _ in range(num_probes):
                    add_to(squares, _squared(weight_gradients(model, names, x, along_signs)))
            num_samples += len(batch)
    parameters = dict(model.named_parameters())
    values = {}
    for group in groups:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for part in parts[group.name]:
            weight = parameters[part.param].detach()
            trace = squares[part.param] / (num_samples * num_probes)
            norm, traced, count = (
                per_channel(group, [part], {part.param: t})
                for t in (weight.double().square(), trace, torch.ones_like(weight))
            )
            total += norm * traced / count.clamp_min(1)
        values[group.name] = total
    return Scores(values, num_samples=num_samples, criterion="lfh")


def _squared(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient.double().square() for name, gradient in gradients.items()}
