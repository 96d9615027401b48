"""The folders of the package: one line of dependencies, and no circle of modules."""

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import tpvprune

ROOT = Path(tpvprune.__file__).parent
BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
layout = importlib.import_module("layout")
sys.path.remove(BENCHMARKS)

# Each may import those before it.
LINE = [
    *("disk", "processes", "passes", "runtimes", "images", "groups", "scores", "repairs"),
    *("widths", "depth", "pipeline"),
    *("weights", "diagnostics", "reports", "saved", "benchmark", "cli"),
]
SURROUNDINGS = {"__init__", "__main__", "cifar_resnet"}
TEXTS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in ROOT.rglob("*.py")
}
IMPORTS = {name: set(layout.imported(text, TEXTS)) - {name} for name, text in TEXTS.items()}


def folder(module):
    return module.partition(".")[0]


def test_folders_import_only_those_before_them():
    assert {folder(m) for m in TEXTS} == {*LINE, *SURROUNDINGS}
    wrong = [
        f"{a} imports {b}"
        for a, found in IMPORTS.items()
        for b in found
        if {folder(a), folder(b)} <= {*LINE} and LINE.index(folder(a)) < LINE.index(folder(b))
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    assert len(list(TopologicalSorter(IMPORTS).static_order())) == len(TEXTS)
    assert not any(name in layout.reached(name, IMPORTS) for name in IMPORTS)


def test_imports_are_seen_wherever_they_stand():
    text = """
from typing import TYPE_CHECKING
from tpvprune import pipeline
from tpvprune.groups import records, find_groups
if TYPE_CHECKING:
    from tpvprune.scores.tpv import Scores
def late():
    from tpvprune.cli.entry import main
    import tpvprune.disk.atomic, torch
"""
    groups = {"groups.records", "groups.__init__"}
    seen = set(layout.imported(text, TEXTS))
    assert seen == {"pipeline.__init__", *groups, "cli.entry", "disk.atomic"}


def test_few_modules_lie_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 6


def test_every_folder_says_what_is_in_it():
    for init in ROOT.glob("*/__init__.py"):
        words = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        assert len(words) > 60, init
