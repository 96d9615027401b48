"""The benchmark: its rows are what prune returns, and a run that was stopped goes on."""

import pytest
import torch
from cases import batches, build

from tpvprune import prune
from tpvprune.benchmark import running as benchmarking
from tpvprune.benchmark.plan import Plan
from tpvprune.benchmark.rows import RANKINGS, key_of
from tpvprune.passes.drawing import drawn_indices
from tpvprune.passes.evaluation import evaluate
from tpvprune.scores.criteria import with_labels

REPAIRS = ("none", "bn", "compensate")


def plan(**changes):
    wanted = {
        "model": "residual", "criteria": ("tpv",), "keeps": (0.6,), "repairs": REPAIRS,
        "rankings": ("curves", "per_cost"), "seeds": (0,), "num_images": 40,
    }  # fmt: skip
    return Plan(**{**wanted, **changes})


def images(_seed):
    return [(x, torch.arange(len(x)) % 3) for x in batches(40, 16)]


def fitted():
    """Return the labelled images that are not held back; a benchmark's criteria see no others."""
    places, _ = drawn_indices(40)
    x, y = (torch.cat(part)[places] for part in zip(*images(0), strict=True))
    return list(zip(x.split(16), y.split(16), strict=True))


def measured(wanted, model, path, monkeypatch):
    """Return the rows, and by the key of each the model that was measured for it."""
    models, last = {}, []

    def watched(model, *args, **kwargs):
        last[:] = [model]
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(benchmarking, "evaluate", watched)
    rows, left_out = benchmarking.run_benchmark(
        wanted, model, images, images(1), path,
        report=lambda row, *_: models.update({key_of(row): last[0]}),
    )  # fmt: skip
    assert not left_out
    return rows, models


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("order", [REPAIRS, REPAIRS[::-1]])
def test_every_row_is_what_prune_returns(order, tmp_path, monkeypatch):
    model = build("residual")
    wanted = plan(criteria=("tpv", "magnitude", "taylor"), repairs=order)
    rows, models = measured(wanted, model, tmp_path / "rows.csv", monkeypatch)
    assert [key_of(row) for row in rows] == wanted.keys()
    assert len(rows) == (2 + 1 + 1) * 3
    # A benchmark compares repairs as they are, also where a user would get a cheaper one.
    monkeypatch.setattr("tpvprune.repairs.guard.best_repair", lambda _, wanted: wanted)
    for row in rows:
        result = prune(
            model, images(0), keep=0.6, criterion=with_labels(row["criterion"], fitted()),
            repair=row["repair"], allocation=RANKINGS[row["ranking"]],
        )  # fmt: skip
        assert equal(models[key_of(row)], result.model), row
        assert row["labels"] == ("yes" if row["criterion"] == "taylor" else "no")


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.long
def test_iterative_rows_go_down_from_cut_to_cut(repair, tmp_path, monkeypatch):
    model = build("residual")
    wanted = plan(keeps=(0.4,), steps=3, rankings=("curves",), repairs=REPAIRS)
    rows, models = measured(wanted, model, tmp_path / "rows.csv", monkeypatch)
    rows = [row for row in rows if row["repair"] == repair]
    assert [float(row["keep"]) for row in rows] == [0.8, 0.6, 0.4]
    assert all(float(row["macs_kept"]) <= float(row["keep"]) + 1e-4 for row in rows)
    pruned, dense_macs = model, evaluate(model, images(1)).macs
    for row in rows:
        share = evaluate(pruned, images(1)).macs / dense_macs
        pruned = prune(
            pruned, images(0), keep=float(row["keep"]) / share, repair="none",
            planned_repair=repair, allocation="curves", repair_factors=False,
        ).model  # fmt: skip
        if repair == "none":
            assert equal(models[key_of(row)], pruned)
        found = models[key_of(row)].state_dict()
        assert {n: t.shape for n, t in found.items() if n.endswith("weight")} == {
            n: t.shape for n, t in pruned.state_dict().items() if n.endswith("weight")
        }


def test_a_run_that_was_stopped_goes_on_and_foreign_rows_are_kept(tmp_path, monkeypatch):
    model, path = build("residual"), tmp_path / "rows.csv"
    few = plan(repairs=("none",))
    rows, _ = measured(few, model, path, monkeypatch)
    again, models = measured(few, model, path, monkeypatch)
    assert again == rows
    assert not models
    more, models = measured(plan(), model, path, monkeypatch)
    assert len(more) == 6
    assert len(models) == 4
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="holds a row that is not asked for"):
        measured(few, model, path, monkeypatch)
    assert path.read_bytes() == kept


def test_labels_reach_only_criteria_that_need_them(tmp_path, monkeypatch):
    model = build("residual")
    poisoned = [(x, object()) for x, _ in images(0)]
    rows, _ = benchmarking.run_benchmark(
        plan(), model, lambda _: poisoned, images(1), tmp_path / "rows.csv", report=lambda *_: None
    )
    clean, _ = measured(plan(), model, tmp_path / "clean.csv", monkeypatch)
    for row, other in zip(rows, clean, strict=True):
        assert {**row, "seconds": ""} == {**other, "seconds": ""}
