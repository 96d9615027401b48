"""What networks do to channels besides convolving and adding: each kind of it is followed.

The oracle is the plain one: what a removal leaves computes the same as the dense network whose
layers have zeros in the place of the weights that read the channels.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tpvprune


class Positions(nn.Module):
    """A table of positions that is read by an index is added to the stream (CLIP, SigLIP)."""

    def __init__(self):
        super().__init__()
        self.stem, self.table = nn.Conv2d(3, 12, 4, 4), nn.Embedding(16, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.fc((x + self.table(torch.arange(16))).relu().mean(1))


class Gated(nn.Module):
    """A gated linear unit along the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 24, 4, 4), nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(F.glu(self.stem(x), dim=1).mean((2, 3)))


class Alike(nn.Module):
    """The stream meets tensors that are made as wide as it is."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        y = x * torch.full_like(x, 0.5) + torch.zeros_like(x) + torch.empty_like(x).fill_(0.2)
        return self.fc(torch.maximum(y, torch.ones_like(x) - 1).mean((2, 3)))


class Patches(nn.Module):
    """Patches are taken apart and put together again (MobileViTv2)."""

    def __init__(self, stride=2):
        super().__init__()
        self.stem, self.fc, self.stride = (
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(12, 5, 1),
            stride,
        )

    def forward(self, x):
        x = self.stem(x)
        patches = F.unfold(x, 2, stride=self.stride)
        return self.fc(F.fold(patches.relu(), x.shape[2:], 2, stride=self.stride)).mean((2, 3))


class ZeroedBias(nn.Module):
    """The middle of a bias is zeroed, as long as a third of it (keys of torchvision's SwinV2)."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(48, 36), nn.Linear(12, 5)

    def forward(self, x):
        x = F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)
        bias = self.stem.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        q, k, v = F.linear(x, self.stem.weight, bias).chunk(3, -1)
        return self.fc((q * k.sigmoid() + v).mean(1))


class Checked(nn.Module):
    """Layers that refuse inputs of another width than they were made for (transformers)."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.fc = nn.Conv2d(3, 12, 4, 4), nn.Conv2d(12, 8, 1), nn.Linear(8, 5)
        self.width = 12

    def forward(self, x):
        x = self.stem(x)
        _, width, _, _ = x.shape
        if width != self.width:
            raise ValueError("another width")
        return self.fc(self.mix(x.relu()).relu().mean((2, 3)))


class Squeezed(nn.Module):
    """Squeeze and excitation by functional calls."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 5)
        self.down, self.up = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.randn(12, 6))

    def forward(self, x):
        x = self.stem(x)
        gate = F.linear(F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.down).relu(), self.up)
        return self.fc((x * gate.sigmoid()[:, :, None, None]).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer reads the columns of a feature map (text recognition)."""

    def __init__(self, kind, **kwargs):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.mix = getattr(nn, kind)(12, 6, batch_first=True, **kwargs)
        self.fc = nn.Linear(12 if self.mix.bidirectional else 6, 5)

    def forward(self, x):
        return self.fc(self.mix(self.stem(x).relu().mean(2).transpose(1, 2))[0].mean(1))


class Flat(nn.Sequential):
    """Layers, a mean over positions, a head."""

    def forward(self, x):
        for layer in self[:-1]:
            x = layer(x)
        return self[-1](x.flatten(2).mean(2))


def upsampled(groups, transposed=nn.ConvTranspose2d, conv=nn.Conv2d):
    return Flat(conv(3, 12, 3), nn.ReLU(), transposed(12, 24, 2, 2, groups=groups), nn.ReLU(),
                conv(24, 8, 3), nn.ReLU(), nn.Linear(8, 5))  # fmt: skip


def normed(groups):
    return Flat(nn.Conv2d(3, 12, 3), nn.GroupNorm(groups, 12, affine=False), nn.ReLU(),
                nn.Conv2d(12, 8, 3), nn.Linear(8, 5))  # fmt: skip


def shuffled():
    return Flat(nn.Conv2d(3, 24, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(6, 8, 3),
                nn.PixelUnshuffle(2), nn.Conv2d(32, 8, 3), nn.Linear(8, 5))  # fmt: skip


# network, shape of an input, units of the groups
KINDS = {
    "positions": (Positions, (3, 16, 16), {"stem": 12}),
    "made alike": (Alike, (3, 16, 16), {"stem": 12}),
    "gated": (Gated, (3, 16, 16), {"stem": 12}),
    "patches": (Patches, (3, 8, 8), {"stem": 12}),
    "patches that overlap": (lambda: Patches(1), (3, 8, 8), {"stem": 12}),
    "zeroed bias": (ZeroedBias, (3, 16, 16), {"stem": 12}),
    "checked": (Checked, (3, 16, 16), {"stem": 12, "mix": 8}),
    "squeezed": (Squeezed, (3, 16, 16), {"stem": 12, "": 6}),
    "LSTM": (lambda: Recurrent("LSTM", bidirectional=True, num_layers=2), (3, 16, 16),
             {"stem": 12}),
    "GRU": (lambda: Recurrent("GRU"), (3, 16, 16), {"stem": 12}),
    "transposed": (lambda: upsampled(1), (3, 8, 8), {"0": 12, "2": 24, "4": 8}),
    "transposed, grouped": (lambda: upsampled(4), (3, 8, 8), {"0": 4, "4": 8}),
    "transposed, depthwise": (lambda: upsampled(12), (3, 8, 8), {"0": 12, "4": 8}),
    "along one dimension": (lambda: upsampled(4, nn.ConvTranspose1d, nn.Conv1d), (3, 8),
                            {"0": 4, "4": 8}),
    "along three": (lambda: upsampled(4, nn.ConvTranspose3d, nn.Conv3d), (3, 6, 6, 6),
                    {"0": 4, "4": 8}),
    "normalised": (lambda: normed(4), (3, 8, 8), {"0": 4, "3": 8}),
    "shuffled": (shuffled, (3, 8, 8), {"0": 6, "3": 8, "5": 8}),
}  # fmt: skip


def made(kind):
    torch.manual_seed(0)
    factory, shape, units = KINDS[kind]
    return factory().eval(), torch.randn(24, *shape), units


def zeroed(model, groups, kept):
    """Return the dense network, zeros in the place of the weights that read what leaves."""
    model = copy.deepcopy(model)
    for name, mask in kept.items():
        for part in groups[name].slices:
            if part.side == "consumer":
                gone = part.index[~mask[part.channel]]
                model.get_parameter(part.param).data.index_fill_(part.dim, gone, 0)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_removal_is_a_zero_in_every_weight_that_reads(kind):
    model, x, units = made(kind)
    groups = tpvprune.find_groups(model, x[:2])
    assert {g.name: g.num_channels for g in groups} == units
    kept = {g.name: torch.arange(g.num_channels) % 3 != 1 for g in groups}
    small = tpvprune.remove_channels(model, groups, kept).double()
    expected = zeroed(model, groups, kept).double()(x.double())
    torch.testing.assert_close(small(x.double()), expected, rtol=1e-10, atol=1e-10)
    dense = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) == groups.params(kept) < dense
    assert groups.macs(kept) == pytest.approx(tpvprune.count_macs(small.float(), x[:1]), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pruned_repaired_saved_and_trained(kind, tmp_path):
    model, x, _ = made(kind)
    result = tpvprune.prune(model, x.split(8), keep=0.7, num_images=None)
    report = result.report
    share = report["variance_share"]
    assert result.reached and share[report["repair_chosen"]] <= share["none"]
    tpvprune.save_pruned(result, tmp_path / "pruned", dense=model)
    loaded = tpvprune.load_pruned(tmp_path / "pruned", model=model)
    assert torch.equal(loaded(x), result.model(x))
    result.model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in result.model.parameters())


def test_what_is_normalised_by_its_neighbours_stays_with_the_reason():
    model = Flat(nn.Conv2d(3, 12, 3), nn.LocalResponseNorm(3), nn.Conv2d(12, 8, 3), nn.Linear(8, 5))
    groups = tpvprune.find_groups(model.eval(), torch.randn(2, 3, 8, 8))
    assert [g.name for g in groups] == ["2"]
    assert "its neighbours" in {g.name: g.blocked for g in groups.blocked}["0"]
