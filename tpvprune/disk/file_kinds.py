"""What a file is that was taken for a checkpoint: said from its first bytes, none are run."""

from __future__ import annotations

import codecs
from pathlib import Path

_HEAD = 512
_ZIP, _PICKLE, _POINTER = b"PK\x03\x04", b"\x80", b"version https://git-lfs"


def found_instead(path: str | Path, reason: str) -> str:
    """Say what a file is that could not be read as weights."""
    with Path(path).open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "an empty file"
    if head.startswith(_POINTER):
        return "a Git LFS pointer: `git lfs pull` fetches the file itself"
    if _is_text(head):
        first = head.decode("utf-8", "ignore").strip().partition("\n")[0]
        return f"a text file: it begins with {first[:40]!r}"
    if "blocked" in reason and head.startswith((_ZIP, _PICKLE)):
        return "a pickle of more than weights, which is not run: save the state_dict() alone"
    if head.startswith((_ZIP, _PICKLE)) or Path(path).suffix == ".safetensors":
        return f"damage ({reason})"
    return "another kind of file"


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the end may be half a letter
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)
