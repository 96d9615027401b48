"""Compensation uses every image, in any memory and in any chunks, and holds on other images."""

import copy

import pytest
import torch
from cases import CASES, NUM_CLASSES, batches, build, images
from test_compensation import cut_everywhere
from torch import nn
from torch.nn import functional as F

from tpvprune import compensate_weights, find_groups, remove_channels
from tpvprune.groups.removal import restore_empty
from tpvprune.passes.evaluation import output_variance
from tpvprune.repairs import compensation, walk

# Sums of float64 in another order; a solution amplifies it by its condition, <= 1 / ridge.
ROUNDING = {"rtol": 1e-7, "atol": 1e-9}


def conv_block(inputs, outputs, *, inplace=True):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=inplace),
    )


class UNet(nn.Module):
    """Down, and up again beside what was there: blocks whose outputs are read much later."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([conv_block(3, 4), conv_block(4, 5), conv_block(5, 6)])
        self.up = nn.ModuleList([conv_block(6 + 5, 4), conv_block(4 + 4, 4)])
        self.head = nn.Conv2d(4, NUM_CLASSES, 1)

    def forward(self, x):
        seen = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            seen.append(x)
        for block, beside in zip(self.up, seen[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), beside], 1))
        return self.head(x).mean((2, 3))


class Rectified(nn.Module):
    """Residual blocks that overwrite what comes in, before the shortcut reads it."""

    class Block(nn.Module):
        def __init__(self, width, *, inplace):
            super().__init__()
            self.conv1 = nn.Conv2d(5, width, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, 5, 3, padding=1)
            self.inplace = inplace

        def forward(self, x):
            y = F.leaky_relu(x, 0.3, inplace=self.inplace)  # twice is not once
            y = F.relu(self.bn(self.conv1(y)), inplace=self.inplace)
            y = self.conv2(y)
            return y.add_(x) if self.inplace else y + F.leaky_relu(x, 0.3)

    def __init__(self, inplace=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.blocks = nn.Sequential(*[self.Block(w, inplace=inplace) for w in (4, 6)])
        self.fc = nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        return self.fc(F.relu(self.blocks(self.stem(x))).mean((2, 3)))


class ReadAgain(nn.Module):
    """A block overwrites its input, which the network reads again behind it."""

    class Block(nn.Module):
        def __init__(self, *, inplace):
            super().__init__()
            self.conv1 = nn.Conv2d(5, 6, 3, padding=1)
            self.conv2 = nn.Conv2d(6, 4, 1)
            self.inplace = inplace

        def forward(self, x):
            x = F.leaky_relu(x, 0.3, inplace=self.inplace)
            return self.conv2(F.relu(self.conv1(x)))

    def __init__(self, inplace=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.blocks = nn.ModuleList([self.Block(inplace=inplace)])
        self.beside = nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(4, NUM_CLASSES)
        self.inplace = inplace

    def forward(self, x):
        x = self.stem(x)
        y = self.blocks[0](x)
        x = x if self.inplace else F.leaky_relu(x, 0.3)
        return self.fc((y + self.beside(x)).mean((2, 3)))


class Shared(nn.Module):
    """One layer runs twice, another owns the weight of a third."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 6, 1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.right.weight = self.left.weight
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.outer(F.relu(self.inner(x))))
        x = self.twice(F.relu(self.twice(x)))
        return self.fc(F.relu(self.right(F.relu(self.left(x)))).mean((2, 3)))


NETS = {**CASES, "unet": UNet, "rectified": Rectified, "read_again": ReadAgain}


def made(net):
    """Return (dense, pruned, groups, kept)."""
    dense = build(NETS.get(net, net) if isinstance(net, str) else net)
    return dense, *cut_everywhere(dense)


def repaired(dense, pruned, groups, kept, *, num=26, data=None, **options):
    options = {"ridge": 1e-2, "rows_per_input": 4, "min_rows": 60, **options}
    data = batches(num, 10) if data is None else data
    return compensate_weights(pruned, dense, data, groups=groups, kept=kept, **options)


def assert_same(a, b, **tolerance):
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], tensor, **tolerance, msg=name)


def differ(a, b, least=1e-6):
    """Return the names of what is not the same."""
    other = b.state_dict()
    return {n for n, t in a.state_dict().items() if (t - other[n]).abs().max() > least}


# ---- memory and chunks ----------------------------------------------------------------------


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_less_memory_gives_the_same_weights(net, nonlinear, monkeypatch):
    monkeypatch.setattr(compensation, "chunk_size", lambda *_: 10)
    dense, pruned, groups, kept = made(net)
    again = []
    init = walk._AgainError.__init__
    monkeypatch.setattr(
        walk._AgainError, "__init__", lambda e, call: (again.append(call), init(e, call))[0]
    )
    plenty = repaired(dense, pruned, groups, kept, max_bytes=1 << 30, nonlinear=nonlinear)
    assert not again
    none = repaired(dense, pruned, groups, kept, max_bytes=0, nonlinear=nonlinear)
    # Every chunk has left at every layer, but for those before the first that sees a change.
    first = compensation._first_changed(groups, kept)
    assert len(again) == 3 * len(set(again))
    assert min(again) >= first
    assert len(set(again)) >= 3 - first
    assert_same(plenty, none, **ROUNDING)
    # Through an activation, a layer that gains nothing on images held back stays as it is.
    assert len(differ(pruned, plenty)) >= (2 if nonlinear else 3)


@pytest.mark.parametrize("net", NETS)
def test_layers_before_the_first_cut_need_no_fit(net, monkeypatch):
    dense = build(NETS.get(net, net) if isinstance(net, str) else net)
    groups = find_groups(dense, images(2))
    last = max(groups, key=lambda g: min((r.call for r in g.readers), default=0))
    kept = {last.name: torch.arange(last.num_channels) % 2 == 0}
    kept = restore_empty(groups, kept)
    pruned = remove_channels(dense, groups, kept)
    first = compensation._first_changed(groups, kept)
    some = repaired(dense, pruned, groups, kept, nonlinear=False)
    monkeypatch.setattr(compensation, "_first_changed", lambda *_: 0)
    every = repaired(dense, pruned, groups, kept, nonlinear=False)
    assert first == min(r.call for r in last.readers)
    assert_same(every, some, **ROUNDING)


class Spatial(nn.Module):
    """Attention over positions reads the mean of all channels, before any layer reads them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.where = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        x = self.conv1(x).relu()
        x = x * torch.sigmoid(self.where(x.mean(1, keepdim=True)))
        return self.head(self.conv2(x).mean((2, 3)))


def test_a_layer_that_reads_a_mean_over_channels_is_refitted():
    dense = build(Spatial)
    groups = find_groups(dense, images(2))
    kept = {"conv1": torch.arange(6) % 2 == 0}
    pruned = remove_channels(dense, groups, kept)
    found = repaired(dense, pruned, groups, kept, nonlinear=False)
    assert not torch.equal(found.where.weight, pruned.where.weight)


@pytest.mark.parametrize("net", ["residual", "grouped", "flatten", "attention", "unet"])
def test_chunks_do_not_matter(net, monkeypatch):
    model = made(net)
    fits = []
    for size in (1, 3, 100):
        monkeypatch.setattr(compensation, "chunk_size", lambda *_, size=size: size)
        fits.append(repaired(*model, num=12))
    assert_same(fits[2], fits[0], **ROUNDING)
    assert_same(fits[2], fits[1], **ROUNDING)


@pytest.mark.parametrize("net", [Rectified, ReadAgain])
def test_what_layers_overwrite_does_not_matter(net):
    fits = []
    for inplace in (True, False):
        dense = build(net, inplace)
        fits.append(repaired(dense, *cut_everywhere(dense)))
    assert_same(*fits, **ROUNDING)


@pytest.mark.parametrize("max_bytes", [0, 1 << 30])
@pytest.mark.parametrize("net", [UNet, Rectified, ReadAgain])
def test_nothing_removed_changes_nothing(net, max_bytes):
    dense = build(net)
    groups = find_groups(dense, images(2))
    assert_same(dense, repaired(dense, copy.deepcopy(dense), groups, {}, max_bytes=max_bytes),
                rtol=1e-6, atol=1e-9)  # fmt: skip


# ---- images ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "ridge"), [(1 << 20, None), (0, 1e-2)], ids=["all positions", "one of each"]
)
def test_every_image_matters(rows, ridge, monkeypatch):
    monkeypatch.setattr(compensation, "chunk_size", lambda *_: 4)
    model, x = made("chain"), images(13)
    options = {"ridge": ridge, "rows_per_input": 0, "min_rows": rows}
    fit = repaired(*model, data=[x], **options)
    for i, other in enumerate(images(13, seed=3)):
        changed = x.clone()
        changed[i] = other
        found = differ(fit, repaired(*model, data=[changed], **options))
        assert {"conv2.weight", "fc.weight"} <= found
    assert not differ(fit, repaired(*model, data=x.split([5, 8]), **options), 1e-9)


# ---- layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [0, 1 << 30])
def test_layers_that_run_twice_stay_as_they_are(max_bytes):
    dense = build(Shared)
    groups = find_groups(dense, images(2))
    inner = next(g for g in groups if g.num_channels == 5)
    kept = {inner.name: torch.arange(5) < 2}
    pruned = remove_channels(dense, groups, kept)
    fit = repaired(dense, pruned, groups, kept, max_bytes=max_bytes)
    found = differ(pruned, fit)
    assert found.isdisjoint({"twice.weight", "twice.bias", "left.weight", "right.weight"})
    assert "outer.weight" in found
    assert "fc.weight" in found  # behind them


# ---- other images ---------------------------------------------------------------------------


class Rows(nn.Module):
    """One row an image: with few images a layer has fewer rows than inputs."""

    def __init__(self, width=64):
        super().__init__()
        self.fc0 = nn.Linear(192, width)
        self.fc1 = nn.Linear(width, 16)
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        return self.fc(F.relu(self.fc1(F.relu(self.fc0(x.flatten(1))))))


def noise(num, seed):
    """Return images whose features tell little of each other: there is little to learn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, 8, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num", [16, 32, 48])
def test_few_images_do_not_make_it_worse_on_others(num):
    dense = build(Rows)
    groups = find_groups(dense, images(2))
    kept = {next(iter(groups)).name: torch.arange(64) < 32}
    pruned = remove_channels(dense, groups, kept)
    others, fit = [noise(400, 5)], list(noise(num, 0).split(16))
    unrepaired = output_variance(pruned, dense, others)
    chosen, fixed = (
        output_variance(
            compensate_weights(pruned, dense, fit, groups=groups, kept=kept, ridge=ridge),
            dense,
            others,
        )
        for ridge in (None, 1e-3)
    )
    # The means at least can be learned; a ridge that is not chosen learns the noise besides.
    assert chosen < 0.8 * unrepaired
    assert fixed > 1.1 * unrepaired


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_short_numbers_are_repaired_as_well(dtype):
    dense, pruned, groups, kept = made("chain")
    others = [images(200, seed=5)]
    long = output_variance(repaired(dense, pruned, groups, kept, num=60), dense, others)
    unrepaired = output_variance(pruned, dense, others)
    short = [copy.deepcopy(m).to(dtype) for m in (dense, pruned)]
    data = [x.to(dtype) for x in batches(60, 20)]
    fit = repaired(*short, groups, kept, data=data)
    assert {t.dtype for t in fit.parameters()} == {dtype}
    found = output_variance(fit, short[0], [x.to(dtype) for x in others])
    assert long < 0.5 * unrepaired
    assert found < 1.2 * long  # the weights are rounded to 3 digits


def test_progress_counts_every_layer_once():
    torch.manual_seed(0)
    dense, told = UNet().double().eval(), []
    repaired(dense, *cut_everywhere(dense), progress=lambda *a: told.append(a))
    num = sum(isinstance(m, nn.Conv2d) for m in dense.modules()) - 1  # the first sees no change
    assert told == [("compensation", i, num) for i in range(1, num + 1)]
