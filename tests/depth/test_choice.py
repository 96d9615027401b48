"""How many branches go: the best of few trials."""

import pytest

from tpvprune.depth import choice
from tpvprune.depth.choice import best_depth, most_gone, most_trials
from tpvprune.depth.records import Branch


@pytest.mark.parametrize("most", [0, 1, 2, 5, 12, 27])
@pytest.mark.parametrize("best", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_near_the_least_of_a_valley(most, best):
    tried = []

    def damage(num):
        tried.append(num)
        return 0.0, (num - best * most) ** 2

    found = best_depth(damage, most)
    assert abs(found - best * most) <= max(0.5, most / 8)
    assert len(tried) == len(set(tried)) <= most_trials(most) <= 9


def test_a_share_of_branches_is_not_short_of_one_by_rounding():
    for num in range(1, 101):
        assert [most_gone(gone / num, [None] * num) for gone in range(num + 1)] == [*range(num + 1)]
    assert most_gone(0.5, [None] * 9) == 4


def test_the_budget_counts_first():
    assert best_depth(lambda num: (max(0, 3 - num), num), 8) == 3
    assert best_depth(lambda num: (9 - num, num), 8) == 8


@pytest.mark.parametrize("most", [0, 1, 4, 20])
@pytest.mark.parametrize("enough", [0.0, 0.05, 1.5, 4.0, 100.0])
def test_the_order_ends_where_enough_is_saved(monkeypatch, most, enough):
    names = [f"block{i}" for i in range(20)]
    scores = {name: (7 * i % 20) + 1.0 for i, name in enumerate(names)}
    savings = {name: 0.1 + 0.03 * (3 * i % 20) for i, name in enumerate(names)}
    branches = [Branch(name, None, (name,), i, 1) for i, name in enumerate(names)]
    seen = []

    def scored(model, left, inputs, *, gone):
        seen.append((len(left), len(gone)))
        return {b.name: scores[b.name] for b in left}

    monkeypatch.setattr(choice, "branch_scores", scored)
    order, first = choice.branch_order(None, branches, [], savings, most=most, enough=enough)
    best = sorted(names, key=lambda name: scores[name] / savings[name])[:most]
    fewest = [n for n in range(len(best) + 1) if sum(savings[name] for name in best[:n]) >= enough]
    assert [b.name for b in order] == best[: fewest[0] if fewest else most]
    assert first == (scores if most else {})
    assert len(seen) <= 3
    assert all(left + gone == 20 for left, gone in seen)
