"""Inputs that hardly vary beside their mean, and numbers that are none: every loop ends."""

import math

import pytest
import torch
from cases import batches, build, images
from torch import nn

import tpvprune
from tpvprune.passes.finite import NotFiniteError
from tpvprune.scores.curves import _eliminate
from tpvprune.scores.residuals import folded_covariances, merged


class Squeezed(nn.Module):
    """Channels that are near 1.7, and a gate that reads their means over the map."""

    def __init__(self, seed, width=128):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, width, 1)
        self.reduce, self.expand = nn.Conv2d(width, 16, 1), nn.Conv2d(16, width, 1)
        self.project, self.fc = nn.Conv2d(width, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        h = self.stem(x).sigmoid() + 1
        gate = self.expand(self.reduce(h.mean((2, 3), keepdim=True)).tanh())
        return self.fc(self.project(h * gate).sigmoid().mean((2, 3)))


def near_ones(noise, seed):
    generator = torch.Generator().manual_seed(seed)
    return list((1 + noise * torch.randn(12, 3, 16, 16, generator=generator)).split(4))


# Of a hundred, some that never ended.
@pytest.mark.filterwarnings("ignore:the covariance of")
@pytest.mark.parametrize(("noise", "seed"), [(1e-3, 4), (1e-4, 0), (1e-5, 3), (1e-6, 0), (0.0, 0)])
def test_inputs_that_hardly_vary_are_pruned(noise, seed):
    model, x = Squeezed(seed).eval(), near_ones(noise, seed)
    groups = tpvprune.find_groups(model, x[0][:2])
    for _, covariance in merged(*folded_covariances(model, groups, x)[1:]).values():
        assert bool((covariance.diagonal() >= 0).all())
    result = tpvprune.prune(model, x, keep=0.5)
    assert result.report["reached"]
    assert result.model(x[0]).isfinite().all()


class Cut:
    """Stands in for a cut whose numbers are no longer finite."""

    def __init__(self, values, joint):
        self.s = torch.zeros(3, 4, 1)
        self.values, self.joint, self.asked = values, joint, 0

    def changes(self, num):
        self.asked += 1
        assert self.asked <= num, "no progress"
        return torch.tensor(self.values)[:, None].expand(num, 4)

    def remove(self, channels):
        return torch.full((4,), self.joint)


@pytest.mark.parametrize(
    "values", [[math.inf] * 4, [math.nan] * 4, [1.0, math.inf, math.nan, -math.inf], [1e30] * 4]
)
def test_an_elimination_ranks_what_is_left_and_ends(values):
    group = tpvprune.find_groups(build("grouped"), images(2), verify=False)
    group = next(g for g in group if g.num_channels == 4)
    curve = _eliminate(group, [Cut(values, 1.0)], torch.ones(4))
    assert sorted(curve.order.tolist()) == [0, 1, 2, 3]
    assert curve.variance.isfinite().all()
    with pytest.raises(NotFiniteError, match=r"expected a finite curve, found nan .* raise ridge"):
        _eliminate(group, [Cut(values, math.nan)], torch.ones(4))


def test_constant_inputs_are_no_reason_to_stop():
    x = [torch.ones_like(b) for b in batches()]
    result = tpvprune.prune(build("residual"), x, keep=0.6)
    assert result.model(x[0]).isfinite().all()
