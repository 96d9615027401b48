"""The network that is made smaller in own_task.py, fine-tuned once, and the images of a seed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tpvprune.images.loading import choose_images, in_memory, permutation
from tpvprune.images.preprocessing import Preprocessing, resolve_preprocessing
from tpvprune.images.sources import ImageSource, open_images
from tpvprune.images.training import training_images
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.running import evaluating
from tpvprune.repairs.finetuning import finetune
from tpvprune.repairs.training import Recipe
from tpvprune.saved.models import load_model

TEACHERS_RATE = 0.01


@dataclass(frozen=True)
class Task:
    """A fine-tuned network, and the images of one seed.

    Of one permutation of the training set the first tenth is held back from all training, the
    teacher's too; channels are chosen with some of the others. The test set is for the table alone.
    """

    args: argparse.Namespace
    seed: int
    source: ImageSource
    test_source: ImageSource
    preprocessing: Preprocessing
    teacher: nn.Module

    @property
    def num_train(self) -> int:
        """How many images the training set has, those held back included."""
        return min(self.args.num_train or self._count, self._count)

    @property
    def num_held(self) -> int:
        """How many of them nothing is trained on."""
        return max(1, self.num_train // 10)

    @property
    def _count(self) -> int:
        if self.source.count is None:
            raise ValueError(f"{self.source.name}: expected a folder or a tar, found a stream")
        return self.source.count

    @cached_property
    def test(self) -> list[Any]:
        """Labelled batches for the table."""
        return self._images(self.test_source, self.args.num_test)

    @cached_property
    def held(self) -> list[Tensor]:
        """Unlabeled batches that nothing is trained on."""
        return list(unlabeled(self._images(self.source, self.num_held)))

    @cached_property
    def calibration(self) -> list[Any]:
        """Labelled batches to choose channels with; only criteria with labels see them."""
        num = min(self.args.num_images, self.num_train - self.num_held)
        return self._images(self.source, num, skip=self.num_held)

    @cached_property
    def classes(self) -> Tensor:
        """What the teacher says to the test images."""
        return classes(self.teacher, [x for x, _ in self.test])

    def read(self) -> None:
        """Read what is held in memory, so that no way has to wait for it."""
        _ = self.test, self.held, self.calibration

    def training(self, *, labelled: bool) -> tuple[Any, Any]:
        """Return what every training sees: batches, and what is left to augment of them."""
        held_back = permutation(self._count, self.seed)[: self.num_held]
        return training_images(
            self.source,
            self.preprocessing,
            num_images=self.num_train - self.num_held,
            apart=held_back,
            seed=self.seed,
            batch_size=self.args.batch_size,
            workers=self.args.threads,
            labelled=labelled,
            mixed=not labelled,
        )

    def _images(self, source: ImageSource, num: int | None, skip: int = 0) -> list[Any]:
        chosen = choose_images(
            source,
            self.preprocessing,
            num_images=num,
            skip=skip,
            seed=self.seed,
            batch_size=self.args.batch_size,
            workers=self.args.threads,
            labelled=True,
        )
        return list(in_memory(chosen))


def opened(args: argparse.Namespace, seed: int) -> Task:
    """Open the images and load the teacher, which is fine-tuned and kept where there is none."""
    model, _ = load_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        model_kwargs=dict(args.model_kwargs),
    )
    preprocessing = resolve_preprocessing(
        model,
        input_size=args.input_size or (args.img_size and (3, args.img_size, args.img_size)),
        mean=args.mean,
        std=args.std,
        crop_pct=args.crop_pct,
        interpolation=args.interpolation,
    )
    images, tests = (open_images(path, labelled=True) for path in (args.train_dir, args.test_dir))
    if images.class_names != tests.class_names:
        raise ValueError(f"{tests.name}: expected the classes of {images.name}, found others")
    assert images.num_classes is not None
    task = Task(
        args, seed, images, tests, preprocessing, with_classes(model, images.num_classes, seed)
    )
    size = "x".join(map(str, preprocessing.input_size))
    what = f"{args.model}-{Path(args.train_dir).stem}{task.num_train}-{size}-{args.epochs}epochs"
    file = args.work / f"{what}-seed{seed}.safetensors"
    if not file.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        save_file(_finetuned(task).state_dict(), file)
    task.teacher.load_state_dict(load_file(file))
    task.read()
    return task


def _finetuned(task: Task) -> nn.Module:
    batches, augment = task.training(labelled=True)
    recipe = Recipe(epochs=task.args.epochs, lr=TEACHERS_RATE, seed=task.seed)
    return finetune(task.teacher, batches, recipe=recipe, augment=augment)


def with_classes(model: nn.Module, num_classes: int, seed: int) -> nn.Module:
    """Give a timm model a new, random classifier, in place."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model.eval()


def classes(outputs: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Tensor:
    """Return the most likely classes of inputs, [number of images]."""
    modules = [outputs] if isinstance(outputs, nn.Module) else []
    with evaluating(*modules), torch.no_grad():
        return torch.cat([outputs(x).argmax(1) for x in batches])
