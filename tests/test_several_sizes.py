"""Several sizes of one model: each is what `prune` gives, and what they share is computed once."""

from collections import Counter

import pytest
import torch
from cases import Residual, batches, build

import tpvprune
from tpvprune.pipeline import setup
from tpvprune.widths.ranking import RankBy


def same(a, b):
    """Whether two results are the same, bit for bit."""
    states = (x.model.state_dict() for x in (a, b))
    one, other = states
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repair": "reconstruct"},
        {"repair": "auto"},
        {"mirrored": True},
        {"steps": 2},
        {"granularity": ("channel", "branch")},
        {"criterion": "magnitude", "allocation": "rank"},
    ],
)
def test_each_size_is_that_of_prune(options, untouched):
    model, data = build(Residual), batches(48, 8)
    sizes = tpvprune.Sizes(model, data, seed=3, **options)
    with untouched(model):
        found = [sizes.prune(keep) for keep in (0.8, 0.5, 0.65)]
    ranking = None
    for keep, result in zip((0.8, 0.5, 0.65), found, strict=True):
        alone = tpvprune.prune(model, data, keep=keep, seed=3, ranking=ranking, **options)
        assert same(result, alone)
        for key in ("held_back", "widths", "warnings", "keep"):
            assert result.report.get(key) == alone.report.get(key)
        ranking = alone.ranking


@pytest.fixture
def counted(monkeypatch):
    """Count what is done once, by name."""
    counts = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def called(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    for owner, name in ((setup, "wanted_by"), (setup, "find_groups"), (RankBy, "ranked")):
        count(owner, name)
    return counts


def test_groups_ranking_and_dense_values_are_computed_once(counted):
    sizes = tpvprune.Sizes(build(Residual), batches(48, 8))
    for keep in (0.9, 0.7, 0.5):
        sizes.prune(keep)
    assert counted == {"wanted_by": 1, "find_groups": 1, "ranked": 1}


def test_one_size_in_steps_fits_to_the_same_values(counted):
    tpvprune.prune(build(Residual), batches(48, 8), steps=3)
    assert counted["wanted_by"] == 1


def test_one_size_holds_no_values_longer_than_it_needs_them(counted):
    tpvprune.prune(build(Residual), batches(48, 8))
    assert not counted["wanted_by"]


def test_with_little_memory_they_are_computed_anew(counted, monkeypatch):
    model, data = build(Residual), batches(48, 8)
    first = [tpvprune.Sizes(model, data).prune(keep) for keep in (0.8, 0.6)]
    assert counted["wanted_by"] == 2
    monkeypatch.setattr(setup, "spare_bytes", lambda _: 1 << 30)
    sizes = tpvprune.Sizes(model, data)
    assert all(same(a, sizes.prune(keep)) for a, keep in zip(first, (0.8, 0.6), strict=True))
    assert counted["wanted_by"] == 2


def test_a_ranking_that_is_given_serves_all_sizes(counted):
    model, data = build(Residual), batches(48, 8)
    ranking = tpvprune.rank_channels(model, data)
    sizes = tpvprune.Sizes(model, data, ranking=ranking)
    assert sizes.ranking is ranking
    results = [sizes.prune(keep) for keep in (0.8, 0.6)]
    assert counted["ranked"] == 1
    assert same(results[1], tpvprune.prune(model, data, keep=0.6, ranking=ranking))


def test_progress_of_a_size_is_told_to_whom_that_size_names():
    told, others = [], []
    sizes = tpvprune.Sizes(build(Residual), batches(48, 8), progress=lambda *x: told.append(x[0]))
    assert "groups" in told
    told.clear()
    sizes.prune(0.8)
    assert "compensation" in told
    told.clear()
    sizes.prune(0.6, progress=lambda *x: others.append(x[0]))
    assert not told
    assert "compensation" in others


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="repair: expected one of"):
        tpvprune.Sizes(build(Residual), batches(8, 8), repair="glue")
    sizes = tpvprune.Sizes(build(Residual), batches(8, 8))
    with pytest.raises(ValueError, match="keep"):
        sizes.prune(1.5)
