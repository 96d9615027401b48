"""The folders of the package: one line of dependencies, and no circle of modules."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import tpvprune

ROOT = Path(tpvprune.__file__).parent
# Each may import those before it.
LINE = [
    *("disk", "processes", "passes", "images", "groups", "scores", "repairs", "widths", "pipeline"),
    *("weights", "diagnostics", "reports", "saved", "benchmark", "cli"),
]
SURROUNDINGS = {"__init__", "__main__", "cifar_resnet"}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imported_by(path):
    """Return the modules of the package that a module imports when it runs, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in typing_only:
            continue
        package, _, home = (node.module or "").partition(".")
        if package == "tpvprune":
            inside = [f"{home}.{alias.name}".strip(".") for alias in node.names]
            yield from (m if m in MODULES else home for m in inside if m in MODULES or home)


EDGES = {name: set(imported_by(path)) - {name} for name, path in MODULES.items()}


def folder(module):
    return module.partition(".")[0]


def test_folders_import_only_those_before_them():
    assert {folder(m) for m in MODULES} == {*LINE, *SURROUNDINGS}
    wrong = [
        f"{a} imports {b}"
        for a, found in EDGES.items()
        for b in found
        if folder(a) in LINE and LINE.index(folder(a)) < LINE.index(folder(b))
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    assert len(list(TopologicalSorter(EDGES).static_order())) == len(MODULES)


def test_few_modules_lie_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 6


def test_every_folder_says_what_is_in_it():
    for init in ROOT.glob("*/__init__.py"):
        words = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        assert len(words) > 60, init
