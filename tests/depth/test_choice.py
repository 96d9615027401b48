"""How many branches go: the best of few trials."""

import pytest

from tpvprune.depth.choice import best_depth, most_trials


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


def test_the_budget_counts_first():
    assert best_depth(lambda num: (max(0, 3 - num), num), 8) == 3
    assert best_depth(lambda num: (9 - num, num), 8) == 8
