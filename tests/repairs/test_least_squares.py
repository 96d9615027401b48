"""Ridge least squares in chunks against explicit solutions in float64 on all rows together."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tpvprune.repairs import least_squares
from tpvprune.repairs.least_squares import FIXED_RIDGE, RIDGES, LeastSquares, factorised

EXACT = {"rtol": 1e-9, "atol": 1e-10}
FORMS = pytest.mark.parametrize("few_rows", [False, True], ids=["primal", "dual"])
FREE = pytest.mark.parametrize("free", [True, False], ids=["intercept", "none"])


def problem(groups=2, rows=40, unknowns=6, outputs=3, *, noise=0.5, mean=0.7, seed=0):
    """Return inputs and targets that depend on them, [groups, rows, ...], float64, not centred."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(groups, rows, unknowns) @ draw(groups, unknowns, unknowns) + mean * draw(
        groups, 1, unknowns
    )
    e = x @ draw(groups, unknowns, outputs) + noise * draw(groups, rows, outputs) + mean
    return x, e


def held_of(rows, every=4):
    return torch.arange(rows) % every == every - 1


def explicit(x, e, ridge, *, free):
    """Return (D, b) by the normal equations of every group, float64."""
    x, e = x.double(), e.double()
    changes, intercepts = [], []
    for a, b in zip(x, e, strict=True):
        a_mean, b_mean = a.mean(0, keepdim=True), b.mean(0, keepdim=True)
        if not free:
            a_mean, b_mean = torch.zeros_like(a_mean), torch.zeros_like(b_mean)
        a, b = a - a_mean, b - b_mean  # noqa: PLW2901
        if math.isinf(ridge):
            d = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
        else:
            scale = a.square().sum(0).mean()
            eye = torch.eye(a.shape[1], dtype=torch.float64)
            d = torch.linalg.solve(a.T @ a + ridge * scale * eye, a.T @ b)
        changes.append(d)
        intercepts.append(b_mean - a_mean @ d)
    return torch.stack(changes), torch.stack(intercepts)


def solved(x, e, held=None, *, ridge=None, free=True, few_rows=False, sizes=None):
    held = torch.zeros(x.shape[1], dtype=torch.bool) if held is None else held
    fit = LeastSquares(free=free, few_rows=few_rows)
    sizes = sizes or [x.shape[1]]
    for *part, judge in zip(x.split(sizes, 1), e.split(sizes, 1), held.split(sizes), strict=True):
        for rows in (~judge, judge):
            fit.add(*(t[:, rows] for t in part), held=rows is judge)
    return fit.solve(ridge)


# ---- the solution ---------------------------------------------------------------------------


@FORMS
@FREE
@pytest.mark.parametrize("ridge", [1e-4, 0.03, 10.0, math.inf])
@pytest.mark.parametrize("shape", [(1, 40, 6), (3, 40, 6), (2, 7, 12)])
def test_fits_equal_the_explicit_solution(shape, ridge, free, few_rows):
    x, e = problem(*shape)
    fit = solved(x, e, held_of(shape[1]), ridge=ridge, free=free, few_rows=few_rows)
    change, intercept = explicit(x, e, ridge, free=free)
    torch.testing.assert_close(fit.change, change, **EXACT)
    torch.testing.assert_close(fit.intercept, intercept, **EXACT)
    assert fit.ridge == ridge
    assert (fit.intercept.abs().max() > 0.1) == free


@FORMS
@FREE
@pytest.mark.parametrize("ridge", [None, 0.01])
def test_chunks_do_not_matter(ridge, free, few_rows, monkeypatch):
    x, e = problem(rows=60, noise=3)
    monkeypatch.setattr(least_squares, "_ROWS_AT_ONCE", 8)  # so that sums of chunks are merged
    for held in (held_of(60), torch.arange(60) >= 40):  # chunks of both kinds, and of one alone
        fits = [
            solved(x, e, held, ridge=ridge, free=free, few_rows=few_rows, sizes=sizes)
            for sizes in ([60], [1] * 60, [7, 1, 20, 32], [20, 20, 20])
        ]
        for fit in fits[1:]:
            assert fit.ridge == fits[0].ridge
            torch.testing.assert_close(fit.change, fits[0].change, **EXACT)
            torch.testing.assert_close(fit.intercept, fits[0].intercept, **EXACT)


# ---- precision ------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("sizes", [[60], [9] * 6 + [6]])
def test_means_of_a_thousand_deviations_cost_nothing(sizes, few_rows, monkeypatch):
    monkeypatch.setattr(least_squares, "_ROWS_AT_ONCE", 8)
    x, e = problem(rows=60, mean=0, noise=0.1)
    x, e = (x / x.std() + 1000).float(), (e / e.std() - 1000).float()
    fit = solved(x, e, ridge=1e-3, few_rows=few_rows, sizes=sizes)
    change, _ = explicit(x, e, 1e-3, free=True)
    # Inputs have 13 bits beside their mean; products that are not centred have none left.
    torch.testing.assert_close(fit.change, change, rtol=1e-3, atol=1e-3)
    errors = (x.double() @ fit.change + fit.intercept - e.double()).square().mean()
    best = explicit(x, e, 1e-3, free=True)
    least = (x.double() @ best[0] + best[1] - e.double()).square().mean()
    assert errors < 1.001 * least


@FORMS
@FREE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_short_numbers_are_long(dtype, free, few_rows):
    x, e = (t.to(dtype) for t in problem(rows=300, unknowns=5))
    fit = solved(x, e, held_of(300), ridge=1e-3, free=free, few_rows=few_rows)
    change, intercept = explicit(x, e, 1e-3, free=free)
    assert fit.change.dtype == torch.float64
    # Of float32; the numbers themselves have 3 digits, products in them would have 2.
    torch.testing.assert_close(fit.change, change, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fit.intercept, intercept, rtol=1e-4, atol=1e-4)


# ---- the ridge ------------------------------------------------------------------------------


def brute_force(x, e, held, *, free):
    """Return the ridge whose explicit fit to the other rows errs least on those held back."""
    errors = {}
    for ridge in RIDGES:
        change, intercept = explicit(x[:, ~held], e[:, ~held], ridge, free=free)
        errors[ridge] = float((x[:, held] @ change + intercept - e[:, held]).square().sum())
    return min(errors, key=errors.__getitem__)


@FORMS
@FREE
def test_the_ridge_chosen_errs_least_on_the_rows_held_back(free, few_rows):
    chosen = set()
    for seed in range(12):
        x, e = problem(rows=32, unknowns=[4, 20][seed % 2], noise=10.0 ** (seed % 4 - 1), seed=seed)
        held = held_of(32)
        fit = solved(x, e, held, free=free, few_rows=few_rows, sizes=[10, 22])
        assert fit.ridge == brute_force(x, e, held, free=free)
        # All rows are fitted with it.
        change, intercept = explicit(x, e, fit.ridge, free=free)
        torch.testing.assert_close(fit.change, change, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(fit.intercept, intercept, rtol=1e-6, atol=1e-8)
        chosen.add(fit.ridge)
    assert len(chosen) >= 4


@FORMS
@FREE
def test_of_noise_nothing_is_learned(free, few_rows):
    x, _ = problem(rows=64, unknowns=40)
    e = torch.randn(2, 64, 30, dtype=torch.float64)
    fit = solved(x, e, held_of(64), free=free, few_rows=few_rows)
    assert fit.ridge == math.inf
    assert not fit.change.any()
    wanted = e.mean(1, keepdim=True) if free else torch.zeros(2, 1, 30, dtype=torch.float64)
    torch.testing.assert_close(fit.intercept, wanted, **EXACT)


@FORMS
@pytest.mark.parametrize("held", [torch.zeros, torch.ones], ids=["none", "all"])
def test_without_rows_to_judge_the_ridge_is_fixed(held, few_rows):
    x, e = problem()
    fit = solved(x, e, held(40, dtype=torch.bool), few_rows=few_rows)
    assert fit.ridge == FIXED_RIDGE
    torch.testing.assert_close(fit.change, explicit(x, e, FIXED_RIDGE, free=True)[0], **EXACT)


# ---- memory ---------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.num = max(self.num, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("ridge", [None, 1e-3])
def test_few_rows_of_many_unknowns_take_no_matrix_of_the_unknowns(ridge):
    unknowns, rows = 25_088, 64  # of the first linear layer of VGG
    x = torch.randn(1, rows, unknowns)
    e = x[..., :4] + torch.randn(1, rows, 4)
    with Largest() as largest:
        fit = solved(x, e, held_of(rows), ridge=ridge, few_rows=True, sizes=[16] * 4)
    assert fit.change.shape == (1, unknowns, 4)
    assert rows * unknowns <= largest.num <= 2 * rows * unknowns


# ---- what is singular, or no number ---------------------------------------------------------


@FORMS
@pytest.mark.parametrize("ridge", [0.0, 1e-30, 1e-12])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_collinear_inputs_end(num_groups, ridge, few_rows):
    x, e = problem(num_groups, noise=0)
    twice = torch.cat([x, x, torch.zeros_like(x[..., :1])], 2)
    fit = solved(twice, e, ridge=ridge, few_rows=few_rows)
    assert fit.change.isfinite().all()
    torch.testing.assert_close(twice @ fit.change + fit.intercept, e, rtol=1e-4, atol=1e-4)


@FORMS
def test_inputs_that_do_not_vary_change_nothing(few_rows):
    _, e = problem()
    fit = solved(torch.full((2, 40, 6), 3.0).double(), e, held_of(40), few_rows=few_rows)
    assert not fit.change.any()
    torch.testing.assert_close(fit.intercept, e.mean(1, keepdim=True), **EXACT)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("least", [0.0, -1e-9, -0.01])
def test_matrices_that_are_not_definite_are_damped_until_they_are(size, least):
    values = torch.linspace(1, 2, size, dtype=torch.float64)
    values[0] = least
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    gram = torch.stack([vectors * values @ vectors.T, torch.eye(size, dtype=torch.float64)])
    factor = factorised(gram, torch.full((2,), 1e-12, dtype=torch.float64))
    found = factor @ factor.mT
    # Each group grows by its own; by no more than ten times what it takes.
    added = (found - gram).diagonal(dim1=1, dim2=2)
    assert (added[1] < 1e-11).all()
    assert -least < float(added[0].mean()) <= max(1e-10, 11 * -least)
    torch.testing.assert_close(added[0], added[0].mean().expand(size), rtol=0, atol=1e-12)


@FORMS
@pytest.mark.parametrize("ridge", [None, 1e-3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_what_is_no_number_gives_none(where, value, ridge, few_rows):
    x, e = problem()
    (x if where == "inputs" else e)[0, 5, 2] = value
    fit = solved(x, e, held_of(40), ridge=ridge, few_rows=few_rows)
    assert fit.change[0].isnan().any()
    if where == "inputs":
        assert fit.change[0].isnan().all()


def test_a_group_that_is_no_number_leaves_the_others_alone():
    gram = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    gram[0, 2, 2], gram[1, 1, 1] = math.nan, 0.0
    factor = factorised(gram, torch.zeros(3, dtype=torch.float64))
    assert factor[0].isnan().all()
    torch.testing.assert_close(factor[1:] @ factor[1:].mT, gram[1:], rtol=0, atol=1e-6)
    assert factor[1:].isfinite().all()
