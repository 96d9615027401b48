"""The examples and every code block of the README and the guide run as they are written."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from image_cases import write_classes
from PIL import Image

from tpvprune.cli.entry import main
from tpvprune.cli.flags import build_parser

ROOT = Path(__file__).parents[1]


def blocks(language, pages=("README.md",)):
    text = "\n".join((ROOT / page).read_text("utf-8") for page in pages)
    found = re.findall(rf"```{language}\n(.*?)```", text, re.S)
    assert found
    return found


@pytest.mark.parametrize(
    "name", ["quickstart.py", "your_own_model.py", "embeddings_and_adapters.py"]
)
def test_example_runs_and_is_short(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = ROOT / "examples" / name
    assert len(path.read_text("utf-8").splitlines()) <= 50
    runpy.run_path(str(path), run_name="__main__")
    assert "MACs" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["resnet10t", "vit"])
def test_training_example_makes_what_its_prune_command_reads(model, tmp_path, monkeypatch):
    write_classes(tmp_path / "images", ("cats", "dogs"), 12)
    path = ROOT / "examples" / "train_cifar10.py"
    page = path.read_text("utf-8").replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    train = ["--model", model, "--data-dir", "images", "--output", f"{model}.safetensors"]
    monkeypatch.setattr("sys.argv", ["train", *train, "--epochs", "1", "--batch-size", "8"])
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    lines = (line for line in page.splitlines() if "tpvprune prune" in line)
    (command,) = (shlex.split(line)[1:] for line in lines if f"{model}.safetensors" in line)
    command[command.index("--data-dir") + 1] = "images"
    quick = ["--criterion", "magnitude", "--repair", "none", "--latency-repeats", "0"]
    assert main([*command, *quick]) == 0


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"image": Image.new("RGB", (70, 50))}  # the reader's own
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert {path.name for path in Path("smaller").iterdir()} == {
        "model.safetensors",
        "config.json",
        "ranking.safetensors",
        "report.html",
        "report.json",
    }


def test_commands_of_the_documents_are_understood():
    lines = (
        "\n".join(blocks("sh", ("README.md", "docs/guide.md"))).replace("\\\n", " ").splitlines()
    )
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line[:9] == "tpvprune "]
    found = {build_parser().parse_args(command).command for command in commands}
    assert found == {"groups", "prune", "evaluate", "compare", "export", "distill"}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    named = re.findall(r"`make (\w+)`", (ROOT / "README.md").read_text("utf-8"))
    assert {"demo", "test"} <= {*named} <= {*targets}


def test_links_of_the_documents_lead_somewhere():
    for page in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text("utf-8")):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_functions_named_in_the_method_exist():
    text = (ROOT / "docs" / "method.md").read_text("utf-8")
    for module, name in re.findall(r"`(\w+)\.(\w+)(?:\(|`)", text):
        if module == "tpvprune" or (ROOT / "tpvprune" / f"{module}.py").exists():
            home = "tpvprune" if module == "tpvprune" else f"tpvprune.{module}"
            assert hasattr(__import__(home, fromlist=[name]), name) or name == "py", (module, name)
