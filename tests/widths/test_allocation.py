"""The dynamic programme against exhaustive search over widths."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, Blocks, build, images
from oracles import best_widths

from tpvprune import allocate, find_groups
from tpvprune.groups.budget import cost, reaches
from tpvprune.groups.removal import check_kept
from tpvprune.scores.curves import Curve
from tpvprune.widths.limits import Limits
from tpvprune.widths.problem import WidthProblem


def separable():
    """Return three groups whose costs do not depend on each other."""
    groups = find_groups(build(Blocks), images(2), ignore=["stem"])
    assert len(groups) == 3
    return groups


def random_curves(groups, seed=0, *, convex=False):
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for group in groups:
        steps = torch.rand(group.num_channels - 1, generator=generator, dtype=torch.float64)
        steps = steps.sort().values if convex else steps
        variance = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        order = torch.randperm(group.num_channels, generator=generator)
        curves[group.name] = Curve(order, variance, torch.zeros(len(order)))
    return curves


def last(curves, widths):
    kept = {}
    for name, width in widths.items():
        order = curves[name].order
        kept[name] = torch.zeros(len(order), dtype=torch.bool)
        kept[name][order[len(order) - width :]] = True
    return kept


def damage(curves, kept):
    return float(sum(curves[n].variance[int((~kept[n]).sum())] for n in kept))


def best(groups, curves, *, keep, of="macs"):
    return best_widths(
        lambda name, width: float(curves[name].variance[groups[name].num_channels - width]),
        lambda widths: cost(groups, last(curves, widths), of),
        {g.name: range(1, g.num_channels + 1) for g in groups},
        keep * cost(groups, {}, of),
    )


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("seed", range(4))
def test_allocation_equals_exhaustive_search_where_costs_are_separable(seed, of):
    groups = separable()
    curves = random_curves(groups, seed, convex=seed % 2 == 0)
    for keep in (0.9, 0.75, 0.6, 0.5):
        kept = allocate(groups, curves, keep=keep, of=of)
        torch.testing.assert_close(damage(curves, kept), best(groups, curves, keep=keep, of=of))


@pytest.mark.parametrize("seed", range(4))
def test_allocation_finds_the_best_that_just_fits(seed):
    groups = separable()
    curves = random_curves(groups, seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        widths = {
            g.name: int(torch.randint(1, g.num_channels, (), generator=generator)) for g in groups
        }
        fitting = cost(groups, last(curves, widths), "macs") / groups.macs()
        # The budget axis has 4000 buckets and each of three groups is rounded up to one.
        kept = allocate(groups, curves, keep=fitting + 3 / 4000)
        assert damage(curves, kept) <= best(groups, curves, keep=fitting) * (1 + 1e-9)


@pytest.mark.parametrize("case", ["chain", "residual", "attention"])
def test_allocation_is_near_the_best_where_costs_interact(case):
    groups = find_groups(build(case), images(2))
    curves = random_curves(groups, convex=True)
    for keep in (0.8, 0.6, 0.4):
        kept = allocate(groups, curves, keep=keep)
        assert damage(curves, kept) <= 1.5 * best(groups, curves, keep=keep) + 1e-12


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("case", CASES)
def test_budget_is_met_or_every_group_is_at_its_floor(case, of):
    groups = find_groups(build(case), images(2))
    curves = random_curves(groups)
    for keep in (0.99, 0.6, 0.3, 0.05, 0.001):
        kept = allocate(groups, curves, keep=keep, of=of)
        fits = reaches(groups, kept, keep=keep, of=of)
        check_kept(groups, kept)
        smallest = WidthProblem(groups, curves, keep=keep, of=of, limits=Limits()).least
        assert fits or {n: int(mask.sum()) for n, mask in kept.items()} == smallest


@pytest.mark.parametrize("case", CASES)
def test_keeping_everything_removes_nothing(case):
    groups = find_groups(build(case), images(2))
    kept = allocate(groups, random_curves(groups), keep=1.0)
    assert all(mask.all() for mask in kept.values())


def test_channels_leave_in_the_order_of_the_curve():
    groups = separable()
    curves = random_curves(groups)
    kept = allocate(groups, curves, keep=0.6)
    assert any(not mask.all() for mask in kept.values())
    for name, mask in kept.items():
        assert mask[curves[name].order].tolist() == sorted(mask.tolist())


def test_channels_that_cost_nothing_leave_before_any_other():
    groups = separable()
    curves = random_curves(groups)
    name = groups.groups[1].name
    curves[name] = replace(curves[name], variance=curves[name].variance * 0)
    assert damage(curves, allocate(groups, curves, keep=0.9)) == 0


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.1])
def test_floors_hold(keep):
    groups = find_groups(build("attention"), images(2))
    curves = random_curves(groups)
    rounded = allocate(groups, curves, keep=keep, limits=Limits(round_to=4))
    for group in groups:
        width = int(rounded[group.name].sum())
        assert width == group.num_channels or width % 4 == 0 or group.unit == "head"
    for mask in allocate(groups, curves, keep=keep, limits=Limits(min_channels=2)).values():
        assert mask.sum() >= 2
    for mask in allocate(groups, curves, keep=keep, limits=Limits(max_removed=0.5)).values():
        assert (~mask).sum() <= 0.5 * len(mask)


def test_bad_budgets_are_rejected():
    groups = separable()
    with pytest.raises(ValueError, match="keep: expected a fraction"):
        allocate(groups, random_curves(groups), keep=0)
