"""Milliseconds as a budget: the table, the widths that follow from it, and the proof by the clock.

Times of this machine enter two tests only, in ratios that no load can turn round.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import Chain, batches, build, images
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tpvprune
from tpvprune.groups.budget import CostModel, LatencyTable, LayerTime, cost, unit_costs
from tpvprune.pipeline import run, setup
from tpvprune.widths import latency, latency_file
from tpvprune.widths import speed as speed_module
from tpvprune.widths.speed import Speed, as_fast_as, compare_latency

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
    return Speed(1.0, ratio, ratio, ratio, ratio, 1, 9, 1.0, 1.0, ratio, ratio, "eager", "here")


@pytest.mark.parametrize(
    "truth", [lambda a: a + 0.1, lambda a: 0.7 * a, lambda a: a**0.5, lambda a: a**4]
)
def test_a_wrong_table_is_corrected_by_the_clock(truth):
    chosen, found = as_fast_as(0.6, 0.6, lambda aim: aim, lambda aim: speed(truth(aim)))
    assert found.ratio == truth(chosen)
    assert 0.57 < found.ratio <= 0.6


def test_what_no_width_can_reach_is_tried_and_returned():
    _, found = as_fast_as(0.6, 0.6, lambda aim: aim, lambda aim: speed(0.8 + 0.1 * aim))
    assert found.ratio > 0.6


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Let the table count weights, and the clock parameters, a fifth more of them."""
    monkeypatch.setattr(latency, "cache_folder", lambda: tmp_path)
    asked = []

    def table(model, groups, x, **where):
        asked.append(where)
        counted = table_of(groups, model, lambda i, o: i * o)
        return replace(counted, runtime=where["runtime"], num_threads=where["num_threads"])

    def by_params(watch, pruned):
        assert watch.x.shape[0] == 3
        assert {"runtime": watch.runtime, "num_threads": watch.num_threads} == asked[-1]
        return speed(1.2 * tpvprune.count_params(pruned) / tpvprune.count_params(watch.dense))

    monkeypatch.setattr(setup, "latency_table", table)
    monkeypatch.setattr(run.Stopwatch, "compare", by_params)


def in_milliseconds(model, **options):
    """Return the report of a run whose budget the clock confirmed."""
    result = tpvprune.prune(
        model, batches(), keep=0.6, of="latency", latency_batch_size=3, latency_runtime="openvino",
        latency_threads=2, repair="none", **options,
    )  # fmt: skip
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
    assert "no branch can go whole: channels alone were pruned" in report["warnings"]


def test_trials_are_counted(timed):
    seen = []
    in_milliseconds(build("residual"), progress=lambda *told: seen.append(told))
    trials = [(done, total) for stage, done, total in seen if stage == "trials of depth"]
    num = len(trials) // 2
    assert num >= 2
    assert trials == [(done, num) for trial in range(num) for done in (trial, trial + 1)]


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def test_a_measured_table_is_kept_and_read_again(tmp_path, monkeypatch, untouched):
    model, x = Wide(), torch.randn(2, 3, 96, 96)  # 16 times the work is more than calls cost
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
    for damage in ("", "[]", '{"format": 2}', '{"format": 0, "layers": {}}'):
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
    monkeypatch.setattr(speed_module, "_PATIENCE", 0.0)
    assert compare_latency(*models, x, rounds=25).rounds == 6
    assert compare_latency(*models, x, rounds=4).rounds == 4


# ---- other runtimes -----------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_turns_in_a_runtime_show_which_model_is_faster(runtime):
    pytest.importorskip(runtime)
    narrow, wide = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 256, 3)
    x = torch.randn(2, 3, 48, 48)
    found = compare_latency(wide, narrow, x, rounds=8, runtime=runtime, num_threads=1)
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.dense_low_ms <= found.dense_ms <= found.dense_high_ms
    assert found.ratio < 0.8
    assert found.runtime == runtime
    assert runtime in found.device
    assert "1 thread" in found.device


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.long
def test_a_table_of_a_runtime_sums_to_the_whole_network(runtime, monkeypatch, untouched):
    pytest.importorskip(runtime)
    model, x = Wide(), torch.randn(1, 3, 16, 16)
    groups = tpvprune.find_groups(model, x, verify=False)
    monkeypatch.setattr(latency, "_SECONDS", 0.001)
    monkeypatch.setattr(latency, "_STEPS", (1,))
    totals = []
    whole = latency._Timer.model
    monkeypatch.setattr(
        latency._Timer, "model", lambda *args: totals.append(whole(*args)) or totals[-1]
    )
    threads = torch.get_num_threads()
    with untouched(model):
        table = latency.measured_table(model, groups, x, runtime=runtime, num_threads=1)
    assert torch.get_num_threads() == threads
    assert (table.runtime, table.num_threads, table.input_shape) == (runtime, 1, (3, 16, 16))
    assert table.layers.keys() == {"conv1", "conv2", "fc"}
    assert cost(groups, {}, table) == pytest.approx(totals[0])


@pytest.mark.parametrize("truth", [(10.0, 7.0), (10.0, 1.0), (10.0, 10.5)])
def test_a_calibrated_table_says_what_was_measured(chain, monkeypatch, truth):
    model, groups = chain
    table = replace(table_of(groups, model, lambda i, o: i * o), ms_per_value=0.5)
    dense_ms, half_ms = truth
    measured = replace(speed(half_ms / dense_ms), dense_ms=dense_ms, pruned_ms=half_ms)
    monkeypatch.setattr(speed_module.Stopwatch, "compare", lambda *_: measured)
    found, _ = latency.calibrated(table, model, groups, batches()[0][:1])
    half = {g.name: torch.arange(g.num_channels) < max(1, g.num_channels // 2) for g in groups}
    assert cost(groups, {}, found) == pytest.approx(dense_ms)
    least = dense_ms * cost(groups, half, table) / cost(groups, {}, table)
    # A constant below 0 there is not, nor channels that cost less than nothing.
    assert cost(groups, half, found) == pytest.approx(min(max(half_ms, least), dense_ms))
    assert found.constant_ms >= 0


def test_a_table_of_another_device_is_taken_at_its_word(chain, monkeypatch):
    model, groups = chain
    x = batches()[0][:1]
    table = replace(
        table_of(groups, model, lambda i, o: i * o), batch_size=4, runtime="onnxruntime",
        device="a board", shapes=latency_file.shapes_digest(model), input_shape=tuple(x.shape[1:]),
    )  # fmt: skip
    monkeypatch.setattr(speed_module.Stopwatch, "compare", None)
    prune = partial(
        tpvprune.prune, model, batches(), keep=0.6, of="latency", repair="none",
        latency_runtime=table,
    )  # fmt: skip
    result = prune()
    found = result.report["speed"]
    assert result.reached
    assert (found["rounds"], found["runtime"], found["device"]) == (0, "table", "a board")
    assert found["batch_size"] == 4
    assert found["pruned_ms"] == pytest.approx(cost(groups, result.kept, table))
    assert found["ratio"] <= 0.6 * (1 + 1e-9)
    json.dumps(result.report)
    twice = prune(steps=2)
    assert twice.report["speed"]["pruned_ms"] == pytest.approx(cost(groups, twice.kept, table))
    with pytest.raises(ValueError, match="expected 4, that of the table, found 2"):
        prune(latency_batch_size=2)
    with pytest.raises(ValueError, match="expected one of this model, found one of another model"):
        prune(latency_runtime=replace(table, shapes="0"))
    with pytest.raises(ValueError, match=r"inputs of 3 x 8 x 8, found one for 3 x 9 x 9"):
        prune(latency_runtime=replace(table, input_shape=(3, 9, 9)))
    with pytest.raises(ValueError, match="only with a budget of latency, found one of macs"):
        prune(of="macs")


def test_runtimes_are_checked():
    prune = partial(tpvprune.prune, build("residual"), batches(), of="latency")
    with pytest.raises(ValueError, match=r"expected one of eager, compile.*found 'tensorrt'"):
        prune(latency_runtime="tensorrt")
    with pytest.raises(ValueError, match="expected at least 1, found 1 and 0"):
        prune(latency_threads=0)


# ---- files ------------------------------------------------------------------------------------


@pytest.fixture
def written(chain, tmp_path):
    model, groups = chain
    table = replace(table_of(groups, model, lambda i, o: i * o), input_shape=(3, 8, 8), model="m")
    latency_file.write_latency_table(tmp_path / "t.json", table)
    return tmp_path / "t.json", table


def test_a_table_is_read_as_it_was_written(written):
    path, table = written
    assert latency_file.read_latency_table(path) == table


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 0), ("batch_size", "x"), ("constant_ms", -1), ("ms_per_value", float("nan")),
        ("device", 3), ("layers", []), ("layers", {"fc": 1}), ("input_shape", 3),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused_in_one_line(written, key, value):
    path, _ = written
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, key: value}))
    with pytest.raises(ValueError, match=r"t\.json: this latency table is damaged") as caught:
        latency_file.read_latency_table(path)
    assert "\n" not in str(caught.value)
    del found[key]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"t\.json: (this latency table|expected a table)"):
        latency_file.read_latency_table(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ins", []), ("outs", [2, 1]), ("ms", [[1.0]]), ("values", -1),
        ("ms", [[float("inf")] * 3] * 5), ("ms", None),
    ],
)  # fmt: skip
def test_a_damaged_layer_is_refused(written, key, value):
    path, _ = written
    found = json.loads(path.read_text())
    found["layers"]["fc"][key] = value
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="this latency table is damaged"):
        latency_file.read_latency_table(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "layers": {}}', "\udcff"])
def test_other_files_are_no_tables(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"t\.json: expected a .*table"):
        latency_file.read_latency_table(path)


@pytest.mark.parametrize(
    ("round_to", "multiple"), [(None, 4), ("auto", 4), (1, 1), (2, 2)], ids=["", "auto", "1", "2"]
)
def test_widths_are_multiples_of_what_the_table_found_unless_others_are_said(round_to, multiple):
    model = build("residual")
    groups = tpvprune.find_groups(model, batches()[0][:1], verify=False)
    table = table_of(groups, model, lambda i, o: i * o, step=4)
    shapes = latency_file.shapes_digest(model)
    table = replace(table, input_shape=tuple(batches()[0].shape[1:]), shapes=shapes)
    limits = None if round_to is None else tpvprune.Limits(round_to=round_to)
    result = tpvprune.prune(
        model, batches(), keep=0.55, of="latency", latency_runtime=table, limits=limits,
        granularity=("channel",), repair="none",
    )  # fmt: skip
    assert result.report["round_to"] == multiple
    narrowed = [g for g in result.report["groups"] if g["kept"] < g["num_channels"] > multiple]
    assert narrowed
    assert all(g["kept"] % multiple == 0 for g in narrowed)
