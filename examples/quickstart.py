"""Prune a timm model with unlabeled images, save it, load it, and measure what it cost."""

from pathlib import Path
from tempfile import mkdtemp

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate

import tpvprune

digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
images = interpolate(images, size=(16, 16), mode="bilinear")
labels = torch.as_tensor(digits.target)

# Stands for your pretrained model: a few seconds of training, with labels.
torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(100):
    batch = torch.randint(0, 1000, (64,))
    optimizer.zero_grad()
    cross_entropy(model(images[batch]), labels[batch]).backward()
    optimizer.step()
model.eval()

# From here on no label is read, except to measure at the end.
result = tpvprune.prune(model, images[:300].split(100), keep=0.5)

for name, mask in result.kept.items():
    print(f"{name}: {int(mask.sum())} of {len(mask)} channels stay")
for group in result.groups.blocked:
    print(f"{group.name}: left whole, {group.blocked}")

folder = tpvprune.save_pruned(result, Path(mkdtemp()) / "smaller")
smaller = tpvprune.load_pruned(folder)

held_out = [(images[1000:], labels[1000:])]
for title, network in (("dense", model), ("pruned", smaller)):
    found = tpvprune.evaluate(network, held_out)
    print(f"{title}: {found.macs:,} MACs, {found.params:,} parameters, top-1 {found.top1:.1%}")
