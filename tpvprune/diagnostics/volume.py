"""How much room the weights have before the outputs move: a local log-volume and its error.

A flat minimum is a large set of weights that compute nearly the same function.

Reference:
    Zhang, Reid, Valle Pérez, Louis, Why flatness does and does not correlate with generalization
    for deep neural networks, 2021, https://arxiv.org/abs/2103.06219; the estimate by radii:
    Scherlis, Belrose, Estimating the probability of sampling a trained neural network at random,
    2025, section 3, https://arxiv.org/abs/2501.18812
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tpvprune.passes.batches import unlabeled
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device

_RADIUS_TOLERANCE = 1e-3
_MAX_EVALUATIONS = 40


@dataclass(frozen=True)
class LocalVolume:
    """Size of the set of weights around a model whose outputs stay close to the model's.

    Attributes:
        log_volume: log of the mean over directions of r^n, times the ball's: too low an estimate
            where few directions carry it (``effective`` near 1).
        lower_bound: The same from the mean of log r: below the log-volume by Jensen, and sure.
        lower_bound_stderr: Standard error of the latter over directions.
        log_volume_stderr: Of the former, by the delta method; too small where ``effective`` is.
        effective: Effective number of directions, (sum r^n)^2 / sum r^2n.
        log_radius: Mean of log r: what is left of the volume per weight.
        log_radius_stderr: Its standard error.
        num_weights: n, the dimension: weights that are not zero.
        num_directions: Random directions measured.
        threshold: Output variance at the boundary, in squared output units.
    """

    log_volume: float
    lower_bound: float
    lower_bound_stderr: float
    log_volume_stderr: float
    effective: float
    log_radius: float
    log_radius_stderr: float
    num_weights: int
    num_directions: int
    threshold: float


def local_volume(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    share: float = 0.1,
    coordinates: Literal["relative", "absolute"] = "relative",
    num_directions: int = 8,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> LocalVolume:
    r"""Estimate the log-volume of the weights that change the outputs by little.

    .. math:: S = \{t : E_x \|f(x; w + s \odot t) - f(x; w)\|^2 \le \varepsilon\}, \quad
        \log\mathrm{vol}(S) = \log\frac{\pi^{n/2}}{\Gamma(n/2 + 1)} + \log E_u\, r(u)^n

    u uniform on the sphere, r(u) the first radius at which the output variance reaches epsilon.
    With s = |w| (``"relative"``) t is a change in units of each weight: rescaling a ReLU network
    leaves S as it is. With s = 1 (``"absolute"``) S is the plain set of weights, whose log-volume
    rescaling shifts by the log of its determinant. In many dimensions r^n is dominated by the
    luckiest direction: compare ``log_radius`` between models of one architecture. Cost: about 6
    forwards per direction; no labels.

    Args:
        model: The network; left as it is.
        batches: Inputs; labels are dropped.
        share: epsilon over the outputs' own variance E||f - E f||^2, > 0.
        coordinates: Units of the weights, see above.
        num_directions: Random directions, >= 2.
        seed: Of these directions.
        outputs: What counts of what the model returns; see :func:`tpvprune.prune`.

    Returns:
        The log-volume and its errors.

    Raises:
        ValueError: If an argument is out of range, or the outputs do not vary.
    """
    if coordinates not in {"relative", "absolute"}:
        raise ValueError(f"coordinates: expected 'relative' or 'absolute', found {coordinates!r}")
    if num_directions < 2 or not 0 < share < math.inf:
        raise ValueError(
            f"num_directions, share: expected at least 2 and above 0, found {num_directions}, "
            f"{share}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), evaluating(model):
        inputs = [on_device(x, model) for x in unlabeled(batches)]
        counted = Outputs.measured(model, inputs, outputs)
        dense = [counted.joined(model(x), len(x)) for x in inputs]
        threshold = share * _spread(dense)
        weights = {n: p.detach() for n, p in model.named_parameters()}
        relative = coordinates == "relative"
        scales = {n: w.abs() if relative else (w != 0).to(w) for n, w in weights.items()}
        num = sum(int((w != 0).sum()) for w in weights.values())
        length = math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))
        radii = [0.1 * (math.sqrt(num) if relative else length)]
        for _ in range(num_directions):
            direction = _on_sphere(weights, scales, generator)

            def variance(r: float, direction: Mapping[str, Tensor] = direction) -> float:
                moved = {n: w + r * direction[n] for n, w in weights.items()}
                total = 0.0
                for x, rows in zip(inputs, dense, strict=True):
                    after = counted.joined(functional_call(model, moved, (x,)), len(x))
                    total += float((after - rows).double().square().sum())
                return total / sum(map(len, inputs))

            radii.append(_radius(variance, threshold, radii[-1]))
    return _summary(torch.tensor([math.log(r) for r in radii[1:]]).double(), num, threshold)


def _summary(logs: Tensor, num: int, threshold: float) -> LocalVolume:
    ball = num / 2 * math.log(math.pi) - math.lgamma(num / 2 + 1)
    count = len(logs)
    shares = (num * logs).softmax(0)
    mean_log = float(torch.logsumexp(num * logs, 0)) - math.log(count)
    error = float((shares * count - 1).square().sum().sqrt()) / math.sqrt(count * (count - 1))
    radius, radius_error = float(logs.mean()), float(logs.std()) / math.sqrt(count)
    return LocalVolume(
        log_volume=ball + mean_log,
        lower_bound=ball + num * radius,
        lower_bound_stderr=num * radius_error,
        log_volume_stderr=error,
        effective=1 / float(shares.square().sum()),
        log_radius=radius,
        log_radius_stderr=radius_error,
        num_weights=num,
        num_directions=count,
        threshold=threshold,
    )


def _on_sphere(
    weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return a direction of unit length over the weights that are not zero, times their scales."""
    drawn, square = {}, 0.0
    for name, w in weights.items():
        noise = torch.randn(w.shape, generator=generator).to(w) * (w != 0)
        square += float(noise.double().square().sum())
        drawn[name] = noise
    return {n: noise * scales[n] / math.sqrt(square) for n, noise in drawn.items()}


def _spread(dense: Sequence[Tensor]) -> float:
    outputs = torch.cat(list(dense)).double()
    spread = float((outputs - outputs.mean(0)).square().sum(1).mean())
    if not spread > 0:
        raise ValueError("volume: expected outputs that differ between images, found equal ones")
    return spread


def _radius(variance: Callable[[float], float], threshold: float, start: float) -> float:
    """Return the radius at which the variance reaches the threshold."""
    # The variance grows as r^2 near 0: steps on log-log axes, inside a bracket.
    low, high, r, slope = 0.0, math.inf, start, 2.0
    last: tuple[float, float] | None = None
    for _ in range(_MAX_EVALUATIONS):
        value = variance(r)
        inside = value <= threshold  # NaN is outside
        low, high = (r, high) if inside else (low, r)
        gap = -2.0 if inside else 2.0
        if 0 < value < math.inf:
            gap = math.log(value / threshold)
        if abs(gap) < 2 * _RADIUS_TOLERANCE or (low and high / low < 1 + _RADIUS_TOLERANCE):
            return r
        if last is not None and last[0] != r and (gap - last[1]) * (r - last[0]) > 0:
            slope = min(max((gap - last[1]) / math.log(r / last[0]), 0.5), 8.0)
        last = (r, gap)
        step = r * math.exp(min(max(-gap / slope, -2.0), 2.0))
        # What leaves the bracket halves it instead.
        r = step if low < step < high else math.sqrt(low * high)
    return r
