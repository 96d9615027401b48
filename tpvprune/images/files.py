"""Images by a list of their files, or in one NumPy array: unlabeled sources."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tpvprune.disk.path_checks import check_list
from tpvprune.images.sources import ImageSource

_MAX_LIST_BYTES = 2**30


def listed_images(path: str | Path, *, root: str | Path | None = None) -> ImageSource:
    """Open the images that a text file names, one path a line."""
    path = Path(path)
    check_list(path)
    if path.stat().st_size > _MAX_LIST_BYTES:
        raise ValueError(
            f"{path}: expected a list of paths, found more than {_MAX_LIST_BYTES} bytes"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file of paths, one a line") from error
    start = path.parent if root is None else Path(root)
    files = [start / line.strip() for line in lines if line.strip()]
    if not files:
        raise ValueError(f"{path}: expected paths of images, one a line, found none")
    if not files[0].is_file():
        raise ValueError(
            f"{path}: expected image files, found no {files[0]}: relative paths start from "
            f"{'the folder of the list' if root is None else root}"
        )

    def read(item: int) -> tuple[Image.Image, Any]:
        return Image.open(io.BytesIO(files[item].read_bytes())), None

    return ImageSource(
        str(path), len(files), lambda: range(len(files)), read, lambda i: str(files[i]), None
    )


def array_images(path: str | Path) -> ImageSource:
    """Open a NumPy array of images, mapped from the disk and not loaded as a whole."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a NumPy array of images, found damage") from error
    channels = images.shape[3:] if images.ndim == 4 else (1,) if images.ndim == 3 else ()
    if images.dtype != np.uint8 or channels not in ((1,), (3,)) or not images.size:
        raise ValueError(
            f"{path}: expected uint8 images [N, H, W, 1 or 3] or [N, H, W], found "
            f"{images.dtype} {list(images.shape)}"
        )

    def read(item: int) -> tuple[Image.Image, Any]:
        image = np.array(images[item])  # a copy: the file is mapped for reading only
        return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), None

    num = len(images)
    return ImageSource(
        str(path), num, lambda: range(num), read, lambda i: f"image {i} of {path}", None
    )
