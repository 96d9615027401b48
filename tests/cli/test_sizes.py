"""Several sizes from one ranking are those of several runs; a stopped series goes on."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from image_cases import write_images

from tpvprune.cli import pruning
from tpvprune.widths.ranking import RankBy, Ranking


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=6).state_dict(), root / "a.pt")
    torch.save(timm.create_model("test_resnet", num_classes=6).state_dict(), root / "b.pt")
    write_images(root / "images", 40)
    return root


def flags(output, *extra, weights="a.pt"):
    model = ["--model", "test_resnet", "--checkpoint", weights, "--data-dir", "images"]
    fast = ["--img-size", "32", "--crop-pct", "1", "-b", "8", "--num-images", "32"]
    return ["prune", *model, *fast, "--latency-repeats", "0", *extra, "--output", output]


@pytest.fixture
def rankings(monkeypatch):
    """Count how often channels are ranked, and what the repair makes up for is measured."""
    counted, ranked = [], RankBy.ranked

    def counting(*args):
        counted.append(1)
        return ranked(*args)

    monkeypatch.setattr(RankBy, "ranked", counting)
    return counted


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.long
def test_sizes_are_those_of_runs_of_their_own(run, tmp_path, rankings):
    code, out, err = run(*flags(tmp_path / "all", "--keep", "0.8", "0.5", "--json"))
    assert code == 0 and len(rankings) == 1
    assert [r["keep"] for r in json.loads(out)["runs"]] == [0.8, 0.5]
    for keep in ("0.8", "0.5"):
        assert run(*flags(tmp_path / keep, "--keep", keep))[0] == 0
        assert weights_of(tmp_path / keep) == weights_of(tmp_path / "all" / f"keep-{keep}")
    page = (tmp_path / "all" / "comparison.html").read_text("utf-8")
    assert "keep-0.8" in page and "keep-0.5" in page
    assert "keep 0.5: 2 of 2" in err and "agreement" in err
    assert max(len(line) for line in err.splitlines() if "/" not in line) <= 80


def test_a_stopped_series_goes_on_with_what_is_missing(run, tmp_path, monkeypatch, rankings):
    argv = flags(tmp_path / "out", "--keep", "0.8", "0.5")
    one_size, sizes = pruning._pruned, []

    def stop(args, *others):
        if sizes:
            raise KeyboardInterrupt
        sizes.append(args.keep)
        return one_size(args, *others)

    monkeypatch.setattr(pruning, "_pruned", stop)
    assert run(*argv)[0] == 130
    before = (tmp_path / "out" / "keep-0.8" / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(pruning, "_pruned", one_size)
    code, _, err = run(*argv)
    assert code == 0 and "1 of 2 sizes were there already" in " ".join(err.split())
    assert (tmp_path / "out" / "keep-0.8" / "config.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "comparison.html").is_file()
    assert len(rankings) == 1  # that of the finished size serves the other
    # Another command does not take over what this one has left.
    code, _, err = run(*argv, "--seed", "1")
    assert code == 2 and "keep-0.8: expected nothing or a size of this very command" in " ".join(
        err.split()
    )


def test_the_ranking_of_an_earlier_run_serves_another_budget(run, tmp_path, rankings):
    run(*flags(tmp_path / "first", "--keep", "0.8"))
    run(*flags(tmp_path / "alone", "--keep", "0.5"))
    rankings.clear()
    code, _, _ = run(*flags(tmp_path / "again", "--keep", "0.5", "--ranking", tmp_path / "first"))
    assert code == 0 and not rankings
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "alone")
    saved, ranking = (Ranking.load(tmp_path / name) for name in ("again", "first"))
    for name, curve in ranking.curves.items():
        assert torch.equal(saved.curves[name].order, curve.order)
        assert torch.equal(saved.curves[name].variance, curve.variance)
        assert torch.equal(saved.scores[name], ranking.scores[name])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep", "0.5", "0.5"], "--keep: expected different sizes, found one twice"),
        (["--keep", "0.5", "0.50000001"], "--keep: expected different sizes, found one twice"),
        (["--keep", "0.7", "0.5", "--granularity", "weight"], "--keep: expected one size with"),
        (["--ranking", "images"], "images: expected ranking.safetensors of a saved run of `prune`"),
    ],
)
def test_what_does_not_go_together_is_said_before_any_work(run, tmp_path, extra, message):
    code, _, err = run(*flags(tmp_path / "out", *extra))
    assert code == 2 and message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_sizes_go_into_no_folder_of_anything_else(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = run(*flags(tmp_path, "--keep", "0.8", "0.5"))
    assert code == 2
    assert "expected a new folder or one of sizes" in err and "found mine.txt in it" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_ranking_of_other_weights_or_a_damaged_one_is_refused(run, tmp_path):
    run(*flags(tmp_path / "first", "--keep", "0.8"))
    given = ["--ranking", tmp_path / "first"]
    code, _, err = run(*flags(tmp_path / "out", *given, weights="b.pt"))
    assert code == 2 and "ranking: expected one of these weights" in " ".join(err.split())
    path = tmp_path / "first" / "ranking.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, _, err = run(*flags(tmp_path / "out", *given))
    assert code == 2 and re.search("expected a ranking that tpvprune saved", " ".join(err.split()))
    assert not (tmp_path / "out").exists()
