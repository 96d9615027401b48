"""Changes that leave a model as good as it was: what an audit tries on criteria and measures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from tpvprune.diagnostics.catalogue import Setting
from tpvprune.diagnostics.measures import Labelled
from tpvprune.diagnostics.rescaling import rescale
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.evaluation import evaluate
from tpvprune.repairs.finetuning import finetune
from tpvprune.repairs.training import Recipe

NEUTRAL = 0.002
"""Accuracy, or agreement with the model itself, may change by so much: 0.2 points."""

_OPTIMIZERS = (("sgd", 0.01), ("sgd", 0.001), ("adam", 1e-4))
_ATTEMPTS = 4


@dataclass(frozen=True)
class Change:
    """A setting that differs from the first one in one respect.

    Attributes:
        name: What was changed.
        kind: "rescaling", "images", "seed" or "training".
        setting: The model, images and seed after it.
        moved: Fraction of the images by which accuracy (without labels: agreement with the model
            as it was) fell or rose.
        note: What else is to be known.
    """

    name: str
    kind: str
    setting: Setting = field(repr=False)
    moved: float = 0.0
    note: str = ""

    @property
    def neutral(self) -> bool:
        """Whether the model is as good as it was."""
        return abs(self.moved) <= NEUTRAL + 1e-9


def changes_of(
    setting: Setting,
    others: Iterable[Any],
    *,
    epochs: int = 1,
    labelled_others: Labelled | None = None,
    seed: int = 0,
) -> tuple[list[Change], dict[str, str]]:
    """Make the changes that an audit tries.

    Rescaling of ReLU channels, each by its own factor and layer by layer; other images, half of
    them; another seed; a few steps of SGD at two rates and of Adam, towards labels or the model's
    own classes. Steps that cost more than 0.2 points are made again at a quarter of the rate, three
    times at most.

    Args:
        setting: Model and images as they are.
        others: As many other images.
        epochs: Passes of the training steps over the images.
        labelled_others: The same with labels, if the setting has labels.
        seed: Of factors and training.

    Returns:
        The changes, and what could not be changed with the reason.
    """
    other = list(unlabeled(others))
    changes, missing = [], {}
    start = _accuracy(setting, setting.model)
    example = next(iter(setting.batches))
    per: Literal["channel", "layer"]
    for per in ("channel", "layer"):
        name = f"rescaled by {per}"
        found = rescale(setting.model, setting.groups, example, per=per, seed=seed + 1)
        if not found.factors:
            missing[name] = next(iter(found.left.values()), "no channel groups")
            continue
        note = f"{len(found.factors)} of {len(setting.groups)} groups"
        moved = _accuracy(setting, found.model) - start
        changes.append(Change(name, "rescaling", replace(setting, model=found.model), moved, note))
    half = setting.batches[: max(len(setting.batches) // 2, 1)]
    labelled_half = setting.labelled[: len(half)]
    changes += [
        Change("other images", "images", setting.with_images(other, labelled_others)),
        Change("half of the images", "images", setting.with_images(half, labelled_half)),
        Change("another seed", "seed", replace(setting, seed=setting.seed + 1)),
    ]
    for opt, lr in _OPTIMIZERS:
        recipe = Recipe(
            epochs=epochs, lr=lr, opt=opt, weight_decay=0.0, freeze_batchnorm=True, seed=seed
        )
        changes.append(_trained(setting, start, recipe, epochs * len(setting.labelled)))
    return changes, missing


def _trained(setting: Setting, start: float, recipe: Recipe, updates: int) -> Change:
    name, note = f"{recipe.opt} steps, rate {recipe.lr:g}", ""
    for _ in range(_ATTEMPTS):
        model = finetune(setting.model, setting.labelled, recipe=recipe)
        moved = _accuracy(setting, model) - start
        steps = f"{updates} steps at {recipe.lr:g}"
        after = replace(setting, model=model)
        change = Change(name, "training", after, moved, note + steps)
        if change.neutral:
            break
        note += f"{100 * moved:+.2f} points by {steps}; "
        recipe = replace(recipe, lr=recipe.lr / 4)
    return change


def _accuracy(setting: Setting, model: nn.Module) -> float:
    """Return accuracy; without labels, agreement with the classes of the model as it was."""
    return evaluate(model, setting.eval_images or setting.labelled).top1
