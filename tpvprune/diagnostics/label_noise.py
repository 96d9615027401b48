"""TPV under noise on the training targets, the network's own outputs: no label is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from tpvprune.diagnostics.jacobian_norms import Estimate, mean_and_error
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device, prepare_forward_mode


@torch.no_grad()
def label_noise_variance(
    model: nn.Module,
    train_batches: Iterable[Any],
    measured_batches: Sequence[Iterable[Any]],
    *,
    linear: bool = False,
    noise: float = 0.1,
    num_draws: int = 5,
    epochs: int = 5,
    lr: float = 1e-4,
    momentum: float = 0.9,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> list[Estimate]:
    r"""Measure how far noise on the training targets moves the outputs.

    The targets are the network's own outputs plus normal noise eps; SGD with momentum fits them by
    mean squared error, with fixed BatchNorm statistics, the same batches in the same order for
    every draw, and TPV = E_eps E_x ||f(x; w_eps) - f(x; w)||^2. In the trace form (``linear``) the
    network is replaced by its linearisation, f + J dw: then dw = A eps for the matrix A of the
    whole training, C = sigma^2 A A^T, and the mean over draws estimates Tr(H_eff C).

    Args:
        model: The network; not changed.
        train_batches: Inputs that it is trained on; these batches are the mini-batches.
        measured_batches: Sets of inputs on which the outputs are compared.
        linear: Trace form instead of Monte-Carlo; a step takes about twice as long.
        noise: Standard deviation of eps, relative to the mean absolute output.
        num_draws: Trainings, >= 1. The same seed draws the same noise for both forms.
        epochs: Passes over the training inputs.
        lr: Learning rate.
        momentum: Of SGD.
        seed: Of the noise.
        outputs: What counts of what the model returns; see :func:`tpvprune.prune`.

    Returns:
        An estimate for each measured set, in squared output units; standard errors over draws.

    Raises:
        ValueError: If num_draws is below 1, or training diverges.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws: expected at least 1, found {num_draws}")
    generator = torch.Generator().manual_seed(seed)
    train = [on_device(x, model) for x in unlabeled(train_batches)]
    measured = [[on_device(x, model) for x in unlabeled(b)] for b in measured_batches]
    weights = {name: p.detach() for name, p in floating(model).items()}
    found: list[list[float]] = [[] for _ in measured]
    counted = Outputs.measured(model, train, outputs)

    def rows(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return counted.joined(functional_call(model, parameters, (x,)), len(x))

    def outputs_at(moved: dict[str, Tensor], x: Tensor) -> Tensor:
        # f(w + dw), or J dw of the linearisation.
        if not linear:
            return rows({name: w + moved[name] for name, w in weights.items()}, x)
        prepare_forward_mode()
        change: Tensor = jvp(partial(rows, x=x), (weights,), (moved,))[1]
        return change

    def trained(noisy: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
        # dw after SGD on (inputs, outputs at w, eps).
        moved = {name: torch.zeros_like(p) for name, p in weights.items()}
        velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
        for x, f, e in (batch for _ in range(epochs) for batch in noisy):
            at = weights if linear else {n: w + moved[n] for n, w in weights.items()}
            now, *pull = vjp(partial(rows, x=x), at)
            change = outputs_at(moved, x) if linear else now - f
            gradient = pull[0](2 * (change - e).detach() / f.numel())[0]
            for name, v in velocity.items():
                v.mul_(momentum).add_(gradient[name])
                moved[name] = moved[name] - lr * v
        return moved

    with evaluating(model):
        dense = [rows(weights, x) for x in train]
        before = [[rows(weights, x) for x in inputs] for inputs in measured]
        scale = noise * torch.cat(dense).abs().mean()
        for _ in range(num_draws):
            eps = [torch.randn(f.shape, generator=generator).to(f) * scale for f in dense]
            moved = trained(list(zip(train, dense, eps, strict=True)))
            for inputs, fs, values in zip(measured, before, found, strict=True):
                after = [outputs_at(moved, x) for x in inputs]
                values.append(distance(after, [0 * f if linear else f for f in fs]))
    estimates = [mean_and_error(torch.tensor(v, dtype=torch.float64)) for v in found]
    if any(e.value != e.value or e.value == float("inf") for e in estimates):
        raise ValueError(f"lr: training diverged at {lr:g}: pass a lower one")
    return estimates


def floating(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that noise can move, by name."""
    return {name: p for name, p in model.named_parameters() if p.is_floating_point()}


def distance(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Return E_x ||after - before||^2."""
    total = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(after, before, strict=True)
    )
    return total / sum(map(len, before))
