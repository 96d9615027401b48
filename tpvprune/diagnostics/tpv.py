"""TPV under other perturbations: SGD noise, quantization, label noise, and a real selection.

Test prediction variance is E_x ||f(x; w + dw) - f(x; w)||^2, to first order Tr(H_eff C) with
H_eff = E_x[J^T J] and C = E[dw dw^T]. Each perturbation comes in two forms: the trace form, from
Jacobians at w, and the Monte-Carlo form, which draws dw and runs the perturbed network. Where they
agree, first order carries; where training and held-out inputs agree, the measure is stable.

Source: Arpit, Test prediction variance, ICML 2026, https://arxiv.org/abs/2512.11089, section 4 and
appendix F; definitions of step and noise as in its example for a CIFAR-10 ResNet-20.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.diagnostics.jacobian_norms import (
    Estimate,
    JacobianNorms,
    jacobian_norms,
    mean_and_error,
)
from tpvprune.diagnostics.label_noise import distance, floating, label_noise_variance
from tpvprune.groups import ChannelGroups
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.evaluation import output_variance
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device
from tpvprune.scores.taps import Probing
from tpvprune.scores.tpv import output_changes

StepOf = Literal["model", "tensor"]
Draw = Callable[[str, Tensor, torch.Generator], Tensor]
"""``draw(parameter name, its values, generator)`` returns its perturbation."""


def sgd_variances(model: nn.Module, *, lr: float, batch_size: int) -> dict[str, float]:
    """Return the weight variance of stationary SGD near a minimum, lr / (2 B), by parameter name.

    The isotropic approximation of the paper: gradient noise H / B and pull H balance there.
    """
    return dict.fromkeys(floating(model), lr / (2 * batch_size))


def quantization_steps(
    model: nn.Module, *, bits: int, step_of: StepOf = "model"
) -> dict[str, float]:
    """Return the step of uniform b-bit quantization, (max - min) / (2^b - 1), by parameter name.

    ``step_of``: one range over the ``"model"``, as in the paper, or one for each ``"tensor"``.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: expected 1 to 16, found {bits}")
    if step_of not in {"model", "tensor"}:
        raise ValueError(f"step_of: expected 'model' or 'tensor', found {step_of!r}")
    values = {name: p.detach() for name, p in floating(model).items()}
    ends = {name: (float(p.min()), float(p.max())) for name, p in values.items()}
    if step_of == "model":
        widest = min(low for low, _ in ends.values()), max(high for _, high in ends.values())
        ends = dict.fromkeys(ends, widest)
    return {name: (high - low) / (2**bits - 1) for name, (low, high) in ends.items()}


def quantized(model: nn.Module, *, bits: int, step_of: StepOf = "model") -> nn.Module:
    """Return a copy with every parameter rounded to the nearest multiple of its step."""
    steps = quantization_steps(model, bits=bits, step_of=step_of)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in floating(rounded).items():
            if steps[name] > 0:
                p.copy_((p / steps[name]).round() * steps[name])
    return rounded


def gaussian(variances: Mapping[str, float]) -> Draw:
    """Return a draw of independent normal noise of these variances."""
    return lambda name, p, generator: (
        torch.randn(p.shape, generator=generator) * variances[name] ** 0.5
    )


def uniform(steps: Mapping[str, float]) -> Draw:
    """Return a draw of independent noise, uniform within half a step up and down."""
    return lambda name, p, generator: (torch.rand(p.shape, generator=generator) - 0.5) * steps[name]


@torch.no_grad()
def perturbed_variance(
    model: nn.Module,
    batches: Iterable[Any],
    draw: Draw,
    *,
    num_draws: int = 20,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Estimate:
    """Measure E_dw E_x ||f(x; w + dw) - f(x; w)||^2 by drawing dw: the Monte-Carlo form of TPV.

    Args:
        model: The network; not changed.
        batches: Re-iterable of unlabeled inputs.
        draw: The perturbation of a parameter.
        num_draws: Perturbed networks, >= 1; a forward over all inputs each.
        seed: Of the draws.
        outputs: What counts of what the model returns; see :func:`tpvprune.prune`.

    Returns:
        The variance in squared output units; the standard error is over draws, for these inputs.

    Raises:
        ValueError: If num_draws is below 1.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws: expected at least 1, found {num_draws}")
    generator = torch.Generator().manual_seed(seed)
    inputs = [on_device(x, model) for x in unlabeled(batches)]
    counted = Outputs.measured(model, inputs, outputs)
    perturbed = copy.deepcopy(model)
    weights, noisy = floating(model), floating(perturbed)
    found = []
    with evaluating(model, perturbed):
        dense = [counted.joined(model(x), len(x)) for x in inputs]
        for _ in range(num_draws):
            for name, p in noisy.items():
                p.copy_(weights[name] + draw(name, p, generator).to(p))
            moved = [counted.joined(perturbed(x), len(x)) for x in inputs]
            found.append(distance(moved, dense))
    return mean_and_error(torch.tensor(found, dtype=torch.float64))


def selection_variance(
    model: nn.Module,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    num_probes: int = 1,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> tuple[Estimate, float]:
    r"""Predict the output variance of removing a whole selection, and measure it.

    .. math:: E_x E_v \Big( \sum_{c \in R} v^T u_c(x) \Big)^2

    over all removed channels R together (their interactions are in it), u_c as in
    :func:`tpvprune.tpv_scores` without compensation. The ratio of the two says how far first
    order carries.

    Args:
        model: The dense network.
        groups: Its channel groups.
        kept: What stays; groups left out stay whole.
        batches: Re-iterable of unlabeled inputs.
        num_probes: Directions per sample.
        seed: Of the directions.
        outputs: What counts of what the model returns; see :func:`tpvprune.prune`.

    Returns:
        The prediction, with its standard error over samples, and what was measured.
    """
    inputs = unlabeled(batches)
    gone = {name: ~mask for name, mask in kept.items() if not bool(mask.all())}
    counted = Outputs.measured(model, inputs, outputs)
    probing = Probing(num_probes=num_probes, seed=seed, outputs=counted)
    rows = []
    for changes, _ in output_changes(model, groups, inputs, probing):
        sums = [changes[name][:, :, mask].double().sum(2) for name, mask in gone.items()]
        rows.append(torch.stack(sums).sum(0).square().mean(0).cpu())
    pruned = remove_channels(model, groups, kept)
    found = output_variance(pruned, model, inputs, outputs=counted)
    return mean_and_error(torch.cat(rows)), found


def stability_rows(
    model: nn.Module,
    train_batches: Iterable[Any],
    held_out_batches: Iterable[Any],
    *,
    lr: float = 1e-3,
    batch_size: int = 128,
    bits: Sequence[int] = (8,),
    step_of: StepOf = "model",
    num_probes: int = 1,
    num_draws: int = 20,
    label_noise: Mapping[str, Any] | None = None,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> list[dict[str, Any]]:
    """Compare TPV on the training set with TPV on a held-out set, perturbation by perturbation.

    The paper's stability claim (theorem 3.1) is that the ratio is near one. Costs one pass of
    :func:`~tpvprune.diagnostics.jacobian_norms` over both sets, and ``num_draws`` forwards for
    each Monte-Carlo form.

    Args:
        model: The network.
        train_batches: Unlabeled inputs that it was trained on.
        held_out_batches: Others.
        lr: Of SGD noise.
        batch_size: Of SGD noise.
        bits: Word lengths of quantization noise.
        step_of: See :func:`quantization_steps`.
        num_probes: Directions per sample.
        num_draws: Of the Monte-Carlo forms.
        label_noise: Options of :func:`label_noise_variance`; None leaves label noise out.
        seed: Of all draws.
        outputs: Of a model with several outputs those that count, each in units of its own second
            moment on the training inputs; None: all, alike.

    Returns:
        Rows of plain data: ``perturbation``, ``form`` ("trace", "monte carlo", and "rounding" for
        one real quantization), ``train``, ``train_stderr``, ``held_out``, ``held_out_stderr``,
        ``ratio`` (train / held-out). A standard error that is not known is None.
    """
    sets = [list(unlabeled(train_batches)), list(unlabeled(held_out_batches))]
    counted = Outputs.measured(model, sets[0], outputs)
    of: dict[str, Any] = {"seed": seed, "outputs": counted}
    norms = [jacobian_norms(model, s, num_probes=num_probes, **of) for s in sets]
    rows = []

    def add(perturbation: str, form: str, found: Iterable[Estimate]) -> None:
        train, held_out = found
        row: dict[str, Any] = {"perturbation": perturbation, "form": form}
        for name, e in (("train", train), ("held_out", held_out)):
            row |= {name: e.value, f"{name}_stderr": None if e.stderr != e.stderr else e.stderr}
        row["ratio"] = train.value / held_out.value if held_out.value else None
        rows.append(row)

    def both(perturbation: str, variances: Mapping[str, float], draw: Draw) -> None:
        add(perturbation, "trace", [n.trace(variances) for n in norms])
        drawn = [perturbed_variance(model, s, draw, num_draws=num_draws, **of) for s in sets]
        add(perturbation, "monte carlo", drawn)

    variances = sgd_variances(model, lr=lr, batch_size=batch_size)
    both("sgd noise", variances, gaussian(variances))
    for b in bits:
        steps = quantization_steps(model, bits=b, step_of=step_of)
        both(f"{b}-bit quantization", {n: d * d / 12 for n, d in steps.items()}, uniform(steps))
        rounded = quantized(model, bits=b, step_of=step_of)
        moved = [output_variance(rounded, model, s, outputs=counted) for s in sets]
        exact = [Estimate(value, float("nan")) for value in moved]
        add(f"{b}-bit quantization", "rounding", exact)
    if label_noise is not None:
        for form, linear in (("trace", True), ("monte carlo", False)):
            options = {**of, **label_noise, "linear": linear}
            add("label noise", form, label_noise_variance(model, sets[0], sets, **options))
    return rows


def parameter_points(
    train: JacobianNorms, held_out: JacobianNorms
) -> list[tuple[str, Estimate, Estimate]]:
    """Return (parameter, E||J_p||^2 on training inputs, on held-out inputs): a scatter plot."""
    first, second = train.by_parameter(), held_out.by_parameter()
    return [(name, first[name], second[name]) for name in train.names]
