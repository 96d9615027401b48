"""Training with labels, to compare distillation with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.passes.batches import private_randomness
from tpvprune.passes.evaluation import class_indices
from tpvprune.passes.moments import in_single
from tpvprune.passes.running import first_output
from tpvprune.processes.shares import part_of
from tpvprune.repairs.training import Recipe, count_batches, identity_of, returned_by, train
from tpvprune.scores.baselines.gradients import labelled_pairs

Labelled = tuple[Tensor, Tensor]
LABELS = "labels"  # what a saved state says of such a run


def finetune(
    model: nn.Module,
    labelled_batches: Iterable[Any],
    *,
    recipe: Recipe,
    augment: Callable[[Tensor], Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    state: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """Train a copy of a classifier with outputs [B, K] by cross-entropy; else as ``distill`` does.

    ``labelled_batches``: re-iterable of (inputs [B, ...], class indices [B]). ValueError if they
    are not labelled, the labels are not the model's classes, or training fails.
    """

    def epoch_batches(seed: int) -> Iterator[Labelled]:
        source = private_randomness(labelled_batches, seed=seed)
        for inputs, labels in labelled_pairs("fine-tuning", model, source):
            yield inputs if augment is None else augment(inputs), labels

    def loss_of(trained: nn.Module, batch: Labelled, _: tuple[int, int]) -> Tensor:
        outputs = in_single(first_output(returned_by(trained, batch[0], recipe.amp)))
        loss = F.cross_entropy(outputs, class_indices(batch[1], outputs))
        return loss * part_of(len(outputs))

    return train(
        model, epoch_batches, count_batches(labelled_batches), loss_of, recipe,
        state=state, masks=masks, identity=(LABELS, identity_of(labelled_batches)),
        progress=progress,
    )  # fmt: skip
