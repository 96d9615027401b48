"""Between the start and the end of a training: the closest point on other images."""

import copy

import pytest
import torch
from cases import Residual, batches, build, images
from torch import nn
from torch.nn import functional as F

from tpvprune import distill
from tpvprune.passes.difference import Reference, difference
from tpvprune.repairs.interpolation import FRACTIONS, nearest_between


class Classes(nn.Module):
    """One layer: outputs are linear in the weights."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(x)


def moved(dense, by, seed=3):
    """Return a copy whose weights are moved along one direction, by so much."""
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=by)
    return model


def rows(num=60, seed=7):
    return torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))


def slow_divergence(model, dense, x):
    """Return the mean of sum_c p_c log(p_c / q_c), image by image."""
    found = []
    with torch.no_grad():
        for image in x.split(1):
            p, q = (m(image)[0].double().softmax(0) for m in (dense, model))
            found.append(float((p * (p / q).log()).sum()))
    return sum(found) / len(found)


def test_divergence_is_that_of_the_classes():
    dense = build(Residual)
    model, x = moved(dense, 0.05), images(9)
    found = difference(model, dense, x.split(4)).divergence
    assert found == pytest.approx(slow_divergence(model, dense, x), rel=1e-6)
    assert difference(dense, dense, x.split(4)).divergence == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num_classes", [5, 0])
@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [(1.0, -1.0, 0.5), (1.0, -3.0, 0.25), (0.1, -9.0, 0.0), (1.0, 0.0, 1.0), (1.0, 0.3, 1.0)],
)
def test_the_closest_of_the_points_is_chosen(before, after, wanted, num_classes):
    torch.manual_seed(0)
    dense = Classes(num_classes)
    start, end = moved(dense, before), moved(dense, after)
    weights = [copy.deepcopy(m.state_dict()) for m in (start, end)]
    between = nearest_between(start, end, Reference(dense, rows().split(16)))
    assert between.fraction == wanted
    for name, t in between.model.state_dict().items():
        torch.testing.assert_close(t, torch.lerp(*(w[name] for w in weights), wanted))
    assert between.end == difference(end, dense, rows().split(16))
    assert between.found == difference(between.model, dense, rows().split(16))
    for m, w in zip((start, end), weights, strict=True):
        assert all(torch.equal(t, w[name]) for name, t in m.state_dict().items())


@pytest.mark.parametrize("seed", range(4))
def test_no_other_point_is_closer(seed):
    torch.manual_seed(seed)
    dense, x = Classes(), rows(seed=seed)
    start, end = moved(dense, 0.8, seed), moved(dense, -0.5, seed + 1)
    between = nearest_between(start, end, Reference(dense, x.split(16)))
    found = []
    for fraction in FRACTIONS:
        point = Classes()
        ends = (m.state_dict() for m in (start, end))
        pairs = zip(*(m.items() for m in ends), strict=True)
        point.load_state_dict({n: torch.lerp(a, b, fraction) for (n, a), (_, b) in pairs})
        found.append(slow_divergence(point, dense, x))
    assert FRACTIONS[found.index(min(found))] == between.fraction


def test_an_end_that_is_not_finite_is_never_the_closest():
    dense = Classes()
    reference = Reference(dense, rows().split(16))
    between = nearest_between(moved(dense, 1.0), moved(dense, torch.nan), reference)
    assert between.fraction == 0
    assert all(t.isfinite().all() for t in between.model.state_dict().values())


@pytest.mark.parametrize("lr", [1e-3, 3.0])
def test_distillation_with_images_held_back_ends_no_further_than_it_began(lr):
    dense = build(Residual)
    student = moved(dense, 0.05)
    data, held = list(batches()), [images(40, seed=11)]
    how = {"epochs": 3, "lr": lr, "seed": 0}
    plain = distill(student, dense, data, **how)
    best = distill(student, dense, data, held_back=held, **how)
    before, after, kept = (
        F.kl_div(m(held[0]).log_softmax(1), dense(held[0]).softmax(1), reduction="batchmean")
        for m in (student, plain.eval(), best.eval())
    )
    assert kept <= min(before, after) + 1e-6
    assert (before < after) == (lr > 1)
