"""The demonstration, with one short epoch, few images and two of the five rows."""

import argparse
import html
import json

import pytest
import torch

from tpvprune.cli import demo
from tpvprune.cli.entry import main
from tpvprune.passes.evaluation import evaluate
from tpvprune.saved.checkpoint import load_pruned

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    args = argparse.Namespace(
        output=output, overwrite=False, seed=0, json=True, command_line="tpvprune demo"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_ROWS", (demo._ROWS[0], demo._ROWS[3]))
        code, document = demo.run_demo(args, num_images=80, num_epochs=1)
    return output, code, document, args


def test_every_row_meets_the_budget_and_only_taylor_used_labels(finished):
    _, code, document, _ = finished
    dense, *rows = document["comparison"]
    assert code == 0
    assert document["reached"]
    assert not document["used_labels"]
    assert [row["criterion"] for row in rows if row["labels"]] == ["Taylor, rank"]
    assert all(row["macs"] <= 0.4 * dense["macs"] for row in rows)
    assert all(0 <= row["top1"] <= 1 and row["output_variance"] >= 0 for row in rows)


def test_document_has_the_documented_keys(finished):
    _, _, document, _ = finished
    keys = "model dense pruned blocked criterion used_labels keep of seed versions comparison"
    assert set(keys.split()) <= set(document)
    for side in ("dense", "pruned"):
        assert {"macs", "params", "latency_ms", "top1", "agreement"} <= set(document[side])
    assert document["versions"].keys() >= {"python", "torch", "timm", "scikit-learn"}
    json.dumps(document)


def test_saved_model_is_the_first_row(finished):
    output, _, document, _ = finished
    _, held_out = demo._digits(0)
    scored = evaluate(load_pruned(output), [held_out])
    first = document["comparison"][1]
    assert (scored.macs, scored.top1) == (first["macs"], pytest.approx(first["top1"]))
    assert scored.top1 == pytest.approx(document["pruned"]["top1"])


def test_note_says_why_the_saved_row_is_saved_and_what_a_difference_is_worth(finished):
    output, _, document, _ = finished
    rows = document["comparison"][1:]
    best = max(rows, key=lambda row: row["top1"])
    note = document["comparison_note"]
    assert "Saved is 'TPV, joint curves', chosen beforehand and without labels" in note
    if best["top1"] > rows[0]["top1"]:
        assert f"{100 * (best['top1'] - rows[0]['top1']):.1f} points more top-1" in note
        assert best["criterion"] in note
    assert html.escape(note) in (output / "report.html").read_text("utf-8")


def test_noise_is_that_of_the_same_images():
    best, saved = torch.zeros(2, 400, dtype=torch.bool)
    best[:207] = saved[:200] = True
    saved[395:] = True  # 7 images only the one names right, 5 only the other
    error = ((7 + 5) / 400 - (2 / 400) ** 2) ** 0.5 / 400**0.5
    note = demo._why_saved("a", "b", best, saved)
    assert "'b' has 0.5 points more" in note
    assert f"On 400 images the standard error of that difference is {100 * error:.1f}" in note
    assert note.endswith("within noise.")
    saved[:] = False
    assert demo._why_saved("a", "b", best, saved).endswith("more than noise.")
    assert demo._why_saved("a", "a", best, best).endswith("no other row has a higher top-1.")


def test_report_tells_criteria_seed_and_versions(finished):
    output, _, document, _ = finished
    page = (output / "report.html").read_text()
    for text in ("TPV, joint curves", "Taylor, rank", "Cut only", "trained by tpvprune demo"):
        assert text in page
    assert document["versions"]["torch"] in page


def test_terminal_table_fits_80_columns(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    document = {**finished[2], "output": "demo-output"}
    demo._show(document)
    lines = capsys.readouterr().err.splitlines()
    assert "Taylor, rank" in "".join(lines)
    assert max(map(len, lines)) <= 80


def test_a_folder_in_use_is_refused_before_any_work(finished, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", lambda args: pytest.fail("work was done"))
    assert main(["demo", "--output", str(finished[0])]) == 2
    assert "pass --overwrite" in capsys.readouterr().err


def test_split_depends_on_the_seed_and_nothing_is_in_both_parts():
    (first, _), (held_out, labels) = demo._digits(0)
    (again, _), _ = demo._digits(0)
    (other, _), _ = demo._digits(1)
    assert (len(first), len(held_out)) == (900, 897)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(labels.tolist()) == set(range(10))
    both = torch.cat([first, held_out]).flatten(1)
    assert len(both.unique(dim=0)) >= 1797 - 1  # the data set itself may hold a twin


def test_training_is_repeatable_and_learns():
    (images, labels), _ = demo._digits(0)
    models = [demo._subject((images[:128], labels[:128]), 0, 2).model for _ in range(2)]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not models[0].training
