"""Benchmarks still give what they gave on real networks and images: tests/reference/accuracy.yaml.

Needs images and weights in a folder 'shared' beside the checkout, weights also in the folder
TPVPRUNE_WEIGHTS (`benchmarks/get_weights.py` makes them); skips without.
"""

import importlib
from pathlib import Path

import pytest
from shared_files import SHARED

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reference")


def entries():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        reference = importlib.import_module("reference")
    return reference.read(reference.FILE)


KEYS = ["name", "slow", "command", "rows", "columns", "tolerance", "figures"]
ENTRIES = entries()


def compared(entry):
    how_long = pytest.mark.slow if entry["slow"] else pytest.mark.long
    return pytest.param(entry, id=entry["name"], marks=how_long)


def test_entries_are_whole_and_written_as_they_are_read(tool, tmp_path):
    assert all(list(entry) == KEYS for entry in ENTRIES)
    assert len({entry["name"] for entry in ENTRIES}) == len(ENTRIES)
    tool.write(tmp_path / "again.yaml", ENTRIES)
    assert (tmp_path / "again.yaml").read_text() == tool.FILE.read_text("utf-8")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_files_are_looked_for_in_both_folders(tool, tmp_path, entry):
    shared, weights = tmp_path / "shared", tmp_path / "weights"
    words, lacking = tool.arguments(entry, shared, weights)
    files = [word for word in lacking if word.endswith(".safetensors")]
    assert len(files) == 1
    assert len(lacking) >= 3
    for folder in (shared / "data", weights):
        folder.mkdir(parents=True)
        for name in lacking:
            (folder / name).touch()
    words, lacking = tool.arguments(entry, shared, weights)
    assert not lacking
    assert str(weights / files[0]) in words
    assert not any("$" in word for word in words)
    test = words[words.index("--test-dir") + 1].partition(":")[0]
    assert Path(test).parent == shared / "data"


@pytest.mark.parametrize("entry", [compared(entry) for entry in ENTRIES])
def test_figures_are_what_they_were(tool, entry):
    words, lacking = tool.arguments(entry, SHARED, tool.weights_folder())
    if lacking:
        pytest.skip(f"needs {lacking[0]} in a folder 'shared' beside the checkout")
    if entry["figures"] is None:
        pytest.skip("not measured yet: python benchmarks/reference.py --shared ../shared")
    found = tool.measured(entry, words)
    assert found.keys() == entry["figures"].keys()
    # Another processor or number of threads rounds otherwise, and some images change sides.
    for row, figures in entry["figures"].items():
        assert found[row] == pytest.approx(figures, abs=entry["tolerance"]), row
