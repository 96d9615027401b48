"""What benchmarks give on real networks and images, for a test that notices a change.

    python benchmarks/reference.py --shared ../shared --weights WEIGHTS

runs the commands of tests/reference/accuracy.yaml that have no figures yet (`--all`: all) and fills
them in; what lacks its weights stays as it is. `make test-long` measures again what takes a minute,
`python -m pytest -m slow tests/benchmark/test_reference.py` the rest, and compares. An entry:

| key | meaning |
|---|---|
| `name`, `slow` | of the entry; whether it takes minutes |
| `command` | a benchmark and arguments but for `--output`; `$DATA/`, `$WEIGHTS/` are folders |
| `rows`, `columns` | what tells the rows of its CSV file apart, and what is compared |
| `tolerance` | by how many points each figure may differ |
| `figures` | row: the values of its columns, in %; null: not measured yet |

`--shared` holds `data/` and `weights/`; `--weights`, or the environment variable TPVPRUNE_WEIGHTS,
is a second folder to look for weights in.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

Entry = dict[str, Any]
Figures = dict[str, list[float]]
FILE = Path(__file__).parents[1] / "tests" / "reference" / "accuracy.yaml"
HEAD = "# Made by `python benchmarks/reference.py`, which says what the keys mean.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the entries that have no figures yet."""
    parser = argparse.ArgumentParser(description="reference accuracies")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=weights_folder())
    parser.add_argument("--all", action="store_true", help="measure what has figures, too")
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args(argv)
    entries = read(args.file)
    for entry in entries:
        if entry["figures"] is not None and not args.all:
            continue
        words, lacking = arguments(entry, args.shared, args.weights)
        if lacking:
            print(f"{entry['name']}: left as it is: needs {lacking[0]}", file=sys.stderr)
            continue
        entry["figures"] = measured(entry, words)
        write(args.file, entries)
        print(f"{entry['name']}: {entry['figures']}", flush=True)
    return 0


def weights_folder() -> Path | None:
    """Return the second folder of weights, if the environment names one."""
    folder = os.environ.get("TPVPRUNE_WEIGHTS")
    return Path(folder) if folder else None


def read(path: Path) -> list[Entry]:
    """Return the entries of a file."""
    return list(yaml.safe_load(path.read_text("utf-8")))


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write the entries."""
    text = yaml.dump(
        list(entries), Dumper=_Plain, sort_keys=False, width=100, default_flow_style=None
    )
    path.write_text(HEAD + text, "utf-8")


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def arguments(
    entry: Mapping[str, Any], shared: Path, weights: Path | None
) -> tuple[list[str], list[str]]:
    """Return the words of a command with its files in place, and which of them are not there."""
    folders = {"$DATA/": [shared / "data"], "$WEIGHTS/": [shared / "weights"]}
    folders["$WEIGHTS/"] += [] if weights is None else [weights]
    words, lacking = [], []
    for word in shlex.split(entry["command"]):
        mark = next((mark for mark in folders if word.startswith(mark)), None)
        if mark is None:
            words.append(word)
            continue
        # A set of photographs may have its share of the centre behind it.
        name, colon, crop = word.removeprefix(mark).partition(":")
        found = [place / name for place in folders[mark] if (place / name).exists()]
        lacking += [] if found else [name]
        words.append(f"{found[0] if found else name}{colon}{crop}")
    return words, lacking


def measured(entry: Mapping[str, Any], words: Sequence[str]) -> Figures:
    """Run a command; return the columns of its rows."""
    script, *rest = words
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.csv"
        benchmark = importlib.import_module(script.removesuffix(".py"))
        into = Path(folder) if benchmark.__name__ == "paper_pruning" else output
        more = ["--work", folder] if benchmark.__name__ == "own_task" else []
        # As many as whoever runs this has set: tests run side by side on one thread each.
        more += ["--threads", str(torch.get_num_threads())]
        status = benchmark.main([*rest, *more, "--output", str(into)])
        if status:
            raise RuntimeError(f"{entry['name']}: expected exit code 0, found {status}")
        (path,) = Path(folder).glob("*.csv")
        with path.open(newline="", encoding="utf-8") as file:
            return {
                " ".join(row[name] for name in entry["rows"]): [
                    float(row[name]) for name in entry["columns"]
                ]
                for row in csv.DictReader(file)
            }


if __name__ == "__main__":
    raise SystemExit(main())
