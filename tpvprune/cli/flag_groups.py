"""Flags that several commands share, with timm's names wherever timm has one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tpvprune.cli.flag_values import count, count_or_auto, output, pair, positive, seed
from tpvprune.runtimes.names import RUNTIMES, TABLE


class _UsageError(ValueError):
    """Wrong flags: reported in one line like every other bad input."""


class Parser(argparse.ArgumentParser):
    """argparse, with sections by title and one-line errors."""

    def section(self, title: str) -> argparse._ArgumentGroup:
        """Return the help section of that title, made where there is none."""
        titled = [group for group in self._action_groups if group.title == title]
        return titled[0] if titled else self.add_argument_group(title)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit with."""
        raise _UsageError(f"{message} (see {self.prog} --help)")


def flag(group: Any, names: str, metavar: Any, text: str, **how: Any) -> None:
    """Add a flag with a value; of several names with spaces between the last one counts."""
    group.add_argument(*names.split(), metavar=metavar, help=text, **how)


def switch(group: Any, name: str, text: str) -> None:
    """Add a flag without a value."""
    group.add_argument(name, action="store_true", help=text)


_YES = {"action": "store_true"}
# Flags that mean the same wherever they are: section, text and what argparse is told.
_ALIKE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "--eval-dir": (
        "images", "labelled images, only to measure top-1 before and after", {"metavar": "D"},
    ),
    "--grad-checkpointing": ("pruning", "score with less memory, in more time (tpv)", _YES),
    "--ignore": (
        "pruning", "layers whose channels stay", {"metavar": "NAME", "nargs": "+", "default": ()},
    ),
    "--device": ("run", "cpu, cuda, cuda:1 (cpu)", {"metavar": "DEV", "default": "cpu"}),
    "--latency-repeats": (
        "run", "timed calls of each model by turns, 0 for none (50)",
        {"metavar": "N", "type": int, "default": 50},
    ),
    "--dry-run": ("run", "say what would be done and how long it may take", _YES),
    "--seed": (
        "run", "seed of every random choice (0)", {"metavar": "N", "type": seed, "default": 0},
    ),
    "--json": ("run", "one JSON document on stdout", _YES),
}  # fmt: skip


def add(sub: Parser, *names: str) -> None:
    """Add flags that mean the same wherever they are."""
    for name in names:
        section, text, how = _ALIKE[name]
        sub.section(section).add_argument(name, help=text, **how)


def add_model(sub: Parser, *, required: bool = True) -> None:
    """Add which model, with which weights."""
    group = sub.section("model")
    flag(
        group, "--model", "M", required=required,
        text="timm's name, hf-hub:..., local-dir:..., torchvision/NAME, hf:NAME (transformers), "
        "or your own package.module:factory",
    )  # fmt: skip
    weights = group.add_mutually_exclusive_group()
    flag(weights, "--checkpoint", "F", "safetensors or weights-only torch file")
    switch(weights, "--pretrained", "timm's pretrained weights")
    flag(group, "--num-classes", "N", "classifier size (else the checkpoint's)", type=int)
    add_model_kwargs(group)


def add_folder(sub: Parser, text: str = "folder that `prune` wrote") -> None:
    """Add a saved model in the place of a named one."""
    sub.add_argument("folder", nargs="?", metavar="OUT", help=text)
    add_model(sub, required=False)


def add_model_kwargs(group: Any) -> None:
    """Add how a model is made and called."""
    flag(
        group, "--forward", "F",
        "package.module:function(model, x), whose outputs count in the place of the model's",
    )  # fmt: skip
    flag(
        group, "--model-kwargs", "K=V", "arguments of the model, as pad_type=same",
        nargs="*", default=(), type=pair,
    )  # fmt: skip


def add_data(
    sub: Parser,
    num_images: int | None,
    *,
    split: str = "train",
    shown: str | None = None,
    auto: bool = False,
    labelled: bool = False,
) -> None:
    """Add which images, how many (as `shown`) of them, and how they are read."""
    group = sub.section("images")
    flag(
        group, "--data-dir", "D",
        "folder or .tar of images, one subfolder per class, whose names are the labels"
        if labelled
        else "folder, .tar or uint8 .npy of images, no labels needed",
    )  # fmt: skip
    flag(group, "--data-list", "F", "text file: one image path a line (from --data-dir)")
    flag(group, "--dataset", "NAME", "torch/..., hfds/..., tfds/..., wds/...", default="")
    flag(group, "--split", "S", "split of the dataset (%(default)s)", default=split)
    switch(group, "--dataset-download", "let timm download it")
    flag(group, "--class-map", "F", "file: class name -> index")
    flag(group, "--input-key", "K", "image column of the dataset")
    flag(group, "--target-key", "K", "label column of the dataset")
    flag(
        group, "--num-images", "N", type=count_or_auto if auto else count, default=num_images,
        text=f"images used, drawn by the seed ({shown or num_images or 'all'})"
        + ("; auto: until half of the scores are known to 10 %%" if auto else ""),
    )  # fmt: skip
    flag(
        group, "-b --batch-size", "N", type=count,
        text="images per batch (64, of large images on a CPU fewer; in training 128)",
    )  # fmt: skip
    flag(group, "-j --workers", "N", "decoding threads (4)", type=count, default=4)
    add_preprocessing(sub)


def add_preprocessing(sub: Parser) -> None:
    """Add how an image becomes an input."""
    group = sub.section("preprocessing (default: the model's pretrained_cfg)")
    size = group.add_mutually_exclusive_group()
    flag(size, "--input-size", ("C", "H", "W"), "channels, height, width", nargs=3, type=count)
    flag(size, "--img-size", "N", "short for --input-size 3 N N", type=count)
    flag(group, "--mean", "X", "one, or one per channel", nargs="+", type=float)
    flag(group, "--std", "X", "likewise", nargs="+", type=float)
    flag(group, "--crop-pct", "X", "part of the image that stays", type=float)
    flag(group, "--interpolation", "NAME", "bilinear, bicubic, ...")


def add_criterion(sub: Parser) -> None:
    """Add how channels are scored."""
    group = sub.section("pruning")
    flag(group, "--criterion", "NAME", "how to score (tpv)", default="tpv")
    flag(group, "--num-probes", "N", "random output directions (1)", type=count, default=1)
    flag(
        group, "--outputs", "K[=X]", nargs="+", type=output,
        text="outputs that count (all), and how much each (1): logits, 0, aux.1=0.5",
    )  # fmt: skip


def add_training(
    sub: Parser, title: str = "training", *, teacher: bool = True, mirror: str = ""
) -> None:
    """Add how a pruned model is trained; with what concerns the dense one if that teaches.

    ``mirror``: what else mirror images do.
    """
    group = sub.section(title)
    length = group.add_mutually_exclusive_group()
    flag(length, "--epochs", "N", "passes (10)", type=count)
    flag(
        length, "--minutes", "M", type=positive,
        text="train for so long in their place, measuring before and after included",
    )  # fmt: skip
    flag(
        group, "--lr", "X", type=positive, default=0.001 if teacher else 0.01,
        text="peak learning rate; a high one undoes what compensation has won (%(default)g)",
    )  # fmt: skip
    if teacher:
        flag(
            group, "--loss", None, choices=("logits", "divergence"), default="logits",
            text="relative squared error of the outputs, or divergence of the classes (logits)",
        )  # fmt: skip
        flag(
            group, "--temperature", "T", "of the softmax in the divergence (3)",
            type=positive, default=3.0,
        )  # fmt: skip
        switch(group, "--no-mix", "do not mix images with others of their batch")
        switch(
            group, "--mirrored",
            "left and right mean nothing: teach the mean of the dense outputs on an image and on "
            "its mirror image" + mirror,
        )  # fmt: skip
        flag(
            group, "--num-views", "N", type=count,
            text="repeat the augmentation after N epochs, holding the dense outputs (never)",
        )  # fmt: skip
    flag(group, "--opt", "NAME", "timm's optimizer (sgd)", default="sgd")
    flag(group, "--sched", "NAME", "cosine, tanh or poly (cosine)", default="cosine")
    flag(group, "--weight-decay", "X", "of weights (1e-4)", type=float, default=1e-4)
    flag(group, "--warmup-epochs", "X", "rise to the peak (0.2)", type=float, default=0.2)
    flag(
        group, "--clip-grad", "X", f"largest norm of the gradient ({'1' if teacher else 'any'})",
        type=positive, default=1.0 if teacher else None,
    )  # fmt: skip
    flag(group, "--model-ema-decay", "X", "save the moving average of the weights", type=float)
    switch(group, "--amp", "mixed precision")
    flag(
        group, "--amp-dtype", None, "its type; float16 on CUDA only (bfloat16)",
        choices=("bfloat16", "float16"), default="bfloat16",
    )  # fmt: skip
    switch(group, "--freeze-batchnorm", "keep BatchNorm's running statistics")
    used = {action.dest: action.default for action in group._group_actions}
    others = {"amp", "mirrored"}  # these are of use without any training, too
    sub.set_defaults(untrained={name: used[name] for name in used if name not in others})


def add_latency_budget(group: Any, *, table: bool = True) -> None:
    """Add where milliseconds are measured that a budget counts, or that a table may hold."""
    flag(
        group, "--latency-runtime", None, default="eager",
        choices=(*RUNTIMES, TABLE) if table else RUNTIMES,
        text="where the model will run: PyTorch as it is or compiled on --device, or ONNX Runtime "
        "or OpenVINO on the CPU" + ("; table: what --latency-table says" if table else "")
        + " (eager)",
    )  # fmt: skip
    if table:
        flag(
            group, "--latency-table", "F",
            "file that `latency-table` wrote on the device where the model will run",
        )  # fmt: skip
    flag(
        group, "--latency-batch-size", "N", type=count, default=1,
        text="images of one call" + (", with --of latency (1)" if table else " (1)"),
    )  # fmt: skip
    flag(
        group, "--latency-threads", "N", type=count,
        text="threads of one call on a CPU (as many as PyTorch uses)",
    )  # fmt: skip


def add_output(sub: Parser, text: str, default: str | None = None) -> None:
    """Add where the result goes."""
    group = sub.section("run")
    flag(
        group, "--output", "OUT", text, type=Path, required=default is None, default=default
    )  # fmt: skip
    switch(group, "--overwrite", "replace what OUT holds")


def add_file(group: Any, text: str) -> None:
    """Add a file to write, where one is asked for."""
    flag(group, "--output", "F", text, type=Path)
    switch(group, "--overwrite", "replace a file that is there")


def check_unset(args: argparse.Namespace, defaults: Mapping[str, Any], why: str) -> None:
    """Check that no flag, of those that the command has, differs from its default."""
    for name, default in defaults.items():
        if getattr(args, name, default) != default:
            raise ValueError(f"--{name.replace('_', '-')}: {why}")


@contextmanager
def errors_by_flag(**others: str) -> Iterator[None]:
    """Name flags in the errors of functions that name their arguments first.

    ``others``: argument -> flag, with underscores, where they are called differently.
    """
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if not (colon and name.isidentifier()):
            raise
        raise ValueError(f"--{others.get(name, name).replace('_', '-')}:{rest}") from error


# ---- what a flag's text may be --------------------------------------------------------------
