"""Layers that people use and that were once blocked, refused by an accident, or never ended."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tpvprune


def small(first, second):
    """Return two layers that are pruned, and a head."""
    return nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    ).eval()


# ---- one slope a channel ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [12, 16])
def test_slopes_leave_with_their_channels(size):
    """At a height of 16 a slope of 16 channels would fit the last dimension, too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16), nn.Conv2d(16, 32, 3, padding=1), nn.PReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[1].weight.uniform_(-1, 1)
    x = torch.randn(12, 3, size, size)
    groups = tpvprune.find_groups(model, x[:2])
    assert [(g.name, g.num_channels) for g in groups] == [("0", 16), ("2", 32)]
    result = tpvprune.prune(model, x.split(4), keep=0.5)
    assert result.report["reached"]
    assert len(result.model[1].weight) == int(result.kept["0"].sum())
    kept = {"0": torch.arange(16) % 3 == 0}
    smaller = tpvprune.remove_channels(model, groups, kept)
    torch.testing.assert_close(smaller[1].weight, model[1].weight[kept["0"]])
    assert len(result.model[3].weight) == 1


# ---- a forward that fixes its precision ---------------------------------------------------------


class FixedNorm(nn.LayerNorm):
    """As in CLIP: float32 whatever comes in."""

    def forward(self, x):
        return super().forward(x.type(torch.float32)).type(x.dtype)


class Normed(nn.Module):
    """``wrong`` mixes its channels up as soon as there are fewer."""

    def __init__(self, *, wrong=False):
        super().__init__()
        self.stem, self.mix, self.wrong = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 8, 1), wrong
        self.norm, self.fc = FixedNorm(8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        if self.wrong and x.shape[1] != 32:
            x = x.roll(1, 1)
        return self.fc(self.norm(self.mix(x).flatten(2).transpose(1, 2)).mean(1))


def test_what_runs_in_float32_only_is_verified_in_it():
    torch.manual_seed(0)
    found = tpvprune.find_groups(Normed().eval(), torch.randn(2, 3, 16, 16))
    assert [g.name for g in found] == ["stem", "mix"]


def test_a_wrong_cut_is_seen_in_float32_too():
    torch.manual_seed(0)
    found = tpvprune.find_groups(Normed(wrong=True).eval(), torch.randn(2, 3, 16, 16))
    assert [g.name for g in found] == ["mix"]
    assert any("differ by" in g.blocked and "float32" in g.blocked for g in found.blocked)


# ---- tables of positions ------------------------------------------------------------------------


class Attention(nn.Module):
    """A table of positions in two parts, one of them resized, read by an index (as in BEiT)."""

    def __init__(self, side=2, heads=4, width=32):
        super().__init__()
        self.side, self.heads, self.rows = side, heads, (2 * side - 1) ** 2 + 3
        self.stem, self.fc = nn.Conv2d(3, width, 8, 8), nn.Linear(width, 5)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(self.rows, heads))

    def bias(self):
        num, r = self.side**2 + 1, 2 * self.side - 1
        grid = self.table[: self.rows - 3].reshape(1, r, r, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(r, r), mode="bilinear").permute(0, 2, 3, 1)
        table = torch.cat([grid.reshape(r * r, -1), self.table[self.rows - 3 :]])
        index = torch.arange(num * num).view(num, num) % (r * r)
        index[0, :], index[:, 0], index[0, 0] = r * r, r * r + 1, r * r + 2
        return table[index.view(-1)].view(num, num, -1).permute(2, 0, 1)[None]

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :1], x], 1)
        num, length, width = x.shape
        qkv = self.qkv(x).view(num, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=self.bias())
        return self.fc(self.out(out.transpose(1, 2).reshape(num, length, width)).mean(1))


def test_a_table_that_varies_over_several_dimensions_ends():
    torch.manual_seed(0)
    groups = tpvprune.find_groups(Attention().eval(), torch.randn(2, 3, 16, 16))
    assert len(groups) >= 1


# ---- what is not followed is counted ------------------------------------------------------------


class Recognizer(nn.Module):
    """Convolutions, and a recurrent layer or attention of torch's own on their columns."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        if kind == "attention":
            self.mix = nn.MultiheadAttention(16, 4, batch_first=True)
        else:
            self.mix = getattr(nn, kind)(16, 16, batch_first=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.wide(self.conv(x).relu()).mean(2).transpose(1, 2)
        x = self.mix(x, x, x)[0] if isinstance(self.mix, nn.MultiheadAttention) else self.mix(x)[0]
        return self.fc(x.mean(1))


@pytest.mark.parametrize("kind", ["attention", "LSTM", "GRU"])
def test_macs_are_those_of_an_independent_counter(kind):
    torch.manual_seed(0)
    model, x = Recognizer(kind).eval(), torch.randn(24, 3, 12, 12)
    groups = tpvprune.find_groups(model, x[:2])
    assert groups.macs() == pytest.approx(tpvprune.count_macs(model, x[:2]), rel=0.01)
    (note,) = groups.notes if kind == "attention" else [""]
    assert kind != "attention" or "not followed" in note
    result = tpvprune.prune(model, x.split(6), keep=0.7)
    real = tpvprune.count_macs(result.model, x[:2]) / tpvprune.count_macs(model, x[:2])
    assert result.report["reached"] == (real <= 0.7)
    assert result.report["pruned"]["macs"] == pytest.approx(
        tpvprune.count_macs(result.model, x[:2]), rel=0.01
    )
    # Attention was taken apart: all of it is followed.
    assert note not in result.report["warnings"]


def test_followed_networks_have_no_note():
    model = small(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3))
    assert not tpvprune.find_groups(model, torch.randn(2, 3, 12, 12)).notes


def test_parameters_among_the_arguments_of_a_block_can_be_counted():
    """As in CaiT, whose class token is one: hooks of torch's counter fell over it."""

    class Block(nn.Linear):
        def forward(self, token, x):
            return super().forward(token + x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.block = nn.Parameter(torch.zeros(1, 6)), Block(6, 4)

        def forward(self, x):
            return self.block(self.token, x)

    assert tpvprune.count_macs(Model(), torch.randn(2, 6)) == 24


# ---- what runs in training mode only ------------------------------------------------------------


class Supervised(nn.Module):
    """An auxiliary head reads the middle in training mode."""

    def __init__(self, *, breaks=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)
        self.last, self.fc, self.breaks = nn.Conv2d(24, 32, 3), nn.Linear(32, 5), breaks
        self.aux_conv, self.aux_norm = nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8)
        self.aux_fc = nn.Linear(8, 5)

    def forward(self, x):
        middle = self.second(self.first(x).relu()).relu()
        out = self.fc(self.last(middle).relu().mean((2, 3)))
        if not self.training:
            return out
        if self.breaks:
            raise RuntimeError("no labels given")
        return out, self.aux_fc(self.aux_norm(self.aux_conv(middle)).mean((2, 3)))


def test_channels_that_an_auxiliary_head_reads_stay_and_the_model_trains():
    torch.manual_seed(0)
    model, x = Supervised().eval(), torch.randn(32, 3, 12, 12)
    state = torch.get_rng_state()
    groups = tpvprune.find_groups(model, x[:1])
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert model.aux_norm.num_batches_tracked == 0
    assert [g.name for g in groups] == ["first", "last"]
    reasons = {g.name: g.blocked for g in groups.blocked}
    assert reasons["second"] == "is read by aux_conv, which runs in training mode only"
    result = tpvprune.prune(model, x.split(8), keep=0.6)
    sum(out.sum() for out in result.model.train()(x)).backward()
    tpvprune.distill(result.model.eval(), model, x.split(8), epochs=1)


def test_a_training_mode_that_cannot_run_is_said():
    groups = tpvprune.find_groups(Supervised(breaks=True).eval(), torch.randn(2, 3, 12, 12))
    assert [g.name for g in groups] == ["first", "second", "last"]
    (note,) = groups.notes
    assert "RuntimeError: no labels given" in note


# ---- tables that a network remembers ------------------------------------------------------------


class Remembering(nn.Module):
    """It gathers its table once (as LeViT does), and keeps a shape (as ultralytics' heads do)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)
        self.slopes, self.kept, self.seen = nn.Parameter(torch.rand(16)), {}, None

    def forward(self, x):
        if self.training or "cpu" not in self.kept:
            self.kept["cpu"] = self.slopes * 2
        h = self.a(x).relu()
        self.seen = h.shape
        return self.b(h * self.kept["cpu"])


def test_what_a_network_remembers_of_an_earlier_forward_changes_nothing(tmp_path):
    torch.manual_seed(0)
    model, x = Remembering().eval(), torch.randn(24, 6)
    before = tpvprune.find_groups(model, x)
    with torch.no_grad():
        model(x)
    held = model.kept["cpu"]
    after = tpvprune.find_groups(model, x)
    assert [g.name for g in after] == [g.name for g in before] == ["a"]
    assert model.kept["cpu"] is held
    result = tpvprune.prune(model, x.split(8), keep=0.5)
    assert result.reached
    tpvprune.save_pruned(result, tmp_path / "small", dense=model)
    loaded = tpvprune.load_pruned(tmp_path / "small", model=model)
    assert torch.equal(loaded(x), result.model(x))


# ---- what lends its type alone ------------------------------------------------------------------


class Lending(nn.Module):
    """Its grid has the type of feature maps of another shape (as anchors of detectors have)."""

    def __init__(self, cast):
        super().__init__()
        self.a, self.b, self.cast = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), cast
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.a(x).relu()
        grid = self.cast(torch.arange(10), h)
        return self.head((self.b(h) * grid).relu().mean((2, 3)))


@pytest.mark.parametrize("cast", [torch.Tensor.type_as, torch.Tensor.to], ids=["type_as", "to"])
def test_a_tensor_that_lends_its_type_is_not_combined_with(cast):
    torch.manual_seed(0)
    found = tpvprune.find_groups(Lending(cast).eval(), torch.randn(2, 3, 14, 14))
    assert [g.name for g in found] == ["a", "b"]
