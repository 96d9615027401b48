"""Brute-force ablation and rank correlation against slower, independent computations."""

import copy
from contextlib import nullcontext

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from tpvprune.diagnostics import ablation_scores, spearman
from tpvprune.groups import find_groups


class Net(nn.Module):
    """A stem, a residual block and in-place activations on a convolution's output."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 5, 3, padding=1)
        self.b = nn.Conv2d(5, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * 4, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        y = self.b(self.a(x).relu_())
        x = F.relu(x + self.bn(y), inplace=True)
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.fc(self.hidden(x).relu_())


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64) for n in (4, 3)]


@pytest.fixture
def groups(net, images):
    found = find_groups(net, images[0])
    assert len(found) == 3
    return found


def change_without(model, group, channel, x):
    """Return ‖Δf‖² per sample with the columns that read a channel set to zero."""
    cut = copy.deepcopy(model)
    state = cut.state_dict()
    for part in group.slices:
        if part.side == "consumer":
            state[part.param].index_fill_(part.dim, part.index[part.channel == channel], 0)
    with torch.no_grad():
        return (cut(x) - model(x)).square().sum(1)


def test_ablation_is_the_change_by_zeroed_columns(net, groups, images):
    x = torch.cat(images)
    scores = ablation_scores(net, groups, images)
    for group in groups:
        for channel in range(group.num_channels):
            change = change_without(net, group, channel, x)
            torch.testing.assert_close(scores[group.name][channel], change.mean())
            torch.testing.assert_close(
                scores.stderr[group.name][channel], change.std() / len(x) ** 0.5
            )
    assert scores.num_samples == 7
    assert not scores.used_labels


def test_ablation_measures_a_seeded_choice_of_channels(net, groups, images):
    full = ablation_scores(net, groups, images)
    some = ablation_scores(net, groups, images, max_channels=2, seed=3)
    again = ablation_scores(net, groups, images, max_channels=2, seed=3)
    for group in groups:
        measured = ~some[group.name].isnan()
        assert measured.sum() == 2
        assert torch.equal(some[group.name][measured], full[group.name][measured])
        assert torch.equal(measured, ~again[group.name].isnan())


def test_ablation_of_a_dead_channel_is_zero(net, groups, images):
    with torch.no_grad():
        net.fc.weight[:, 2] = 0
    scores = ablation_scores(net, groups, images)
    assert scores["hidden"][2] == 0
    assert (scores["hidden"] > 0).sum() >= 4


def test_ablation_drops_labels_and_ignores_the_split(net, groups, images):
    labelled = [(x, object()) for x in torch.cat(images).split(2)]
    a = ablation_scores(net, groups, labelled)
    b = ablation_scores(net, groups, images)
    for group in groups:
        torch.testing.assert_close(a[group.name], b[group.name])


def test_ablation_refuses_zero_channels(net, groups, images):
    with pytest.raises(ValueError, match="max_channels: expected at least 1"):
        ablation_scores(net, groups, images, max_channels=0)


@pytest.mark.parametrize("breaks", [False, True])
def test_ablation_leaves_the_model_as_it_was(net, groups, images, breaks, untouched):
    net.train()
    net.stem.eval()
    net.a.weight.requires_grad_(False)
    if breaks:
        net.fc = nn.Linear(99, 3).double()
    raised = pytest.raises(RuntimeError) if breaks else nullcontext()
    with untouched(net), raised:
        ablation_scores(net, groups, images)


@pytest.mark.parametrize("high", [3, 1000])  # many ties, hardly any
def test_spearman_agrees_with_scipy(high):
    generator = torch.Generator().manual_seed(high)
    a, b = torch.randint(high, (2, 40), generator=generator).double()
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_spearman_sees_order_only():
    a = torch.tensor([0.1, 5.0, 2.0, torch.inf])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)


def test_spearman_skips_what_was_not_measured():
    a = torch.tensor([1.0, 2.0, torch.nan, 3.0])
    b = torch.tensor([1.0, 2.0, 0.0, 3.0])
    assert spearman(a, b) == pytest.approx(1)
    assert spearman(b, b.flip(0), torch.tensor([True, True, False, False])) == pytest.approx(-1)


def test_spearman_refuses_vectors_of_two_lengths():
    with pytest.raises(ValueError, match="one length"):
        spearman(torch.ones(3), torch.ones(4))
