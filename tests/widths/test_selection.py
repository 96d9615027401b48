"""Greedy selection against plain loops, and the promises of every option."""

import itertools

import pytest
import torch
from cases import CASES, build, images
from torch import nn

from tpvprune import find_groups, select_channels
from tpvprune.groups.budget import cost, reaches, unit_costs
from tpvprune.groups.removal import check_kept, restore_empty
from tpvprune.widths.limits import Limits


def found(case):
    return find_groups(build(case), images(2))


def random_scores(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.num_channels, generator=generator) for g in groups}


def whole(groups):
    return {g.name: torch.ones(g.num_channels, dtype=torch.bool) for g in groups}


def kept_at_least(groups, kept):
    """Tell whether nothing more can go: every channel is the only one of some layer."""
    for name, mask in kept.items():
        for channel in mask.nonzero().flatten().tolist():
            trial = without(kept, name, channel)
            with pytest.raises(ValueError, match=r"at least one must stay|fewer than"):
                check_kept(groups, trial)
    return True


def without(kept, name, channel):
    kept = {n: mask.clone() for n, mask in kept.items()}
    kept[name][channel] = False
    return kept


def greedy(groups, scores, keep, of):
    """Return the selection by trying every next removal, one channel at a time."""
    kept, single = whole(groups), unit_costs(groups, of)
    ranks = {n: (scores[n] / single[n]).argsort().argsort() for n in kept}
    nothing = {n: torch.zeros_like(mask) for n, mask in kept.items()}
    needed = restore_empty(groups, nothing, ranks)  # by some layer that would have no other
    budget = keep * cost(groups, {}, of)
    while cost(groups, kept, of) > budget:
        trials = []
        for group in groups:
            free = kept[group.name] & ~needed[group.name]
            if not free.any():
                continue
            rank = (scores[group.name] / single[group.name]).masked_fill(~free, torch.inf)
            channel = int(rank.argmin())
            trial = without(kept, group.name, channel)
            saving = cost(groups, kept, of) - cost(groups, trial, of)
            trials.append((float(scores[group.name][channel]) / saving, trial))
        if not trials:
            break
        kept = min(trials, key=lambda t: t[0])[1]
    return kept


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("case", CASES)
def test_selection_equals_plain_greedy_loops(case, of):
    groups = found(case)
    scores = random_scores(groups)
    for keep in (0.8, 0.5, 0.3):
        kept = select_channels(groups, scores, keep=keep, of=of, refill=False)
        expected = greedy(groups, scores, keep, of)
        assert all(torch.equal(kept[n], expected[n]) for n in expected)


def test_selection_in_one_group_is_the_best_subset():
    groups = find_groups(build("no_norm"), images(2), ignore=["conv2"])
    scores = random_scores(groups)
    values = scores["conv1"]
    for keep in (0.9, 0.7, 0.5, 0.3):
        kept = select_channels(groups, scores, keep=keep)
        subsets = [torch.tensor(bits) for bits in itertools.product([False, True], repeat=5)]
        fitting = [
            m for m in subsets if m.any() and reaches(groups, {"conv1": m}, keep=keep, of="macs")
        ]
        assert values[kept["conv1"]].sum() == max(values[mask].sum() for mask in fitting)


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("case", CASES)
def test_budget_is_met_or_said_to_be_unreachable(case, of):
    groups = found(case)
    for keep in (0.99, 0.6, 0.3, 0.05, 0.001):
        kept = select_channels(groups, random_scores(groups), keep=keep, of=of)
        fits = cost(groups, kept, of) <= keep * cost(groups, {}, of) * (1 + 1e-9)
        assert reaches(groups, kept, keep=keep, of=of) == fits
        check_kept(groups, kept)
        assert fits or kept_at_least(groups, kept)


def test_unreachable_budget_is_reported():
    groups = found("chain")
    kept = select_channels(groups, random_scores(groups), keep=1e-6)
    assert not reaches(groups, kept, keep=1e-6, of="macs")


@pytest.mark.parametrize("per_cost", [False, True])
def test_smaller_budgets_keep_subsets(per_cost):
    groups = found("residual")
    scores, before = random_scores(groups), whole(groups)
    for keep in torch.linspace(1, 0.1, 19).tolist():
        kept = select_channels(groups, scores, keep=keep, per_cost=per_cost, refill=False)
        assert all((kept[n] <= before[n]).all() for n in kept)
        before = kept


@pytest.mark.parametrize("case", CASES)
def test_refill_gives_back_only_what_fits(case):
    groups = found(case)
    scores = random_scores(groups)
    for keep in (0.8, 0.5, 0.3):
        plain = select_channels(groups, scores, keep=keep, refill=False)
        kept = select_channels(groups, scores, keep=keep)
        assert all((plain[n] <= kept[n]).all() for n in plain)
        if reaches(groups, plain, keep=keep, of="macs"):
            assert reaches(groups, kept, keep=keep, of="macs")


@pytest.mark.parametrize("case", CASES)
def test_keeping_everything_removes_nothing(case):
    groups = found(case)
    kept = select_channels(groups, random_scores(groups), keep=1.0)
    assert kept.keys() == whole(groups).keys()
    assert all(mask.all() for mask in kept.values())


def test_among_equal_scores_the_later_channel_goes_first():
    groups = found("no_norm")
    scores = {g.name: torch.ones(g.num_channels) for g in groups}
    kept = select_channels(groups, scores, keep=0.5)
    for mask in kept.values():
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)


def test_ranking_without_costs_goes_by_score_alone():
    groups = found("residual")
    scores = random_scores(groups)
    kept = select_channels(groups, scores, keep=0.5, per_cost=False, refill=False)
    removed = torch.cat([scores[n][~kept[n]] for n in kept])
    stays = torch.cat([scores[n][kept[n]] for n in kept if kept[n].sum() > 1])
    assert removed.max() < stays.min()


@pytest.mark.parametrize("keep", [0.8, 0.4, 0.01])
def test_every_group_keeps_min_channels(keep):
    groups = found("residual")
    kept = select_channels(groups, random_scores(groups), keep=keep, limits=Limits(min_channels=3))
    assert all(mask.sum() >= 3 for mask in kept.values())


@pytest.mark.parametrize("keep", [0.8, 0.4, 0.01])
def test_groups_lose_at_most_max_removed(keep):
    groups = found("residual")
    kept = select_channels(groups, random_scores(groups), keep=keep, limits=Limits(max_removed=0.5))
    assert all((~mask).sum() <= 0.5 * len(mask) for mask in kept.values())


def test_max_removed_zero_keeps_everything():
    groups = found("residual")
    kept = select_channels(groups, random_scores(groups), keep=0.1, limits=Limits(max_removed=0.0))
    assert all(mask.all() for mask in kept.values())


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.2, 0.01])
def test_kept_widths_are_whole_or_rounded(keep):
    groups = found("attention")
    kept = select_channels(groups, random_scores(groups), keep=keep, limits=Limits(round_to=4))
    for group in groups:
        width = int(kept[group.name].sum())
        assert width == group.num_channels or width % 4 == 0 or group.unit == "head"
        assert width > 0


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.2])
def test_widths_are_rounded_by_the_width_of_their_group(keep):
    steps = {100: 16, 96: 16, 95: 8, 48: 8, 24: 4, 12: 2, 11: 1}
    layers, before = [], 3
    for width in steps:
        layers += [nn.Conv2d(before, width, 1), nn.ReLU()]
        before = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 3))
    groups = find_groups(model, torch.randn(2, 3, 1, 1))
    limits = Limits(round_to="auto")
    assert limits == Limits()
    assert {g.num_channels: limits.step(g) for g in groups} == steps
    kept = select_channels(groups, random_scores(groups), keep=keep, limits=limits)
    for group in groups:
        width = int(kept[group.name].sum())
        assert width == group.num_channels or width % steps[group.num_channels] == 0
    assert any(not mask.all() for mask in kept.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, "keep: expected a fraction"),
        ({"keep": 1.1}, "keep: expected a fraction"),
        ({"keep": float("nan")}, "keep: expected a fraction"),
        ({"of": "latency"}, "of: expected"),
    ],
)
def test_bad_budgets_are_rejected(arguments, message):
    groups = found("chain")
    with pytest.raises(ValueError, match=message):
        select_channels(groups, random_scores(groups), **{"keep": 0.5, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"round_to": 0}, "round_to"),
        ({"min_channels": 0}, "min_channels"),
        ({"max_removed": 1.5}, "max_removed"),
    ],
)
def test_bad_limits_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Limits(**arguments)


def test_scores_that_do_not_fit_are_rejected():
    groups = found("chain")
    scores = random_scores(groups)
    with pytest.raises(ValueError, match="expected an entry for group 'conv2'"):
        select_channels(groups, {"conv1": scores["conv1"]}, keep=0.5)
    with pytest.raises(ValueError, match="expected 5 finite values"):
        select_channels(groups, {**scores, "conv1": torch.ones(4)}, keep=0.5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        select_channels(groups, {**scores, "conv1": torch.full((5,), torch.nan)}, keep=0.5)
