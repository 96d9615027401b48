"""The loss of a network whose every layer has norm one: test against training, and a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpvprune.diagnostics.folding import folded
from tpvprune.diagnostics.measures import Labelled
from tpvprune.passes.evaluation import class_indices
from tpvprune.passes.running import evaluating, first_output, on_device


@dataclass(frozen=True)
class NormalizedLoss:
    """Cross-entropy of f(x) / prod_l ||W_l||_F.

    Attributes:
        loss: In nats; log K for outputs that say nothing.
        below_chance: log K - loss, exact where ``loss`` is log K to all digits, as it is in deep
            networks, whose product of norms is enormous.
        stderr: Standard error of both over images.
        log_norm: sum_l log ||W_l||_F.
        error: Fraction of the images classified wrong.
    """

    loss: float
    below_chance: float
    stderr: float
    log_norm: float
    error: float


@torch.no_grad()
def normalized_loss(model: nn.Module, labelled_batches: Labelled) -> NormalizedLoss:
    r"""Compute the cross-entropy of the network divided by the product of its layers' norms.

    .. math:: \tilde f(x) = f(x) \Big/ \prod_l \|W_l\|_F, \qquad
        \tilde L = E\,[\log \sum_k e^{\tilde f_k} - \tilde f_y]

    Of a chain of ReLU layers this is the network with every layer (BatchNorm folded in; its bias
    scaled alike) at norm one; for others it is the same formula. Layers rescaled against each other
    give the same number; channels rescaled within a layer do not. Cost: one forward; needs labels,
    or ``own_predictions``.

    Args:
        model: Classifier whose first output is [B, K].
        labelled_batches: Pairs of inputs [B, ...] and class indices [B].

    Returns:
        The loss and what belongs to it.

    Raises:
        ValueError: If a layer's weights are all zero.

    Reference:
        Liao, Miranda, Banburski, Hidary, Poggio, A surprising linear relationship predicts test
        performance in deep networks, 2018, section 3, https://arxiv.org/abs/1807.09659
    """
    private, names = folded(model, labelled_batches[0][0][:2])
    norms = {name: float(private.get_parameter(f"{name}.weight").norm()) for name in names}
    if dead := [name for name, norm in norms.items() if norm == 0]:
        raise ValueError(
            f"normalized loss: expected layers with a norm above 0, found only zeros in "
            f"{dead[0]!r} (BatchNorm folded in): train the model or leave this measure out"
        )
    log_norm = math.fsum(math.log(norm) for norm in norms.values())
    gains, wrong = [], 0
    with evaluating(model):
        for inputs, labels in labelled_batches:
            outputs = first_output(model(on_device(inputs, model))).cpu().double()
            y = class_indices(labels.cpu(), outputs)
            small = outputs * math.exp(-log_norm)
            # log K - loss = f_y - log mean_k exp f_k, without taking log K from itself.
            gains.append(small.gather(1, y[:, None]).squeeze(1) - small.expm1().mean(1).log1p())
            wrong += int((outputs.argmax(1) != y).sum())
    gain = torch.cat(gains)
    below = float(gain.mean())
    return NormalizedLoss(
        loss=math.log(outputs.shape[1]) - below,
        below_chance=below,
        stderr=float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else math.inf,
        log_norm=log_norm,
        error=wrong / len(gain),
    )


@dataclass(frozen=True)
class Line:
    """Least-squares line y = slope x + intercept, with what it leaves."""

    slope: float
    intercept: float
    r2: float
    rmse: float


def fit_line(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> Line:
    """Fit y = slope x + intercept by least squares.

    Args:
        x: Abscissas [N], N >= 3, not all equal.
        y: Ordinates [N].

    Returns:
        The line, its coefficient of determination R^2, and the root mean square of its errors
        in units of y.

    Raises:
        ValueError: If there are fewer than three points or x does not vary.
    """
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (x, y))
    if a.shape != b.shape or a.ndim != 1 or len(a) < 3 or not bool((a != a[0]).any()):
        raise ValueError(
            f"a line needs at least three points of different x, found {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    centred = a - a.mean()
    slope = float(centred @ (b - b.mean()) / centred.square().sum())
    intercept = float(b.mean()) - slope * float(a.mean())
    rest = b - slope * a - intercept
    spread = (b - b.mean()).square().sum()
    r2 = 1 - float(rest.square().sum() / spread) if float(spread) > 0 else math.nan
    return Line(slope, intercept, r2, float(rest.square().mean().sqrt()))
