"""Milliseconds of a runtime, or of a table of another device, as a budget on the command line."""

import json
from pathlib import Path

import pytest
import torch
from image_cases import write_images

from tpvprune.cli.entry import main
from tpvprune.widths import latency

MODEL = ["--model", "cifar_resnet20", "--num-classes", "4", "--img-size", "16"]
PRUNE = [
    *("prune", *MODEL, "--data-dir", "flat", "--num-images", "16", "-b", "8", "-j", "1"),
    *("--criterion", "magnitude", "--repair", "none", "--latency-repeats", "0", "--of", "latency"),
]

TABLE = ["--latency-runtime", "table", "--latency-table", "t.json"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, and a table of a model measured for batches of 2."""
    place = tmp_path_factory.mktemp("latency")
    write_images(place / "flat", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(latency, "_SECONDS", 0.001)
        patch.setattr(latency, "_STEPS", (1,))
        argv = ["--latency-batch-size", "2", "--latency-threads", "1", "--output", "t.json"]
        assert main(["latency-table", *MODEL, *argv]) == 0
    return place


@pytest.fixture
def run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def run(*argv):
        code = main([str(part) for part in argv])
        return code, *capsys.readouterr()

    return run


def test_a_table_is_written_and_aimed_at(run, tmp_path):
    table = json.loads(Path("t.json").read_text("utf-8"))
    assert (table["batch_size"], table["num_threads"], table["model"]) == (2, 1, "cifar_resnet20")
    # Of this machine no time enters the test.
    table |= {"device": "a board", "constant_ms": 1.0, "ms_per_value": 0.0, "step": 1}
    for layer in table["layers"].values():
        layer["ms"] = [[i * o for o in layer["outs"]] for i in layer["ins"]]
    (tmp_path / "t.json").write_text(json.dumps(table))
    where = ["--latency-runtime", "table", "--latency-table", tmp_path / "t.json"]
    code, out, err = run(*PRUNE, *where, "--keep", "0.7", "--json", "--output", tmp_path / "out")
    document = json.loads(out)
    assert code == (0 if document["reached"] else 3)
    speed = document["speed"]
    assert (speed["runtime"], speed["device"], speed["rounds"]) == ("table", "a board", 0)
    assert document["dense"]["latency_ms"] == speed["dense_ms"]
    assert document["pruned"]["latency_batch_size"] == 2
    assert "latency, 2 images, table" in err
    assert "by the table of a board" in " ".join(err.split())
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "a board" in page
    assert document["reached"]
    assert speed["ratio"] <= 0.7 * (1 + 1e-9)


@pytest.mark.long
@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_a_runtime_is_measured_and_shown(runtime, run, tmp_path, monkeypatch, capsys):
    if runtime != "eager":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(latency, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(latency, "_SECONDS", 0.001)
    monkeypatch.setattr(latency, "_STEPS", (1,))
    threads = torch.get_num_threads()
    where = ["--latency-runtime", runtime, "--latency-threads", "1"]
    code, out, err = run(*PRUNE, *where, "--keep", "0.95", "--json", "--output", tmp_path / "out")
    document = json.loads(out)
    assert torch.get_num_threads() == threads
    speed = document["speed"]
    assert code == (0 if speed["ratio"] <= 0.95 else 3)
    assert document["reached"] == (speed["ratio"] <= 0.95)
    assert speed["runtime"] == document["pruned"]["latency_runtime"] == runtime
    assert document["pruned"]["latency_ms"] == speed["pruned_ms"]
    low, high = document["pruned"]["latency_range_ms"]
    assert 0 < low <= document["pruned"]["latency_ms"] <= high
    where = "latency, 1 image" + ("" if runtime == "eager" else f", {runtime}")
    (line,) = (line for line in err.splitlines() if line.startswith(f"{where} "))
    # The ratio that the budget is about is the one and only one that is shown.
    ratio = f"{speed['ratio']:.3f}"
    assert line.split()[-1] == ratio
    assert f"ratio {ratio} (quartiles" in " ".join(err.split())
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f"{100 * speed['ratio']:.1f}\u202f% of" in page
    assert main(["compare", *[str(tmp_path / "out")] * 2, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["share"]["latency"] == speed["ratio"]
    assert f"quartiles {document['dense']['latency_range_ms'][0]:.2f} to " in " ".join(err.split())
    assert f"{low:.2f} to {high:.2f} ms pruned" in " ".join(err.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--latency-runtime", "table"], "--latency-runtime table and --latency-table F together"),
        (["--latency-table", "t.json"], "--latency-runtime table and --latency-table F together"),
        (["--latency-runtime", "table", "--latency-table", "none"], "none: no such file"),
        (["--of", "macs", "--latency-threads", "1"], "--latency-threads: expected only with --of"),
        (
            ["--of", "params", "--latency-runtime", "onnxruntime"],
            "--latency-runtime: expected only with --of latency, found --of params",
        ),
        (
            [*TABLE, "--img-size", "24"],
            "expected one for inputs of 3 x 24 x 24, found one for 3 x 16 x 16",
        ),
        (
            [*TABLE, "--model", "test_resnet"],
            "expected one of this model, found one of cifar_resnet20",
        ),
        (
            [
                "--latency-runtime",
                "table",
                "--latency-table",
                "t.json",
                "--latency-batch-size",
                "3",
            ],
            "expected 2, that of the table, found 3",
        ),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(run, argv, message):
    code, _, err = run(*PRUNE, *argv, "--output", "out")
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert message in last
    assert last.startswith("tpvprune: error: ")


def test_a_table_that_is_there_stays(run):
    code, _, err = run("latency-table", *MODEL, "--output", "t.json")
    assert code == 2
    assert "exists already" in err
