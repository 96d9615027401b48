"""benchmarks/photographs.py: its rows are what prune gives, and a run that was stopped goes on."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from image_cases import write_classes, write_images

from tpvprune import evaluate, prune
from tpvprune.benchmark.rows import read_rows

ROOT = Path(__file__).parents[2]
CLASSES = ["0000", "0001", "0002"]
MODEL = "test_resnet"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("photographs")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photographs to prune with and, in two sets, to measure on; labels apart from the former."""
    root = tmp_path_factory.mktemp("photographs")
    write_images(root / "calib", 24, size=40)
    lines = [f"{i:04d}.png\t{i % 3}" for i in range(24)]
    (root / "labels.tsv").write_text("\n".join(lines))
    write_classes(root / "first", CLASSES, 5)
    write_classes(root / "second", CLASSES[1:], 2)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, num_classes=3).state_dict(), root / "weights.pt")
    return root


def words(root, output, *more, tests=("first:0.9", "second")):
    given = [
        "--model", MODEL, "--checkpoint", root / "weights.pt", "--img-size", 32,
        "--calib-dir", root / "calib", "--class-map", root / "classes.txt", "--num-images", 20,
        "--threads", 1, "--keep", 0.7, "--output", output,
        "--test-dir", *(root / name for name in tests), *more,
    ]  # fmt: skip
    return [str(word) for word in given]


def failed(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_rows_are_what_prune_gives_on_all_sets_together(tool, root, tmp_path, capsys):
    output = tmp_path / "rows.csv"
    assert tool.main(words(root, output, "--criteria", "tpv", "--repair", "bn")) == 0
    rows = read_rows(output)
    assert [row["ranking"] for row in rows] == ["curves", "per_cost"]
    args = tool.parse(words(root, output))
    subject = tool.opened(args)
    batches = tool.calibration(args, subject.model, 0, labelled=False)
    assert sum(map(len, batches)) == 20
    result = prune(subject.model, batches, keep=0.7, repair="bn")
    found = [evaluate(result.model, test.batches, dense=subject.model) for test in subject.tests]
    assert [one.num_images for one in found] == [15, 4]
    dense = [evaluate(subject.model, test.batches).top1 for test in subject.tests]
    assert [test.top1 for test in subject.tests] == pytest.approx(dense)
    for name in ("top1", "agreement"):
        right = sum(one.num_images * getattr(one, name) for one in found)
        assert float(rows[0][name]) == pytest.approx(100 * right / 19, abs=0.006)
    by_set = f"first {100 * found[0].top1:.2f}; second {100 * found[1].top1:.2f}"
    assert rows[0]["top1_by_set"] == by_set
    assert 0.5 < float(rows[0]["macs_kept"]) <= 0.7
    assert rows[0]["images_used"]
    assert rows[0]["test_sets"] == "first:0.9; second"
    out = capsys.readouterr().out
    assert "| `test_resnet` | bn | 20 | " in out
    assert "TPV, ranked" in out


def test_a_run_that_was_stopped_goes_on(tool, root, tmp_path, monkeypatch):
    output = tmp_path / "rows.csv"
    first = words(root, output, "--criteria", "magnitude", "--repair", "none")
    assert tool.main(first) == 0
    rows = read_rows(output)
    assert tool.main([*first, "bn", "--seeds", "2"]) == 0
    more = read_rows(output)
    assert more[:1] == rows
    assert [(row["seed"], row["repair"]) for row in more] == [
        ("0", "none"), ("0", "bn"), ("1", "none"), ("1", "bn")
    ]  # fmt: skip
    monkeypatch.setattr(tool, "opened", None)  # nothing is left to do
    assert tool.main([*first, "bn", "--seeds", "2"]) == 0
    assert read_rows(output) == more


def test_rows_of_other_settings_and_other_files_are_refused(tool, root, tmp_path, capsys):
    output = tmp_path / "rows.csv"
    more = ("--criteria", "magnitude", "--repair", "none")
    assert tool.main(words(root, output, *more)) == 0
    kept = output.read_bytes()
    capsys.readouterr()
    assert tool.main(words(root, output, *more, tests=("first",))) == 2
    assert "measured with test_sets 'first:0.9; second', found 'first'" in failed(capsys)
    assert output.read_bytes() == kept
    output.write_text("a,b\n1,2\n")
    assert tool.main(words(root, output, *more)) == 2
    assert "expected rows of photographs.py" in failed(capsys)


def test_labels_come_from_a_file_and_only_for_those_who_ask(tool, root, tmp_path, capsys):
    labels = ("--calib-labels", root / "labels.tsv")
    args = tool.parse(words(root, tmp_path / "rows.csv", *labels))
    flags = importlib.import_module("photograph_flags")
    assert set(tool.plan_of(args).criteria) == {*flags.UNLABELED, *flags.LABELLED}
    subject = tool.opened(args)
    pairs = tool.calibration(args, subject.model, 0, labelled=True)
    plain = tool.calibration(args, subject.model, 0, labelled=False)
    assert all(torch.equal(x, y) for (x, _), y in zip(pairs, plain, strict=True))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:20]
    assert torch.cat([y for _, y in pairs]).tolist() == (order % 3).tolist()

    broken = tmp_path / "labels.tsv"
    lines = (root / "labels.tsv").read_text().splitlines()
    for text, message in (
        ("\n".join(lines[:-1]), "expected a line for 0023.png, found none"),
        ("0000.png 3", "expected a file name, a tab and a class index"),
    ):
        broken.write_text(text)
        more = ("--criteria", "taylor", "--calib-labels", broken)
        assert tool.main(words(root, tmp_path / "rows.csv", *more)) == 2
        assert message in failed(capsys)


@pytest.mark.long
def test_criteria_of_others(tool, root, tmp_path):
    output, criteria = tmp_path / "rows.csv", ("taylor", "tp:magnitude", "tp:taylor")
    labels = ("--calib-labels", root / "labels.tsv")
    more = ("--criteria", *criteria, "--repair", "compensate")
    assert tool.main(words(root, output, *labels, *more)) == 0
    rows = read_rows(output)
    assert [row["criterion"] for row in rows] == list(criteria)
    for row in rows:
        assert row["labels"] == ("no" if row["criterion"] == "tp:magnitude" else "yes")
        assert float(row["macs_kept"]) <= 0.7


def test_what_does_not_fit_is_left_out_and_said(tool, root, tmp_path, capsys):
    output = tmp_path / "rows.csv"
    more = ("--criteria", "magnitude", "tp:magnitude", "--repair", "none", "--keep", "0.01")
    assert tool.main(words(root, output, *more)) == 0
    assert "left out: tp:magnitude, torch_pruning, none: " in capsys.readouterr().err
    assert [row["criterion"] for row in read_rows(output)] == ["magnitude"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", MODEL], "--calib-dir is required"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["--summary", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_wrong_arguments_are_one_line(tool, argv, message, capsys):
    assert tool.main(argv) == 2
    assert message in failed(capsys)


def test_some_of_the_test_images_are_the_same_for_every_seed(tool, root, tmp_path):
    whole, some, other = (
        tool.opened(tool.parse(words(root, tmp_path / "rows.csv", *more))).tests[0].batches
        for more in ((), ("--num-test", 4), ("--num-test", 4, "--seed", 7))
    )
    (drawn, labels), all_inputs = some[0], torch.cat([x for x, _ in whole])
    assert torch.equal(drawn, other[0][0])
    assert len(labels) == 4
    assert all(any(torch.equal(x, y) for y in all_inputs) for x in drawn)


def test_crops_are_told_from_paths(tool):
    assert tool.with_crop("a/b.tar:0.987") == ("a/b.tar", 0.987)
    assert tool.with_crop("a/b.tar") == ("a/b.tar", None)
    assert tool.with_crop("C:/photos") == ("C:/photos", None)


@pytest.mark.long
def test_tables_are_made_from_the_results(tool, root, tmp_path, monkeypatch, capsys):
    tables = importlib.import_module("photograph_tables")
    output = tmp_path / "photographs-test_resnet.csv"
    more = ("--criteria", "tpv", "magnitude", "--repair", "none", "bn", "--keep", "0.8", "0.6")
    assert tool.main(words(root, output, *more)) == 0
    shutil.copy(output, tmp_path / "elsewhere.csv")
    printed = capsys.readouterr().out
    assert tool.main(["--summary", str(output)]) == 0
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = {(r["repair"], r["criterion"], r["ranking"], r["keep"]): r for r in read_rows(output)}
    row = rows["bn", "tpv", "curves", "0.6"]
    loss = float(row["top1"]) - float(row["dense_top1"])
    head, _, _, line = tables.photographs().splitlines()
    assert head == "| network | repair | images | dense | 0.8 of MACs | 0.6 of MACs |"
    assert line.startswith(f"| `test_resnet` | bn | 20 | {row['dense_top1']} | ")
    assert line.endswith(f"{row['top1']} ({loss:+.1f}) |")
    head, _, *lines = tables.photographs_criteria().splitlines()
    assert head == "| repair | criterion | labels | `test_resnet` 0.8 | `test_resnet` 0.6 |"
    assert [line.split(" | ")[0] for line in lines] == ["| none"] * 3 + ["| bn"] * 3
    (line,) = [line for line in lines if line.startswith("| bn | TPV, curves | no |")]
    assert line.endswith(f" {loss:+.1f} |")


def test_a_budget_of_milliseconds_says_what_share_of_them_and_which_branches(tool, root, tmp_path):
    output = tmp_path / "rows.csv"
    more = ["--criteria", "tpv", "--ranking", "curves", "--repair", "bn", "--of", "latency"]
    more += ["--granularity", "channel,branch", "--latency-batch-size", "2"]
    assert tool.main(words(root, output, *more)) == 0
    (row,) = read_rows(output)
    told = re.fullmatch(r"([0-9.]+) \(([0-9.]+) to ([0-9.]+)\)", row["latency_kept"])
    ratio, low, high = map(float, told.groups())
    assert 0 < low <= ratio <= high
    gone, found = map(int, row["branches_removed"].split(" of "))
    assert 0 <= gone <= found == 2
    assert row["arguments"].endswith("granularity channel,branch; of latency; latency_batch_size 2")
    tool.main(words(root, tmp_path / "macs.csv", *more[:6]))
    (row,) = read_rows(tmp_path / "macs.csv")
    assert (row["latency_kept"], row["branches_removed"]) == ("", "")


def test_a_ranking_that_is_kept_serves_another_granularity(tool, root, tmp_path, monkeypatch):
    more = ["--criteria", "tpv", "--ranking", "curves", "--repair", "bn"]
    shallow = [*more, "--granularity", "channel,branch"]
    assert tool.main(words(root, tmp_path / "new.csv", *shallow)) == 0
    kept = ["--rankings", str(tmp_path / "rankings")]
    assert tool.main(words(root, tmp_path / "first.csv", *more, *kept)) == 0
    assert len(list((tmp_path / "rankings").iterdir())) == 1

    def no_ranking(*_):
        raise AssertionError("ranked again")

    monkeypatch.setattr("tpvprune.widths.ranking.RankBy.ranked", no_ranking)
    assert tool.main(words(root, tmp_path / "second.csv", *shallow, *kept)) == 0
    (found,), (expected,) = map(read_rows, (tmp_path / "second.csv", tmp_path / "new.csv"))
    for name in ("macs_kept", "top1", "agreement", "variance_ratio", "branches_removed"):
        assert found[name] == expected[name]
    with pytest.raises(AssertionError, match="ranked again"):
        tool.main(words(root, tmp_path / "third.csv", *shallow, *kept, "--seed", "1"))
    monkeypatch.setattr("photograph_flags._code", lambda: "of another version")
    with pytest.raises(AssertionError, match="ranked again"):
        tool.main(words(root, tmp_path / "fourth.csv", *shallow, *kept))
