"""Real networks on real photographs still give what they gave: tests/reference/accuracy.yaml.

Needs photographs and weights in a folder 'shared' beside the checkout, weights also in the folder
TPVPRUNE_WEIGHTS (`benchmarks/get_weights.py` makes them); skips without.
"""

import importlib
import sys
from pathlib import Path

import pytest
from shared_files import SHARED

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
reference = importlib.import_module("reference")
sys.path.remove(str(ROOT / "benchmarks"))

ENTRIES = reference.read(reference.FILE)
KEYS = ["model", "images", "img_size", "keep", "repair", "seed", "top1", "agreement", "tolerance"]


def test_entries_are_whole_and_written_as_they_are_read(tmp_path):
    assert all(list(entry) == KEYS and entry["model"] in reference.NETWORKS for entry in ENTRIES)
    assert len({reference.title(entry) for entry in ENTRIES}) == len(ENTRIES)
    reference.write(tmp_path / "again.yaml", ENTRIES)
    assert (tmp_path / "again.yaml").read_text() == reference.FILE.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=reference.title)
def test_accuracy_is_what_it_was(entry):
    weights = reference.weights_folder()
    lack = reference.lacking(entry, SHARED, weights)
    if lack is not None:
        pytest.skip(f"needs {lack}")
    if entry["top1"] is None:
        pytest.skip("not measured yet: python benchmarks/reference.py --shared ../shared")
    found = reference.measured(entry, SHARED, weights)
    # Another processor or number of threads rounds otherwise, and some images change sides.
    for name in ("top1", "agreement"):
        assert abs(found[name] - entry[name]) <= entry["tolerance"], (name, found, entry)
