"""Several gloo processes on this machine: the results of one, and an end when one is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_cases import write_images

from tpvprune.processes import shares as distributed
from tpvprune.processes.membership import Team, present
from tpvprune.scores.taps import probe_directions

PROCESSES = Path(__file__).parents[1] / "forked.py"
# Sums of float64 in another order; the fits solve with a ridge of 1e-3, the curves hold float32.
TOLERANCE = {"curves": 1e-5, "training": 1e-6}


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(
        [sys.executable, PROCESSES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(server, tmp_path):
    """Return a function that runs a job in so many processes: exit codes, ends, texts."""

    def start(job, size, *arguments):
        folder = tmp_path / f"{job}-{size}"
        folder.mkdir()
        server.stdin.write(json.dumps([job, size, str(folder), *arguments]) + "\n")
        server.stdin.flush()
        ended = json.loads(server.stdout.readline())
        texts = [(folder / f"{rank}.txt").read_text() for rank in range(size)]
        return *map(list, zip(*ended, strict=True)), texts

    return start


@pytest.fixture
def found(start, tmp_path):
    """Return a function that runs a job in so many processes: what each of them found."""

    def found(job, size, *arguments):
        codes, _, texts = start(job, size, *arguments)
        assert codes == [0] * size, texts
        return [torch.load(tmp_path / f"{job}-{size}" / f"{rank}.pt") for rank in range(size)]

    return found


@pytest.mark.parametrize("job", ["statistics", "drawing", "pipeline", "training"])
@pytest.mark.long
def test_results_do_not_depend_on_the_number_of_processes(found, job):
    (one,) = found(job, 1)
    for size in (2, 3):
        for several in found(job, size):
            for name, expected in one.items():
                tolerance = TOLERANCE.get(name, TOLERANCE.get(job, 1e-8))
                gap = (several[name] - expected).norm() / expected.norm()
                assert gap <= tolerance, f"{name}: {gap:.1e}"


@pytest.mark.long
def test_training_goes_on_from_a_saved_state(found, tmp_path):
    (unbroken,) = found("training", 1, str(tmp_path / "state"))
    again = found("training", 2, str(tmp_path / "state"))
    assert all(torch.equal(each["weights"], unbroken["weights"]) for each in again)


def test_independent_tasks_come_back_in_order(found):
    expected = [(task, i) for task in range(7) for i in range(task % 3)]
    assert [each["results"] for each in found("dealing", 3)] == [expected] * 3


def test_processes_that_differ_are_refused(found):
    for each in found("disagreement", 2):
        assert "expected the same numbers in all 2 processes" in each["message"]


def test_processes_that_verify_other_groups_are_refused(found):
    for each in found("other_groups", 2):
        assert "expected the same channel groups in all 2 processes" in each["message"]


# ---- the command line -------------------------------------------------------------------------


def prune(images, output):
    return [
        "prune", "--model", "test_resnet", "--num-classes", "10", "--img-size", "32",
        "--data-dir", str(images), "--num-images", "11", "-b", "4", "--keep", "0.6", "--json",
        "--latency-repeats", "2", "--output", str(output),
    ]  # fmt: skip


@pytest.mark.long
def test_torchrun_gives_what_one_process_gives(start, tmp_path):
    images = write_images(tmp_path / "images", 11)
    one = start("command", 1, *prune(images, tmp_path / "one"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tpvprune", *prune(images, tmp_path / "two")]
    # What aborts a process is to say where it was.
    env = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    two = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert two.returncode == 0, two.stderr
    expected, document = json.loads(one[2][0][one[2][0].index("{\n") :]), json.loads(two.stdout)
    assert two.stderr.count("saved:") == 1
    assert document["pruned"]["macs"] == expected["pruned"]["macs"]
    assert document["num_images"] == expected["num_images"] == 10
    for name, variance in expected["output_variance"].items():
        assert document["output_variance"][name] == pytest.approx(variance, rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )


LEFT = """
import os, sys
import numpy
from tpvprune.processes import membership, shares
alone = set(os.listdir("/proc/self/task"))
with membership.joined():
    import timm
    shares.of_all(1)
    assert len(os.listdir("/proc/self/task")) > len(alone)
sys.exit(str(left) if (left := set(os.listdir("/proc/self/task")) - alone) else 0)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc lists threads here")
@pytest.mark.long
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """Whatever was imported meanwhile: one that meets the end of the interpreter may abort it."""
    script = tmp_path / "left.py"
    script.write_text(LEFT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dies", "another process of this run ended"),
        ("hangs", "process 2 of 3 does not answer any more"),
        ("fails", "the disk of this machine is full"),
    ],
)
@pytest.mark.long
def test_a_process_that_is_lost_ends_the_run(start, tmp_path, how, message):
    images = write_images(tmp_path / "images", 11)
    output = tmp_path / "out" / "pruned"
    codes, ends, texts = start("lost", 3, how, *prune(images, output))
    assert codes[2] == {"dies": -9, "hangs": None, "fails": 2}[how], texts
    assert not {0, None} & {*codes[:2]}, (codes, texts)
    since = (tmp_path / "lost-3" / "lost").stat().st_mtime
    assert max(ends[:2]) - since < 60, texts
    said = "".join(texts)
    assert message in said
    assert said.count("tpvprune: error:") == 1
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out/**/*"))


@pytest.mark.parametrize("job", ["command", "slow_command"])
def test_bad_input_is_said_once(start, tmp_path, job):
    argv = prune(tmp_path / "nowhere", tmp_path / "out")
    codes, _, texts = start(job, 2, *argv)
    assert all(code in {1, 2} for code in codes)
    assert "".join(texts).count("no such folder") == 1


# ---- shares -----------------------------------------------------------------------------------


@pytest.fixture
def as_process(monkeypatch):
    def pretend(rank, size):
        monkeypatch.setattr(present, "team", Team(rank, size))

    return pretend


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), num=st.integers(1, 5))
def test_shares_are_a_partition_that_knows_its_places(sizes, num):
    whole = torch.arange(sum(sizes))
    seen = []
    try:
        for rank in range(num):
            present.team = Team(rank, num)
            mine = torch.cat([whole[:0], *distributed.shard(whole.split(sizes))])
            assert torch.equal(mine, distributed.global_indices(0, len(mine)))
            assert len(mine) == distributed.share(len(whole))
            seen.append(mine)
    finally:
        present.team = Team()
    assert torch.equal(torch.cat(seen).sort().values, whole)


@pytest.mark.parametrize("metric", ["logits", "fisher"])
def test_directions_belong_to_the_images(as_process, metric):
    outputs = torch.randn(12, 7)
    (whole,) = probe_directions(outputs, metric, 1, torch.Generator().manual_seed(0))
    for rank in range(3):
        as_process(rank, 3)
        generator = torch.Generator().manual_seed(0)
        parts = [probe_directions(x, metric, 1, generator)[0] for x in outputs[rank::3].split(3)]
        assert torch.equal(torch.cat(parts), whole[rank::3])
