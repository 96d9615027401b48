"""Images from folders, tars and datasets, as timm reads them; by a list of files; in one array."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

from tpvprune.disk.digest import digest_of
from tpvprune.disk.path_checks import check_images, check_list

# timm's own, and what PIL reads as surely.
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_MOST_LISTED = 200_000
_MAX_LIST_BYTES = 2**30
# timm's prefixes of dataset names, and what timm reads those with.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torch": (),
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "tfds": ("tensorflow", "tensorflow-datasets"),
    "wds": ("webdataset",),
}


@dataclass(frozen=True)
class ImageSource:
    """A set of images that can be read by position, or only streamed.

    Attributes:
        name: For messages: the path or the dataset's name.
        count: Number of images; None for a stream of unknown length.
        items: Positions, or (image, target) pairs of a stream; anew on each call.
        read: Item -> (PIL image, not necessarily decoded yet; target).
        where: Item -> its file name, for messages.
        num_classes: Number of classes; None where the source does not say.
        class_names: Name of each class, in order; None where the source does not say.
        note: What a user should know of it, in lines; empty for nothing.
        path: The folder or file that its images lie in; None if unknown.
        label: What tells it from others that call their images alike, wherever it lies.
        within: Item -> its file's name in ``path``; None if images are numbered only.
    """

    name: str
    count: int | None
    items: Callable[[], Iterable[Any]]
    read: Callable[[Any], tuple[Image.Image, Any]]
    where: Callable[[Any], str]
    num_classes: int | None
    class_names: tuple[str, ...] | None = None
    note: str = ""
    path: Path | None = None
    label: str = ""
    within: Callable[[Any], str] | None = None

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of label, number and names of the images in their order."""
        names = () if self.within is None else map(self.within, self.items())
        return digest_of("\n".join([self.label, str(self.count), *names])).hex()

    def files(self) -> set[str]:
        """Return the files of the images, of not too many without links; empty if unknown."""
        if self.path is None or self.within is None:
            return set()
        plain = os.path.realpath if (self.count or 0) <= _MOST_LISTED else os.path.normpath
        return {plain(self.path / self.within(item)) for item in self.items()}


def open_images(
    data_dir: str | Path | None = None,
    *,
    dataset: str = "",
    split: str = "train",
    class_map: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    labelled: bool = False,
    download: bool = False,
) -> ImageSource:
    """Open a folder, a tar or a timm dataset.

    Args:
        data_dir: Folder of images (with or without class subfolders), a `.tar` of
            them, or the root of `dataset`.
        dataset: Empty, or timm's name: torch/..., hfds/..., hfids/..., tfds/... or wds/...
        split: Split of the dataset; a folder's subfolder of that name is used.
        class_map: File that maps class names to indices.
        input_key: Name of the image column (hfds, wds).
        target_key: Name of the label column (hfds, wds).
        labelled: Whether labels will be read: class subfolders are then required.
        download: Let timm download the dataset.

    Returns:
        The source.

    Raises:
        ValueError: If nothing can be read there, with the reason in one line.
    """
    name = _checked_location(data_dir, dataset)
    options: dict[str, Any] = {"class_map": class_map}
    if dataset:
        options |= {"input_key": input_key, "target_key": target_key}
        options["download"] = download
        if not labelled and dataset.lower().startswith("hfds/"):
            # Any column can stand in for the labels that an unlabeled set lacks.
            options["target_key"] = input_key or "image"
    elif Path(name).is_file():
        # timm would cache the index of a large tar as a pickle beside it.
        options["cache_tarinfo"] = False
    if dataset.lower().startswith("torch/"):
        options = {"download": download}
    fetches = dataset and download and data_dir is not None
    tidied = _no_empty_folders(Path(str(data_dir))) if fetches else nullcontext()
    try:
        # timm prints what is missing, besides raising it.
        with _extensions(), tidied, redirect_stdout(io.StringIO()):
            opened = timm.data.create_dataset(
                dataset,
                root=None if data_dir is None else str(data_dir),
                split=split,
                **{key: value for key, value in options.items() if value is not None},
            )
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}: {_reason(error, dataset)}") from error
    source = _opened_source(name, opened, label=f"{dataset} {split}" if dataset else "")
    if source.count == 0:
        raise ValueError(f"{name}: expected images, found none")
    if labelled and dataset:
        _check_target(source)
    if labelled and not dataset and (source.num_classes or 0) < 2:
        raise ValueError(
            f"{name}: expected labelled images in one subfolder per class, found "
            f"{source.num_classes} class"
        )
    return source


def _opened_source(name: str, opened: Any, *, label: str) -> ImageSource:
    """Return the source of what timm has opened. ``label``: of a dataset by name."""
    if isinstance(opened, torch.utils.data.IterableDataset):
        return ImageSource(
            name, None, lambda: opened, lambda i: i, lambda _: "a sample", None, label=label
        )
    source = _map_source(name, opened)
    if label:
        return replace(source, label=label)
    path = Path(opened.reader.root).resolve()
    return replace(source, path=path, label=path.name, within=source.where)


def _check_target(source: ImageSource) -> None:
    try:
        int(source.read(next(iter(source.items())))[1])
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(
            f"{source.name}: expected a class index with each image, found none: pass "
            "--target-key or class folders"
        ) from error


def _checked_location(data_dir: str | Path | None, dataset: str) -> str:
    if not dataset:
        if data_dir is None:
            raise ValueError("data_dir: expected a folder, a .tar or a dataset name")
        check_images(data_dir)
        return str(Path(data_dir))
    prefix, _, rest = dataset.partition("/")
    if prefix.lower() not in _PACKAGES or not rest:
        known = ", ".join(f"{name}/..." for name in _PACKAGES)
        raise ValueError(
            f"--dataset: expected a name that begins with one of {known}, found {dataset!r}: for a "
            "folder or a .tar of images pass --data-dir alone"
        )
    if prefix.lower() == "torch" and data_dir is None:
        raise ValueError(
            f"{dataset}: expected the folder that holds it, or is to hold it with "
            "--dataset-download, found none: pass --data-dir D"
        )
    return dataset if data_dir is None else f"{dataset} in {Path(data_dir)}"


def _reason(error: BaseException, dataset: str) -> str:
    message = (str(error).splitlines() or [""])[0]
    unknown = f"cannot be opened ({type(error).__name__}: {message})"
    if dataset:
        return _reason_of_dataset(error, dataset) or unknown
    if isinstance(error, tarfile.TarError):
        return f"not a readable tar ({error})"
    if isinstance(error, ValueError) or "Found 0 images" in message:
        return f"expected images ({', '.join(_EXTENSIONS)}), found none"
    return unknown


def _reason_of_dataset(error: BaseException, dataset: str) -> str:
    packages = _PACKAGES[dataset.partition("/")[0].lower()]
    if any(find_spec(package.replace("-", "_")) is None for package in packages):
        return f"needs what is not installed here: pip install {' '.join(packages)}"
    if "download=True" in str(error):
        return "its files are not there: --dataset-download fetches them"
    if isinstance(error, URLError):
        return (
            f"cannot be downloaded ({error.reason}): check the network, or put its files there "
            "yourself"
        )
    if isinstance(error, ImportError):
        return f"needs a package that is not installed ({error})"
    return ""


@contextmanager
def _extensions() -> Iterator[None]:
    """Let timm's readers of folders and tars find all kinds of images meanwhile."""
    before = get_img_extensions()
    set_img_extensions(_EXTENSIONS)
    try:
        yield
    finally:
        set_img_extensions(before)


@contextmanager
def _no_empty_folders(root: Path) -> Iterator[None]:
    """Take away the new folders in which a download that failed has put nothing."""

    def present() -> set[Path]:
        above = {path for path in (root, *root.parents) if path.is_dir()}
        return above | {Path(folder) for folder, _, _ in os.walk(root)}

    before = present()
    try:
        yield
    except BaseException:
        for path in sorted(present() - before, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not empty
                path.rmdir()
        raise


def _noted(root: str) -> str:
    """Return which files of a folder are no images by their name, and which are links to others.

    ValueError if links lead to a folder twice, or round and round: what is fitted to would judge.
    """
    others: list[str] = []
    links: dict[str, Path] = {}
    seen: dict[str, str] = {}
    for folder, _, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            raise ValueError(
                f"{root}: expected every folder once, found {folder}, which leads to "
                f"{seen[real]} again: remove the link"
            )
        seen[real] = folder
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() not in _EXTENSIONS:
                others.append(str(path))
            elif path.is_symlink():
                links[str(path)] = path.resolve()
    leading = Counter(links.values())
    again = [k for k, v in links.items() if leading[v] > 1 or str(v.parent) in seen]
    notes = []
    if others:
        notes.append(
            f"note: {len(others)} files of {root} are no images by their names and are not read "
            f"(first: {min(others)})"
        )
    if again:
        notes.append(
            f"note: links in {root} to images that are there again: {len(again)} (first: "
            f"{min(again)}): what is fitted to one is judged by the other: remove them"
        )
    return "\n".join(notes)


def _map_source(name: str, opened: Any) -> ImageSource:
    reader = getattr(opened, "reader", None)
    lock = threading.Lock()

    def read(index: int) -> tuple[Image.Image, Any]:
        # Readers share one file handle, so bytes are read one image at a time.
        with lock:
            if reader is None:
                image, target = opened[index]
                return image, target
            file, target = reader[index]
            with file:
                content = file.read()
        return Image.open(io.BytesIO(content)), target

    def where(index: int) -> str:
        return f"image {index}" if reader is None else str(reader.filename(index))

    count, classes = len(opened), _classes(reader, opened)
    note = ""
    if isinstance(reader, ReaderImageFolder) and count <= _MOST_LISTED:
        note = _noted(str(reader.root))  # folders of millions are not walked a second time
    num_classes = None if classes is None else len(classes)
    return ImageSource(name, count, lambda: range(count), read, where, num_classes, classes, note)


def _classes(*owners: Any) -> tuple[str, ...] | None:
    """Return the names of the classes by number, where the source knows any."""
    classes: Mapping[str, int] | None = None
    for owner in owners:
        for attribute in ("class_to_idx", "class_name_to_idx"):
            classes = classes or getattr(owner, attribute, None)
    if not classes:
        return None
    names = {number: str(name) for name, number in classes.items()}
    return tuple(names.get(number, f"class {number}") for number in range(max(names) + 1))


def listed_images(path: str | Path, *, root: str | Path | None = None) -> ImageSource:
    """Open the images that a text file names, one path a line."""
    path = Path(path)
    check_list(path)
    if path.stat().st_size > _MAX_LIST_BYTES:
        raise ValueError(
            f"{path}: expected a list of paths, found more than {_MAX_LIST_BYTES} bytes"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file of paths, one a line") from error
    start = path.parent if root is None else Path(root)
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: expected paths of images, one a line, found none")
    # An image that is there twice would be fitted to and judge.
    once = {os.path.realpath(start / name): name for name in reversed(names)}
    num_again, names = len(names) - len(once), list(reversed(once.values()))
    files = [start / name for name in names]
    if not files[0].is_file():
        raise ValueError(
            f"{path}: expected image files, found no {files[0]}: relative paths start from "
            f"{'the folder of the list' if root is None else root}"
        )

    def read(item: int) -> tuple[Image.Image, Any]:
        return Image.open(io.BytesIO(files[item].read_bytes())), None

    return ImageSource(
        str(path), len(files), lambda: range(len(files)), read, lambda i: str(files[i]), None,
        note=f"note: {path} names {num_again} images again, which are read once" * bool(num_again),
        path=start.resolve(), within=names.__getitem__,
    )  # fmt: skip


def array_images(path: str | Path) -> ImageSource:
    """Open a NumPy array of images, mapped from the disk and not loaded as a whole."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a NumPy array of images, found damage") from error
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{path}: expected one NumPy array of images, found an archive (.npz)")
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
        str(path), num, lambda: range(num), read, lambda i: f"image {i} of {path}", None,
        label=Path(path).resolve().name,
    )  # fmt: skip
