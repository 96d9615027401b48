"""Train a small timm model on CIFAR-10, to have something of your own to prune.

    python examples/train_cifar10.py --model resnet10t --data-dir cifar10-train.tar \
        --output resnet10t.safetensors
    tpvprune prune --model resnet10t --checkpoint resnet10t.safetensors --num-classes 10 \
        --img-size 32 --crop-pct 1 --data-dir cifar10-train.tar --keep 0.5 --output pruned

    python examples/train_cifar10.py --model vit --data-dir cifar10-train.tar \
        --output vit.safetensors
    tpvprune prune --model vit_tiny_patch16_224 --checkpoint vit.safetensors --num-classes 10 \
        --model-kwargs img_size=32 patch_size=4 embed_dim=96 depth=4 num_heads=3 \
        --img-size 32 --crop-pct 1 --data-dir cifar10-train.tar --keep 0.7 --output pruned

Some minutes an epoch on one CPU core, seconds on a GPU. This step uses labels (it makes the
"pretrained" model); pruning does not.
"""

from __future__ import annotations

import argparse

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset
from torch import Tensor, nn

SMALL_VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
MODELS = {"resnet10t": ("resnet10t", {}), "vit": ("vit_tiny_patch16_224", SMALL_VIT)}


def load(path: str, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Read a folder or tar.

    Returns:
        Normalised images [N, 3, 32, 32] and labels [N].
    """
    pairs = [(np.asarray(image), label) for image, label in create_dataset("", root=path)]
    x = torch.from_numpy(np.stack([p[0] for p in pairs])).permute(0, 3, 1, 2).float() / 255
    shape = (3, 1, 1)
    x = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return x, torch.tensor([p[1] for p in pairs])


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images, half of them flipped, the batch shifted by up to four pixels."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
    return nn.functional.pad(x, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]


def main() -> None:
    """Train, print the loss of every epoch, save the weights."""
    parser = argparse.ArgumentParser(description="train a small model on CIFAR-10")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    name, options = MODELS[args.model]
    model = timm.create_model(name, num_classes=10, **options).to(args.device)
    # The model's own preprocessing, so that the command above needs no --mean and --std.
    x, y = load(args.data_dir, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps = args.epochs * (len(x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.2)
    for epoch in range(args.epochs):
        total, order = 0.0, torch.randperm(len(x), generator=generator)
        for index in order.split(args.batch_size)[: len(x) // args.batch_size]:
            logits = model(augment(x[index], generator).to(args.device))
            target = y[index].to(args.device)
            loss = nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        print(f"epoch {epoch + 1}/{args.epochs}: loss {total / len(x):.3f}", flush=True)
        save_file(model.state_dict(), args.output)


if __name__ == "__main__":
    main()
