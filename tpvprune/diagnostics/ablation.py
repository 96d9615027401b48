"""The truth that a score estimates: remove every channel, one at a time, and look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.groups import ChannelGroups
from tpvprune.groups.masking import MaskedChannels
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.operations import CONTRACTIONS, function_name
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device
from tpvprune.scores.tpv import Scores


@torch.no_grad()
def ablation_scores(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Any],
    *,
    max_channels: int | None = None,
    seed: int = 0,
    outputs: Outputs | Chosen | None = None,
) -> Scores:
    """Measure how much the outputs change when each channel alone is removed.

    S_c = E_x ‖f(x without c) − f(x)‖², summed over outputs, with channel c zeroed at every layer
    that reads it. One forward per channel and batch, without the layers in front of the cut.

    Args:
        model: The dense model.
        groups: Its channel groups.
        batches: Inputs; labels are dropped.
        max_channels: So many of each group are measured, chosen at random, >= 1; None: all.
        seed: Of that choice.
        outputs: What counts of what the model returns; see :func:`tpvprune.prune`.

    Returns:
        Scores in squared output units (of several outputs without unit), float64 [C] per group,
        NaN where a channel was not measured; ``stderr`` over samples likewise.

    Raises:
        ValueError: If max_channels is below 1.
    """
    if max_channels is not None and max_channels < 1:
        raise ValueError(f"max_channels: expected at least 1 or None, found {max_channels}")
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        group.name: torch.randperm(group.num_channels, generator=generator)[:max_channels]
        .sort()
        .values.tolist()
        for group in groups
    }
    sums = {}  # of channels that are not measured NaN, of the changes and of their squares
    for group in groups:
        sums[group.name] = torch.full((2, group.num_channels), torch.nan, dtype=torch.float64)
        sums[group.name][:, chosen[group.name]] = 0
    num_samples = 0
    counted = Outputs.measured(model, unlabeled(batches), outputs)
    with evaluating(model):
        for inputs in unlabeled(batches):
            num_samples += len(inputs)
            x = on_device(inputs, model)
            known = _KnownCalls()
            with known:
                dense = counted.joined(model(x), len(x))
            for group in groups:
                known.replay_before(min(reader.call for reader in group.readers))
                for channel in chosen[group.name]:
                    others = torch.arange(group.num_channels) != channel
                    with known, MaskedChannels(groups, {group.name: others}):
                        change = counted.joined(model(x), len(x)) - dense
                    moved = change.double().square().sum(1)
                    sums[group.name][:, channel] += torch.stack(
                        [moved.sum(), moved.square().sum()]
                    ).cpu()

    values, stderr = {}, {}
    for name, (total, squares) in sums.items():
        mean = total / num_samples
        variance = (squares / num_samples - mean.square()).clamp_min(0)
        values[name] = mean
        stderr[name] = (variance / max(num_samples - 1, 1)).sqrt()
    return Scores(values, stderr, num_samples=num_samples, criterion="ablation", used_labels=False)


def spearman(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Compute the rank correlation of two score vectors.

    Pearson's correlation of the ranks; ties share the mean of their ranks.

    Args:
        a: Scores [C].
        b: Scores [C] of the same channels.
        mask: BoolTensor [C], which channels count; None: where both scores are numbers.

    Returns:
        Correlation in [-1, 1]; NaN for fewer than two channels, or if all of one side are equal.

    Raises:
        ValueError: If the vectors differ in length.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"spearman needs two vectors of one length, found {tuple(a.shape)} and {tuple(b.shape)}"
        )
    use = ~(a.isnan() | b.isnan()) if mask is None else mask
    ranks = [_ranks(v[use].double().cpu()) for v in (a, b)]
    x, y = (r - r.mean() for r in ranks)
    return (x @ y / (x.norm() * y.norm())).item()


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


class _KnownCalls(TorchFunctionMode):
    """Remember the outputs of one forward's contractions, then replay the first ones.

    Enter it outside of `MaskedChannels`, which then counts the same calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[Any] = []  # of a recurrent layer a tuple
        self._num_known = 0
        self._call = 0

    def replay_before(self, call: int) -> None:
        """From now on answer the calls before `call` from memory and compute the rest."""
        self._num_known = call

    def __enter__(self) -> _KnownCalls:
        self._call = 0
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function_name(func) not in CONTRACTIONS:
            return func(*args, **(kwargs or {}))
        call, self._call = self._call, self._call + 1
        if call < self._num_known:
            # An activation may work in place on the answer: it gets its own copy.
            return _copied(self._outputs[call])
        output = func(*args, **(kwargs or {}))
        if call == len(self._outputs):
            self._outputs.append(_copied(output))
        return output


def _copied(output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) else tuple(map(_copied, output))
