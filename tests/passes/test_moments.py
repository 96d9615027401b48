"""Moments that come in parts: those of all rows, however far the mean and however coarse the type.

The oracle is the covariance of the same numbers in float64, centred first.
"""

import copy

import pytest
import torch
from cases import Chain, build, images
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tpvprune
from tpvprune.passes.moments import Moments
from tpvprune.passes.running import takes_channels_last
from tpvprune.repairs.batchnorm import rebase_batchnorm
from tpvprune.scores.baselines.activations import activation_variance_scores
from tpvprune.scores.residuals import folded_covariances, merged

# Of products in float32 (64 rows and more are summed in it); float64 has nearly all digits.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def rows_with(offset, dtype, num=96, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(num, size, generator=generator) @ torch.randn(
        size, size, generator=generator
    )
    return (mixed.double() + offset).to(dtype)


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_covariance_is_that_of_the_numbers_as_they_are(dtype, offset):
    rows = rows_with(offset, dtype)
    expected = torch.cov(rows.double().T, correction=0)
    joint, single = Moments(6, joint=True), Moments(6)
    for part in rows.split(40):
        joint.add(part)
        single.add(part)
    for count, mean, spread in (joint.over_processes(), single.over_processes()):
        assert count == len(rows)
        assert spread.dtype == torch.float64
        assert float((mean - rows.double().mean(0)).norm()) <= TOLERANCE[dtype] / 10
        wanted = expected if spread.ndim == 2 else expected.diagonal()
        assert gap(spread, wanted) <= TOLERANCE[dtype]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    exponent=st.integers(-3, 7),
    ordered=st.booleans(),
)
def test_parts_give_the_moments_of_the_whole_and_nothing_is_negative(sizes, exponent, ordered):
    rows = rows_with(10.0**exponent, torch.float32, num=sum(sizes))
    rows = rows.sort(0).values if ordered else rows
    whole, parts = Moments(6, joint=True), Moments(6, joint=True)
    whole.add(rows)
    for part in rows.split(sizes):
        parts.add(part)
    _, mean, covariance = parts.over_processes()
    assert torch.allclose(mean, whole.mean, rtol=1e-6, atol=1e-6)
    scale = whole.spread.norm() / len(rows)
    assert (covariance - whole.spread / len(rows)).norm() <= 1e-5 * scale
    assert bool((covariance.diagonal() >= 0).all())
    # Positive semidefinite to the rounding of products in float32.
    assert torch.linalg.eigvalsh(covariance)[0] >= -1e-5 * covariance.diagonal().sum()


@pytest.mark.parametrize("joint", [True, False])
def test_no_rows_at_all_are_no_moments(joint):
    moments = Moments(3, joint=joint)
    moments.add(torch.empty(0, 3))
    count, mean, spread = moments.over_processes()
    assert count == 0
    assert bool(mean.isnan().all())
    assert bool(spread.isnan().all())


# ---- where they are used --------------------------------------------------------------------


class Far(nn.Module):
    """A layer whose inputs are far from zero: what is read is the image plus an offset."""

    def __init__(self, offset):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.offset = offset
        self.read = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 3)
        with torch.no_grad():  # it sees how the inputs differ
            self.read.weight -= self.read.weight.mean(1, keepdim=True)

    def forward(self, x):
        return self.fc(self.read(self.stem(x) + self.offset).tanh().mean((2, 3)))


@pytest.mark.parametrize("split", [4, 24])
@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.bfloat16, 10.0), (torch.float16, 10.0), (torch.float32, 1e4)]
)
def test_covariances_of_inputs_far_from_zero(dtype, offset, split):
    torch.manual_seed(0)
    model = Far(offset).to(dtype).eval()
    x = images(24).to(dtype)
    groups = tpvprune.find_groups(model, x[:2], verify=False)
    takes_channels_last(model, x)  # asks the model once
    read = []
    hook = model.read.register_forward_pre_hook(lambda _, args: read.append(args[0].double()))
    _, *folds = folded_covariances(model, groups, list(x.split(split)))
    found = merged(*folds)
    hook.remove()
    rows = torch.cat(read).movedim(1, -1).reshape(-1, 6)
    mean, covariance = found[groups["stem"].readers[0].call]
    assert float((mean - rows.mean(0)).norm()) <= 1e-6 * offset
    assert gap(covariance, torch.cov(rows.T, correction=0)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_and_curves_of_inputs_far_from_zero_are_those_in_double_precision(dtype):
    offset = 8.0 if dtype == torch.bfloat16 else 1e3
    torch.manual_seed(0)
    model = Far(offset).to(dtype).eval()
    x = list(images(64).to(dtype).split(16))
    exact, there = copy.deepcopy(model).double(), [b.double() for b in x]
    groups = tpvprune.find_groups(exact, there[0][:2])
    # The activations themselves are rounded: to 2^-9 of 8, beside deviations of about 1.
    for score in (tpvprune.tpv_scores, curves_of):
        found, wanted = score(model, groups, x), score(exact, groups, there)
        for name in wanted:
            assert gap(found[name], wanted[name]) <= 0.1


def curves_of(model, groups, batches):
    curves = tpvprune.variance_curves(model, groups, batches)
    return {name: curve.variance for name, curve in curves.items()}


@torch.no_grad()
def far_from_zero(dtype):
    """Return a chain whose first BatchNorm reads numbers around 1e6 times their deviation."""
    model = build("chain").to(dtype)
    model.conv1.bias = nn.Parameter(torch.full((5,), 1e6 if dtype == torch.float64 else 1e3))
    return model.to(dtype)


def variances(model, batches):
    seen = []
    hook = model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for x in batches:
            model(x)
    hook.remove()
    return torch.cat(seen).var((0, 2, 3), correction=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_of_batchnorm_far_from_zero(dtype):
    model, x = far_from_zero(dtype), list(images(24).to(dtype).split(8))
    expected = variances(model, x)
    recalibrated = tpvprune.recalibrate_batchnorm(model, x)
    # A float32 activation at 1e3 is itself rounded to 6e-5; both read the same ones.
    assert gap(recalibrated.bn1.running_var.double(), expected) <= 1e-6
    rebase_batchnorm(model, x)
    assert gap(model.bn1.running_var.double(), expected) <= 1e-6


def test_activation_variance_far_from_zero():
    torch.manual_seed(0)
    model = Far(1e6).double().eval()
    x = list(images(24).split(8))
    groups = tpvprune.find_groups(model, x[0][:2], verify=False)
    found = activation_variance_scores(model, groups, x)["stem"]
    expected = torch.cat([model.stem(b) for b in x]).detach().var((0, 2, 3), correction=0)
    assert gap(found, expected) <= 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_pruned_and_repaired(dtype):
    torch.manual_seed(0)
    model = Chain(12).to(dtype).eval()
    x = list(images(64).to(dtype).split(16))
    result = tpvprune.prune(model, x, keep=0.5)
    variance = result.report["output_variance"]["compensate"]
    bare = tpvprune.prune(model, x, keep=0.5, repair="none", planned_repair="compensate")
    assert variance < bare.report["output_variance"]["none"]
