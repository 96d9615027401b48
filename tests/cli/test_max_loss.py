"""`prune --max-loss`: the smallest model within a limit, on images that nothing else has seen."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from image_cases import write_classes, write_images

from tpvprune import load_pruned
from tpvprune.cli import pruning
from tpvprune.passes.loss import Losses
from tpvprune.widths.ranking import RankBy


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("within")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    with torch.no_grad():  # or else it would choose one class for all of this noise
        model.fc.bias -= model(2 * torch.rand(64, 3, 32, 32) - 1).mean(0)
    torch.save(model.state_dict(), root / "a.pt")
    write_images(root / "images", 60)
    write_images(root / "few", 5)
    write_classes(root / "labelled", ["a", "b", "c"], 10)
    return root


def flags(output, *extra, images="images"):
    model = ["--model", "test_resnet", "--checkpoint", "a.pt", "--data-dir", images]
    fast = ["--img-size", "32", "--crop-pct", "1", "-b", "8", "--num-images", "32"]
    return ["prune", *model, *fast, "--latency-repeats", "0", *extra, "--output", output]


@pytest.fixture
def seen(monkeypatch):
    """Note how often channels are ranked, and what each part of a run is shown."""
    notes = {"ranked": 0, "measured": [], "fit": []}
    ranked, of = RankBy.ranked, Losses.of

    def ranking(*args):
        notes["ranked"] += 1
        return ranked(*args)

    class Sizes(pruning.Sizes):
        def __init__(self, model, batches, **options):
            notes["fit"] += batches
            super().__init__(model, batches, **options)

    def measured(losses, model):
        notes["measured"].append(list(losses._inputs))
        return of(losses, model)

    monkeypatch.setattr(RankBy, "ranked", ranking)
    monkeypatch.setattr(pruning, "Sizes", Sizes)
    monkeypatch.setattr(Losses, "of", measured)
    return notes


def rows(batches):
    return {row.numpy().tobytes() for batch in batches for row in batch}


def test_the_smallest_size_within_the_limit_is_saved(run, tmp_path, seen):
    code, out, err = run(*flags(tmp_path / "out", "--max-loss", "10", "--json"))
    document = json.loads(out)
    quality = document["quality"]
    assert code == 0 and quality["met"] and document["reached"] and seen["ranked"] == 1
    sizes = {size["keep"]: size["loss"]["points"] for size in quality["sizes"]}
    assert len(sizes) == 5 and min(sizes.values()) <= 10 < max(sizes.values())
    assert document["keep"] == min(keep for keep, lost in sizes.items() if lost <= 10)
    assert quality["promised"]["points"] == sizes[document["keep"]]
    # Decided on one half, judged and shown on the other; neither is fitted to.
    *deciding, judging = map(rows, seen["measured"])
    assert all(found == deciding[0] for found in deciding)
    assert len(deciding[0]) == len(judging) == 14  # 60 images, 32 of them to prune with
    fit = rows(seen["fit"])
    assert len(fit) == 32 and not (deciding[0] & judging) | (fit & (deciding[0] | judging))
    lost = 1 - quality["measured"]["points"] / 100
    assert document["pruned"]["agreement"] == pytest.approx(lost)
    assert document["images"]["agreement_on"] == "14 held-back images"
    text = " ".join(err.split())
    assert "at most 10 points of agreement lost: kept" in text and "size 1 of at most 5" in text
    assert "14 images decide, which leaves an interval of" in text
    assert max(len(line) for line in err.splitlines() if "/" not in line) <= 80
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Sizes tried" in page and "took no part" in page
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_limit_that_no_size_keeps_is_said(run, tmp_path, monkeypatch):
    of = Losses.of

    def always(losses, model):
        return type(of(losses, model)).of_agreement(9, 14)

    monkeypatch.setattr(Losses, "of", always)
    argv = flags(tmp_path / "out", "--max-loss", "3", "--repair", "none", "--json")
    code, out, err = run(*argv)
    document, text = json.loads(out), " ".join(err.split())
    assert code == 3 and not document["reached"] and document["keep"] == 1 - 2**-5
    assert "even keep 0.96875, the largest size tried, loses 64.29 points, more than 3" in text
    assert "NOT KEPT" in text and "budget not reached" not in text
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "The limit of loss was not kept" in page and "budget was not reached" not in page


@pytest.mark.long
def test_labelled_images_decide_by_top_1_and_reach_nothing_else(run, tmp_path, seen):
    given = ["--max-loss", "30", "--eval-dir", "labelled", "--json"]
    code, out, err = run(*flags(tmp_path / "out", *given))
    document = json.loads(out)
    quality = document["quality"]
    assert code in {0, 3} and quality["of"] == "top-1" and not document["used_labels"]
    assert quality["promised"]["num_images"] == quality["measured"]["num_images"] == 15
    lost = 100 * (document["dense"]["top1"] - document["pruned"]["top1"])
    assert quality["measured"]["points"] == pytest.approx(lost)
    assert "labels chose between sizes alone" in " ".join(err.split())
    keep = ["--keep", document["keep"]]
    assert run(*flags(tmp_path / "alone", *keep))[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "alone")]
    assert weights[0] == weights[1]


def test_a_stopped_search_keeps_its_ranking(run, tmp_path, monkeypatch, seen):
    argv = flags(tmp_path / "out", "--max-loss", "10")
    of, calls = Losses.of, []

    def stop(losses, model):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return of(losses, model)

    monkeypatch.setattr(Losses, "of", stop)
    assert run(*argv)[0] == 130 and not (tmp_path / "out").exists()
    assert run(*argv)[0] == 0 and seen["ranked"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep", "0.5", "--max-loss", "1"], "--max-loss: not allowed with argument --keep"),
        (["--max-loss", "0"], "--max-loss: expected points above 0 and below 100, found '0'"),
        (["--max-loss", "1", "--granularity", "2:4"], "--max-loss: expected channels, heads"),
        (["--max-loss", "1", "--repair", "distill"], "--max-loss: expected a repair without"),
        (["--max-loss", "1", "--data-dir", "few"], "few: expected at least 8 images, some of"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, tmp_path, extra, message):
    code, _, err = run(*flags(tmp_path / "out", *extra))
    assert code == 2 and message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_branches_go_within_a_limit(run, tmp_path, seen):
    argv = flags(tmp_path / "out", "--max-loss", "40", "--granularity", "branch", "--json")
    code, out, err = run(*argv, "--max-depth-removed", "1")
    document = json.loads(out)
    assert (code == 0) == document["quality"]["met"]
    assert seen["ranked"] == 1  # once for all sizes
    assert sum(b["gone"] for b in document["branches"]) > 0
    assert "branches removed" in err
    assert load_pruned(tmp_path / "out")


def test_a_plan_says_how_many_sizes_are_tried(run, tmp_path):
    code, out, err = run(*flags(tmp_path / "out", "--max-loss", "10", "--dry-run", "--json"))
    document, text = json.loads(out), " ".join(err.split())
    assert code == 0 and document["keep"] is None and document["max_loss"] == 10
    assert "at most 10 points of agreement lost: up to 5 sizes" in text
    assert "28 images more decide and judge" in text


TWO_OUTPUTS = """
import timm, torch

class TwoOutputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = timm.create_model("test_resnet", num_classes=3, checkpoint_path="a.pt")

    def forward(self, x):
        found = self.body(x)
        return {"a": 0 * found + torch.tensor([1.0, 0.0, 0.0]), "b": found}
"""


def test_the_output_that_counts_decides_and_judges(run, root, monkeypatch):
    """The agreement of another, which here no cut changes, says nothing of it."""
    (root / "two_outputs.py").write_text(TWO_OUTPUTS)
    monkeypatch.syspath_prepend(root)
    argv = ["prune", "--model", "two_outputs:TwoOutputs", "--data-dir", "images", "--outputs", "b"]
    argv += [
        "--img-size",
        "32",
        "-b",
        "8",
        "--num-images",
        "32",
        "--latency-repeats",
        "0",
        "--json",
    ]
    argv += ["--repair", "none", "--max-loss", "5", "--output", "two"]
    _, out, _ = run(*argv)
    document = json.loads(out)
    lost = document["quality"]["measured"]["points"]
    assert document["pruned"]["agreement"] == pytest.approx(1 - lost / 100)
    assert any(size["loss"]["points"] for size in document["quality"]["sizes"])
    code, _, err = run(*argv, "--repair", "distill", "--output", "none")
    assert code == 2
    assert "a repair that tells outputs apart, found --repair distill" in " ".join(err.split())
