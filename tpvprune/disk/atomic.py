"""Write a folder whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

OWN_FILES = {
    *("config.json", "model.safetensors", "buffers.safetensors", "ranking.safetensors"),
    *("masks.safetensors", "report.json", "report.html"),
}
_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{32}\.(tmp|old)")
# safetensors passes on what the system says in an error of its own.
_REFUSALS = (OSError, SafetensorError)
# The user's umask says who may read a file; safetensors would let nobody but the owner.
_FILES = 0o666
_AT_CURRENT_FOLDER, _EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Find out before any work is done whether a folder may be written."""
    try:
        folder = Path(folder).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, no home folder
        raise ValueError(f"{folder}: expected a folder's name ({error}): choose another") from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file: choose another name")
    present = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if present and not overwrite:
        raise ValueError(
            f"{folder}: expected no folder or an empty one, found {len(present)} entries: "
            "pass overwrite=True or choose another name"
        )
    if not OWN_FILES.issuperset(present) and not _holds_saved_model(folder):
        raise ValueError(
            f"{folder}: expected a saved pruned model to overwrite, found other files "
            f"({min(set(present) - OWN_FILES)!r}): choose another folder"
        )
    parent = next(path for path in folder.parents if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: {parent} is not writable: choose another folder")
    return folder


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill; at the end it takes the place of ``folder``.

    It lies beside its final place. Only after everything in it has reached the disk is it
    renamed, exchanging names with an old folder in one step where the system can. When
    the body raises, the old folder stays and the new one goes. What a killed process left
    unfinished goes, too: of two that write one place at a time, the first one fails. ValueError
    tells the reason if the system refuses to write.
    """
    with _beside(folder, "folder") as unfinished:
        unfinished.mkdir()
        yield unfinished
        mode = unfinished.stat().st_mode & _FILES
        for path in (*unfinished.rglob("*"), unfinished):
            if path.is_file():
                path.chmod(mode)
            _flush(path)
        _replace(folder, unfinished)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """Give the name of a new file to write; see :func:`written_folder`."""
    with _beside(path, "place") as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode & _FILES
        unfinished.unlink()
        yield unfinished
        unfinished.chmod(mode)
        _flush(unfinished)
        unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def _beside(place: Path, kind: str) -> Iterator[Path]:
    """Give a name to write to beside a place, where nothing is left at the end."""
    unfinished = place.parent / f".{place.name}.{uuid.uuid4().hex}.tmp"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear(place)
        yield unfinished
        _flush(place.parent)
    except _REFUSALS as error:
        raise ValueError(
            f"{place}: cannot be written ({_reason(error)}): choose another {kind}"
        ) from error
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).rpartition("I/O error: ")[2]


def is_unfinished(path: Path) -> bool:
    """Tell whether a file or folder is what a killed process left of one that it wrote."""
    return _UNFINISHED.fullmatch(path.name) is not None


def present_in(folder: Path) -> set[str]:
    """Return what a folder, if there is one, holds beside what killed processes left."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file: choose another name")
    entries = folder.iterdir() if folder.is_dir() else ()
    return {entry.name for entry in entries if not is_unfinished(entry)}


def _clear(place: Path) -> None:
    """Remove what a killed process left beside a place, or put it back if it is all there is."""
    for path in place.parent.iterdir():
        found = _UNFINISHED.fullmatch(path.name)
        if found is None or found[1] != place.name:
            continue
        if found[2] == "old" and not place.exists():
            path.rename(place)
        else:
            _remove(path)


def _replace(folder: Path, new: Path) -> None:
    """Put ``new`` in the place of ``folder``; what was there is at ``new`` or gone."""
    if not folder.exists():
        new.rename(folder)
        return
    if _exchange(folder, new):
        return
    aside = new.with_suffix(".old")
    folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    # In one step; False where the system or the file system cannot.
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    names = os.fsencode(first), os.fsencode(second)
    done = rename(_AT_CURRENT_FOLDER, names[0], _AT_CURRENT_FOLDER, names[1], _EXCHANGE)
    return bool(done == 0)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _holds_saved_model(folder: Path) -> bool:
    try:
        return "format_version" in json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False
