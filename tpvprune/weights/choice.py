"""Which weights stay, by the output variance that their joint, compensated removal causes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.batches import unlabeled
from tpvprune.passes.crossing import fetched
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.scores.sample_gradients import SampleGradients
from tpvprune.weights.elimination import Path, elimination_path
from tpvprune.weights.masks import pattern_of
from tpvprune.weights.scores import add_gradients, input_grams, prunable_weights
from tpvprune.widths.knapsack import choose_options


def joint_weight_masks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    keep: float = 0.5,
    pattern: str | None = None,
    num_steps: int = 16,
    num_probes: int = 1,
    ridge: float = 1e-2,
    ignore: Iterable[str] = (),
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Choose the weights that stay so that what leaves together changes the outputs least.

    Every layer is thinned out step by step (:func:`tpvprune.weights.elimination.elimination_path`).
    What a layer at one density does to the outputs is the TPV of its whole compensated change,

    .. math:: V_l(\rho) = E_x E_v (v^T J_l(x)\, \Delta w_l(\rho))^2,

    measured with the gradients of single samples; a dynamic programme then chooses the densities
    of least summed variance. With a pattern every layer has the same density, and no gradient but
    that of the outputs of each layer is needed.

    Arguments and errors are those of :func:`tpvprune.weights.pruning.prune_weights`. Returns masks
    by parameter name, True = stays, and scores: the fraction of the steps at which a weight was
    still there.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a fraction in (0, 1], found {keep}")
    if num_probes < 1:
        raise ValueError(f"num_probes: expected at least 1, found {num_probes}.")
    n_of_m = None if pattern is None else pattern_of(pattern)
    inputs = list(unlabeled(batches))
    weights = prunable_weights(model, ignore=ignore)
    counted = Outputs.measured(model, inputs, outputs)
    sensitivity = _sensitivities(model, inputs, weights, num_probes, seed, counted=counted)
    grams = input_grams(model, inputs, set(weights), seed=seed)
    paths = {}
    for name, weight in weights.items():
        if n_of_m is not None and weight.shape[1] % n_of_m[1]:
            whole = torch.ones(1, *weight.shape, dtype=torch.bool, device=weight.device)
            paths[name] = Path(whole, torch.zeros_like(whole, dtype=weight.dtype))
            continue
        paths[name] = elimination_path(
            weight, grams.pop(name), sensitivity[name],
            num_steps=num_steps, pattern=n_of_m, ridge=ridge,
        )  # fmt: skip
    scores = {name: path.masks.double().mean(0) for name, path in paths.items()}
    if n_of_m is not None:
        return {name: path.masks[-1] for name, path in paths.items()}, scores
    variances = _joint_variances(model, inputs, paths, num_probes, seed + 1, counted=counted)
    sizes = {name: path.densities().cpu() * path.masks[0].numel() for name, path in paths.items()}
    budget = keep * sum(w.numel() for w in weights.values())
    steps = choose_options(list(sizes.values()), list(variances.values()), budget)
    return {n: paths[n].masks[i] for n, i in zip(paths, steps, strict=True)}, scores


def _sensitivities(
    model: nn.Module,
    inputs: list[Tensor],
    weights: Mapping[str, Tensor],
    num_probes: int,
    seed: int,
    *,
    counted: Outputs | None = None,
) -> dict[str, Tensor]:
    """Return E_x E_v sum_p delta_o(x, p)^2 of every layer's outputs [out]."""
    sums = {name: w.new_zeros(len(w), dtype=torch.float64) for name, w in weights.items()}

    def squares(_: str, found: SampleGradients) -> Tensor:
        return found.left.double().square().sum((0, 3)).reshape(-1)

    num = add_gradients(
        model, inputs, sums, squares, num_probes=num_probes, seed=seed, outputs=counted
    )
    return {name: total / num for name, total in sums.items()}


def _joint_variances(
    model: nn.Module,
    inputs: list[Tensor],
    paths: Mapping[str, Path],
    num_probes: int,
    seed: int,
    *,
    counted: Outputs | None = None,
) -> dict[str, Tensor]:
    """Return V of every layer at every step, float64 [steps], on the CPU."""
    sums = {n: p.changes.new_zeros(len(p.masks), dtype=torch.float64) for n, p in paths.items()}

    def squares(name: str, found: SampleGradients) -> Tensor:
        outcome = found.dense().flatten(1) @ paths[name].changes.flatten(1).T
        return outcome.double().square().sum(0)

    num = add_gradients(
        model, inputs, sums, squares, num_probes=num_probes, seed=seed, outputs=counted
    )
    totals = zip(sums, fetched(*sums.values()), strict=True)
    return {name: total / num for name, total in totals}
