"""Prune a model that timm does not know, one stage of the method at a time."""

from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

import tpvprune


class Net(nn.Module):
    """Two branches, joined: channels are followed through the join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, 10] for images [B, 3, H, W]."""
        x = self.stem(x)
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


dense = Net().eval()
batches = torch.randn(128, 3, 32, 32).split(32)  # yours: unlabeled inputs

groups = tpvprune.find_groups(dense, batches[0])
print([f"{group.name}: {group.num_channels}" for group in groups])

scores = tpvprune.tpv_scores(dense, groups, batches)  # or tpvprune.SCORERS["magnitude"], ...
kept = tpvprune.select_channels(groups, scores, keep=0.6)
cut = tpvprune.remove_channels(dense, groups, kept)
pruned = tpvprune.compensate_weights(cut, dense, batches, groups=groups, kept=kept)

num_macs = [tpvprune.count_macs(model, batches[0][:1]) for model in (dense, pruned)]
print(f"{num_macs[1] / num_macs[0]:.0%} of the MACs")
with torch.no_grad():
    outputs = dense(batches[0])
    for title, model in (("cut", cut), ("repaired", pruned)):
        change = (model(batches[0]) - outputs).square().sum() / outputs.square().sum()
        print(f"{title}: the outputs change by {change:.4%} of their squared size")

folder = tpvprune.save_pruned(pruned, Path(mkdtemp()) / "net", dense=dense)
loaded = tpvprune.load_pruned(folder, model=Net())
assert torch.equal(loaded(batches[0]), pruned(batches[0]))
