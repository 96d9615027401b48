"""From flags to the images that a command shows to a model."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tpvprune.cli.console import bar, say
from tpvprune.cli.pruning_options import outputs_of, probing_options
from tpvprune.cli.session import Subject
from tpvprune.groups import ChannelGroups
from tpvprune.images.fitted import Fit
from tpvprune.images.loading import ImageBatches, choose_images, in_memory, permutation
from tpvprune.images.sources import ImageSource, array_images, listed_images, open_images
from tpvprune.passes.costs import count_macs
from tpvprune.passes.drawing import drawn_indices, hold_back
from tpvprune.passes.loss import Losses
from tpvprune.processes.shares import share, total
from tpvprune.scores.tpv import Scores, tpv_scores

# Images that agreement is measured on: as many as so many MACs of the dense model allow.
_MOST_EVALUATED, _ENOUGH, _EVALUATED_MACS = 512, 64, 1e12
_KNOWN = 0.1  # standard error / score


@dataclass(frozen=True)
class EvalImages:
    """Images to measure agreement on that the repair has not seen, and what they are."""

    batches: Any
    kind: Literal["labelled", "other", "held-back"]

    def __str__(self) -> str:
        """Return their number and kind, for people."""
        num = num_images(self.batches)
        return f"{num} {self.kind} image{'' if num == 1 else 's'}"


@dataclass(frozen=True)
class Opened:
    """What `prune` works with: the model, layers to leave whole, images to prune and measure with.

    ``labelled``: the batches of `--eval-dir`, or None. With ``--max-loss`` some images decide on
    the size (``deciding``), and what measures the result has not seen them. ``seconds``: what
    reading took. ``num_apart``: images that ranking and repair do not see.
    """

    subject: Subject
    layers: tuple[str, ...]
    images: ImageSource
    batches: Any
    labelled: Any
    eval_images: EvalImages
    seconds: dict[str, float]
    num_apart: int = 0
    deciding: Losses | None = None


class Shown:
    """Re-iterable batches whose every pass shows a progress bar."""

    def __init__(self, batches: Any, title: str) -> None:
        self.batches, self.title = batches, title

    def __iter__(self) -> Iterator[Any]:
        return iter(bar(self.title)(self.batches))


def open_data(args: argparse.Namespace, *, labelled: bool, again: bool = False) -> ImageSource:
    """Open the images that the flags name."""
    is_array = not args.dataset and str(args.data_dir).endswith(".npy")
    if labelled and (is_array or args.data_list is not None):
        raise ValueError(
            f"{args.data_list or args.data_dir}: holds no labels: labelled images come in one "
            "subfolder per class"
        )
    if args.data_list is not None:
        images = listed_images(args.data_list, root=args.data_dir)
    elif is_array:
        images = array_images(args.data_dir)
    else:
        named = ("dataset", "split", "input_key", "target_key")
        images = open_images(
            args.data_dir,
            **{name: getattr(args, name) for name in named},
            class_map=args.class_map if labelled else None,
            labelled=labelled,
            download=args.dataset_download,
        )
    if images.note and not again:
        say(images.note)
    return images


def choose(
    args: argparse.Namespace,
    subject: Subject,
    images: ImageSource,
    num_images: int | None,
    *,
    skip: int = 0,
    places: Sequence[int] | None = None,
    labelled: bool = False,
) -> ImageBatches:
    """Choose images by the flags' seed; see `loading.choose_images`."""
    args.images_per_batch = args.batch_size or _images_per_batch(subject)
    return choose_images(
        images,
        subject.preprocessing,
        num_images=num_images,
        skip=skip,
        places=places,
        seed=args.seed,
        batch_size=args.images_per_batch,
        workers=args.workers,
        labelled=labelled,
        notice=say,
    )


def _images_per_batch(subject: Subject) -> int:
    """Return 64; on a CPU so many that a batch has no more pixels than 64 images of 112 pixels.

    Beyond that its activations leave the caches, and a third of the time goes into memory pages.
    """
    if subject.device.type != "cpu":
        return 64
    _, high, wide = subject.preprocessing.input_size
    return max(1, min(64, 64 * 112 * 112 // (high * wide)))


def scored_until_known(
    args: argparse.Namespace,
    subject: Subject,
    images: ImageSource,
    groups: ChannelGroups,
    *,
    apart: int = 0,
) -> Scores:
    """Score with ``--num-images auto``: until half of the scores are known well enough.

    Images set apart are not looked at.
    """
    num, skip = all_but(apart, images, images.count)
    chosen = choose(args, subject, images, num, skip=skip)
    scores = tpv_scores(
        subject.model,
        groups,
        Shown(chosen, "scoring"),
        until=_KNOWN,
        outputs=outputs_of(args),
        **probing_options(args),
    )
    say(f"{scores.num_samples} images scored, until half of the scores were known to {_KNOWN:.0%}")
    return scores


def calibration(
    args: argparse.Namespace,
    subject: Subject,
    images: ImageSource,
    *,
    labelled: bool,
    apart: int = 0,
) -> Any:
    """Return the images that pruning sees."""
    num, skip = all_but(apart, images, args.num_images)
    chosen = choose(args, subject, images, num, skip=skip, labelled=labelled)
    if labelled:
        check_classes(images, subject, class_map=args.class_map)
    batches = in_memory(chosen, progress=bar("reading images"))
    if isinstance(batches, list) and not batches:
        raise ValueError(f"{images.name}: expected images, found none")
    if images.count is not None and images.count - apart < args.num_images:
        beside = f" beside {apart} that are set apart" if apart else ""
        say(
            f"note: {images.name} holds {images.count - apart} images{beside}, fewer than "
            "--num-images"
        )
    return batches


def others(
    args: argparse.Namespace, subject: Subject, images: ImageSource, batches: Any, num: int
) -> EvalImages:
    """Return up to so many images beside those that pruning sees, to measure agreement on.

    They take no part in a repair. Where the set holds hardly more than pruning asks for, they are
    what :func:`tpvprune.passes.drawing.hold_back` keeps from it, with whatever is left.
    """

    def left(num: int) -> Any:
        return in_memory(choose(args, subject, images, num, skip=args.num_images))

    more = 0 if images.count is None else images.count - args.num_images
    if more >= _ENOUGH:
        return EvalImages(left(num), "other")
    held = _first(hold_back(batches, seed=args.seed)[1], num)
    room = num - int(total(sum(map(len, held))))
    return EvalImages([*held, *(left(room) if min(more, room) > 0 else ())], "held-back")


def _first(batches: Iterable[Tensor], num: int) -> list[Tensor]:
    """Return the first so many of the inputs of all processes, this one's part."""
    found, left = [], share(num)
    for x in batches:
        found.append(x[:left])
        left -= len(found[-1])
    return [x for x in found if len(x)]


def num_eval_images(subject: Subject) -> int:
    """Return how many images agreement is measured on, of what pruning does not use."""
    macs = count_macs(subject.model, subject.example[:1])
    return max(_ENOUGH, min(_MOST_EVALUATED, int(_EVALUATED_MACS / max(macs, 1))))


def choose_apart(
    args: argparse.Namespace, subject: Subject, images: ImageSource, num: int
) -> ImageBatches:
    """Choose images that pruning does not see: the last of the permutation, the first of a stream.

    It takes the first ones of the permutation.
    """
    skip = 0 if images.count is None else images.count - num
    return choose(args, subject, images, num, skip=skip)


def all_but(apart: int, images: ImageSource, num_images: int | None) -> tuple[int | None, int]:
    """Return how many images to take after how many others, without those set apart."""
    if images.count is None:
        return num_images, apart
    rest = images.count - apart
    return (rest if num_images is None else min(num_images, rest)), 0


def fit_of_cut(args: argparse.Namespace, opened: Opened) -> Fit:
    """Return which images ranking and repair have seen, once they have read them."""
    images, batches = opened.images, opened.batches
    num, skip = all_but(opened.num_apart, images, args.num_images)
    assert num is not None
    order = range(skip + num) if images.count is None else permutation(images.count, args.seed)
    held = [order[skip + place] for place in drawn_indices(num, seed=args.seed)[1]]
    # Without a damaged one the next have other numbers: which were held back is not known.
    whole = num_images(batches) == num and not getattr(batches, "skipped", 0)
    apart = [*order[:skip], *(held if whole else ())]
    return Fit.to(images, seed=args.seed, num=skip + num, apart=apart)


def labelled_images(args: argparse.Namespace, subject: Subject, others: ImageSource) -> Any:
    """Return the labelled batches of `--eval-dir`, or None; they only measure top-1.

    ``others``: the unlabeled images of the command, of which none should be among them.
    """
    if args.eval_dir is None:
        return None
    images = _labelled_source(args)
    _check_apart(args, images, others)
    check_classes(images, subject, class_map=args.class_map)
    chosen = choose(args, subject, images, None, labelled=True)
    return in_memory(chosen, progress=bar("reading labelled images"))


def _check_apart(args: argparse.Namespace, labelled: ImageSource, images: ImageSource) -> None:
    """Say how many labelled images may be fitted to; where they decide, that is a ValueError."""
    num = len(labelled.files() & images.files())
    if not num:
        return
    found = f"{num} of the {labelled.count} images of --eval-dir are among those of {images.name}"
    if getattr(args, "max_loss", None) is not None:
        raise ValueError(
            f"--max-loss: expected images that take no part in the cut, but {found}: pass others, "
            "or leave out --eval-dir: then some images are set apart"
        )
    say(f"note: {found}: on images that it was fitted to a model looks better than on others")


def class_names(args: argparse.Namespace) -> list[str] | None:
    """Return what the class folders of `--eval-dir` are called, or None without one."""
    if args.eval_dir is None:
        return None
    names = _labelled_source(args).class_names
    return None if names is None else list(names)


def _labelled_source(args: argparse.Namespace) -> ImageSource:
    return open_images(args.eval_dir, split="validation", class_map=args.class_map, labelled=True)


def check_classes(images: ImageSource, subject: Subject, *, class_map: str | None) -> None:
    """Check that the classes of a source are those of the model."""
    expected, found = subject.num_classes, images.num_classes
    if expected == 0:
        raise ValueError(
            f"{images.name}: expected a model that chooses among classes, found one without "
            "(num_classes 0), whose features labels do not tell: leave out what needs them"
        )
    if expected is None or found is None:
        return
    if found > expected or (found < expected and class_map is None):
        raise ValueError(
            f"{images.name}: expected the model's {expected} classes, found {found}: pass "
            "--class-map with the index of each class folder"
        )


def has_labels(images: ImageSource, subject: Subject, *, explicit: bool) -> bool:
    """Tell whether the subfolders of a source are the classes of the model."""
    if explicit:
        return True
    expected = subject.num_classes
    if images.num_classes == expected:
        return expected is not None and expected > 1  # a folder without subfolders is one class
    if (images.num_classes or 1) > 1:
        known = expected or "no"
        say(
            f"note: {images.name} has {images.num_classes} subfolders, the model {known} "
            "classes: top-1 is not measured; --class-map gives each its index"
        )
    return False


def num_images(batches: Any) -> int | None:
    """Count the images of batches; None of a stream that has not been read to its end."""
    if isinstance(batches, ImageBatches):
        return batches.total if batches.seen is None else batches.seen
    return int(total(sum(len(b[0] if isinstance(b, tuple) else b) for b in batches)))
