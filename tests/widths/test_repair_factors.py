"""How much a repair makes up for: factors against one cut and one compensation at a time."""

import pytest
import torch
from cases import batches, build

from tpvprune import (
    allocate,
    compensate_weights,
    find_groups,
    prune,
    remove_channels,
    variance_curves,
)
from tpvprune.passes.evaluation import output_variance
from tpvprune.widths.knapsack import choose_options
from tpvprune.widths.repair_factors import _segments, repair_factors, scaled


def prepared(case="residual"):
    model, x = build(case), batches(64)
    groups = find_groups(model, x[0])
    curves = variance_curves(model, groups, x)
    return model, x, groups, curves, allocate(groups, curves, keep=0.6)


def gone(kept, name):
    return int((~kept[name]).sum())


@pytest.mark.parametrize("num_segments", [1, 3])
def test_factors_are_measured_over_predicted_variance(num_segments, untouched):
    model, x, groups, curves, kept = prepared()
    with untouched(model):
        factors = repair_factors(model, groups, kept, curves, x, num_segments=num_segments)
    whole = torch.cat(x)
    fit, held = whole[:48].split(len(x[0])), [whole[48:]]
    segments = _segments(groups, kept, curves, num_segments)
    assert sorted(g.name for s in segments for g in s) == sorted(g.name for g in groups)
    for segment in segments:
        cut = {g.name: kept[g.name] for g in segment}
        predicted = sum(float(curves[n].variance[gone(kept, n)]) for n in cut)
        if not predicted:
            continue
        smaller = remove_channels(model, groups, cut)
        repaired = compensate_weights(
            smaller,
            model,
            fit,
            groups=groups,
            kept=cut,
            nonlinear=False,
            rows_per_input=12,
            min_rows=16384,
        )
        exact = output_variance(repaired, model, held) / predicted
        for name in cut:
            assert factors[name] == pytest.approx(min(20, max(0.05, exact)), rel=1e-6)


def test_streams_are_a_segment_of_their_own():
    _, _, groups, curves, kept = prepared()
    first = _segments(groups, kept, curves, 3)[0]
    assert [g.name for g in first] == ["stem"]


def test_equal_factors_change_nothing_and_unequal_ones_do():
    _, _, groups, curves, kept = prepared()
    same = allocate(groups, scaled(curves, dict.fromkeys(curves, 0.3)), keep=0.6)
    assert all(torch.equal(same[n], kept[n]) for n in kept)
    name = max(kept, key=lambda n: gone(kept, n))
    spared = allocate(groups, scaled(curves, {name: 1e6}), keep=0.6)
    assert gone(spared, name) < gone(kept, name)


def test_nothing_cut_is_nothing_repaired():
    model, x, groups, curves, kept = prepared("chain")
    whole = {n: torch.ones_like(m) for n, m in kept.items()}
    assert set(repair_factors(model, groups, whole, curves, x).values()) == {1.0}


@pytest.mark.parametrize("repair", ["compensate", "none"])
def test_prune_measures_factors_only_for_repairs_that_refit(repair, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "tpvprune.pipeline.setup.measured_factors",
        lambda *a, **k: calls.append(1) or repair_factors(*a, **k),
    )
    prune(build("residual"), batches(32), keep=0.6, repair=repair, steps=2)
    assert len(calls) == (repair == "compensate")


@pytest.mark.parametrize("seed", range(5))
def test_knapsack_finds_the_best_of_all_choices(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = [torch.randint(0, 12, (n,), generator=generator).double() for n in (3, 4, 2, 5)]
    damages = [torch.rand(len(c), generator=generator).double() for c in costs]
    everything = torch.cartesian_prod(*(torch.arange(len(c)) for c in costs))
    cost = sum(c[everything[:, i]] for i, c in enumerate(costs))
    damage = sum(d[everything[:, i]] for i, d in enumerate(damages))
    for budget in range(int(cost.min()), int(cost.max()) + 1):
        # Whole numbers fall on whole buckets: rounding loses nothing.
        spare = max(1, budget - int(sum(c.min() for c in costs)))
        chosen = choose_options(costs, damages, budget, num_buckets=spare)
        spent = sum(float(c[i]) for c, i in zip(costs, chosen, strict=True))
        found = sum(float(d[i]) for d, i in zip(damages, chosen, strict=True))
        assert spent <= budget
        assert found == pytest.approx(float(damage[cost <= budget].min()))
