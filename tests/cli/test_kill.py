"""A command that is killed leaves the old output, the new one or none, and goes on when rerun.

TPVPRUNE_KILLS=50 sets the number of moments for each command.
"""

import csv
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from image_cases import write_classes, write_images

from tpvprune.cli.entry import main
from tpvprune.saved.checkpoint import load_pruned

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")

KILLS = int(os.environ.get("TPVPRUNE_KILLS", "2"))
KILLED = -9
SIZE = ["--img-size", "24", "-b", "4", "-j", "1"]
DENSE = ["--model", "test_resnet", "--checkpoint", "../weights.pt", *SIZE, "--data-dir", "../flat"]
COMMANDS = {
    "prune": [
        *("prune", *DENSE, "--num-images", "8", "--latency-repeats", "0", "--output", "out"),
        *("--overwrite", "--criterion", "activation_variance", "--repair", "bn"),
    ],
    "prune within a limit": [
        *("prune", *DENSE, "--num-images", "8", "--latency-repeats", "0", "--output", "out"),
        *("--overwrite", "--criterion", "activation_variance", "--repair", "none"),
        *("--max-loss", "60"),
    ],
    "prune weights": [
        *("prune", *DENSE, "--num-images", "8", "--latency-repeats", "0", "--output", "out"),
        *("--overwrite", "--granularity", "2:4", "--criterion", "magnitude", "--repair", "none"),
    ],
    "benchmark": [
        *("benchmark", *DENSE, "--num-images", "8", "--eval-dir", "../classes", "--output", "out"),
        *("--criteria", "magnitude", "--ranking", "per_cost", "--keep", "0.8,0.6"),
        *("--repair", "none,bn", "--seeds", "1"),
    ],
    "distill": [
        *("distill", "../pruned", *SIZE, "--data-dir", "../flat", "--dense", "../weights.pt"),
        *("--latency-repeats", "0", "--epochs", "3", "--output", "out", "--overwrite"),
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("kill")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save(model.state_dict(), place / "weights.pt")
    write_images(place / "flat", 12, size=24)
    write_classes(place / "classes", ["a", "b", "c"], 2)
    argv = ["prune", "--model", "test_resnet", "--checkpoint", str(place / "weights.pt"), *SIZE]
    argv += ["--data-dir", str(place / "flat"), "--criterion", "magnitude", "--repair", "none"]
    assert main([*argv, "--latency-repeats", "0", "--output", str(place / "pruned")]) == 0
    return place


@pytest.fixture(scope="module")
def run():
    """Run a command in a process of its own; return its exit code and seconds."""
    script = Path(__file__).parents[1] / "killing.py"
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def run(folder, argv, moment=None):
        print(json.dumps([str(folder), moment, *argv]), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(timeout=30)


def rows(folder):
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def result(folder):
    """What must come out the same: weights bit for bit, or rows apart from times."""
    if folder.parent.name.startswith("benchmark"):
        if (folder / "settings.json").exists():
            json.loads((folder / "settings.json").read_text("utf-8"))
        return rows(folder) if (folder / "results.csv").exists() else []
    load_pruned(folder)
    masks = folder / "masks.safetensors"
    return [
        (folder / "model.safetensors").read_bytes(),
        masks.read_bytes() if masks.exists() else None,
    ]


def check_state(folder, old, new):
    """Whatever the moment was, the output is absent, the old one or the new one."""
    if not folder.exists() or not any(folder.iterdir()):
        assert old is None, "the old output is gone"
        return
    found = result(folder)
    if isinstance(new[0], dict):
        assert all(row in new for row in found)
    else:
        assert found in (old, new)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.long
def test_killed_command_leaves_nothing_half_done_and_goes_on(place, run, name):
    argv = COMMANDS[name]
    numbers = random.Random(KILLS)
    unbroken, warm = place / f"{name}, unbroken", place / f"{name}, warm"
    unbroken.mkdir()
    warm.mkdir()
    run(warm, argv, ["here"])
    code, seconds = run(unbroken, argv)
    assert code == 0, (unbroken / "said.txt").read_text()
    steps = int((unbroken / "steps.txt").read_text())
    new = result(unbroken / "out")
    killed = 0
    for i in itertools.count():
        folder = place / f"{name}, {i}"
        folder.mkdir()
        old = None
        if "--overwrite" in argv and numbers.random() < 0.5:
            shutil.copytree(place / "pruned", folder / "out")
            old = result(folder / "out")
        at = ["step", numbers.randint(1, steps)], ["clock", numbers.uniform(0, seconds)]
        # Twice in a row at times: the rerun is killed, too.
        for moment in at[: 1 + (i % 3 == 2)] if i % 2 else at[1:]:
            code, _ = run(folder, argv, moment)
            killed += code == KILLED
            assert code in {0, KILLED}, (folder / "said.txt").read_text()
            check_state(folder / "out", old, new)
        code, _ = run(folder, argv)
        assert code == 0, (moment, (folder / "said.txt").read_text())
        assert result(folder / "out") == new, moment
        left = {path.name for path in folder.rglob("*") if path.is_file()}
        expected = {path.name for path in unbroken.rglob("*") if path.is_file()}
        assert left == expected, (moment, left ^ expected)
        shutil.rmtree(folder)
        if killed >= KILLS:
            return
