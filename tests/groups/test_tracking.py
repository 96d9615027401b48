"""Channels of small networks whose groups are known by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tpvprune.groups import find_groups
from tpvprune.groups.tracing.fields import Atoms
from tpvprune.groups.tracing.sizes import TracedInt, solve
from tpvprune.groups.tracing.tracking import track
from tpvprune.passes.operations import function_name


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.a = nn.Conv2d(6, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.b(F.relu(self.a(x)))
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.mix = nn.Conv2d(10, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x).relu()], 1)
        return self.fc(self.mix(x).relu().mean((2, 3)))


class Split(nn.Module):
    """Res2Net's way: sizes of the pieces are an attribute."""

    def __init__(self):
        super().__init__()
        self.width = 4
        self.a = nn.Conv2d(3, 12, 1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        p, q, r = torch.split(self.a(x).relu(), self.width, 1)
        x = torch.cat([p, self.b(q).relu() + p, r], 1)
        return self.fc(x.mean((2, 3)))


class UnequalSplit(nn.Module):
    def __init__(self):
        super().__init__()
        self.sizes = [3, 7]
        self.a = nn.Conv2d(3, 10, 1)
        self.b = nn.Conv2d(3, 5, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        p, q = self.a(x).relu().split(self.sizes, dim=1)
        return self.fc(torch.cat([self.b(p), q], 1).mean((2, 3)))


class Gated(nn.Module):
    """SwiGLU: the two chunks are multiplied."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 5)

    def forward(self, x):
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.dw = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.se1, self.se2 = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.out = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = self.dw(self.a(x).relu())
        gate = self.se2(self.se1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.out(x * gate).mean((2, 3))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16, 5)

    def forward(self, x):
        return self.fc(F.avg_pool2d(self.a(x).relu(), 2).flatten(1))


class Shared(nn.Module):
    """One layer called twice: its input and output channels are the same stream."""

    def __init__(self):
        super().__init__()
        self.a, self.twice, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.twice(self.a(x).relu()).relu()
        return self.fc(self.twice(x).relu())


class Trunk(nn.Module):
    """Pre-norm transformer: class token, positions, heads, LayerScale, MLP."""

    def __init__(self, fused=True):
        super().__init__()
        self.fused = fused
        self.num_heads, self.head_dim, self.attn_dim = 3, 4, 12
        self.embed = nn.Conv2d(3, 10, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 10))
        self.pos = nn.Parameter(torch.randn(1, 5, 10))
        self.norm1, self.norm2 = nn.LayerNorm(10), nn.LayerNorm(10)
        self.qkv, self.proj = nn.Linear(10, 36), nn.Linear(12, 10)
        self.gamma = nn.Parameter(torch.ones(10))
        self.fc1, self.fc2, self.head = nn.Linear(10, 7), nn.Linear(7, 10), nn.Linear(10, 5)

    def attention(self, x):
        b, n, _ = x.shape
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = (
            qkv.reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        x = x + self.gamma * self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


class PadShortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 5)
        self.pad = Pad(2, 2)

    def forward(self, x):
        x = self.a(x).relu()
        return self.fc((self.pad(x) + self.b(x)).relu().mean((2, 3)))


class Pad(nn.Module):
    def __init__(self, front, back):
        super().__init__()
        self.front, self.back = front, back

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))


class Shuffled(nn.Module):
    """Channels moved into positions, four to a pixel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        return self.b(F.pixel_shuffle(self.a(x).relu(), 2)).mean((2, 3))


IMAGE, TOKENS = (2, 3, 8, 8), (2, 4, 6)
KNOWN = [
    # net, input shape, {group: (channels, unit)}
    (Residual, IMAGE, {"stem": (6, "channel"), "a": (4, "channel")}),
    (Concat, IMAGE, {"a": (4, "channel"), "b": (6, "channel"), "mix": (8, "channel")}),
    (Split, IMAGE, {"a": (4, "channel")}),
    (UnequalSplit, IMAGE, {"a": (10, "channel"), "b": (5, "channel")}),
    (Gated, TOKENS, {"up": (8, "channel")}),
    (Depthwise, IMAGE, {"a": (6, "conv group"), "se1": (3, "channel")}),
    (Flattened, IMAGE, {"a": (4, "channel")}),
    (Shared, TOKENS, {"a": (8, "channel")}),
    (Trunk, IMAGE, {"embed": (10, "channel"), "qkv": (3, "head"), "fc1": (7, "channel")}),
    (Shuffled, IMAGE, {"a": (6, "channel")}),
]


def found(net, shape, **kwargs):
    torch.manual_seed(0)
    return find_groups(net, torch.randn(shape), **kwargs)


@pytest.mark.parametrize(("net", "shape", "known"), KNOWN, ids=[n.__name__ for n, _, _ in KNOWN])
def test_groups_of_small_networks(net, shape, known):
    groups = found(net(), shape)
    assert {g.name: (g.num_channels, g.unit) for g in groups} == known
    reasons = {b.blocked for b in groups.blocked}
    assert reasons == {"is an output of the network"}


def test_padded_shortcut_ties_the_channels_it_carries():
    groups = found(PadShortcut(), IMAGE)
    [group] = groups
    assert group.num_channels == 8  # four that the shortcut carries, four that it pads
    positions = {
        (s.param, s.dim): dict(zip(s.channel.tolist(), s.index.tolist(), strict=True))
        for s in group.slices
    }
    carried = {
        i: positions["a.weight", 0][c]
        for c, i in positions["b.weight", 0].items()
        if c in positions["a.weight", 0]
    }
    assert carried == {2: 0, 3: 1, 4: 2, 5: 3}


def test_unfused_attention_has_the_groups_of_fused_attention():
    fused, unfused = (found(Trunk(f), IMAGE) for f in (True, False))
    assert [(g.name, g.num_channels, g.unit) for g in fused] == [
        (g.name, g.num_channels, g.unit) for g in unfused
    ]


def test_head_owns_its_rows_of_query_key_and_value():
    group = found(Trunk(), IMAGE)["qkv"]
    rows = next(s for s in group.slices if s.param == "qkv.weight" and s.dim == 0)
    owner = dict(zip(rows.index.tolist(), rows.channel.tolist(), strict=True))
    assert [owner[i] for i in range(36)] == [i // 4 for i in range(12)] * 3
    [reader] = group.readers
    assert (reader.module, reader.channel_dim) == ("proj", -1)


def test_normalised_stream_is_recorded():
    groups = found(Trunk(), IMAGE)
    axes = list(groups.norms.values())
    assert [a.size for a in axes] == [10, 10]
    assert all([m[0] for m in a.members] == ["embed"] for a in axes)


def test_size_rules_follow_the_heads():
    net = Trunk()
    groups = found(net, IMAGE)
    kept = {"qkv": torch.tensor([True, False, True])}
    changed = {a.name: v for a, v in solve(groups.sizes, kept, net).items()}
    assert changed == {"num_heads": 2, "attn_dim": 8}


def test_sides_of_slices():
    group = found(Residual(), IMAGE)["stem"]
    sides = {(s.param, s.dim): s.side for s in group.slices}
    assert (
        sides["stem.weight", 0] == sides["bn.running_var", 0] == sides["b.weight", 0] == "producer"
    )
    assert sides["a.weight", 1] == sides["fc.weight", 1] == "consumer"


def test_unknown_operation_pins_with_its_name():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.b(self.a(x).sort(-1).values)

    groups = found(Sorted(), TOKENS)
    assert not len(groups)
    assert "sort" in {b.name: b.blocked for b in groups.blocked}["a"]


def test_tracking_needs_no_gradients_and_keeps_the_mode_stack():
    net = Residual().requires_grad_(False)
    with torch.no_grad():
        tracker = track(net, (torch.randn(IMAGE),))
    assert len(tracker.calls) == 4
    assert type(torch.ones(2).shape[0]) is int


def test_traced_integers_remember_and_compute():
    n = TracedInt(6, 6)
    assert (n // 4, 13 // n, n - 1, 1 - n, n * 2, n % 4) == (1, 2, 5, -5, 12, 2)
    assert isinstance(7 - n, TracedInt)
    assert n / 4 == 1.5
    assert hash(n) == hash(6)


def test_atoms_unite_and_pin():
    atoms = Atoms()
    a = atoms.new(4)
    atoms.unite(a[:2], a[2:], "")
    assert atoms.roots(a).tolist() == [1, 2, 1, 2]
    atoms.unite(a[:1], torch.zeros(1, dtype=torch.long), "because")
    assert atoms.pinned == {1: "because"}


def test_function_names():
    assert function_name(torch.Tensor.__iadd__) == function_name(torch.add) == "add"
    assert function_name(torch.Tensor.relu_) == "relu"
