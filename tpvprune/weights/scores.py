"""How much each single weight matters: TPV of its removal, and what it is compared with.

Removing weight w_i is the perturbation dw = -w_i e_i, so TPV_i = w_i^2 (H_eff)_ii =
E_x E_v (v^T J_i w_i)^2: the square is taken per sample, of the gradient that sums all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.passes.batches import unlabeled
from tpvprune.passes.moments import in_single
from tpvprune.passes.operations import function_name
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.patches import count_positions, patches_of, window_of
from tpvprune.passes.running import evaluating, on_device
from tpvprune.repairs.branches import FITTED, Layer, Plan, arguments_first, layers_by_weight
from tpvprune.scores.residuals import ridge_inverse
from tpvprune.scores.sample_gradients import SampleGradients, sample_gradients

WeightScores = Mapping[str, Tensor]
"""Scores by parameter name, in the parameter's shape; bigger = keep."""


def prunable_weights(model: nn.Module, *, ignore: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the weights of all convolutions and linear layers, detached, by parameter name.

    A weight that two layers share is there once.
    """
    layers = [layer for layer in layers_by_weight(model).values() if layer.name not in set(ignore)]
    return {f"{layer.name}.weight": layer.module.weight.detach() for layer in layers}


def magnitude_weight_scores(
    model: nn.Module, batches: Iterable[Any] = (), *, ignore: Iterable[str] = (), seed: int = 0
) -> dict[str, Tensor]:
    """Score every weight by |w|; reads no input."""
    return {name: w.abs() for name, w in prunable_weights(model, ignore=ignore).items()}


def wanda_weight_scores(
    model: nn.Module, batches: Iterable[Any], *, ignore: Iterable[str] = (), seed: int = 0
) -> dict[str, Tensor]:
    r"""Score every weight by |w_oj| ||x_j||, the norm over inputs and positions.

    Source: Sun et al., A simple and effective pruning approach for large language models,
    ICLR 2024, https://arxiv.org/abs/2306.11695, equation 1. In a convolution x_j is the input that
    one kernel entry sees. ``seed``: of the sampled positions.
    """
    weights = prunable_weights(model, ignore=ignore)
    scores = {}
    for name, gram in input_grams(model, batches, set(weights), seed=seed).items():
        norms = gram.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[:, None]  # [groups, 1, unknowns]
        w = weights[name]
        grouped = w.reshape(len(gram), -1, norms.shape[2])
        scores[name] = (grouped.abs() * norms.to(w)).reshape(w.shape)
    return scores


def tpv_weight_scores(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    compensated: bool = True,
    num_probes: int = 1,
    ridge: float = 1e-2,
    ignore: Iterable[str] = (),
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> dict[str, Tensor]:
    r"""Score every weight by the output variance that its removal causes.

    .. math:: \mathrm{TPV}_{oj} = w_{oj}^2 \;
        E_x E_v \Big( \sum_p \delta_o(x, p)\, r_j(x, p) \Big)^2

    with delta the gradient of v^T f by the layer's output and r = x, the layer's inputs (plain), or
    the part of x_j that the other inputs of the row cannot predict, r_j = (P x)_j / P_jj,
    P = (E[x x^T] + lambda I)^-1 (compensated): what is left after they stood in.

    ``num_probes``: directions per sample, >= 1. ``ridge``: lambda, relative to the mean square of
    the layer's inputs. ``seed``: of directions and sampled positions. ``outputs``: what counts of
    what the model returns; see :func:`tpvprune.prune`. Returns scores by parameter name, in squared
    output units. ValueError if num_probes is below 1, or a score is not finite.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes: expected at least 1, found {num_probes}.")
    inputs = unlabeled(batches)
    weights = prunable_weights(model, ignore=ignore)
    maps: dict[str, Tensor] = {}
    if compensated:
        grams = input_grams(model, inputs, set(weights), seed=seed)
        for name in list(grams):
            found = torch.stack([_stand_in(g, ridge) for g in grams.pop(name)])
            maps[name] = found.to(weights[name])
    sums = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}

    def squares(name: str, found: SampleGradients) -> Tensor:
        gradients, stand_in = found.dense(), maps.get(name)
        if stand_in is not None:
            gradients = gradients.reshape(len(gradients), len(stand_in), -1, stand_in.shape[1])
            gradients = gradients @ stand_in
        return gradients.square().sum(0).double().reshape(weights[name].shape)

    num = add_gradients(
        model, inputs, sums, squares, num_probes=num_probes, seed=seed, outputs=outputs
    )
    scores = {}
    for name, w in weights.items():
        scores[name] = w.double().square() * sums[name] / num
        if not bool(scores[name].isfinite().all()):
            raise ValueError(
                f"parameter {name!r}: expected finite scores, found NaN or infinity: check the "
                "weights and the inputs"
            )
    return scores


def add_gradients(
    model: nn.Module,
    inputs: Iterable[Tensor],
    sums: dict[str, Tensor],
    part: Callable[[str, SampleGradients], Tensor],
    *,
    num_probes: int,
    seed: int,
    outputs: Outputs | Chosen | None,
) -> int:
    """Add ``part(name, gradients)`` of all inputs and directions to the sum of each weight.

    Returns of how many gradients the sums are: inputs times directions.
    """

    def collect(name: str, probe: int, samples: slice, found: SampleGradients) -> None:
        sums[name] += part(name, found)

    shown = sample_gradients(
        model, inputs, collect, num_probes=num_probes, seed=seed, only=sums, outputs=outputs
    )
    return num_probes * sum(shown)


WEIGHT_SCORERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "tpv": tpv_weight_scores,
    "magnitude": magnitude_weight_scores,
    "wanda": wanda_weight_scores,
}


# ---- inputs ---------------------------------------------------------------------------------


def input_grams(
    model: nn.Module,
    batches: Iterable[Any],
    names: set[str],
    *,
    max_positions: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measure E[x x^T] of what every weight reads, over samples and positions drawn of each.

    Returns parameter name -> [groups, unknowns, unknowns], float64.
    """
    watch = _InputGrams(layers_by_weight(model), names)
    with evaluating(model), torch.no_grad():
        for number, batch in enumerate(unlabeled(batches)):
            x = on_device(batch, model)
            watch.plan = Plan(len(x), 0, max_positions * len(x), seed + number, device=x.device)
            with watch:
                model(x)
    return {name: gram / watch.num_rows[name] for name, gram in watch.sums.items()}


class _InputGrams(TorchFunctionMode):
    plan: Plan

    def __init__(self, layers: dict[int, Layer], names: set[str]) -> None:
        super().__init__()
        self._layers = layers
        self._number = {name: number for number, name in enumerate(sorted(names))}
        self.sums: dict[str, Tensor] = {}
        self.num_rows: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function_name(func) in FITTED:
            x, weight = arguments_first(args, kwargs)[0][:2]
            layer = self._layers.get(id(weight))
            if layer is not None and f"{layer.name}.weight" in self._number:
                self._add(f"{layer.name}.weight", layer.module, x, window_of(args, kwargs))
        return func(*args, **kwargs)

    def _add(self, name: str, module: Any, x: Tensor, window: Any) -> None:
        num_positions = count_positions(x, window, self.plan.num_inputs)
        positions = self.plan.positions(self._number[name], module, num_positions)
        rows = in_single(patches_of(x, window, positions, getattr(module, "groups", 1)))
        gram = (rows.mT @ rows).double()
        self.sums[name] = self.sums[name] + gram if name in self.sums else gram
        self.num_rows[name] = self.num_rows.get(name, 0) + rows.shape[1]


def _stand_in(gram: Tensor, ridge: float) -> Tensor:
    """Return M [n, n] with (x M)_j the part of x_j that the others cannot predict."""
    precision = ridge_inverse(gram, ridge)
    return precision / precision.diagonal()
