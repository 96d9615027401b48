"""How the package hangs together: modules, imports and circles, now or at a commit.

    python benchmarks/layout.py 9399de0 HEAD

A circle is a set of modules each of which imports, by way of others, all of them; imports inside
functions count, those for type hints alone do not. Lines are those of .py files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PACKAGE = "tpvprune"


def main(commits: list[str]) -> None:
    """Print a row for each commit."""
    print("| commit | lines | modules | at the top | folders | imports | modules in circles |")
    print("|---|---|---|---|---|---|---|")
    for commit in commits:
        texts = sources(commit)
        imports = {name: set(imported(text, texts)) - {name} for name, text in texts.items()}
        row = [
            sum(text.count("\n") for text in texts.values()),
            len(texts),
            sum("." not in name for name in texts if f"{name}.__init__" not in texts),
            len({name.partition(".")[0] for name in texts if "." in name}),
            sum(map(len, imports.values())),
            sum(name in reached(name, imports) for name in imports),
        ]
        print(f"| {commit} | " + " | ".join(f"{number:,}" for number in row) + " |")


def sources(commit: str) -> dict[str, str]:
    """Return the text of every module at a commit, by its name within the package."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout

    paths = git("ls-tree", "-r", "--name-only", commit, PACKAGE).split()
    return {
        ".".join(PurePosixPath(path).relative_to(PACKAGE).with_suffix("").parts): git(
            "show", f"{commit}:{path}"
        )
        for path in paths
        if path.endswith(".py")
    }


def imported(text: str, known: Mapping[str, str]) -> Iterator[str]:
    """Yield the modules of the package that a module imports when it runs."""
    tree = ast.parse(text)
    hints = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in hints:
            for alias in node.names:
                package, _, name = alias.name.partition(".")
                if package == PACKAGE:
                    yield from filter(None, [module_of(name, "", known)])
        if isinstance(node, ast.ImportFrom) and node not in hints:
            package, _, home = (node.module or "").partition(".")
            names = [f"{home}.{alias.name}".strip(".") for alias in node.names]
            if package == PACKAGE:
                yield from filter(None, (module_of(name, home, known) for name in names))


def module_of(name: str, home: str, known: Mapping[str, str]) -> str | None:
    """Return the module behind an imported name: itself one, or found in ``home``."""
    candidates = (name, f"{name}.__init__", home, f"{home}.__init__")
    return next((c for c in candidates if c in known), None)


def reached(name: str, imports: Mapping[str, set[str]]) -> set[str]:
    """Return what a module imports, directly or not; itself only if it is in a circle."""
    found: set[str] = set()
    left = list(imports[name])
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += imports[module]
    return found


if __name__ == "__main__":
    main(sys.argv[1:] or ["HEAD"])
