"""benchmarks/own_task.py: every way in equal minutes, rows once, and who is ahead is computed."""

import csv
import importlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from image_cases import write_classes
from safetensors.torch import save_file

from tpvprune import evaluate
from tpvprune.repairs import duration

ROOT = Path(__file__).parents[2]
CLASSES = ["bear", "cat", "dog"]
MODEL = "test_resnet"


@pytest.fixture
def tools(monkeypatch):
    """The script, its ways, and a clock that goes on by a quarter of a second when looked at."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("own_task", "ways", "teachers", "tables", "own_task_chart")
    found = {name: importlib.import_module(name) for name in names}
    now = [0.0]

    def monotonic():
        now[0] += 0.25
        return now[0]

    for module in (found["ways"], duration):
        monkeypatch.setattr(module, "monotonic", monotonic)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("own_task")
    write_classes(root / "train", CLASSES, 12)
    write_classes(root / "test", CLASSES, 4)
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, num_classes=7).state_dict(), root / "weights.safetensors")
    return root


def words(root, output, *more):
    weights = root / "weights.safetensors"
    given = [
        "--model", MODEL, "--checkpoint", weights, "--img-size", 32, "--keep", 0.7,
        "--train-dir", root / "train", "--test-dir", root / "test", "--num-images", 16,
        "-b", 8, "--minutes", 0.2, "--epochs", 1, "--work", root / "work", "--output", output,
        "--smaller", 0.7, MODEL, weights, "mean=0.4", "std=0.3", *more,
    ]  # fmt: skip
    return [str(word) for word in given]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def failed(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.long
def test_every_way_has_the_same_minutes_and_is_measured_once(tools, root, tmp_path, capsys):
    output = tmp_path / "rows.csv"
    assert tools["own_task"].main(words(root, output)) == 0
    rows = {row["way"]: row for row in read(output)}
    assert rows.keys() == tools["ways"].WAYS.keys()
    for way, row in rows.items():
        trained = tools["ways"].WAYS[way] and "int8" not in way
        if trained:  # by the end of a clock that goes on in quarters of a second
            assert 0.2 - 3 / 60 <= float(row["minutes"]) <= 0.2 + 1 / 60, way
        assert (row["training"] == "") == (not tools["ways"].WAYS[way])
        network = rows["smaller + distill"]["macs_kept"] if way == "smaller + distill" else "0.7"
        assert float(row["macs_kept"]) <= (1 if row["keep"] == "1" else float(network))
    assert rows["dense"]["agreement"] == rows["dense"]["held_agreement"] == "100.00"
    assert float(rows["int8"]["mb"]) < float(rows["dense"]["mb"])
    labels = {way: row["labels"] for way, row in rows.items() if row["labels"] != "no"}
    assert labels == tools["ways"].LABELLED
    before = output.read_bytes()
    assert (tmp_path / "rows.json").exists()
    assert tools["own_task"].main(words(root, output)) == 0
    assert output.read_bytes() == before
    capsys.readouterr()
    assert tools["own_task"].main(words(root, output, "--minutes", "9")) == 2
    assert "rows were measured with arguments" in failed(capsys)


def test_the_teacher_is_trained_once_and_no_way_trains_on_what_is_held_back(tools, root, tmp_path):
    args = tools["own_task"].parse(words(root, tmp_path / "rows.csv"))
    first, again = (tools["teachers"].opened(args, 5) for _ in "ab")
    for a, b in zip(first.teacher.parameters(), again.teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    found = evaluate(first.teacher, first.test)
    made = next(tools["ways"].dense(first, 1.0))
    quality = tools["ways"].quality(first, made)
    assert float(quality["top1"]) == pytest.approx(100 * found.top1, abs=0.006)

    def seen(batches):
        return {x.numpy().tobytes() for x in torch.cat(list(batches))}

    held, calibration = seen(first.held), seen(x for x, _ in first.calibration)
    assert (len(held), len(calibration)) == (3, 16)
    assert not held & calibration
    unlabeled, _ = first.training(labelled=False)
    assert all(isinstance(batch, torch.Tensor) for batch in unlabeled)


def test_a_smaller_network_sees_what_it_would_see_by_itself(tools, root, tmp_path):
    args = tools["own_task"].parse(words(root, tmp_path / "rows.csv"))
    task = tools["teachers"].opened(args, 0)
    network = timm.create_model(MODEL, num_classes=3).eval()
    own = tools["ways"]._own_inputs(task, network, {"mean": "0.4", "std": "0.3"})
    pixels = torch.rand(4, 3, 32, 32)
    config = task.preprocessing.config
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    found, expected = own((pixels - mean) / std), network((pixels - 0.4) / 0.3)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ((3.0, 5.0), "the smaller network `b` is ahead of the pruned one: +3.00 ± 1.41 points"),
        ((-1.0, -1.0), "the pruned network is ahead of the smaller one `b`: -1.00 ± 0.00 points"),
        ((-1.0, 2.0), "are not told apart by these seeds: +0.50 ± 2.12 points"),
    ],
)
def test_who_is_ahead_is_computed(tools, theirs, said):
    ours = [{"seed": str(i), "top1": f"{80 + i}", "network": "a"} for i in range(2)]
    base = 80.0 if theirs[0] != 3.0 else 79.0
    rows = [
        {"seed": str(i), "top1": f"{base + i + apart}", "network": "b"}
        for i, apart in enumerate(theirs)
    ]
    assert said in tools["tables"]._verdict("0.7", ours, rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--smaller", "0.7", "x"], "--smaller: expected KEEP NAME CHECKPOINT"),
        (["--training", "pruned=prayer:1"], "--training: expected"),
        (["--training", "labels=logits:1"], "--training: expected"),
        (["--minutes", "0.001", "--seed", "9"], "expected more than cutting"),
    ],
)
def test_bad_input_is_one_line(tools, root, capsys, flags, message):
    ways = ["--ways", "smaller + distill"]
    assert tools["own_task"].main(words(root, root / "rows.csv", *ways, *flags)) == 2
    assert message in failed(capsys)


def test_the_chart_has_a_panel_for_each_share_with_the_best_way_first(tools, tmp_path):
    names = ("keep", "way", "labels", "dense_top1", "top1", "macs_kept", "ms_kept", "mb")
    ways = (("low", 61), ("high & <mighty>", 83))
    lines = [
        (keep, way, "no", 90.0, top1, keep, 0.4 if way == "low" else "", 7.0)
        for keep in (0.5, 0.7)
        for way, top1 in ways
    ]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        whole = [(1, way, "no", 90.0, 90.0, 1, 1, 9.0) for way in ("dense", "int8")]
        table.writerows([names, *whole, *lines, (0.5, "other", "no", 90.0, 60, 0.58, 1, 7.0)])
    root = ElementTree.fromstring(tools["own_task_chart"].chart(path))
    svg = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{svg}text")]
    panels = [text for text in texts if "MACs" in text]
    assert panels == [f"{share} % of the MACs" for share in (100, 70, 50)]
    shown = [text for text in texts if text in dict(ways) or text in ("int8", "other, 58 %")]
    assert shown == ["int8", *["high & <mighty>", "low"] * 2, "other, 58 %"]
    assert texts.count("40 %") == 2
    dots = [float(dot.get("cx")) for dot in root.iter(f"{svg}circle")]
    assert len(dots) == 6 and dots[1] > dots[2] and dots[1:3] == dots[3:5]
