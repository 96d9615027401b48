"""One model, several sizes: what they share is computed once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune.passes.clock import Progress
from tpvprune.pipeline.choices import Choices
from tpvprune.pipeline.pruning import PruningResult, pruned
from tpvprune.pipeline.setup import set_up
from tpvprune.widths.ranking import Ranking


class Sizes:
    """Prunes a model to one size after the other, each as :func:`tpvprune.prune` would.

    The images are drawn, the groups found and verified, the milliseconds measured and the channels
    ranked once. What the dense network gives, and layers are fitted to, is kept in memory between
    the repairs (2 GiB at most, where 8 GiB are free), until this object goes.

    Args:
        model: Any vision model; untouched.
        batches: Re-iterable of unlabeled input tensors [B, ...]; labels are dropped unread.
        **choices: Of :func:`tpvprune.prune`, but ``keep`` and ``state``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], **choices: Any) -> None:
        """Look up what all sizes share, but for the ranking."""
        told = Choices(**choices)
        self._model, self._given = model, set_up(model, batches, told, several=True)
        self.ranking: Ranking | None = told.ranking
        """What channels are worth; None before the first size, unless it was given."""

    def prune(
        self, keep: float, *, state: str | Path | None = None, progress: Progress | None = None
    ) -> PruningResult:
        """Prune to one size.

        Args:
            keep: Fraction of the dense cost that stays, in (0, 1].
            state: As of :func:`tpvprune.prune`, another file for each size.
            progress: Called with (stage, done, total); None: as given for all sizes.

        Returns:
            What ``tpvprune.prune(..., keep=keep, ranking=self.ranking)`` returns.

        Raises:
            ValueError: If ``keep`` is out of range, or the state is damaged.
        """
        told = self._given.told
        told = replace(
            told, keep=keep, state=state, ranking=self.ranking, progress=progress or told.progress
        )
        result = pruned(self._model, self._given.for_size(told))
        self.ranking = result.ranking
        return result
