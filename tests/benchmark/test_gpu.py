"""benchmarks/gpu.py: its code runs without a GPU, and its checks can fail."""

import importlib
from pathlib import Path

import pytest
import torch
from simulated_device import DEVICE, simulated_device

ROOT = Path(__file__).parents[2]
TINY = ["--model", "test_resnet:32", "--check-model", "test_resnet:32", "--num-images", "4",
        "--batch-size", "2", "--check-images", "4", "--repeats", "1", "--sparse", "64", "64",
        "64"]  # fmt: skip


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def verdicts(out):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[4:]]
    return {what: verdict for what, _, _, verdict in rows}


@pytest.mark.long
def test_the_whole_on_the_cpu(tool, capsys):
    flags = [part.allow_tf32 for part in (torch.backends.cuda.matmul, torch.backends.cudnn)]
    assert tool.main(["--device", "cpu", *TINY]) == 0
    found = verdicts(capsys.readouterr().out)
    assert list(found.values()).count("ok") == 5
    assert {"Taylor pass", "scoring, compensated", "compensation"} < found.keys()
    assert flags == [b.allow_tf32 for b in (torch.backends.cuda.matmul, torch.backends.cudnn)]


@pytest.mark.long
def test_a_device_is_compared_with_the_cpu(tool):
    material = tool.lively("test_resnet:32", num_images=4, batch_size=2)
    with simulated_device():
        rows = list(tool.against_the_cpu(material, DEVICE))
    assert [row.passed for row in rows] == [True] * 3


@pytest.mark.long
def test_checks_fail_where_a_device_is_wrong(tool, monkeypatch):
    def spoil(module):
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data *= 1.05

    def wrong_there(name, spoilt):
        right, results = getattr(tool, name), []

        def call(*args, **kwargs):
            results.append(right(*args, **kwargs))
            return results[-1] if len(results) % 2 else spoilt(results[-1])

        monkeypatch.setattr(tool, name, call)

    wrong_there("tpv_scores", lambda scores: {n: s * 1.01 for n, s in scores.items()})
    wrong_there("allocate", lambda kept: {n: ~k for n, k in kept.items()})
    wrong_there("compensate_weights", lambda model: model.apply(spoil))
    material = tool.lively("test_resnet:32", num_images=4, batch_size=2)
    rows = list(tool.against_the_cpu(material, torch.device("cpu")))
    assert [row.passed for row in rows] == [False] * 3


def test_without_a_gpu_one_line_says_so(tool, capsys):
    assert tool.main(["--device", "lazy"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "--device cpu" in err


def test_the_time_limit_ends_it(tool, capsys):
    assert tool.main(["--device", "cpu", "--limit", "0", *TINY]) == 1
    found = verdicts(capsys.readouterr().out)
    assert list(found.values()) == ["ok", "FAILED"]
    assert "the rest" in found
