"""Images from folders, tars and datasets, as timm reads them, in batches."""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor, nn

HELD_BYTES = 2 << 30
MAX_UNDECODABLE = 0.01
_MODES = {1: "L", 3: "RGB"}
_UNDECODABLE = (
    OSError,
    EOFError,
    IndexError,
    SyntaxError,
    ValueError,
    struct.error,
    tarfile.TarError,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into a model input.

    Attributes:
        input_size: (channels, height, width).
        config: timm's data config (mean, std, crop_pct, interpolation, ...).
        transform: PIL image -> tensor [channels, height, width].
    """

    input_size: tuple[int, int, int]
    config: dict[str, Any]
    transform: Callable[[Any], Tensor]


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
    """

    name: str
    count: int | None
    items: Callable[[], Iterable[Any]]
    read: Callable[[Any], tuple[Image.Image, Any]]
    where: Callable[[Any], str]
    num_classes: int | None


class ImageBatches:
    """Re-iterable batches: tensors [B, C, H, W], or (tensor, targets) if labelled.

    Every pass decodes the images again; `in_memory` holds them where they fit.
    Targets do not leave the reading thread unless `labelled`. Images that cannot
    be decoded are skipped and counted in `skipped`; more than 1 % is an error.
    """

    def __init__(
        self,
        source: ImageSource,
        items: Callable[[], Iterable[Any]],
        preprocessing: Preprocessing,
        *,
        total: int | None,
        batch_size: int = 64,
        workers: int = 4,
        labelled: bool = False,
    ) -> None:
        self.source = source
        self.preprocessing = preprocessing
        self.total = total
        self.batch_size = batch_size
        self.labelled = labelled
        self.skipped = 0
        self.first_skipped = ""
        self._items = items
        self._workers = max(1, workers)
        self._mode = _MODES[preprocessing.input_size[0]]

    def __len__(self) -> int:
        """Return the number of batches.

        Raises:
            TypeError: If the source is a stream of unknown length.
        """
        if self.total is None:
            raise TypeError(f"{self.source.name}: a stream has no length")
        return math.ceil(self.total / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Decode the images anew.

        Yields:
            Inputs [B, C, H, W], or (inputs, targets [B]) if labelled.

        Raises:
            ValueError: If there is no image, or more than 1 % cannot be decoded.
        """
        self.skipped, seen = 0, 0
        for chunk in self._decoded():
            seen += len(chunk)
            done = [sample for sample in chunk if not isinstance(sample, str)]
            failed = [sample for sample in chunk if isinstance(sample, str)]
            if failed:
                self.first_skipped = self.first_skipped or failed[0]
                self.skipped += len(failed)
                self._raise_if_too_many(self.total or seen)
            if done:
                inputs = torch.stack([image for image, _ in done])
                if self.labelled:
                    yield inputs, torch.tensor([int(target) for _, target in done])
                else:
                    yield inputs
        if seen == 0:
            raise ValueError(f"{self.source.name}: expected images, found none")

    def _raise_if_too_many(self, total: int) -> None:
        if self.skipped > MAX_UNDECODABLE * total:
            raise ValueError(
                f"{self.source.name}: at least {self.skipped} of {total} images cannot "
                f"be decoded, more than 1 %: repair or remove them "
                f"(first: {self.first_skipped})"
            )

    def _decoded(self) -> Iterator[list[Any]]:
        items = iter(self._items())
        # One batch is decoded ahead while the model works on the present one.
        ahead: deque[list[Future[Any]]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            while chunk := list(itertools.islice(items, self.batch_size)):
                ahead.append([pool.submit(self._decode, item) for item in chunk])
                if len(ahead) > 1:
                    yield [future.result() for future in ahead.popleft()]
            while ahead:
                yield [future.result() for future in ahead.popleft()]

    def _decode(self, item: Any) -> tuple[Tensor, Any] | str:
        try:
            image, target = self.source.read(item)
            image = image.convert(self._mode)
        except _UNDECODABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            where = self.source.where(item)
            return where if reason.startswith("cannot identify") else f"{where}: {reason}"
        return self.preprocessing.transform(image), target if self.labelled else None


def resolve_preprocessing(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> Preprocessing:
    """Take the evaluation preprocessing from a timm model's `pretrained_cfg`.

    Args:
        model: A timm model.
        input_size: (channels, height, width) instead of the model's.
        mean: One value, or one per channel, in [0, 1], instead of the model's.
        std: Likewise, above 0.
        crop_pct: Fraction of the resized image that is kept, in (0, 1].
        interpolation: nearest, bilinear, bicubic, lanczos, box, hamming or random.

    Returns:
        The preprocessing.

    Raises:
        ValueError: If an override does not fit the number of channels or its range.
    """
    known = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
    if interpolation is not None and interpolation not in known:
        raise ValueError(
            f"interpolation: expected one of {', '.join(known)}, found {interpolation!r}"
        )
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: expected a value in (0, 1], found {crop_pct}")
    overrides: dict[str, Any] = {"crop_pct": crop_pct, "interpolation": interpolation}
    if input_size is not None:
        overrides["input_size"] = tuple(input_size)
    config = timm.data.resolve_model_data_config(model, args=overrides)
    channels = config["input_size"][0]
    if channels not in _MODES:
        raise ValueError(
            f"input_size: expected 1 or 3 channels, found {channels}: only grey and "
            "RGB images are read"
        )
    for name, override in (("mean", mean), ("std", std)):
        config[name] = _per_channel(name, override or config[name], channels, override is not None)
    if min(config["std"]) <= 0:
        raise ValueError(f"std: expected values above 0, found {config['std']}")
    transform = timm.data.create_transform(**config, is_training=False)
    return Preprocessing(tuple(config["input_size"]), config, transform)


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
        dataset: Empty, or timm's name: torch/..., hfds/..., wds/..., ...
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
    try:
        opened = timm.data.create_dataset(
            dataset,
            root=None if data_dir is None else str(data_dir),
            split=split,
            **{key: value for key, value in options.items() if value is not None},
        )
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}: {_reason(error, dataset)}") from error
    source = _map_source(name, opened) if _has_positions(opened) else _stream(name, opened)
    if source.count == 0:
        raise ValueError(f"{name}: expected images, found none")
    if labelled and not dataset and (source.num_classes or 0) < 2:
        raise ValueError(
            f"{name}: expected labelled images in one subfolder per class, found "
            f"{source.num_classes} class"
        )
    return source


def choose_images(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    num_images: int | None,
    skip: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 4,
    labelled: bool = False,
) -> ImageBatches:
    """Choose images at random, the same ones for the same seed.

    The choice is positions skip .. skip + num_images of one permutation drawn from
    `seed`, so that two calls with neighbouring ranges are disjoint. A stream is
    read in its own order.

    Args:
        source: Where from.
        preprocessing: Image -> tensor.
        num_images: How many; None for all, in the source's order.
        skip: How many of the permutation to leave out first.
        seed: Seed of the permutation.
        batch_size: Images per batch.
        workers: Decoding threads.
        labelled: Whether to yield (inputs, targets) instead of inputs.

    Returns:
        Re-iterable batches.

    Raises:
        ValueError: If `num_images` or `batch_size` is below 1.
    """
    if batch_size < 1 or (num_images is not None and num_images < 1):
        raise ValueError(
            f"expected a batch size and a number of images of at least 1, found "
            f"{batch_size} and {num_images}"
        )
    stop = None if num_images is None else skip + num_images
    items: Callable[[], Iterable[Any]]
    if source.count is None:
        total = num_images
        items = lambda: itertools.islice(source.items(), skip, stop)  # noqa: E731
    else:
        order: Sequence[int] = range(source.count)
        if num_images is not None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(source.count, generator=generator).tolist()
        chosen = order[skip:stop]
        total = len(chosen)
        items = lambda: chosen  # noqa: E731
    return ImageBatches(
        source,
        items,
        preprocessing,
        total=total,
        batch_size=batch_size,
        workers=workers,
        labelled=labelled,
    )


def in_memory(
    batches: ImageBatches,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Sequence[Any] | ImageBatches:
    """Decode once and hold the batches where they take at most 2 GiB.

    Args:
        batches: What to hold.
        progress: Wraps the iteration, such as tqdm.

    Returns:
        A list of the batches, or `batches` itself, which decodes on every pass.
    """
    size = 4 * math.prod(batches.preprocessing.input_size)
    if batches.total is None or batches.total * size > HELD_BYTES:
        return batches
    return list(progress(batches) if progress else batches)


def _per_channel(
    name: str, values: Sequence[float], channels: int, strict: bool
) -> tuple[float, ...]:
    if strict and len(values) not in (1, channels):
        raise ValueError(f"{name}: expected 1 or {channels} values, found {len(values)}")
    # One grey channel under a model's colour config: the mean of the colours serves.
    if len(values) != channels:
        return (sum(values) / len(values),) * channels
    return tuple(values)


def _checked_location(data_dir: str | Path | None, dataset: str) -> str:
    if data_dir is None:
        if not dataset:
            raise ValueError("data_dir: expected a folder, a .tar or a dataset name")
        return dataset
    path = Path(data_dir)
    if dataset:
        return f"{dataset} in {path}"
    if not path.exists():
        raise ValueError(f"{path}: no such folder or file")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise ValueError(f"{path}: cannot be read: check its permissions")
    if path.is_file() and path.suffix != ".tar":
        raise ValueError(f"{path}: expected a folder or an uncompressed .tar of images")
    return str(path)


def _reason(error: BaseException, dataset: str) -> str:
    if isinstance(error, ImportError):
        return f"needs a package that is not installed ({error})"
    if isinstance(error, tarfile.TarError):
        return f"not a readable tar ({error})"
    message = (str(error).splitlines() or [""])[0]
    if not dataset and (isinstance(error, ValueError) or "Found 0 images" in message):
        return f"expected images ({', '.join(get_img_extensions())}), found none"
    return f"cannot be opened ({type(error).__name__}: {message})"


def _has_positions(opened: Any) -> bool:
    return not isinstance(opened, torch.utils.data.IterableDataset)


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

    classes: Mapping[str, int] | None = None
    for owner in (reader, opened):
        for attribute in ("class_to_idx", "class_name_to_idx"):
            classes = classes or getattr(owner, attribute, None)
    count = len(opened)
    return ImageSource(
        name,
        count,
        lambda: range(count),
        read,
        where,
        max(classes.values()) + 1 if classes else None,
    )


def _stream(name: str, opened: Any) -> ImageSource:
    return ImageSource(name, None, lambda: opened, lambda item: item, lambda _: "a sample", None)
