"""Whether what a user names is there and may be written, told before heavy imports."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

RANKING_FILE = "ranking.safetensors"
BUFFER_FILE = "buffers.safetensors"


def check_images(path: str | Path, *, arrays: bool = False) -> None:
    """Check that images can be read: a folder or a ``.tar``; with ``arrays`` an ``.npy``, too."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such folder or file")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise ValueError(f"{path}: cannot be read: check its permissions")
    if path.is_file() and path.suffix not in {".tar", *([".npy"] if arrays else [])}:
        array = ", or an .npy of them" if arrays else ""
        hint = ": a list of image files goes to --data-list" if path.suffix == ".txt" else ""
        raise ValueError(
            f"{path}: expected a folder or an uncompressed .tar of images{array}{hint}"
        )


def _check_is_file(path: str | Path, *, otherwise: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such {otherwise}")


check_checkpoint = partial(_check_is_file, otherwise="checkpoint file")
check_list = partial(_check_is_file, otherwise="list of image files")
check_table = partial(_check_is_file, otherwise="file: `tpvprune latency-table` writes one")


def _check_holds(folder: str | Path, *, name: str, what: str) -> None:
    if not (Path(folder) / name).is_file():
        inside = sorted(str(found.parent) for found in Path(folder).glob(f"*/{name}"))
        found = f"those of {', '.join(inside[:3])}: name one of them" if inside else "none"
        raise ValueError(f"{folder}: expected {name} of a saved {what}, found {found}")


check_saved = partial(_check_holds, name="config.json", what="pruned model")
check_run = partial(_check_holds, name="report.json", what="run")
check_ranking = partial(_check_holds, name=RANKING_FILE, what="run of `prune`")


def check_file(path: Path, *, overwrite: bool) -> None:
    """Find out before any work is done whether a file may be written."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a file name, found a folder")
    if path.exists() and not path.is_file():  # which a new file would replace
        raise ValueError(f"{path}: expected a file name, found a device: choose another name")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: pass --overwrite or another --output")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Make and remove a file where `path` will be: permission bits do not tell all."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from error
