"""PAC-Bayes: how much noise the weights bear, over how large they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tpvprune.diagnostics.folding import folded
from tpvprune.diagnostics.measures import Labelled, Measurement
from tpvprune.passes.running import first_output, on_device

_MAX_DOUBLINGS = 24


def pac_bayes_origin(
    model: nn.Module,
    labelled_batches: Labelled,
    *,
    more_errors: float = 0.1,
    num_draws: int = 3,
    num_training: int | None = None,
    seed: int = 0,
) -> Measurement:
    r"""Compute the PAC-Bayes measure with its prior at the origin.

    .. math:: \sqrt{\Big(\frac{\|w\|^2}{4\sigma^2} + \log\frac{m}{\sigma} + 10\Big)\Big/m}

    where Gaussian noise of deviation sigma on every weight (BatchNorm folded in) costs 10 more
    points of accuracy. Moves under rescaling. Cost: about 10 forwards per draw; needs labels, or
    `own_predictions`.

    Args:
        model: Classifier whose first output is [B, K].
        labelled_batches: Pairs of inputs [B, ...] and class indices [B].
        more_errors: Fraction of the images that sigma turns wrong, in (0, 1).
        num_draws: Draws of the noise, the same at every sigma, >= 1.
        num_training: m, images that the network was trained on; None for those given.
        seed: Of the noise.

    Returns:
        The measure.

    Raises:
        ValueError: If an argument is out of range or no noise does so much harm.

    Reference:
        Jiang et al. 2020, appendix C.4 (as computed by Dziugaite et al., In search of robust
        measures of generalization, 2020, https://arxiv.org/abs/2010.11924)
    """
    if not 0 < more_errors < 1 or num_draws < 1:
        raise ValueError(
            f"more_errors, num_draws: expected a fraction and at least 1, found {more_errors}, "
            f"{num_draws}"
        )
    like = next(model.parameters())
    private, names = folded(model, labelled_batches[0][0][:2])
    private = private.to(like.device, like.dtype)
    weights = {f"{n}.weight": private.get_parameter(f"{n}.weight").detach() for n in names}
    generator = torch.Generator().manual_seed(seed)
    draws = [
        {n: torch.randn(w.shape, generator=generator).to(w) for n, w in weights.items()}
        for _ in range(num_draws)
    ]

    def errors(sigma: float) -> float:
        total = 0.0
        for noise in draws:
            noisy = {name: w + sigma * noise[name] for name, w in weights.items()}
            total += _error(private, noisy, labelled_batches)
        return total / num_draws

    target = errors(0.0) + more_errors
    mean_square = sum(float(w.square().sum()) for w in weights.values())
    size = math.sqrt(mean_square / sum(w.numel() for w in weights.values()))
    sigma = _crossing(errors, target, start=0.3 * size)
    m = num_training or sum(len(x) for x, _ in labelled_batches)
    return Measurement(math.sqrt((mean_square / (4 * sigma**2) + math.log(m / sigma) + 10) / m))


@torch.no_grad()
def _error(model: nn.Module, weights: dict[str, Tensor], batches: Labelled) -> float:
    wrong = total = 0
    for inputs, labels in batches:
        outputs = first_output(functional_call(model, weights, (on_device(inputs, model),)))
        wrong += int((outputs.argmax(1) != labels.to(outputs.device)).sum())
        total += len(inputs)
    return wrong / total


def _crossing(errors: Callable[[float], float], target: float, *, start: float) -> float:
    """Return where a rising function crosses ``target``, to 3 %; ValueError if it does not."""
    below = errors(start) < target
    low = high = start
    for _ in range(_MAX_DOUBLINGS):
        low, high = (high, 2 * high) if below else (low / 2, low)
        if (errors(high if below else low) < target) != below:
            break
    else:
        raise ValueError(
            f"PAC-Bayes: expected noise that brings the error to {target:.3f}, found none: pass "
            "other images"
        )
    while high / low > 1.03:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if errors(middle) < target else (low, middle)
    return math.sqrt(low * high)
