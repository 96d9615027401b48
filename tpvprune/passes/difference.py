"""How far one model is from another, on images whose labels nobody sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.passes.batches import unlabeled
from tpvprune.passes.costs import call_arguments
from tpvprune.passes.moments import Moments
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, fast_layout
from tpvprune.processes.shares import summed, total


def agreement(model: nn.Module, dense: nn.Module, batches: Iterable[Any]) -> float:
    """Compute the fraction of inputs on which two models choose the same class.

    mean_x [argmax f(x) = argmax f_dense(x)], over the output dimension 1 and, for outputs
    with positions, over the positions too. Outputs that are not finite never agree. Outputs
    of unequal shape, or no batch at all, are a ValueError.

    Args:
        model: Model to judge, usually the pruned one.
        dense: Model to agree with.
        batches: Inputs [B, ...]; labels are dropped.

    Returns:
        A fraction in [0, 1].
    """
    return difference(model, dense, batches).agreement


def output_variance(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    outputs: Outputs | Chosen | None = None,
) -> float:
    """Compute E_x‖f(x) − f_dense(x)‖², in squared output units: see :func:`difference`."""
    return difference(model, dense, batches, outputs=outputs).output_variance


@dataclass(frozen=True)
class Difference:
    """How far a model is from the dense one on images that it was not fitted to.

    Attributes:
        num_images: How many.
        agreement: Fraction of equal top-1, in [0, 1].
        chance: What the agreement would be if both chose their classes independently.
        output_variance: E‖f − f_dense‖², in squared output units.
        share: The same as a share of the variance of the dense outputs themselves, a common shift
            of all logits aside, which moves no class; 1 is as far as another image's outputs
            are from the mean; infinite where the dense outputs do not vary but these do.
        by_output: The share of each output by itself. Of several outputs agreement is that of the
            first, and output variance the sum over all, each in units of its second moment.
        divergence: KL(softmax(f_dense) || softmax(f)) of the first output, in nats, the mean over
            inputs: smoother than agreement, and blind to classes that neither takes into account.
        has_classes: Whether the outputs choose a class; of features agreement tells nothing.
    """

    num_images: int
    agreement: float
    chance: float
    output_variance: float
    share: float
    by_output: Mapping[str, float] = field(default_factory=dict)
    divergence: float = float("nan")
    has_classes: bool = True

    @property
    def is_broken(self) -> bool:
        """Whether the model is no longer the same function: most classes, or all variance, lost."""
        # Of one image there is no variance to lose.
        shares = (self.share, *self.by_output.values()) if self.num_images > 1 else ()
        same = self.agreement >= 0.5 if self.has_classes else math.isfinite(self.output_variance)
        return not (same and all(share <= 1.0 for share in shares))


def has_classes(model: nn.Module) -> bool:
    """Tell whether the outputs of a model choose a class, unless it says that it has none."""
    return getattr(model, "num_classes", None) != 0


def difference(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    outputs: Outputs | Chosen | None = None,
) -> Difference:
    """Compare two models on unlabeled images; outputs of unequal shape, or no batch: ValueError.

    ``outputs``: what counts of what they return; None: all, each in units of its second moment.
    """
    return Reference(dense, batches, outputs, max_bytes=0).difference(model)


class Reference:
    """The dense network on some images, which several models are compared with.

    Its outputs are held if they take no more than ``max_bytes``, else computed for every model.
    """

    def __init__(
        self,
        dense: nn.Module,
        batches: Iterable[Any],
        outputs: Outputs | Chosen | None = None,
        *,
        max_bytes: int = 1 << 28,
    ) -> None:
        self._dense, self._inputs = dense, unlabeled(batches)
        self._outputs = Outputs.measured(dense, self._inputs, outputs)
        self._room = max_bytes
        self._held: list[list[Tensor]] | None = None
        num_classes = getattr(dense, "num_classes", None)
        self.classifies = (
            isinstance(num_classes, int) and num_classes > 1 and len(self._outputs.scales) == 1
        )

    @torch.no_grad()
    def difference(self, model: nn.Module) -> Difference:
        """Return how far a model is from the dense one."""
        tally = _Tally(len(self._outputs.scales))
        with evaluating(model, self._dense):
            for x, theirs in self._answers():
                ours = self._of(model, x)
                tally.add([(o.double(), t.double()) for o, t in zip(ours, theirs, strict=True)])
        found = tally.difference(self._outputs)
        return replace(found, has_classes=has_classes(self._dense))

    @torch.no_grad()
    def second_moment(self) -> float:
        """Return E||f_dense||^2, the yardstick of every output variance."""
        square, num = torch.zeros(1, dtype=torch.float64), 0
        with evaluating(self._dense):
            for x, outputs in self._answers():
                for output, scale in zip(outputs, self._outputs.scales.values(), strict=True):
                    square += float((scale * output.double()).square().sum())
                num += len(x)
        return float(over_all(square, num)[0]) / total(num)

    def _answers(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield inputs with what the dense network returns for them; hold it if there is room."""
        if self._held is not None:
            yield from zip(self._inputs, self._held, strict=True)
            return
        seen = []
        for x in self._inputs:
            answer = self._of(self._dense, x)
            yield x, answer
            if self._room > 0:
                seen.append(answer)
                self._room -= sum(t.nbytes for t in answer)
        if self._room > 0:
            self._held = seen

    def _of(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        return list(self._outputs.of(returned(model, x)).values())


class _Tally:
    """Sums over images of how far outputs are apart; of the first of them, how often they agree."""

    def __init__(self, num_outputs: int) -> None:
        # Of the first output: agreements, and divergences.
        self._num, self._first = 0, torch.zeros(2, dtype=torch.float64)
        self._changed = torch.zeros(2, num_outputs, dtype=torch.float64)  # without a shift, too
        self._chosen = torch.zeros(2, 0, dtype=torch.float64)
        self._spread: list[Moments] = []

    def add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take in the outputs [B, ...] of both models, the dense one's second."""
        device = pairs[0][0].device  # where the sums stay until all images have been seen
        self._changed, self._first = self._changed.to(device), self._first.to(device)
        for i, (ours, theirs) in enumerate(pairs):
            compared = comparison(ours, theirs)
            rows = _without_shift(theirs).flatten(1)
            apart = (_without_shift(ours).flatten(1) - rows).square().sum()
            self._changed[:, i] += torch.stack([compared[1], apart])
            if len(self._spread) == i:
                self._spread.append(Moments(rows.shape[1], device=device))
            self._spread[i].add(rows)
            if i == 0:
                self._first += torch.stack([compared[0], _divergence(ours, theirs)])
                counts = [o.argmax(1).flatten().bincount(minlength=o.shape[1]) for o in pairs[0]]
                chosen = torch.stack(counts).double()
                self._chosen = chosen + self._chosen if self._num else chosen
                num = len(ours)
        self._num += num

    def difference(self, outputs: Outputs) -> Difference:
        """Return the means over the images of all processes."""
        self._changed, self._first, self._chosen = (
            t.cpu() for t in (self._changed, self._first, self._chosen)
        )
        for m in self._spread:
            m.mean, m.spread = m.mean.cpu(), m.spread.cpu()
        # A process may have no image at all, and learns here how many numbers there are.
        here = [self._chosen.shape[1], *(len(m.mean) for m in self._spread)] if self._num else []
        sizes = torch.zeros(2 + self._changed.shape[1], dtype=torch.float64)
        sizes[: len(here)] = torch.tensor(here, dtype=torch.float64)
        sizes[-1] = bool(here)
        widths = summed(sizes)[0]
        if not here:
            num_classes, *others = (round(float(w / widths[-1])) for w in widths[:-1])
            self._chosen = torch.zeros(2, num_classes, dtype=torch.float64)
            self._spread = [Moments(size) for size in others]
        changed, num = over_all(self._changed, self._num)
        (squared, apart), (agree, diverged) = changed / num, summed(self._first)[0] / num
        chosen = summed(self._chosen)[0]
        odds = chosen / chosen.sum(1, keepdim=True)
        weights = torch.tensor(list(outputs.scales.values()), dtype=torch.float64).square()
        varies = torch.stack([m.over_processes()[2].sum() for m in self._spread])
        shares = map(_share, apart.tolist(), varies.tolist())
        return Difference(
            num,
            float(agree),
            float(odds.prod(0).sum()),
            float(weights @ squared),
            _share(float(weights @ apart), float(weights @ varies)),
            dict(zip(outputs.scales, shares, strict=True)),
            float(diverged),
        )


def _share(changed: float, variance: float) -> float:
    return changed / variance if variance > 0 else (0.0 if changed == 0 else float("inf"))


def _divergence(outputs: Tensor, dense_outputs: Tensor) -> Tensor:
    """Return the sum over the batch of KL(dense || these) of the classes, in nats."""
    given, wanted = (t.log_softmax(1) for t in (outputs, dense_outputs.to(outputs.device)))
    apart = F.kl_div(given, wanted, reduction="none", log_target=True).sum(1)
    return apart.flatten(1).mean(1).sum() if apart.ndim > 1 else apart.sum()


def _without_shift(outputs: Tensor) -> Tensor:
    """Return logits [B, K, ...] without what is common to all classes."""
    return outputs - outputs.mean(1, keepdim=True) if outputs.shape[1] > 1 else outputs


def comparison(outputs: Tensor, dense_outputs: Tensor) -> Tensor:
    """Return sums over the batch [2]: agreements, squared output changes."""
    dense_outputs = dense_outputs.to(outputs.device)
    if outputs.shape != dense_outputs.shape:
        raise ValueError(
            f"expected outputs of the dense model's shape {tuple(dense_outputs.shape)}, found "
            f"{tuple(outputs.shape)}: compare models with the same head"
        )
    agree = (top_classes(outputs, 1) == top_classes(dense_outputs, 1)) & outputs.isfinite().all(
        1, keepdim=True
    )
    share = agree.double().flatten(1).mean(1).sum()
    return torch.stack([share, (outputs - dense_outputs).square().sum()])


def top_classes(outputs: Tensor, num: int) -> Tensor:
    """Return the ``num`` most likely classes along dimension 1; -1 where outputs are not finite."""
    if num == 1:  # unlike topk, argmax takes the first of equals
        ranked = outputs.argmax(1, keepdim=True)
    else:
        ranked = outputs.topk(num, dim=1).indices
        ranked[:, 0] = outputs.argmax(1)
    return ranked.where(outputs.isfinite().all(1, keepdim=True), -1)


def over_all(totals: Tensor, num: int) -> tuple[Tensor, int]:
    """Return sums, and the number of inputs, of all processes."""
    return summed(totals)[0], int(total(num))


def returned(model: nn.Module, inputs: Tensor) -> Any:
    """Return what a model says to inputs, moved to where it is."""
    (moved,) = call_arguments(model, inputs)
    return model(fast_layout(moved, model))
