"""Milliseconds as a budget: the table, the widths that follow from it, and the proof by the clock.

Times of this machine enter two tests only, in ratios that no load can turn round.
"""

import json
from dataclasses import replace

import pytest
import torch
from cases import Chain, batches, build, images
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tpvprune
from tpvprune.groups.budget import CostModel, LatencyTable, LayerTime, cost, unit_costs
from tpvprune.pipeline import run, setup
from tpvprune.widths import latency
from tpvprune.widths.latency import Speed, as_fast_as, compare_latency

LAYERS = ("stem", "conv1", "conv2", "conv3", "conv4", "fc")


def table_of(groups, model, ms, *, step=1, constant=0.0):
    """A table of layers that take ms(inputs, outputs), measured at every width."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            outs, ins = (tuple(range(1, size + 1)) for size in module.weight.shape[:2])
            times = tuple(tuple(float(ms(i, o)) for o in outs) for i in ins)
            layers[name] = LayerTime(ins, outs, times, 1)
    return LatencyTable(layers, 0.0, constant, step, 1, "a device")


def curves_of(groups):
    generator = torch.Generator().manual_seed(0)
    return {
        g.name: tpvprune.scores.curves.Curve(
            torch.randperm(g.num_channels, generator=generator),
            torch.rand(g.num_channels, generator=generator).double().cumsum(0),
            torch.zeros(g.num_channels),
        )
        for g in groups
    }


@pytest.fixture
def chain():
    model = build("residual")
    return model, tpvprune.find_groups(model, batches()[0][:1], verify=False)


def test_products_of_widths_give_the_budget_of_parameters(chain):
    model, groups = chain
    sizes = {n: model.get_parameter(f"{n}.weight")[0, 0].numel() for n in LAYERS}
    layers = table_of(groups, model, lambda i, o: i * o).layers
    scaled = {
        n: replace(e, ms=tuple(tuple(v * sizes[n] for v in row) for row in e.ms))
        for n, e in layers.items()
    }
    table = LatencyTable(scaled, 0.0, 0.0, 1, 1, "a device")
    names = [f"{name}.weight" for name in layers]
    kept = {g.name: torch.arange(g.num_channels) % 3 > 0 for g in groups}
    for some in ({}, kept):
        smaller = tpvprune.remove_channels(model, groups, some) if some else model
        expected = sum(smaller.get_parameter(name).numel() for name in names)
        assert cost(groups, some, table) == pytest.approx(expected)


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.3])
def test_widths_fit_the_milliseconds(chain, keep):
    model, groups = chain
    table = table_of(groups, model, lambda i, o: 1 + i + i * o, constant=2.0)
    curves = curves_of(groups)
    kept = tpvprune.allocate(groups, curves, keep=keep, of=table)
    assert cost(groups, kept, table) <= keep * cost(groups, {}, table) * (1 + 1e-9)
    widths = {name: int(mask.sum()) for name, mask in kept.items()}
    model_of = CostModel(groups, table, {n: c.order for n, c in curves.items()})
    assert model_of.total(widths) == pytest.approx(cost(groups, kept, table))
    scores = {g.name: torch.rand(g.num_channels) for g in groups}
    ranked = tpvprune.select_channels(groups, scores, keep=keep, of=table)
    assert cost(groups, ranked, table) <= keep * cost(groups, {}, table) * (1 + 1e-9)


def test_a_layer_that_costs_most_shrinks_first(chain):
    model, groups = chain
    even = table_of(groups, model, lambda i, o: i * o)
    slow = replace(
        even.layers["conv3"], ms=tuple(tuple(50 * v for v in r) for r in even.layers["conv3"].ms)
    )
    skewed = replace(even, layers={**even.layers, "conv3": slow})
    same = {g.name: torch.ones(g.num_channels) for g in groups}
    kept = tpvprune.select_channels(groups, same, keep=0.9, of=skewed)
    assert bool(kept["conv1"].all())  # nothing that conv3 reads or writes
    savings = unit_costs(groups, skewed)
    assert savings["conv3"].min() > 10 * unit_costs(groups, even)["conv3"].max()


@given(st.lists(st.integers(1, 100), min_size=2, max_size=6, unique=True), st.floats(0, 120))
def test_interpolation_is_exact_at_what_was_measured_and_between(points, x):
    points = tuple(sorted(points))
    ms = tuple(tuple(2.0 * i + 3 * o for o in points) for i in points)
    layer = LayerTime(points, points, ms, 1)
    for p in points:
        assert layer.at(p, points[0]) == pytest.approx(2 * p + 3 * points[0])
    inside = min(max(x, points[0]), points[-1])
    assert layer.at(x, x) == pytest.approx(5 * inside)


# ---- by the clock -----------------------------------------------------------------------------


def speed(ratio):
    return Speed(1.0, ratio, ratio, ratio, ratio, 1, 9)


@pytest.mark.parametrize(
    "truth", [lambda a: a + 0.1, lambda a: 0.7 * a, lambda a: a**0.5, lambda a: a**4]
)
def test_a_wrong_table_is_corrected_by_the_clock(truth):
    chosen, found = as_fast_as(0.6, 0.6, lambda aim: aim, lambda aim: speed(truth(aim)))
    assert found.ratio == truth(chosen)
    assert 0.5 < found.ratio <= 0.6


def test_what_no_width_can_reach_is_tried_and_returned():
    _, found = as_fast_as(0.6, 0.6, lambda aim: aim, lambda aim: speed(0.8 + 0.1 * aim))
    assert found.ratio > 0.6


@pytest.fixture
def timed(monkeypatch):
    """Let the table count weights, and the clock parameters, a fifth more of them."""

    def by_params(dense, pruned, x):
        assert x.shape[0] == 3
        return speed(1.2 * tpvprune.count_params(pruned) / tpvprune.count_params(dense))

    def table(model, groups, x):
        return table_of(groups, model, lambda i, o: i * o)

    monkeypatch.setattr(setup, "latency_table", table)
    monkeypatch.setattr(run, "compare_latency", by_params)


def in_milliseconds(model, **options):
    """Return the report of a run whose budget the clock confirmed."""
    how = {"keep": 0.6, "of": "latency", "latency_batch_size": 3, "repair": "none", **options}
    result = tpvprune.prune(model, batches(), **how)
    assert result.report["reached"]
    assert result.report["speed"]["ratio"] <= 0.6
    kept = tpvprune.count_params(result.model) / tpvprune.count_params(model)
    assert kept <= 0.6 / 1.2
    return json.loads(json.dumps(result.report))


def gone(report):
    return [branch["name"] for branch in report["branches"] if branch["gone"]]


def test_pruning_by_latency_is_proved_by_the_clock(timed):
    report = in_milliseconds(build("residual"), granularity=("channel",))
    assert "branches" not in report


def test_branches_may_go_where_milliseconds_count(timed):
    model = build("residual")
    with torch.no_grad():  # a branch that is worth nothing
        model.bn2.weight.zero_()
        model.bn2.bias.zero_()
    report = in_milliseconds(model)
    assert gone(report) == ["conv2"]
    assert report["timings"]["trials of depth"] > 0
    assert "branches" not in tpvprune.prune(model, batches(), repair="none").report


def test_widths_alone_meet_the_milliseconds_where_no_branch_goes(timed):
    assert gone(in_milliseconds(build("residual"), max_depth_removed=0)) == []
    report = in_milliseconds(build("chain"))
    assert "branches" not in report
    assert "no residual branch can go whole: channels alone were pruned" in report["warnings"]


def test_trials_are_counted(timed):
    seen = []
    in_milliseconds(build("residual"), progress=lambda *told: seen.append(told))
    trials = [(done, total) for stage, done, total in seen if stage == "trials of depth"]
    assert trials == [(0, 2), (1, 2), (1, 2), (2, 2)]


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def test_a_measured_table_is_kept_and_read_again(tmp_path, monkeypatch, untouched):
    model, x = Wide(), torch.randn(2, 3, 16, 16)
    groups = tpvprune.find_groups(model, x, verify=False)
    monkeypatch.setattr(latency, "_SECONDS", 0.001)
    with untouched(model):
        table = latency.latency_table(model, groups, x, cache=tmp_path)
    assert table.layers["conv2"].at(32, 32) > table.layers["conv2"].at(8, 8)
    assert table.batch_size == 2
    monkeypatch.setattr(latency, "_measure", None)
    assert latency.latency_table(model, groups, x, cache=tmp_path) == table
    (file,) = tmp_path.glob("*.json")
    monkeypatch.setattr(latency, "_measure", lambda *_: replace(table, constant_ms=7.0))
    for damage in ("", "[]", '{"format": 1}', '{"format": 0, "layers": {}}'):
        file.write_text(damage)
        assert latency.latency_table(model, groups, x, cache=tmp_path).constant_ms == 7.0


def test_turns_show_which_model_is_faster():
    narrow, wide = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 256, 3)
    found = compare_latency(wide, narrow, torch.randn(4, 3, 32, 32), rounds=8)
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.ratio < 0.8
    with pytest.raises(ValueError, match="expected at least 4, found 3"):
        compare_latency(wide, narrow, torch.randn(1, 3, 8, 8), rounds=3)


def test_slow_models_are_timed_in_fewer_rounds(monkeypatch):
    models, x = (build(Chain), build(Chain)), images(1)
    assert compare_latency(*models, x, rounds=25).rounds == 25
    monkeypatch.setattr(latency, "_PATIENCE", 0.0)
    assert compare_latency(*models, x, rounds=25).rounds == 6
    assert compare_latency(*models, x, rounds=4).rounds == 4
