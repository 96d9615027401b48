"""How far training goes to learn a function, and how steep that function is near the data.

Reference:
    Loukas, Poiitis, Jegelka, What training reveals about neural network complexity, NeurIPS 2021,
    sections 2 and 3, https://arxiv.org/abs/2106.04186
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpvprune.diagnostics.folding import layers_of
from tpvprune.diagnostics.measures import Measurement
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, frozen, on_device


def input_lipschitz(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_iterations: int = 12,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Measurement:
    r"""Compute the average Lipschitz constant of the network near images.

    .. math:: E_x\,\lambda(x), \qquad \lambda(x) = \|\partial f(x) / \partial x\|_2

    the largest singular value, by power iteration from below: each round is a product with J and
    one with its transpose. Depends on the function only, so rescaling does not move it. Cost: one
    forward and two backwards per round; no labels.

    Args:
        model: The network, whose inputs do not mix within a batch in eval mode.
        batches: Inputs; labels are dropped.
        num_iterations: Rounds, >= 1.
        seed: Of the first vectors.
        outputs: What counts of what the model returns; see :func:`tpvprune.prune`.

    Returns:
        The mean, in output units per unit of the (preprocessed) input, and its error over images.

    Raises:
        ValueError: If num_iterations is below 1.

    Reference:
        Loukas et al. 2021, section 2 (there for one output, where it is the gradient's norm).
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations: expected at least 1, found {num_iterations}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    counted = Outputs.measured(model, unlabeled(batches), outputs)
    # Fused attention cannot be differentiated twice.
    with evaluating(model), frozen(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in unlabeled(batches):
            x = on_device(batch.detach(), model).clone().requires_grad_()
            rows = counted.joined(model(x), len(x))
            # J^T c is linear in c, so its gradient by c along u is J u.
            c = torch.zeros_like(rows, requires_grad=True)
            (pulled,) = torch.autograd.grad(rows, x, c, create_graph=True)
            v = torch.randn(rows.shape, generator=generator).to(rows)
            for _ in range(num_iterations):
                v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
                (back,) = torch.autograd.grad(rows, x, v, retain_graph=True)
                (v,) = torch.autograd.grad(pulled, c, back, retain_graph=True)
            found.append(back.flatten(1).norm(dim=1).double().cpu())
    values = torch.cat(found)
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Measurement(float(values.mean()), error)


@dataclass
class Path:
    """What is known of the way of some weights so far."""

    start: Tensor = field(repr=False)
    length: float = 0.0  # sum of the lengths of the steps
    num_steps: int = 0

    def __post_init__(self) -> None:
        self._last = self.start
        self._mean = torch.zeros_like(self.start)
        self._squares = 0.0

    @property
    def distance(self) -> float:
        """Length of the straight way from the start to the present place."""
        return float((self._last - self.start).norm())

    @property
    def variance(self) -> float:
        """Mean squared distance of the recorded places to their mean."""
        return self._squares / self.num_steps if self.num_steps else 0.0

    def add(self, place: Tensor) -> None:
        """Record one more place [n]."""
        self.num_steps += 1
        self.length += float((place - self._last).norm())
        before = place - self._mean
        self._mean = self._mean + before / self.num_steps
        self._squares += float((before * (place - self._mean)).sum())
        self._last = place


class Trajectory:
    r"""Records the way of a network's weights while it trains.

    Call it with the model after every update; ``distill(..., watch=trajectory)`` does. It keeps
    three copies of the weights.

    .. math:: \mathrm{length} = \sum_t \|w_{t+1} - w_t\|, \quad
        \mathrm{distance} = \|w_T - w_0\|, \quad \mathrm{variance} = E_t \|w_t - \bar w\|^2

    ``weights`` is the way of all parameters; ``first_bias`` that of the first layer's bias (of
    its BatchNorm's, where one follows), whose gradient bounds the slope by the input: this is the
    way that the paper's theorems speak of. It is None where the first layer has none.

    Reference:
        Loukas et al. 2021, theorem 1 and section 3.
    """

    def __init__(self, model: nn.Module, example_inputs: Tensor) -> None:
        """Start from the model as it is."""
        layer, norm = next(iter(layers_of(model, example_inputs).items()))
        known = dict(model.named_parameters())
        name = f"{norm or layer}.bias"
        self._first = name
        self.weights = Path(self._place(model))
        self.first_bias = Path(known[name].detach().clone()) if name in known else None

    def __call__(self, model: nn.Module) -> None:
        """Record the weights as they are now."""
        self.weights.add(self._place(model))
        if self.first_bias is not None:
            self.first_bias.add(model.get_parameter(self._first).detach().clone())

    def _place(self, model: nn.Module) -> Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()])
