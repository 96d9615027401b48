"""Fused attention taken apart computes the same, and can then be pruned like anything else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tpvprune
from tpvprune.groups.attention import UnfusedAttention


def fused(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, **options).eval()
    for parameter in module.parameters():  # biases start at zero
        nn.init.normal_(parameter, std=0.3)
    return module


def arguments(batch_first: bool, keys: int = 12, values: int = 12) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((5, 12), (7, keys), (7, values))
    found = (torch.randn(2, *size, generator=generator) for size in sizes)
    return tuple(t if batch_first else t.transpose(0, 1) for t in found)


PAIRS = {
    "none": None,
    "bool": torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.3,
    "added": torch.randn(5, 7, generator=torch.Generator().manual_seed(2)),
    "by head": torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(2)) < 0.3,
}
KEYS = {
    "none": None,
    "bool": torch.tensor([[False] * 6 + [True], [False] * 5 + [True] * 2]),
    "added": torch.tensor([[0.0] * 6 + [-math.inf], [0.0] * 5 + [-1.0] * 2]),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_it_computes_the_same(batch_first, pairs, keys):
    before = fused(batch_first=batch_first)
    after = tpvprune.unfuse_attention(before)
    assert isinstance(after, UnfusedAttention)
    given = arguments(batch_first)
    masks = {"attn_mask": PAIRS[pairs], "key_padding_mask": KEYS[keys]}
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected, found = (module(*given, **masks, **weights) for module in (before, after))
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 6, "vdim": 10}])
def test_other_widths_and_no_bias(options):
    before = fused(batch_first=True, **options)
    after = tpvprune.unfuse_attention(before)
    given = arguments(True, options.get("kdim", 12), options.get("vdim", 12))
    torch.testing.assert_close(after(*given)[0], before(*given)[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sample_without_a_batch(batch_first):
    before = fused(batch_first=batch_first)
    given = tuple(t[0] for t in arguments(True))
    found, expected = (m(*given) for m in (tpvprune.unfuse_attention(before), before))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_it_does_not_know_stays_fused(options):
    model = nn.Sequential(fused(**options))
    assert type(tpvprune.unfuse_attention(model)[0]) is nn.MultiheadAttention


def test_the_model_itself_is_left_alone_and_frozen_weights_stay_frozen():
    model = nn.Sequential(fused())
    model.requires_grad_(False)
    copied = tpvprune.unfuse_attention(model)
    assert type(model[0]) is nn.MultiheadAttention
    assert not any(p.requires_grad for p in copied.parameters())
    assert not copied[0].training


def test_a_module_that_is_used_twice_stays_one():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.again = fused(batch_first=True)
            self.inside = nn.Sequential(nn.Identity(), self.first)

        def forward(self, x: Tensor) -> Tensor:
            once = self.first(x, x, x)[0]
            return self.inside[1](once, once, once)[0] + self.again(x, x, x)[0]

    model = Twice().eval()
    copied = tpvprune.unfuse_attention(model)
    assert isinstance(copied.first, UnfusedAttention)
    assert copied.first is copied.again is copied.inside[1]
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(copied(x), model(x))


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim = 1 if batch_first else 0
        self.stem, self.fc = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 5)
        layer = nn.TransformerEncoderLayer(
            24, 4, 32, batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).movedim(2, self.dim)
        return self.fc(self.encoder(tokens).mean(self.dim))


@pytest.mark.parametrize(("batch_first", "norm_first"), [(True, False), (False, True)])
def test_heads_mlp_and_stream_of_an_encoder_are_pruned(batch_first, norm_first):
    model = Encoder(batch_first, norm_first).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    images = list((images + torch.randn(64, 3, 1, 1, generator=generator)).split(16))
    groups = tpvprune.find_groups(tpvprune.unfuse_attention(model), images[0])
    units = {g.name: (g.unit, g.num_channels) for g in groups}
    assert units["encoder.layers.0.self_attn.q"] == ("head", 4)
    assert units["encoder.layers.1.linear1"] == ("channel", 32)
    assert units["stem"] == ("channel", 24)
    result = tpvprune.prune(model, images, keep=0.6)
    assert result.reached
    real = tpvprune.count_macs(result.model, images[0]) / tpvprune.count_macs(model, images[0])
    assert real == pytest.approx(0.6, abs=0.02)
    shares = result.report["variance_share"]
    assert shares["compensate"] < shares["none"]
    assert any("nn.MultiheadAttention was replaced" in line for line in result.warnings)


def test_a_pruned_encoder_is_saved_and_rebuilt_from_the_fused_dense_model(tmp_path):
    model = Encoder().eval()
    images = list(torch.randn(32, 3, 16, 16).split(16))
    result = tpvprune.prune(model, images, keep=0.6, repair="none")
    folder = tpvprune.save_pruned(result, tmp_path / "pruned", dense=model)
    for dense in (model, tpvprune.unfuse_attention(model)):
        loaded = tpvprune.load_pruned(folder, model=dense)
        assert torch.equal(loaded(images[0]), result.model(images[0]))


def test_without_taking_apart_the_reason_names_the_remedy():
    model = Encoder().eval()
    blocked = tpvprune.find_groups(model, torch.randn(2, 3, 16, 16)).blocked
    assert any("tpvprune.unfuse_attention(model)" in str(b.blocked) for b in blocked)
