"""Measures of a whole network that are said to tell how well it generalises.

Costs are passes over the images; a backward counts two. The loss is cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpvprune.diagnostics.folding import Contraction, folded
from tpvprune.groups import ChannelGroups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.evaluation import class_indices
from tpvprune.passes.outputs import Outputs
from tpvprune.passes.running import evaluating, first_output, on_device
from tpvprune.scores.tpv import Scores, tpv_scores

Labelled = Sequence[tuple[Tensor, Tensor]]
_MAX_DOUBLINGS = 24
_ADDITIVE = (*Contraction, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Measurement:
    """A number, and its standard error where it is an estimate."""

    value: float
    stderr: float | None = None


@torch.no_grad()
def own_predictions(model: nn.Module, batches: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """Return the inputs with the classes that the model itself gives them, at one forward.

    Args:
        model: Classifier whose first output is [B, K].
        batches: Inputs; labels are dropped.

    Returns:
        Pairs of inputs [B, ...] and class indices [B], on the model's device.
    """
    with evaluating(model):
        inputs = [on_device(x, model) for x in unlabeled(batches)]
        return [(x, first_output(model(x)).argmax(1)) for x in inputs]


def channel_tpv(
    model: nn.Module, groups: ChannelGroups, batches: Iterable[Any], *, seed: int = 0
) -> Measurement:
    r"""Compute the test prediction variance of removing one channel, summed over all channels.

    .. math:: \sum_c E_x \|J_c(x) w_c\|^2

    Every term is a channel times the gradient by that channel, so rescaling a ReLU network does
    not move it. Cost: one forward, one backward by activations; no labels.

    Args:
        model: The network.
        groups: Its channel groups.
        batches: Inputs; labels are dropped.
        seed: Of the output directions.

    Returns:
        The sum in squared output units, with the error that independent channels would give.

    Reference:
        Arpit, TPV, https://arxiv.org/abs/2512.11089, section on pruning.
    """
    return summed(tpv_scores(model, groups, batches, compensated=False, seed=seed), groups)


def summed(scores: Scores, groups: ChannelGroups) -> Measurement:
    """Return the sum of scores over all channels, with the error that independent ones give."""
    values = torch.cat([scores[group.name] for group in groups])
    errors = torch.cat([(scores.stderr or {})[group.name] for group in groups])
    return Measurement(float(values.sum()), float(errors.norm()))


def l2_norm(model: nn.Module, example_inputs: Tensor) -> Measurement:
    r"""Compute the norm of all weights, BatchNorm folded in: sqrt(sum_l \|W_l\|_F^2).

    Moves under rescaling. Cost: one forward of the example; no labels.

    Args:
        model: The network.
        example_inputs: One batch [B, ...].

    Returns:
        The norm.

    Reference:
        Jiang et al., Fantastic generalization measures and where to find them, 2020, appendix C,
        https://arxiv.org/abs/1912.02178
    """
    private, names = folded(model, example_inputs)
    weights = [private.get_parameter(f"{name}.weight").detach() for name in names]
    return Measurement(math.sqrt(sum(float(w.square().sum()) for w in weights)))


@torch.no_grad()
def path_norm(model: nn.Module, example_inputs: Tensor) -> Measurement:
    r"""Compute the path norm: the root of the sum over paths of their squared weights' products.

    One forward of the network with squared weights on an input of ones; a bias is a path that
    begins at a constant; every output counts. Rescaling a ReLU network leaves every path's product
    as it is. Cost: one forward; no labels.

    Args:
        model: A network of convolutions, linear layers, BatchNorm, ReLU, pooling and sums.
        example_inputs: One batch [B, ...].

    Returns:
        The path norm.

    Raises:
        ValueError: If the network is not of that kind.

    Reference:
        Neyshabur, Tomioka, Srebro, Norm-based capacity control in neural networks, COLT 2015,
        section 4, https://arxiv.org/abs/1503.00036
    """
    private, _ = folded(model, example_inputs)
    for name, parameter in private.named_parameters():
        if not isinstance(private.get_submodule(name.rpartition(".")[0]), _ADDITIVE):
            raise ValueError(
                f"path norm: expected convolutions, linear layers and BatchNorm, found the "
                f"parameter {name!r} of another layer: leave this measure out"
            )
        parameter.square_()
    ones = torch.ones(1, *example_inputs.shape[1:], dtype=torch.float64)
    counted = Outputs.among(private(ones), 1)
    total = counted.joined(private(ones), 1).sum()
    for name, parameter in private.named_parameters():
        if name.rpartition(".")[2] == "bias":
            parameter.zero_()
    once, twice = (counted.joined(private(scale * ones), 1) for scale in (1.0, 2.0))
    if not torch.allclose(twice, 2 * once, rtol=1e-9, atol=0):
        raise ValueError(
            "path norm: expected ReLU-like activations, found one that does not pass positive "
            "factors on: leave this measure out"
        )
    return Measurement(float(total.sqrt()))


def sharpness(
    model: nn.Module, labelled_batches: Labelled, *, num_probes: int = 2, seed: int = 0
) -> Measurement:
    r"""Estimate the trace of the Hessian of the loss by the weights, as Hutchinson does.

    .. math:: \mathrm{Tr}\,\nabla^2 L = E_z\, z^\top \nabla^2 L\, z, \quad z_i = \pm 1

    in eval mode, by all parameters. Moves under rescaling. Cost: one forward and, per probe, two
    backwards; needs labels, or `own_predictions`.

    Args:
        model: Classifier whose first output is [B, K].
        labelled_batches: Pairs of inputs [B, ...] and class indices [B].
        num_probes: Vectors z for each batch, >= 1.
        seed: Of these vectors.

    Returns:
        The trace, with its standard error over batches and probes.

    Raises:
        ValueError: If num_probes is below 1.

    Reference:
        Hutchinson 1989; Yao, Gholami, Keutzer, Mahoney, PyHessian, 2020, section III,
        https://arxiv.org/abs/1912.07145
    """
    if num_probes < 1:
        raise ValueError(f"num_probes: expected at least 1, found {num_probes}")
    generator = torch.Generator().manual_seed(seed)
    found, weights = [], []
    # Fused attention cannot be differentiated twice.
    with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        for inputs, labels in labelled_batches:
            x = on_device(inputs, model)
            outputs = first_output(functional_call(model, leaves, (x,)))
            loss = F.cross_entropy(outputs, class_indices(labels.to(outputs.device), outputs))
            slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            for probe in range(num_probes):
                drawn = [torch.randint(0, 2, p.shape, generator=generator) for p in leaves.values()]
                z = [(d * 2 - 1).to(p) for d, p in zip(drawn, leaves.values(), strict=True)]
                along = torch.stack([(s * v).sum() for s, v in zip(slopes, z, strict=True)]).sum()
                curved = torch.autograd.grad(
                    along, list(leaves.values()), retain_graph=probe + 1 < num_probes
                )
                found.append(sum(float((c * v).sum()) for c, v in zip(curved, z, strict=True)))
                weights.append(len(x))
    return _weighted(found, weights)


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


def _weighted(values: Sequence[float], weights: Sequence[int]) -> Measurement:
    """Return the mean of values over batches, by their sizes, and its standard error."""
    x, w = torch.tensor(values).double(), torch.tensor(weights).double()
    w /= w.sum()
    mean = (w * x).sum()
    if len(values) < 2:
        return Measurement(float(mean))
    error = ((w * (x - mean)).square().sum() * len(values) / (len(values) - 1)).sqrt()
    return Measurement(float(mean), float(error))
