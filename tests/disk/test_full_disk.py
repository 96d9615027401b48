"""A disk that takes no more: one line, exit code 2, and the old output as it was.

The system is told to let no file grow beyond some bytes, so that every way of writing is met.
"""

import contextlib
import os
from pathlib import Path

import pytest
import timm
import torch
from image_cases import write_classes, write_images

from tpvprune.cli import audit
from tpvprune.cli.entry import main
from tpvprune.saved.checkpoint import load_pruned

resource = pytest.importorskip("resource")

SIZE = ["--img-size", "24", "-b", "4", "-j", "1"]
DENSE = ["--model", "test_resnet", "--checkpoint", "weights.pt", *SIZE, "--data-dir", "flat"]
CHEAP = ["--criterion", "magnitude", "--repair", "none", "--latency-repeats", "0"]
TRAIN = ["--dense", "weights.pt", "--epochs", "1", "--latency-repeats", "0"]
AUDIT = ["--measures", "l2_norm", "--criteria", "magnitude"]
BENCHMARK = ["--eval-dir", "classes", "--criteria", "magnitude", "--keep", "0.5", "--seeds", "1"]
COMMANDS = {
    "prune": ["prune", *DENSE, *CHEAP, "--output", "out"],
    "masks": ["prune", *DENSE, *CHEAP, "--granularity", "2:4", "--output", "out"],
    "score": ["score", *DENSE, *CHEAP[:2], "--output", "scores.json"],
    "distill": ["distill", "small", *SIZE, "--data-dir", "flat", *TRAIN, "--output", "out"],
    "compare": ["compare", "small", "old", "--output", "page.html"],
    "audit": ["audit", *DENSE, "--num-images", "16", *AUDIT, "--output", "audited"],
    "export": ["export", "small", "--format", "pt2", "--output", "model.pt2"],
    "benchmark": [
        *("benchmark", *DENSE, *BENCHMARK, "--repair", "none", "--ranking", "plain"),
        *("--output", "rows"),
    ],
}
# A few bytes, part of config.json, part of the weights.
LIMITS = {
    "benchmark": [10],
    "audit": [10, 1000],
    "score": [10, 1000],
    "compare": [10],
    "export": [10, 20_000],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("disk")
    before = Path.cwd()
    os.chdir(place)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "weights.pt")
    write_images(place / "flat", 16, size=24)
    write_classes(place / "classes", ["a", "b", "c"], 1)
    for name in ("small", "old"):
        assert main(["prune", *DENSE, *CHEAP, "--output", name]) == 0
    yield place
    os.chdir(before)


@contextlib.contextmanager
def no_file_beyond(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def once(function):
    """What is found once is found again: an audit takes seconds, and this is about its files."""
    found = []

    def remembered(*args, **kwargs):
        found[:] = found or [function(*args, **kwargs)]
        return found[0]

    return remembered


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.long
def test_a_full_disk_is_one_line_and_leaves_what_was_there(place, name, capsys, monkeypatch):
    for slow in ("changes_of", "fragility", "_stability"):
        monkeypatch.setattr(audit, slow, once(getattr(audit, slow)))
    assert main(COMMANDS[name]) == 0
    argv = [*COMMANDS[name], *(["--overwrite"] if name != "benchmark" else [])]
    before = contents()
    for size in LIMITS.get(name, [10, 3000, 300_000]):
        capsys.readouterr()
        with no_file_beyond(size):
            assert main(argv) == 2
        err = capsys.readouterr().err
        last = err.splitlines()[-1]
        assert "Traceback" not in err
        assert last.startswith("tpvprune: error: ")
        assert "cannot be written (File too large" in last
        assert contents() == before
    assert main(argv) == 0
    if Path("out").exists():
        load_pruned("out")
        for path in Path("out").iterdir():
            path.unlink()
        Path("out").rmdir()
