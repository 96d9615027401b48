"""Fits through an activation: never behind the linear one on rows of their own, mostly ahead."""

import functools

import pytest
import torch
from cases import Residual, build, images
from torch import nn
from torch.nn import functional as F

from tpvprune import compensate_weights, find_groups, remove_channels
from tpvprune.repairs.activation_fit import ActivationFit, rows_to_hold
from tpvprune.repairs.branches import Plan
from tpvprune.repairs.least_squares import Fit, LeastSquares
from tpvprune.repairs.targets import dense_targets

FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "relu in place": functools.partial(F.relu, inplace=True),
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}
NUM = 2000


class Problem:
    """Half of the inputs of a random layer are seen; what it should give is that of all.

    ``share``: the moments of the linear fit serve the one through the activation, too.
    """

    def __init__(self, phi, *, seed=0, groups=1, slope=1.0, few=NUM, free=True, share=False):
        generator = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.free, self.share = free, share
        self.phi, self.slope = phi, slope * (1 + draw(groups, 1, 5).abs())
        x = draw(groups, NUM + few, 12) @ draw(groups, 12, 12) / 3 + 1
        weight, shift = draw(groups, 12, 5) / 3, draw(groups, 1, 5) - 1
        self.wanted = self.slope * (x @ weight) + shift
        self.x, self.weight = x[..., :6], weight[:, :6]
        self.present = self.slope * (self.x @ self.weight) + shift
        self.is_held = torch.arange(few) % 4 == 3

    def fits(self):
        """Return the linear fit, and the one through the activation."""
        rows = [t[:, NUM:] for t in (self.x, self.present, self.wanted)]
        linear = LeastSquares(free=self.free)
        through = ActivationFit(self.phi, self.slope, free=self.free)
        for held in (False, True):
            own = [t[:, self.is_held == held] for t in rows]
            linear.add(own[0], (own[2] - own[1]) / self.slope, held=held)
            for part in (slice(0, 100), slice(100, None)):
                through.add(*(t[:, part].clone() for t in own), held=held)
        found = linear.solve()
        return found, through.improved(found, known=linear.folds() if self.share else None)

    def error(self, fit):
        """Return E ||phi(z) - phi(z*)||^2 on rows that took no part."""
        x, present, wanted = (t[:, :NUM] for t in (self.x, self.present, self.wanted))
        now = present + self.slope * (x @ fit.change + fit.intercept)
        error = self.phi(now.clone()) - self.phi(wanted.clone())
        return float(error.square().sum(2).mean())


# ---- the fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("groups", [1, 3])
def test_less_error_behind_the_activation_on_other_rows(name, groups):
    errors = []
    for seed in range(4):
        problem = Problem(FUNCTIONS[name], seed=seed, groups=groups)
        errors.append([problem.error(fit) for fit in problem.fits()])
    linear, through = torch.tensor(errors).mean(0)
    assert through < (0.999 if name == "sigmoid" else 0.99) * linear


def test_an_identity_leaves_the_linear_fit():
    problem = Problem(lambda z: z)
    linear, through = problem.fits()
    torch.testing.assert_close(through.change, linear.change, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(through.intercept, linear.intercept, rtol=1e-6, atol=1e-9)


def test_few_rows_are_not_overfitted():
    """With hardly more rows than unknowns no change at all is among the candidates."""
    for seed in range(5):
        problem = Problem(F.relu, seed=seed, few=16)
        zero = Fit(torch.zeros(1, 6, 5).double(), torch.zeros(1, 1, 5).double(), 1.0)
        assert problem.error(problem.fits()[1]) < 1.2 * problem.error(zero)


def test_an_output_that_is_scaled_to_nothing_stays():
    problem = Problem(F.relu)
    problem.slope[..., 2] = 0
    change = problem.fits()[1].change
    assert change.isfinite().all()
    assert not change[..., 2].any()


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_moments_of_the_linear_fit_serve_this_one(free, groups):
    for seed in range(3):
        alone, shared = (
            Problem(F.relu, seed=seed, groups=groups, free=free, share=share)
            for share in (False, True)
        )
        for problem in (alone, shared):  # small enough to count as none, large enough to divide by
            problem.slope[..., 2] = 1e-9
        found, expected = shared.fits()[1], alone.fits()[1]
        torch.testing.assert_close(found.change, expected.change, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.intercept, expected.intercept, rtol=1e-6, atol=1e-9)
        assert not found.change[..., 2].any()


def test_a_ridge_that_is_given_is_kept():
    problem = Problem(F.relu)
    fit = Fit(torch.zeros(1, 6, 5).double(), torch.zeros(1, 1, 5).double(), 0.3)
    rows = [t[:, NUM:] for t in (problem.x, problem.present, problem.wanted)]
    through = ActivationFit(problem.phi, problem.slope, free=True)
    for held in (False, True):
        through.add(*(t[:, problem.is_held == held] for t in rows), held=held)
    assert through.improved(fit, given=True).ridge == 0.3


def test_rows_to_hold_are_bounded():
    assert rows_to_hold(10_000, 1, 64, 64) == 10_000
    assert 0 < rows_to_hold(10**7, 1, 64, 64) < 10**6
    assert rows_to_hold(200, 1, 64, 64) == 0  # too few
    assert rows_to_hold(10**6, 1, 25_088, 4096) == 0  # as of VGG: would take minutes


# ---- what reads a layer -----------------------------------------------------------------------


class Read(nn.Module):
    """A convolution, and something that reads it."""

    def __init__(self, read, *, norm=False, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.read = read
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.read(self.norm(self.conv(x))).mean((2, 3)))


READ = {
    "relu": (F.relu, True),
    "module in place": (nn.ReLU6(inplace=True), True),
    "dropout": (lambda z: F.gelu(F.dropout(z, 0.5, False)), True),
    "leaky": (lambda z: F.leaky_relu(z, 0.3), True),
    "clamp": (lambda z: z.clamp(-1, 1), True),
    "sum": (lambda z: F.relu(z + torch.ones(6, 8, 8, 8).double()[: len(z)]), True),
    "sum in place": (lambda z: z.add_(torch.ones(6, 8, 8, 8).double()[: len(z)]).relu(), True),
    "twice the same": (lambda z: F.relu(z) + F.relu_(z), True),
    "two activations": (lambda z: F.relu(z) + F.relu6(z), False),
    "by keyword": (lambda z: torch.relu(input=z), False),
    "two readers": (lambda z: z * torch.sigmoid(z), False),
    "read again": (lambda z: F.relu(z) + z.mean(), False),
    "a view": (lambda z: F.relu(z.flatten(2)).unflatten(2, (8, 8)), False),
    "pool": (lambda z: F.relu(F.max_pool2d(z, 2)), False),
    "channels": (nn.PReLU(8).double(), False),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("case", READ)
def test_activations_are_found_where_nothing_else_reads(case, norm):
    read, is_found = READ[case]
    model = Read(read, norm=norm).eval().double()
    x = images(6)
    found = dense_targets(model, x.split(3), Plan(6, 12, 100, 0)).activations
    assert set(found) == ({0} if is_found else set())
    if is_found and case not in {"sum", "sum in place", "twice the same"}:
        z = torch.linspace(-9, 9, 50).double()
        expected = read(z.clone())
        torch.testing.assert_close(found[0](z), expected)


# ---- whole networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["chain", Residual])
def test_layers_give_what_the_activation_lets_through(case):
    """Behind every activation there is less error than with the linear fits, on other images."""
    gains = []
    for seed in range(3):
        torch.manual_seed(seed)
        dense = build(case)
        groups = find_groups(dense, images(2))
        generator = torch.Generator().manual_seed(seed)
        kept = {}
        for g in groups:
            mask = torch.rand(g.num_channels, generator=generator) < 0.5
            mask[0] = True
            kept[g.name] = mask
        pruned = remove_channels(dense, groups, kept)
        data, other = images(400, seed=1).split(50), images(200, seed=2)
        errors = []
        for nonlinear in (False, True):
            repaired = compensate_weights(
                pruned, dense, data, groups=groups, kept=kept, nonlinear=nonlinear
            )
            with torch.no_grad():
                errors.append(float((repaired(other) - dense(other)).square().sum(1).mean()))
        gains.append(errors[1] / errors[0])
    assert sum(gains) / len(gains) < 1.0
