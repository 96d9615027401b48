"""What pruning gives on real networks and photographs, for a test that notices a change.

    python benchmarks/reference.py --shared ../shared --weights WEIGHTS

fills in `top1` and `agreement` of the entries of tests/reference/accuracy.yaml that have none yet
(`--all`: of all), one after the other, by `photographs.py`; what lacks its weights stays as it is.
`python -m pytest -m slow tests/benchmark/test_reference.py` measures them again and compares. An
entry:

| key | meaning |
|---|---|
| `model`, `keep`, `repair`, `seed` | TPV with its default widths |
| `images`, `img_size` | unlabeled photographs, and the side that all images are brought to |
| `top1`, `agreement` | % of the labelled photographs; null: not measured yet |
| `tolerance` | by how many points either may differ |

`--shared` holds `data/` and `weights/`; `--weights`, or the environment variable TPVPRUNE_WEIGHTS,
is a second folder to look for weights in.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import photographs
import torch
import yaml

Entry = dict[str, Any]
FILE = Path(__file__).parents[1] / "tests" / "reference" / "accuracy.yaml"
HEAD = "# Made by `python benchmarks/reference.py`, which says what the keys mean.\n"
DATA = ("photos-calib.tar", "imagenet-val-test.tar", "photos-test.tar", "imagenet-classes.txt")


class Network(NamedTuple):
    """The file of a network's weights, and how `photographs.py` is told to make it."""

    weights: str
    options: tuple[str, ...] = ()


NETWORKS = {
    "mobilenetv2_100": Network(
        "mobilenetv2_100_imagenet.safetensors",
        ("--model-kwargs", "pad_type=same", "--mean", "0.5", "--std", "0.5"),
    ),
    "tf_efficientnet_lite0": Network("tf_efficientnet_lite0.safetensors"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the entries that have no numbers yet."""
    parser = argparse.ArgumentParser(description="reference accuracies")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=weights_folder())
    parser.add_argument("--all", action="store_true", help="measure what has numbers, too")
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args(argv)
    entries = read(args.file)
    for entry in entries:
        if entry["top1"] is not None and not args.all:
            continue
        lack = lacking(entry, args.shared, args.weights)
        if lack is not None:
            print(f"{title(entry)}: left as it is: needs {lack}", file=sys.stderr)
            continue
        entry.update(measured(entry, args.shared, args.weights))
        write(args.file, entries)
        print(f"{title(entry)}: {entry['top1']}, agreement {entry['agreement']}", flush=True)
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
    path.write_text(HEAD + yaml.safe_dump(list(entries), sort_keys=False), "utf-8")


def title(entry: Mapping[str, Any]) -> str:
    """Return what an entry is called."""
    return f"{entry['model']}-{entry['keep']}-{entry['repair']}"


def lacking(entry: Mapping[str, Any], shared: Path, weights: Path | None) -> str | None:
    """Return the first file that an entry needs and that is not there."""
    for name in DATA:
        if not (shared / "data" / name).exists():
            return f"data/{name} in a folder 'shared' beside the checkout"
    if _weights(entry["model"], shared, weights) is None:
        return f"{NETWORKS[entry['model']].weights} in shared/weights or in $TPVPRUNE_WEIGHTS"
    return None


def measured(entry: Mapping[str, Any], shared: Path, weights: Path | None) -> dict[str, float]:
    """Prune as an entry says; return top-1 and agreement in %."""
    args = photographs.parse(arguments(entry, shared, weights))
    subject = _subject(entry["model"], entry["img_size"], shared, weights)
    (row,) = photographs.measured(args, subject=subject)
    return {"top1": float(row["top1"]), "agreement": float(row["agreement"])}


def arguments(entry: Mapping[str, Any], shared: Path, weights: Path | None) -> list[str]:
    """Return the arguments of `photographs.py` for an entry."""
    words = {
        "--num-images": entry["images"],
        "--keep": entry["keep"],
        "--repair": entry["repair"],
        "--seed": entry["seed"],
        "--criteria": "tpv",
        "--ranking": "curves",
    }
    model = _of_model(entry["model"], entry["img_size"], shared, weights)
    return [*model, *(str(word) for pair in words.items() for word in pair)]


def _of_model(name: str, img_size: int, shared: Path, weights: Path | None) -> list[str]:
    calibration, *tests, classes = (str(shared / "data" / name) for name in DATA)
    words = ["--model", name, "--checkpoint", str(_weights(name, shared, weights))]
    words += ["--calib-dir", calibration, "--class-map", classes, "--img-size", str(img_size)]
    # The first is cut to 227 pixels already.
    words += ["--test-dir", f"{tests[0]}:0.987", tests[1]]
    return [*words, *NETWORKS[name].options, "--threads", str(torch.get_num_threads())]


def _weights(model: str, shared: Path, weights: Path | None) -> Path | None:
    folders = [shared / "weights", *([] if weights is None else [weights])]
    found = [folder / NETWORKS[model].weights for folder in folders]
    return next((path for path in found if path.exists()), None)


@lru_cache(maxsize=1)
def _subject(model: str, img_size: int, shared: Path, weights: Path | None) -> photographs.Subject:
    return photographs.opened(photographs.parse(_of_model(model, img_size, shared, weights)))


if __name__ == "__main__":
    raise SystemExit(main())
