"""What the flags of a benchmark name: a model, and images of a folder without their labels."""

from __future__ import annotations

import argparse

from torch import Tensor, nn

from tpvprune.images.loading import choose_images, in_memory
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.passes.batches import unlabeled
from tpvprune.saved.models import load_model


def opened_model(args: argparse.Namespace) -> nn.Module:
    """Return the model that the flags of ``add_model`` name; without a checkpoint it is random."""
    model, _ = load_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        num_classes=args.num_classes,
        model_kwargs=dict(args.model_kwargs or ()),
    )
    return model


def images_of(
    args: argparse.Namespace, model: nn.Module, folder: str, num: int | None, *, batch_size: int
) -> list[Tensor]:
    """Return batches [batch_size, C, H, W] of images, held in memory.

    ``num``: so many are drawn at random, or all with None.
    """
    how = resolve_preprocessing(
        model,
        input_size=args.input_size,
        mean=args.mean,
        std=args.std,
        crop_pct=args.crop_pct,
        interpolation=args.interpolation,
    )
    chosen = choose_images(
        open_images(folder), how, num_images=num, seed=args.seed, batch_size=batch_size, workers=0
    )
    return list(unlabeled(in_memory(chosen)))
