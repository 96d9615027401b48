"""Scripts of benchmarks/ end in one line and exit code 2 where their input is not there."""

import importlib
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tpvprune.cifar_resnet import CifarResNet

ROOT = Path(__file__).parents[2]
MODEL = "cifar_resnet20"
TWO_SETS = ("--train-dir", "--test-dir")
FOLDERS = {
    "fidelity": ("--data-dir",), "latency": TWO_SETS, "oneshot": TWO_SETS,
    "paper_pruning": TWO_SETS, "photographs": ("--calib-dir", "--test-dir"),
    "rounding": ("--calib-dir", "--test-dir"), "sizes": ("--data-dir",), "stability": TWO_SETS,
    "weights": TWO_SETS,
}  # fmt: skip
OUTPUTS = [*FOLDERS, "cost", "papers", "processes", "timm_models", "traces"]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / f"{MODEL}.safetensors"
    save_file(CifarResNet(3).state_dict(), path)
    return path


def ended(load, capsys, tmp_path, name, checkpoint):
    """Return what a script says of images that are not there."""
    output = tmp_path / ("some.csv" if "--calib-dir" in FOLDERS[name] else "results")
    words = ["--model", MODEL, "--checkpoint", str(checkpoint), "--output", str(output)]
    for flag in FOLDERS[name]:
        words += [flag, str(tmp_path / "no-images")]
    assert load(name).main(words) == 2
    assert not [*tmp_path.rglob("*.csv"), *tmp_path.rglob("*.json")]
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{name}.py: error: ")
    return line


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_that_is_not_there_is_named_in_one_line(load, capsys, tmp_path, name):
    assert "no-weights" in ended(load, capsys, tmp_path, name, tmp_path / "no-weights.safetensors")


@pytest.mark.parametrize("name", FOLDERS)
def test_images_that_are_not_there_are_named_in_one_line(
    load, capsys, tmp_path, name, checkpoint
):  # fmt: skip
    assert "no-images" in ended(load, capsys, tmp_path, name, checkpoint)


def test_papers_names_images_that_are_not_there(load, capsys, tmp_path, monkeypatch):
    papers = load("papers")
    monkeypatch.setattr(papers, "ways", lambda seeds: [])
    place = str(tmp_path / "no-images")
    words = ["--data-dir", place, "--test-dir", place, "--output", str(tmp_path / "results")]
    assert papers.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("papers.py: error: ")
    assert "no-images" in said[-1]
    assert not any("Traceback" in line for line in said)


def test_errors_of_the_code_itself_keep_their_traceback(load):
    with pytest.raises(ZeroDivisionError):
        load("errors").in_one_line(lambda: 1 // 0)()


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_help_says_whether_output_is_a_folder_or_a_file(load, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        load(name).main(["--help"])
    assert stopped.value.code == 0
    _, _, said = capsys.readouterr().out.rpartition("--output ")
    assert "folder to write to" in said or "CSV file to write" in said


def test_the_help_of_rounding_shows_its_own_flags(load, capsys):
    with pytest.raises(SystemExit):
        load("rounding").main(["--help"])
    said = capsys.readouterr().out
    assert "--runtimes" in said
    assert "multiples of widths, or auto" in said
    assert "--calib-dir" in said


def test_rounding_gives_photographs_its_flags_without_its_own(load):
    words = ["--model", MODEL, "--calib-dir", "a", "--test-dir", "b"]
    args, own = load("rounding").parse([*words, "--round-to", "1", "auto", "--runtimes", "eager"])
    assert own == {"round_to": [1, "auto"], "runtimes": ["eager"]}
    expected = vars(load("photograph_flags").parse(words))
    assert {k: v for k, v in vars(args).items() if k != "runtimes"} == expected
