"""What a model loses against the dense one on images, in points, with its confidence interval.

A point is one image of a hundred. Of unlabeled images it is one on which the two models choose
different classes, of labelled ones a point of top-1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.passes.batches import Again, private_randomness, unlabeled
from tpvprune.passes.evaluation import class_indices
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import evaluating, on_device
from tpvprune.processes.shares import every, summed

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_MOST_MEASURED = 10_000


@dataclass(frozen=True)
class Loss:
    """What a model loses.

    Attributes:
        points: The estimate, in points: above 0 where the model is worse than the dense one.
        low: The lower end of its 95 % confidence interval, in points.
        high: The upper end.
        num_images: On how many images it was measured.
    """

    points: float
    low: float
    high: float
    num_images: int

    @classmethod
    def of_agreement(cls, lost: float, num: int) -> Loss:
        """Return the loss of agreement, with the interval of Wilson (1927).

        Of a model that chooses at each position ``lost`` is a sum of fractions, for which the
        interval is rather too wide.
        """
        share, z2 = lost / num, _Z * _Z
        middle = (lost + z2 / 2) / (num + z2)
        half = _Z * math.sqrt(num * share * (1 - share) + z2 / 4) / (num + z2)
        return cls(100 * share, 100 * max(0.0, middle - half), 100 * (middle + half), num)

    @classmethod
    def of_top1(cls, lost: float, won: float, num: int) -> Loss:
        """Return the loss of top-1, its interval by Bonett and Price (2012) for paired images."""
        lost_share, won_share = (lost + 1) / (num + 2), (won + 1) / (num + 2)
        middle = lost_share - won_share
        half = _Z * math.sqrt((lost_share + won_share - middle**2) / (num + 2))
        return cls(100 * (lost - won) / num, 100 * (middle - half), 100 * (middle + half), num)

    @property
    def width(self) -> float:
        """How wide the interval is, in points."""
        return self.high - self.low

    def needed(self, width: float) -> int:
        """Return on about how many images the interval would be no wider than so many points."""
        return math.ceil(self.num_images * (self.width / width) ** 2)

    def __str__(self) -> str:
        """Return it in words, for people."""
        return (
            f"{self.points:.2f} points ({CONFIDENCE:.0%} interval {self.low:.2f} to "
            f"{self.high:.2f}, {self.num_images} images)"
        )


def agreement_interval(agreement: float, num: int, digits: int = 0) -> str:
    """Return in words, in %, between which values an agreement that ``num`` images gave may lie."""
    loss = Loss.of_agreement((1 - agreement) * num, num)
    low, high = 100 - loss.high, 100 - loss.low
    return f"{CONFIDENCE:.0%} interval {low:.{digits}f} to {high:.{digits}f}"


def images_needed(points: float, width: float) -> int:
    """Return on how few images the interval of so large a loss of agreement is no wider than this.

    All in points; Wilson's interval, solved for the number.
    """
    share, width, z2 = points / 100, width / 100, _Z * _Z
    spread = share * (1 - share)
    root = math.sqrt((2 * z2 * spread) ** 2 + (width * z2) ** 2 * (1 - 4 * spread))
    return max(1, math.ceil((2 * z2 * spread + root) / width**2 - z2))


def num_measured(max_loss: float) -> int:
    """Return how many images tell such a loss apart, in points: half to decide, half to judge.

    Of both the interval is then no wider than the loss, but for the limit of 10,000.
    """
    return min(_MOST_MEASURED, 2 * images_needed(max_loss, max_loss))


class Losses:
    """Measures what models lose against one dense model on the same images.

    ``labelled``: top-1 counts, and batches are pairs with class indices [B]; else agreement.
    ``outputs``: the first that counts is meant. ValueError if the dense model chooses no classes,
    once it is run.
    """

    def __init__(
        self,
        dense: nn.Module,
        batches: Iterable[Any],
        *,
        labelled: bool = False,
        outputs: Chosen | None = None,
    ) -> None:
        self.dense, self.labelled, self._chosen = dense, labelled, outputs
        self._inputs = unlabeled(batches)
        self._batches = batches if labelled else self._inputs
        self._outputs: Outputs | None = None
        self._known: list[Tensor] = []

    @torch.no_grad()
    def prepare(self) -> None:
        """Note which classes the dense model chooses, once."""
        if self._outputs is not None:
            return
        self._outputs = Outputs.measured(self.dense, self._inputs, self._chosen).first
        with evaluating(self.dense):
            outputs = (self._returned(self.dense, x) for x in private_randomness(self._inputs))
            self._known = [found.argmax(1).cpu() for found in outputs]

    @torch.no_grad()
    def of(self, model: nn.Module) -> Loss:
        """Measure what a model loses."""
        self.prepare()
        counts = torch.zeros(3, dtype=torch.float64)  # lost, won, images
        with evaluating(model):
            batches = private_randomness(self._batches)
            for dense, batch in zip(self._known, batches, strict=True):
                counts += self._counts(model, dense, batch)
        lost, won, num = summed(counts)[0].tolist()
        if self.labelled:
            return Loss.of_top1(lost, won, round(num))
        return Loss.of_agreement(lost, round(num))

    def _counts(self, model: nn.Module, dense: Tensor, batch: Any) -> Tensor:
        x = batch[0] if self.labelled else batch
        outputs = self._returned(model, x)
        ours = outputs.argmax(1).where(outputs.isfinite().all(1), -1).cpu()
        if not self.labelled:
            lost = (ours != dense).double().reshape(len(x), -1).mean(1).sum()
            return torch.tensor([float(lost), 0.0, len(x)], dtype=torch.float64)
        labels = class_indices(batch[1], outputs).cpu()
        right, was_right = ours == labels, dense == labels
        lost_won = [float((a & ~b).sum()) for a, b in ((was_right, right), (right, was_right))]
        return torch.tensor([*lost_won, len(x)], dtype=torch.float64)

    def _returned(self, model: nn.Module, x: Tensor) -> Tensor:
        assert self._outputs is not None
        (found,) = self._outputs.of(model(on_device(x, model))).values()
        if found.ndim < 2 or found.shape[1] < 2:
            raise ValueError(
                "max_loss: expected a model that chooses among classes, found outputs of shape "
                f"{tuple(found.shape)}: choose a size with keep"
            )
        return found


def halves(batches: Iterable[Any]) -> tuple[Iterable[Any], Iterable[Any]]:
    """Split images into two halves without a common one: every other image, whatever the batches.

    ``batches``: re-iterable of tensors [B, ...], or of tuples of such.
    """
    return Again(every, batches, 0, 2), Again(every, batches, 1, 2)
