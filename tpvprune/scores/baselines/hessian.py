"""Second-order criteria: squares of per-sample gradients by the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups, ParamSlice
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device
from tpvprune.scores.baselines.gradients import (
    labelled_pairs,
    loss_gradients,
    per_channel,
    per_position,
    scored_by_torch_pruning,
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

    Images pass one by one. Batches without labels, or none at all, are a ValueError.

    Args:
        model: Classifier with outputs [N, K].
        groups: Channel groups to score.
        batches: Labelled batches: pairs of inputs and class indices [N].
        variant: Which formula.
        seed: Ignored; the criterion is deterministic.
        outputs: Names of the outputs that count: the first of them is read; None: the first.

    Returns:
        Scores, float64 [C] per group, in squared units of the loss.

    Reference:
        LeCun et al. 1989, "Optimal brain damage"; Theis et al. 2018, "Faster gaze prediction
        with dense networks and Fisher pruning", https://arxiv.org/abs/1801.05787; Wang et al.
        2019, "EigenDamage" (OBD-C), https://arxiv.org/abs/1905.05934
    """
    parts = _counted(model, groups, variant)
    names = {part.param for owned in parts.values() for part in owned}
    squares: dict[str, Tensor] = {}
    num_samples = num_batches = 0
    with evaluating(model):
        for inputs, targets in labelled_pairs(_NAMES[variant], model, batches):
            first = len(inputs) - 1 if variant == "torch_pruning" else 0
            for x, y in zip(inputs[first:].split(1), targets[first:].split(1), strict=True):
                gradients = loss_gradients(model, names, x, y, outputs=outputs)
                _add_squares(squares, gradients, anew=variant == "torch_pruning")
            num_samples += len(inputs)
            num_batches += 1
    divisor = {"fixed": num_samples, "torch_pruning": 1, "obdc_torch_pruning": num_batches}
    floor = _OBDC_FLOOR if variant == "obdc_torch_pruning" else 0.0
    parameters = dict(model.named_parameters())
    changes = {
        name: parameters[name].detach().double().square() * (s / divisor[variant] + floor)
        for name, s in squares.items()
    }
    return Scores(
        per_channel(groups, parts, changes),
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

    Args:
        model: Any model.
        groups: Channel groups to score.
        batches: Inputs; labels are dropped.
        num_probes: Directions per image, >= 1; each costs a forward and a backward.
        seed: Of the directions.
        outputs: Of a model with several outputs those that count, or how much each counts, in units
            of its own second moment; None: all, alike.

    Returns:
        Scores in squared output units (of several outputs without unit), float64 [C] per group.

    Raises:
        ValueError: If num_probes is below 1.

    Reference:
        Model Compression Toolkit, structured pruning, importance metric LFH,
        https://github.com/SonySemiconductorSolutions/mct-model-optimization
        (`lfh_importance_metric.py`, `weights_hessian_scores_calculator_pytorch.py`).
    """
    if num_probes < 1:
        raise ValueError(f"num_probes: expected at least 1, found {num_probes}.")
    scored = scored_by_torch_pruning(model, ())
    parts = {
        g.name: [p for p in g.slices if p.side == "producer" and p.param in scored] for g in groups
    }
    names = {part.param for owned in parts.values() for part in owned}
    generator = torch.Generator().manual_seed(seed)
    counted = Outputs.measured(model, unlabeled(batches), outputs)
    squares: dict[str, Tensor] = {}
    num_samples = 0
    with evaluating(model):
        for batch in unlabeled(batches):
            for x in on_device(batch, model).split(1):
                for gradients in _probed(model, names, x, num_probes, generator, counted=counted):
                    _add_squares(squares, gradients)
            num_samples += len(batch)
    parameters = dict(model.named_parameters())
    values = {}
    for group in groups:
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for part in parts[group.name]:
            weight = parameters[part.param].detach()
            trace = squares[part.param] / (num_samples * num_probes)
            counts = torch.ones_like(weight)
            norm, traced, count = (
                torch.zeros_like(total).index_add_(
                    0, part.channel.cpu(), per_position(t, part.dim).cpu()[part.index.cpu()]
                )
                for t in (weight.double().square(), trace, counts)
            )
            total += norm * traced / count.clamp_min(1)
        values[group.name] = total
    return Scores(values, num_samples=num_samples, criterion="lfh", used_labels=False)


def _counted(
    model: nn.Module, groups: ChannelGroups, variant: HessianVariant
) -> dict[str, list[ParamSlice]]:
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    producers = variant == "obdc_torch_pruning"
    scored = scored_by_torch_pruning(model, () if producers else norms)
    sides = {"producer"} if producers else {"producer", "consumer"}
    return {g.name: [p for p in g.slices if p.param in scored and p.side in sides] for g in groups}


def _probed(
    model: nn.Module,
    names: Collection[str],
    x: Tensor,
    num: int,
    generator: torch.Generator,
    *,
    counted: Outputs,
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients of vᵀf(x) for random signs v, drawn image by image."""

    def along_signs(returned: Any) -> Tensor:
        (f,) = counted.joined(returned, 1)
        signs = torch.randint(0, 2, (len(f),), generator=generator) * 2 - 1
        return f @ signs.to(f)

    for _ in range(num):
        yield weight_gradients(model, names, x, along_signs)


def _add_squares(
    sums: dict[str, Tensor], gradients: dict[str, Tensor], *, anew: bool = False
) -> None:
    for name, gradient in gradients.items():
        square = gradient.double().square()
        sums[name] = square if anew or name not in sums else sums[name] + square
