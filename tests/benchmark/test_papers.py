"""benchmarks/papers.py: intervals are the bootstrap's, verdicts follow them, rows are resumed."""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # Draws cost time; what is checked here does not need many.
    monkeypatch.setattr(importlib.import_module("paper_statistics"), "NUM_DRAWS", 40)
    return importlib.import_module


def mean(rows):
    return statistics.mean(row["x"] for row in rows)


def alone(row):
    """Every row a unit of its own."""
    return id(row)


def test_intervals_are_quantiles_over_all_sets_that_can_be_drawn(load):
    rows = [{"x": x} for x in (0.0, 1.0, 3.0, 8.0, 9.0)]
    every = sorted(map(mean, itertools.product(rows, repeat=5)))
    ends = [every[round(q * (len(every) - 1))] for q in (0.025, 0.975)]
    bias = statistics.median(every) - 4.2
    found = load("paper_statistics").bootstrap(rows, mean, unit=alone, num_draws=4000)
    assert found.value == 4.2
    assert found.low == pytest.approx(min(ends[0], ends[0] - bias), abs=0.3)
    assert found.high == pytest.approx(max(ends[1], ends[1] - bias), abs=0.3)


values = st.lists(st.integers(-3, 3), min_size=9, max_size=9)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values, values)
def test_an_interval_contains_its_figure_whatever_repeats_and_ties(load, xs, ys):
    tool = load("paper_statistics")
    rows = [{"x": x, "y": y, "way": i % 3} for i, (x, y) in enumerate(zip(xs, ys, strict=True))]
    for unit, within in ((alone, ()), (lambda r: r["way"], ()), (alone, ("way",))):
        how = {"unit": unit, "within": within}
        found = tool.correlation(rows, "x", "y", **how)
        assert math.isnan(found.value) or found.low <= found.value <= found.high
        if math.isfinite(found.low):
            assert -1 <= found.low <= found.high <= 1
        found = tool.bootstrap(rows, tool.quantile(lambda r: r["x"], 0.95), **how)
        assert found.low <= found.value <= found.high


def test_an_interval_contains_its_figure_where_every_draw_misses_it(load):
    # In order, four sizes of three each: repeats can only make the rank correlation stronger.
    rows = [{"x": size, "y": 3.0 * size + seed} for size in range(4) for seed in range(3)]
    found = load("paper_statistics").correlation(rows, "x", "y", unit=alone, within=("x",))
    assert found.value == pytest.approx((11.25 / (143 / 12)) ** 0.5)
    assert found.low < found.value < found.high <= 1


def test_units_are_drawn_whole_and_within_each_way(load):
    tool = load("paper_statistics")
    rows = [{"way": way, "x": 100.0 * way + seed} for way in range(3) for seed in range(2 + way)]

    def checked(drawn):
        assert [sum(r["way"] == w for r in drawn) for w in range(3)] == [2, 3, 4]
        return mean(drawn)

    tool.bootstrap(rows, checked, unit=alone, within=("way",), num_draws=50)
    same = tool.bootstrap(
        [{"way": w, "x": w} for w in (0, 0, 5, 5)], mean, unit=alone, within=("way",)
    )
    assert (same.low, same.value, same.high) == (2.5, 2.5, 2.5)

    def whole(drawn):
        counts = [sum(r["way"] == w for r in drawn) for w in range(3)]
        assert [count % (2 + w) for w, count in enumerate(counts)] == [0, 0, 0]
        assert sum(count // (2 + w) for w, count in enumerate(counts)) == 3
        return mean(drawn)

    tool.bootstrap(rows, whole, unit=lambda r: r["way"], num_draws=50)


def test_seeds_that_are_all_alike_tell_no_more_than_one(load):
    tool = load("paper_statistics")
    one = networks(8, lambda i: 1.0)
    three = [row | {"seed": seed} for row in one for seed in range(3)]
    for key in ("sharpness", "channel_tpv"):
        found = [tool.correlation(rows, key, "cut_top1") for rows in (one, three)]
        assert found[0] == pytest.approx(found[1])


def test_a_network_of_several_sets_counts_once(load):
    tool, papers = load("paper_statistics"), load("papers")
    claims, prediction = load("paper_claims"), load("paper_prediction")
    rows = networks(8, lambda i: 1.0 + 0.1 * (i % 3))
    twice = [*rows, *(row | {"set": "another"} for row in rows[:5])]
    assert tool.distinct(twice) == rows
    assert prediction.predictions(twice) == prediction.predictions(rows)
    assert [*claims.tpv(twice)] == [*claims.tpv(rows)]
    assert "8 small networks of 8 configurations" in papers.page("", twice)


def test_too_few_networks_have_no_interval(load):
    tool = load("paper_statistics")
    rows = [{"way": 0, "x": 1.0}, {"way": 1, "x": 2.0}]
    seeds = [row | {"seed": seed} for row in networks(2, lambda i: 1.0) for seed in range(5)]
    for found in (
        tool.bootstrap(rows, mean, unit=alone),
        tool.bootstrap(rows, mean, unit=alone, within=("way",)),
        tool.correlation(seeds, "sharpness", "cut_top1"),
    ):
        assert (found.low, found.high) == (-math.inf, math.inf)
        assert tool.Bound("mean", found, least=0).verdict == "undecided"
        assert "no interval" in str(found)
    flat = [{"x": 1.0, "y": float(y)} for y in range(5)]
    found = tool.correlation(flat, "x", "y", unit=alone)
    assert math.isnan(found.value)
    assert not math.isfinite(found.high)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.7, 0.9, "held"), (0.1, 0.6, "not held"), (0.6, 0.8, "undecided"), (0.9, 1.2, "undecided"),
     (1.2, 1.3, "not held"), (0.1, 1.3, "undecided")],
)  # fmt: skip
def test_an_interval_that_crosses_a_threshold_decides_nothing(load, low, high, expected):
    tool = load("paper_statistics")
    bound = tool.Bound("slope", tool.Interval((low + high) / 2, low, high), 0.7, 1.0)
    assert bound.verdict == expected
    sure = tool.Bound("other", tool.Interval(0.0, 0.0, 0.0), most=1.0)
    assert tool.verdict([sure, bound]) == expected
    assert tool.verdict([sure]) == "held"
    assert (bound.needs, sure.needs) == ("slope 0.7 to 1", "other ≤ 1")


def networks(num, ratio, arch="resnet8"):
    """Rows in which channel TPV tells the agreement, and nothing else tells anything."""
    generator = torch.Generator().manual_seed(num)
    names = [
        *("tpv_train", "normalized_train", "path_norm", "sharpness", "pac_bayes_origin"),
        *("input_lipschitz", "log_radius", "train_loss", "test_error", "test_loss"),
        *("normalized_test", "cut_top1", "compensated_top1"),
    ]
    models = importlib.import_module("paper_models")
    way = asdict(models.Way("resnet", arch=arch))
    rows = []
    for i in range(num):
        values = torch.rand(len(names), generator=generator).tolist()
        row = dict(zip(names, values, strict=True)) | way | {"lr": float(i)}
        row["channel_tpv"] = float(i)
        row["tpv_test"] = row["tpv_train"] * ratio(i)
        row |= {"cut_agreement": 1 / (1 + i), "compensated_agreement": 1 / (2 + i)}
        rows.append(row | {"images": "some", "train_error": 0.5})
    return rows


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(lambda i: 1.0, "held"), (lambda i: 1.5, "not held"), (lambda i: 1.2 - 0.2 * (i > 0), None)],
)
def test_the_stability_claim_is_held_where_it_is_true(load, ratio, expected):
    lines = load("paper_claims").claims(networks(12, ratio), [])
    (line,) = [line for line in lines if "equals TPV on test images" in line.claim]
    assert line.verdict == (expected or "undecided")
    assert line.needs == "5 % quantile ≥ 0.85; 95 % quantile ≤ 1.15"


def test_the_measure_that_tells_of_pruning_is_found(load):
    tool = load("paper_prediction")
    found = tool.predictions(networks(20, lambda i: 1.0))
    networks_of, measure, figures = found[0]
    assert (networks_of, measure) == ("some (resnet8), 20 of 20", "channel_tpv")
    assert figures["cut_agreement"] == pytest.approx((-1.0, -1.0, -1.0))
    assert len(found) == len(tool.MEASURES)
    assert tool.table(found).count("\n") == 1 + len(tool.MEASURES)
    unfitted = networks(20, lambda i: 1.0, "chain")
    assert math.isnan(tool.predictions(unfitted)[0][2]["cut_agreement"].value)


def test_every_measure_of_a_network_is_taken_once(load, tmp_path, monkeypatch, capsys):
    papers, models = load("papers"), load("paper_models")
    some = [models.Way("init", seed=seed, num_train=125, max_epochs=3) for seed in range(3)]
    monkeypatch.setattr(papers, "ways", lambda seeds: some[:seeds])
    taught = [{"keep": keep, "length": 1.5 - keep} for keep in (0.4, 0.8)]
    monkeypatch.setattr(
        papers, "distilled", lambda images, seed: [row | {"seed": seed} for row in taught]
    )
    page = tmp_path / "claims.md"
    words = ["--output", str(tmp_path), "--docs", str(page)]
    with torch.random.fork_rng():
        assert papers.main(["--seeds", "2", *words]) == 0
        first = (tmp_path / papers.MODELS).read_text()
        assert len(first.splitlines()) == 3
        assert papers.main(["--seeds", "3", *words]) == 0
        text = (tmp_path / papers.MODELS).read_text()
        assert text.startswith(first)
        assert len(text.splitlines()) == 4
        assert len((tmp_path / papers.STUDENTS).read_text().splitlines()) == 7
        monkeypatch.setattr(papers, "measured", None)  # nothing is left to do
        monkeypatch.setattr(papers, "distilled", None)
        assert papers.main(["--seeds", "3", *words]) == 0
        claims, whole = tmp_path / "papers-claims.csv", page.read_text("utf-8")
        known, made_with = claims.read_text(), (tmp_path / "papers.json").read_text()
        for path in (claims, page):
            path.unlink()
        assert papers.main(["--rows-only", *words]) == 0
        assert (claims.read_text(), page.read_text("utf-8")) == (known, whole)
        assert (tmp_path / "papers.json").read_text() == made_with
    out = capsys.readouterr().out
    assert "| paper | claim | measured | needs | verdict |" in out
    assert "## Which measure tells what pruning will do?" in page.read_text("utf-8")
    (tmp_path / papers.MODELS).write_text("images,set\ndigits,init\n")
    assert papers.main(words) == 2
    assert "it is older: move it away" in capsys.readouterr().err
    (tmp_path / papers.MODELS).unlink()
    assert papers.main(["--rows-only", *words]) == 2
    assert "expected rows of an earlier run, found none" in capsys.readouterr().err


def test_a_network_whose_layers_died_is_left_out(load, tmp_path, monkeypatch, capsys):
    papers, models = load("papers"), load("paper_models")

    def dead(images, way):
        model = models.network(images, way).eval()
        torch.nn.init.zeros_(model[-3].weight)
        return model, models.Trajectory(model, images.train[0][:2]), images.train, 1

    monkeypatch.setattr(models, "trained", dead)
    args = papers.parse(["--output", str(tmp_path)])
    with torch.random.fork_rng():
        assert papers.taken(args, models.digits(), [models.Way("init")]) == []
    assert "its outputs do not depend on the image" in capsys.readouterr().out
    assert not (tmp_path / papers.MODELS).exists()
