"""The score: output variance caused by removing each channel (test prediction variance, TPV).

Removing channel c of a group is the weight perturbation that zeroes it at its readers, so to
first order the output of sample x changes by u_c(x) = sum_m sum_p a_mc(x, p) d(f)/d a_mc(x, p),
over the readers m and their positions p, and TPV_c = E_x ||u_c(x)||^2. With random directions v,
E[v v^T] = I, the norm is E_v (v^T u_c)^2: one forward and one backward with respect to the
activations per direction; no gradient of any weight is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.crossing import fetched
from tpvprune.passes.finite import NotFiniteError, retried_in_single
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.positions import contract
from tpvprune.processes.shares import in_step, summed, total
from tpvprune.scores.residuals import residual_maps
from tpvprune.scores.taps import Metric, Probing, passes, reader_plan

# What stands in for a channel is fitted on so many samples: that pass is a forward of its own.
_MAP_SAMPLES = 256
_FEWEST = 64  # samples: the standard error of fewer is too small too often


@dataclass(frozen=True)
class Scores(Mapping[str, Tensor]):
    """Scores by group name; bigger = keep.

    ``stderr`` holds the standard error over samples where the criterion is a mean over samples
    (None otherwise), ``num_samples`` how many inputs it saw.
    """

    values_by_group: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor] | None = None
    num_samples: int = 0
    criterion: str = ""
    used_labels: bool = False

    def __getitem__(self, name: str) -> Tensor:
        return self.values_by_group[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_group)

    def __len__(self) -> int:
        return len(self.values_by_group)


def tpv_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Any],
    *,
    metric: Metric = "logits",
    compensated: bool = True,
    num_probes: int = 1,
    ridge: float = 1e-3,
    until: float | None = None,
    amp: torch.dtype | None = None,
    grad_checkpointing: bool = False,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Scores:
    r"""Score channels by the output variance that their removal causes.

    .. math:: \mathrm{TPV}_c = E_x E_v \Big(\sum_m \sum_p r_{mc}(x,p)
        \frac{\partial\, v^T f(x)}{\partial a_{mc}(x,p)}\Big)^2

    with r = a (plain), or, compensated, the part of a_c that the other inputs of the same reader
    cannot predict linearly: r_c = (P (a - E a))_c / P_cc, P = (Cov a + lambda I)^-1.

    Args:
        model: The network; run in eval mode, restored afterwards.
        groups: Its channel groups.
        batches: Re-iterable of unlabeled input tensors [B, ...].
        metric: The direction v. ``"logits"``, ``"features"``: random signs over all outputs (TPV
            proper; the same estimator, named for what the model returns). ``"pseudo"``:
            p - onehot(argmax p). ``"fisher"``: p - onehot(y), y ~ p.
        compensated: Score what is left after the other channels stood in. Default: ``True``.
        num_probes: Directions per sample, >= 1; each costs one more backward. The deterministic
            ``"pseudo"`` uses one.
        ridge: lambda, relative to the mean variance of the reader's inputs.
        until: Stop after the batch at which half of the channels have standard errors of at most
            this fraction of their scores, and at least 64 samples were seen; None: see all.
        amp: ``torch.bfloat16`` for mixed precision.
        grad_checkpointing: Keep only the inputs of the model's blocks, and compute their inside
            again in the backward pass: the same scores with less memory, in more time.
        seed: Of the directions.
        outputs: Of a model with several outputs those that count, or how much each counts, in units
            of its own second moment (:mod:`tpvprune.passes.outputs`); None: all, alike.

    Returns:
        Scores in squared output units (of several outputs without unit), with standard errors over
        samples.

    Raises:
        ValueError: If an argument is out of range, or an activation or a score is not finite
            (of a float16 model: in float32, either).

    Reference:
        Arpit, Test prediction variance, ICML 2026, https://arxiv.org/abs/2512.11089.
    """
    probing = Probing(metric, num_probes, amp, grad_checkpointing, seed, outputs)
    if until is not None and not 0 < until < float("inf"):
        raise ValueError(f"until: expected a number above 0, found {until}.")
    inputs = unlabeled(batches)

    def measured(model: nn.Module) -> Scores:
        maps = {}
        if compensated:
            maps = residual_maps(model, groups, inputs, ridge=ridge, max_samples=_MAP_SAMPLES)
        # Sums over the samples of u^2, averaged over the directions, and of its square.
        device = next(model.parameters()).device
        first, second = (
            {g.name: torch.zeros(g.num_channels, dtype=torch.float64).to(device) for g in groups}
            for _ in range(2)
        )
        num_samples = 0
        changed = output_changes(model, groups, inputs, probing, maps=maps)
        with closing(changed):
            for batch in changed if until is None else in_step(changed):
                if batch is not None:
                    changes, num = batch
                    num_samples += num
                    for name, u in changes.items():  # [probes, B, C]
                        per_sample = u.double().square().mean(0)
                        first[name] += per_sample.sum(0)
                        second[name] += per_sample.square().sum(0)
                if until is not None and _uncertainty(first, second, num_samples) <= until:
                    break
        mean, squares, num_samples = _means(first, second, num_samples)
        for name, value in mean.items():
            if not bool(value.isfinite().all()):
                raise NotFiniteError(
                    f"group {name!r}: expected finite scores, found NaN or infinity; "
                    "check the inputs and the weights for non-finite values."
                )
        stderr = {n: standard_error(mean[n], squares[n], num_samples) for n in mean}
        return Scores(mean, stderr, num_samples, "tpv")

    return retried_in_single(model, measured)


def _means(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], num_samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return sums over the samples of here as means over those of all processes, on the CPU."""
    num_samples = int(total(num_samples))
    sums = iter(fetched(*summed(*first.values(), *second.values())))
    mean, squares = ({name: next(sums) / num_samples for name in part} for part in (first, second))
    return mean, squares, num_samples


def standard_error(mean: Tensor, squares: Tensor, num_samples: float) -> Tensor:
    """Return the standard error of a mean over samples."""
    variance = (squares - mean.square()).clamp_min(0)
    return (variance / max(num_samples - 1, 1)).sqrt()


def _uncertainty(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], num_samples: int
) -> float:
    """Return the median over channels of standard error / score; of dead channels both are 0.

    Infinite as long as too few samples make the standard errors themselves uncertain.
    """
    mean, squares, num_samples = _means(first, second, num_samples)
    if num_samples < _FEWEST:
        return math.inf
    errors = torch.cat([standard_error(mean[n], squares[n], num_samples) for n in mean])
    scores = torch.cat(list(mean.values()))
    return float((errors / scores.clamp_min(torch.finfo(scores.dtype).tiny)).median())


def output_changes(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: Iterable[Tensor],
    probing: Probing,
    *,
    maps: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> Generator[tuple[dict[str, Tensor], int], None, None]:
    """Measure v^T u_c(x), the change of the output along v when channel c leaves.

    ``inputs``: batches [B, ...]. ``maps``: of :func:`tpvprune.scores.residuals.residual_maps`;
    readers without one are. Yields batch by batch, ({group: [probes, B, C]}, B).
    """
    device = next(model.parameters()).device
    plan = reader_plan(groups, device)
    maps = {call: (mean.to(device), m.to(device)) for call, (mean, m) in (maps or {}).items()}

    def collected(call: int, a: Tensor, grad: Tensor, *, num: int, part: dict[str, Tensor]) -> None:
        a, grad = (plan[call][0][1].by_channel(t, num) for t in (a, grad))
        per_channel = contract(a, grad, num, maps.get(call))
        for group, reader in plan[call]:
            u = part.setdefault(group.name, per_channel.new_zeros(num, group.num_channels))
            u.index_add_(1, reader.channel, per_channel[:, reader.index])

    for x, directions, tap in passes(model, groups, inputs, probing):
        num = len(x)
        parts: list[dict[str, Tensor]] = [{} for _ in directions]
        for i, v in enumerate(directions, 1):
            collect = partial(collected, num=num, part=parts[i - 1])
            tap.backward(v, collect, last=i == len(directions))
        # What does not reach an output that counts changes nothing.
        none = {g.name: x.new_zeros(num, g.num_channels) for g in groups if g.name not in parts[0]}
        found = [none | part for part in parts]
        yield {g.name: torch.stack([part[g.name] for part in found]) for g in groups}, num
