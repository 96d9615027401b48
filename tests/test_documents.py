"""The pages in docs and the workflow for timm users run as they are written."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import tpvprune
from tpvprune.scores.criteria import SCORERS

ROOT = Path(__file__).parents[1]


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page, re.S)


PAGE = (ROOT / "docs" / "migration.md").read_text("utf-8")
BLOCKS = blocks_of(PAGE)


def test_drop_in_of_the_migration_page_runs_and_is_short():
    names = {}
    exec(compile(BLOCKS[0], "migration.md", "exec"), names)
    before = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=10).parameters())
    once = sum(p.numel() for p in names["model"].parameters())
    exec(compile(BLOCKS[1], "migration.md", "exec"), names)
    assert sum(p.numel() for p in names["model"].parameters()) < once < before
    lines = [line for line in BLOCKS[0].splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 10


def test_pruned_model_runs_in_plain_timm_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = timm.create_model("test_resnet", num_classes=5).eval()
    result = tpvprune.prune(dense, [torch.randn(8, 3, 32, 32)], keep=0.7, criterion="magnitude")
    tpvprune.save_pruned(result, "smaller")
    readme = (ROOT / "README.md").read_text("utf-8")
    (block,) = [b for b in blocks_of(readme) if "resolve_model_data_config" in b]
    lines = [line for line in block.splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 5
    names = {"image": Image.new("RGB", (70, 50), (90, 120, 30))}
    exec(compile(block, "README.md", "exec"), names)
    with torch.no_grad():
        expected = result.model(names["transform"](names["image"]).unsqueeze(0))
    assert torch.equal(names["outputs"], expected)


def test_tables_of_the_readme_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("tables")
    pages = [page.read_text("utf-8") for page in tables.PAGES]
    shown = re.findall(r"<!-- table: (\w+) -->", "".join(pages))
    assert sorted(shown) == sorted(tables.TABLES)
    for text in pages:
        assert text == tables.filled(text), "run python benchmarks/tables.py"


def test_criteria_and_names_of_the_table_exist():
    for name in re.findall(r'criterion="(\w+)"', PAGE):
        assert name in SCORERS
    for name in re.findall(r"tpvprune\.(\w+)\(", PAGE):
        assert hasattr(tpvprune, name)


@pytest.mark.parametrize("name", re.findall(r"`tp\.([\w.]+)", PAGE))
def test_names_of_torch_pruning_exist(name):
    import torch_pruning

    found = torch_pruning
    for part in name.split("."):
        found = getattr(found, part)


@pytest.mark.long
def test_workflow_for_timm_users_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spec = importlib.util.spec_from_file_location("workflow", ROOT / "examples/timm_workflow.py")
    workflow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(workflow)
    digits = workflow.load_digits()
    digits.images, digits.target = digits.images[:600], digits.target[:600]  # files cost time
    monkeypatch.setattr(workflow, "load_digits", lambda: digits)
    workflow.main(epochs=1, distill_epochs=1)
    found = re.findall(r"(\w+): ([\d,]+) MACs, top-1 ([\d.]+) %", capsys.readouterr().out)
    macs = {title: int(number.replace(",", "")) for title, number, _ in found}
    assert list(macs) == ["dense", "pruned", "distilled"]
    assert macs["pruned"] == macs["distilled"] <= 0.25 * macs["dense"]


@pytest.mark.long
def test_tutorial_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    with torch.random.fork_rng():
        for block in blocks_of((ROOT / "docs" / "tutorial.md").read_text("utf-8")):
            exec(compile(block, "tutorial.md", "exec"), names)
    dense, cut, repaired = (
        tpvprune.evaluate(names[name], names["held_out"])
        for name in ("model", "cut", "reconstructed")
    )
    assert repaired.macs <= 0.4 * dense.macs
    # What the page promises: the cut alone ruins the model, the repair brings it back.
    assert cut.top1 < dense.top1 - 0.2
    assert repaired.top1 > dense.top1 - 0.05
    assert "rank correlation" in capsys.readouterr().out


@pytest.mark.long
def test_api_reference_has_every_public_name(tmp_path):
    pdoc = pytest.importorskip("pdoc", reason="the API reference needs pdoc (pip install .[dev])")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    modules = re.search(r"^API := ((?:.*\\\n)*.*)$", makefile, re.M)[1].replace("\\\n", " ").split()
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*modules, output_directory=tmp_path)
    for module in ("tpvprune", "tpvprune.diagnostics"):
        page = tmp_path.joinpath(*module.split(".")).with_suffix(".html").read_text("utf-8")
        for name in importlib.import_module(module).__all__:
            assert name == "__version__" or f'id="{name}"' in page
