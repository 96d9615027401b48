"""Train, prune, distill and validate with timm's own loaders and optimizers, in four functions."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, accuracy
from torch import nn

import tpvprune


def write_digits(folder: Path) -> None:
    """Write class folders as timm reads them; stands for your images."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("train" if i % 2 else "validation") / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((32, 32)).save(path)


def loader(model: nn.Module, folder: Path, split: str) -> Any:
    """Return timm's loader, with the preprocessing that the model names."""
    config = {**resolve_model_data_config(model), "input_size": (3, 32, 32), "crop_pct": 1.0}
    dataset = create_dataset("", root=folder, split=split)
    return create_loader(
        dataset, batch_size=64, num_workers=0, use_prefetcher=False, persistent_workers=False,
        device=torch.device("cpu"), **config,
    )  # fmt: skip


def train(model: nn.Module, batches: Iterable[Any], epochs: int) -> nn.Module:
    """Return the model, trained with labels: this makes the "pretrained" one."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def validate(model: nn.Module, batches: Iterable[Any]) -> float:
    """Return top-1 in percent, as timm's validate.py does: a pruned model is a timm model."""
    top1 = AverageMeter()
    with torch.no_grad():
        for images, labels in batches:
            top1.update(accuracy(model(images), labels)[0].item(), len(images))
    return float(top1.avg)


def main(epochs: int = 12, distill_epochs: int = 10) -> None:
    """Do all four, and print what each model has."""
    torch.manual_seed(0)
    folder = Path(mkdtemp())
    write_digits(folder)
    model = timm.create_model("test_resnet", num_classes=10)
    labelled, held_out = (loader(model, folder, split) for split in ("train", "validation"))
    dense = train(model, labelled, epochs)

    batches = [images for images, _ in labelled][:4]  # 256 images, no labels
    result = tpvprune.prune(dense, batches, keep=0.25)
    distilled = tpvprune.distill(  # drops the labels of the loader
        result.model, dense, labelled, epochs=distill_epochs, lr=1e-3, opt="adamw"
    )
    tpvprune.save_pruned(distilled, folder / "smaller")

    smaller = tpvprune.load_pruned(folder / "smaller")
    for title, network in (("dense", dense), ("pruned", result.model), ("distilled", smaller)):
        macs = tpvprune.count_macs(network, torch.zeros(1, 3, 32, 32))
        print(f"{title}: {macs:,} MACs, top-1 {validate(network, held_out):.1f} %")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
