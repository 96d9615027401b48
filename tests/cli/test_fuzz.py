"""No folder of a stranger's and no command line ends in a traceback, runs code or takes all memory.

By default about 150 cases, the same every time; TPVPRUNE_FUZZ=10000 tries so many new ones.
"""

import contextlib
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
from fuzz import command_lines, configs, damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_cases import write_classes, write_images

from tpvprune.benchmark.rows import COLUMNS, read_rows
from tpvprune.cli.entry import main
from tpvprune.saved.checkpoint import load_pruned

resource = pytest.importorskip("resource")

CASES = int(os.environ.get("TPVPRUNE_FUZZ", "0"))
MEMORY = 1 << 30  # beyond what the process holds already
SECONDS = 60
SENTINEL = "ran"
TRAIN = ["--img-size", "24", "--epochs", "1", "--output", "trained", "--overwrite"]
EVALUATE = ["--data-dir", "flat", "-b", "4", "-j", "1", "--num-images", "4"]
EVALUATE += ["--latency-repeats", "0"]


def cases(share):
    """So large a share of the cases: the same every time, unless a number is asked for."""
    return settings(
        max_examples=round(share * (CASES or 150)),
        derandomize=not CASES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class Bomb:
    def __reduce__(self):
        return Path(SENTINEL).touch, ()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two saved models, images and traps; the working folder while these tests run."""
    place = tmp_path_factory.mktemp("fuzz")
    before = Path.cwd()
    os.chdir(place)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save(model.state_dict(), "weights.pt")
    write_images(place / "flat", 6, size=24)
    write_classes(place / "classes", [f"class{i}" for i in range(3)], 2)
    set_traps(place)
    argv = ["prune", "--model", "test_resnet", "--checkpoint", "weights.pt", "--img-size", "24"]
    argv += ["--criterion", "magnitude", "--repair", "none", *EVALUATE, "--output", "out"]
    assert law(argv) == 0
    shutil.copytree("out", "old")
    yield place
    os.chdir(before)


def set_traps(place):
    import numpy as np

    torch.save({"fc.weight": Bomb()}, place / "evil.pt")
    np.save(place / "evil.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.save(place / "x.npy", np.zeros((4, 24, 24, 3), np.uint8))
    (place / "evil.py").write_text(f"import pathlib\npathlib.Path({SENTINEL!r}).touch()\n")
    (place / "evil.json").write_text('{"format_version": 1}')
    (place / "file.txt").write_text("a file")
    (place / "list.txt").write_text("flat/0000.png\nflat/0001.png\n")
    (place / "cut.tar").write_bytes(b"\0" * 700)
    (place / "cut.safetensors").write_bytes(b"\xff" * 40)
    (place / "empty").mkdir()
    (place / "bad").mkdir()
    (place / "bad" / "config.json").write_text('{"format_version": 1, "model": "evil:make"}')
    (place / "loop").symlink_to("loop")


def law(argv):
    """Run one command; whatever it is told, it ends with a result or with one line."""
    out, err = io.StringIO(), io.StringIO()
    start = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited_memory():
        code = main(argv)
    text = err.getvalue()
    assert "Traceback" not in text, text
    assert code in {0, 2, 3}, text
    assert not Path(SENTINEL).exists(), "code of a stranger ran"
    assert time.monotonic() - start < SECONDS, "it took too long"
    if code == 2:
        assert argv[1] != "spoilt" or "allocate" not in text, text
        lines = text.splitlines()
        assert lines[-1].startswith("tpvprune: error: "), text
        assert text.count("tpvprune: error:") == 1, text
        assert 30 < len(lines[-1]) < 1000, text
    return code


@contextlib.contextmanager
def limited_memory():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def spoilt(**files):
    """Make "spoilt" a copy of the saved model with other files: bytes, or a JSON record."""
    folder = Path("spoilt")
    if not folder.exists():
        shutil.copytree("out", folder)
    for path in Path("out").iterdir():
        content = files.get(path.name.replace(".", "_"), path.read_bytes())
        if not isinstance(content, bytes):
            content = json.dumps(content).encode("utf-8", "surrogatepass")
        if (folder / path.name).read_bytes() != content:
            (folder / path.name).write_bytes(content)
    return "spoilt"


@cases(0.4)
@given(data=st.data())
@pytest.mark.long
def test_no_config_breaks_a_command(place, data):
    valid = json.loads((place / "out" / "config.json").read_text("utf-8"))
    folder = spoilt(config_json=data.draw(configs(valid)))
    law(["evaluate", folder, *EVALUATE])


@cases(0.2)
@given(data=st.data())
def test_no_damage_to_a_file_breaks_a_command(place, data):
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = data.draw(damaged((place / "out" / name).read_bytes()))
    folder = spoilt(**{name.replace(".", "_"): content})
    law(["evaluate", folder, *EVALUATE])


@cases(0.1)
@given(data=st.data())
def test_no_report_breaks_a_command(place, data):
    valid = json.loads((place / "out" / "report.json").read_text("utf-8"))
    folder = spoilt(report_json=data.draw(configs(valid)))
    law(["compare", folder, "old", "--output", "page.html", "--overwrite"])
    if data.draw(st.integers(0, 9)) == 0:
        law(["distill", folder, *EVALUATE, *TRAIN])


@cases(0.3)
@given(argv=command_lines())
def test_no_command_line_breaks_a_command(place, argv):
    before = contents(place)
    try:
        code = law(argv)
        if code == 2 and argv[0] != "benchmark":  # whose folder holds what it has so far
            assert contents(place) == before, "what was there was not left as it was"
        for name in ("new", "old"):
            if (place / name / "config.json").exists() and f"{name}/config.json" not in argv:
                load_pruned(place / name)
    finally:
        restore(place, before)


def contents(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def restore(place, before):
    after = contents(place)
    for path in after.keys() - before.keys():
        path.unlink()
    for path, content in before.items():
        if after.get(path) != content:
            path.write_bytes(content)
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()) and path.name != "empty":
            path.rmdir()


# What the cases above once found; MODEL stands for a model and images.
IMAGES = EVALUATE[:-2]
MODEL = ["--model", "test_resnet", "--checkpoint", "weights.pt", *IMAGES, "--img-size", "24"]
TRAINED = ["out", *EVALUATE, *TRAIN]
FOUND = {
    "links in a circle": (["prune", *MODEL, "--output", "loop"], "expected a folder's name"),
    "huge side": (["evaluate", "out", *EVALUATE, "--img-size", str(2**63)], "at most 65536"),
    "tiny crop": (["evaluate", "out", *EVALUATE, "--crop-pct", "1e-300"], "from 0.05 to 1"),
    "nan mean": (["evaluate", "out", *EVALUATE, "--mean", "nan"], "finite values"),
    "infinite std": (["evaluate", "out", *EVALUATE, "--std", "inf"], "above 0"),
    "random": (["evaluate", "out", *EVALUATE, "--interpolation", "random"], "interpolation"),
    "meta": (["evaluate", "out", *EVALUATE, "--device", "meta"], "cannot be used"),
    "device": (["score", *MODEL, "--output", "/dev/null", "--overwrite"], "found a device"),
    "huge rate": (["distill", *TRAINED, "--lr", "1e300"], "at most 1e30"),
    "huge decay": (["distill", *TRAINED, "--weight-decay", "1e300"], "at most 1e30"),
    "divergence": (["distill", *TRAINED, "--weight-decay", "1e29"], "finite outputs"),
    "second order": (["distill", *TRAINED, "--opt", "adahessian"], "of first order"),
    "settings": (
        [
            *("benchmark", *MODEL, "--eval-dir", "classes", "--criteria", "magnitude"),
            *("--ranking", "plain", "--output", "settings"),
        ],
        "settings of a benchmark",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(place, name, capsys):
    argv, message = FOUND[name]
    (place / "settings").mkdir(exist_ok=True)
    (place / "settings" / "settings.json").write_text("{")
    assert main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tpvprune: error: ")
    assert message in last


@pytest.mark.parametrize("damage", [b"test_resnet,tpv\n", b"\xff\xfe\n", b"a," * 99, b"\0\n"])
def test_damaged_rows_are_one_line(tmp_path, damage):
    (tmp_path / "results.csv").write_bytes(",".join(COLUMNS).encode() + b"\n" + damage)
    with pytest.raises(ValueError, match="expected the rows of a benchmark"):
        read_rows(tmp_path / "results.csv")
