"""benchmarks/networks.py: a few of its networks, measured; what it says of a row that is wrong."""

import importlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One of each library, each with something that other libraries do not do.
FEW = [
    "CLIPForImageClassification",
    "SwinTransformer",
    pytest.param("Linknet", marks=pytest.mark.slow),
]


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("networks")


@pytest.mark.parametrize("name", FEW)
@pytest.mark.long
def test_a_network_is_pruned_as_it_should_be(networks, name):
    (line,) = (li for li in networks.NETWORKS.strip().splitlines() if networks.parts(li)[1] == name)
    library = networks.parts(line)[0]
    pytest.importorskip(library, reason=f"pip install {library.replace('_', '-')}")
    row = networks.survey(line, 0.6, 32)
    assert networks.verdict(row, 0.6) == "ok", row
    assert row["macs_ratio"] == pytest.approx(row["reported_ratio"], abs=0.01)


def test_a_row_is_ok_only_if_all_of_it_is(networks):
    good = {"exact": True, "effect": 0.1, "macs_ratio": 0.6, "repaired_share": 0.5, "reload": True,
            "trains": True, "export": "neither does the dense model: Error"}  # fmt: skip
    assert networks.verdict(good, 0.6) == "ok"
    wrong = {"exact": False, "effect": 0.0, "macs_ratio": 0.7, "repaired_share": 1.1,
             "reload": False, "trains": False, "export": "TypeError"}  # fmt: skip
    said = {networks.verdict({**good, key: value}, 0.6) for key, value in wrong.items()}
    assert len(said) == len(wrong) and "ok" not in said
    assert networks.verdict({"error": "not finished in 1 s"}, 0.6) == "failed"


def test_every_network_has_a_name_of_its_own(networks):
    named = [networks.parts(line) for line in networks.NETWORKS.strip().splitlines()]
    assert len({name for _, name, _, _ in named}) == len(named)
    assert all(isinstance(networks.arguments(text), dict) for *_, text in named)


def test_a_process_that_dies_or_hangs_is_a_row(networks):
    def hang():
        while True:
            pass

    assert "not finished in 1 s" in networks.bounded(hang, 1)["error"]
    assert "exit code 3" in networks.bounded(lambda: os._exit(3), 60)["error"]
    assert "ZeroDivisionError" in networks.bounded(lambda: 1 / 0, 60)["error"]
