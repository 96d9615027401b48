"""Flags that several commands share, with timm's names wherever timm has one."""

from __future__ import annotations

import argparse
import ast
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

from tpvprune.runtimes.names import RUNTIMES, TABLE

AUTO = "auto"  # for --num-images: as many as the scores need


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


def add_model(sub: Parser, *, required: bool = True) -> None:
    """Add which model, with which weights."""
    group = sub.section("model")
    group.add_argument(
        "--model", required=required, metavar="M",
        help="timm's name, hf-hub:..., local-dir:..., torchvision/NAME, hf:NAME (transformers), "
        "or your own package.module:factory",
    )  # fmt: skip
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="F", help="safetensors or weights-only torch file")
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")
    group.add_argument(
        "--num-classes", type=int, metavar="N", help="classifier size (else the checkpoint's)"
    )
    _add_model_kwargs(group)


def add_own_model(sub: Parser) -> None:
    """Add how the dense model of a saved one is made, where that is the user's own."""
    group = sub.section("model")
    group.add_argument(
        "--model", metavar="M", help="package.module:factory, if OUT holds a model of your own"
    )
    _add_model_kwargs(group)


def _add_model_kwargs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--forward", metavar="F",
        help="package.module:function(model, x), whose outputs count in the place of the model's",
    )  # fmt: skip
    group.add_argument(
        "--model-kwargs", nargs="*", default=(), type=_pair, metavar="K=V",
        help="arguments of the model, as pad_type=same",
    )  # fmt: skip


def add_data(
    sub: Parser,
    *,
    num_images: bool,
    split: str | None = None,
    default: int | None = 1024,
    shown: str | None = None,
    auto: bool = False,
) -> None:
    """Add which images, and how they are read; `default` (as `shown`) many if `num_images`."""
    group = sub.section("images")
    group.add_argument(
        "--data-dir", metavar="D", help="folder, .tar or .npy of images, no labels needed"
    )
    group.add_argument(
        "--data-list", metavar="F", help="text file: one image path a line (from --data-dir)"
    )
    group.add_argument(
        "--dataset", default="", metavar="NAME", help="torch/..., hfds/..., tfds/..., wds/..."
    )
    group.add_argument(
        "--split", default=split or ("train" if num_images else "validation"), metavar="S",
        help="split of the dataset (%(default)s)",
    )  # fmt: skip
    group.add_argument("--dataset-download", action="store_true", help="let timm download it")
    group.add_argument("--class-map", metavar="F", help="file: class name -> index")
    group.add_argument("--input-key", metavar="K", help="image column of the dataset")
    group.add_argument("--target-key", metavar="K", help="label column of the dataset")
    group.add_argument(
        "--num-images", type=_count_or_auto if auto else count,
        default=default if num_images else None, metavar="N",
        help=f"images used, drawn by the seed ({shown or (default if num_images else 'all')})"
        + ("; auto: until half of the scores are known to 10 %%" if auto else ""),
    )  # fmt: skip
    group.add_argument(
        "-b", "--batch-size", type=count, metavar="N",
        help="images per batch (64, of large images on a CPU fewer; in training 128)",
    )  # fmt: skip
    group.add_argument(
        "-j", "--workers", type=count, default=4, metavar="N", help="decoding threads (4)"
    )
    add_preprocessing(sub)


def add_eval_dir(sub: Parser) -> None:
    """Add images that only measure accuracy."""
    sub.section("images").add_argument(
        "--eval-dir", metavar="D", help="labelled images, only to measure top-1 before and after"
    )


def add_preprocessing(sub: Parser) -> None:
    """Add how an image becomes an input."""
    group = sub.section("preprocessing (default: the model's pretrained_cfg)")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--input-size", nargs=3, type=count, metavar=("C", "H", "W"),
        help="channels, height, width",
    )  # fmt: skip
    size.add_argument("--img-size", type=count, metavar="N", help="short for --input-size 3 N N")
    group.add_argument("--mean", nargs="+", type=float, metavar="X", help="one, or one per channel")
    group.add_argument("--std", nargs="+", type=float, metavar="X", help="likewise")
    group.add_argument("--crop-pct", type=float, metavar="X", help="part of the image that stays")
    group.add_argument("--interpolation", metavar="NAME", help="bilinear, bicubic, ...")


def _output(text: str) -> tuple[str, float]:
    """Return the name of an output, and how much it counts."""
    name, _, weight = text.partition("=")
    return name, positive(weight or "1")


def add_criterion(sub: Parser) -> None:
    """Add how channels are scored."""
    group = sub.section("pruning")
    group.add_argument("--criterion", default="tpv", metavar="NAME", help="how to score (tpv)")
    group.add_argument(
        "--num-probes", type=count, default=1, metavar="N", help="random output directions (1)"
    )
    group.add_argument(
        "--outputs", nargs="+", type=_output, metavar="K[=X]",
        help="outputs that count (all), and how much each (1): logits, 0, aux.1=0.5",
    )  # fmt: skip


_ONLY_TRAINING = (
    *("epochs", "minutes", "lr", "loss", "temperature", "no_mix", "mirrored", "num_views", "opt"),
    *("sched", "weight_decay", "warmup_epochs", "clip_grad", "model_ema_decay", "amp_dtype"),
    "freeze_batchnorm",
)


def add_training(sub: Parser, title: str, *, teacher: bool = True) -> None:
    """Add how a pruned model is trained; with what concerns the dense one if that teaches."""
    group = sub.section(title)
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count, metavar="N", help="passes (10)")
    length.add_argument(
        "--minutes",
        type=positive,
        metavar="M",
        help="train for so long in their place, measuring before and after included",
    )
    group.add_argument(
        "--lr", type=positive, default=0.001 if teacher else 0.01, metavar="X",
        help="peak learning rate; a high one undoes what compensation has won (%(default)g)",
    )  # fmt: skip
    if teacher:
        group.add_argument(
            "--loss", choices=("logits", "divergence"), default="logits",
            help="relative squared error of the outputs, or divergence of the classes (logits)",
        )  # fmt: skip
        group.add_argument(
            "--temperature", type=positive, default=3.0, metavar="T",
            help="of the softmax in the divergence (3)",
        )  # fmt: skip
        group.add_argument(
            "--no-mix", action="store_true", help="do not mix images with others of their batch"
        )
        group.add_argument(
            "--mirrored", action="store_true",
            help="teach the mean of the dense outputs on an image and on its mirror image: better "
            "where left and right mean nothing",
        )  # fmt: skip
        group.add_argument(
            "--num-views", type=count, metavar="N",
            help="repeat the augmentation after N epochs, holding the dense outputs (never)",
        )  # fmt: skip
    group.add_argument("--opt", default="sgd", metavar="NAME", help="timm's optimizer (sgd)")
    group.add_argument(
        "--sched", default="cosine", metavar="NAME", help="cosine, tanh or poly (cosine)"
    )
    group.add_argument(
        "--weight-decay", type=float, default=1e-4, metavar="X", help="of weights (1e-4)"
    )
    group.add_argument(
        "--warmup-epochs", type=float, default=0.2, metavar="X", help="rise to the peak (0.2)"
    )
    group.add_argument(
        "--clip-grad", type=positive, default=1.0 if teacher else None, metavar="X",
        help=f"largest norm of the gradient ({'1' if teacher else 'any'})",
    )  # fmt: skip
    group.add_argument(
        "--model-ema-decay", type=float, metavar="X", help="save the moving average of the weights"
    )
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument(
        "--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16",
        help="its type; float16 on CUDA only (bfloat16)",
    )  # fmt: skip
    group.add_argument(
        "--freeze-batchnorm", action="store_true", help="keep BatchNorm's running statistics"
    )
    # --amp and -b are of use without any training, too.
    sub.set_defaults(untrained={name: sub.get_default(name) for name in _ONLY_TRAINING})


def add_latency(sub: Parser) -> None:
    """Add how often the model is timed."""
    sub.section("run").add_argument(
        "--latency-repeats", type=int, default=50, metavar="N",
        help="timed calls of each model by turns, 0 for none (50)",
    )  # fmt: skip


def add_latency_budget(group: Any, *, table: bool = True) -> None:
    """Add where milliseconds are measured that a budget counts, or that a table may hold."""
    group.add_argument(
        "--latency-runtime", choices=(*RUNTIMES, TABLE) if table else RUNTIMES, default="eager",
        help="where the model will run: PyTorch as it is or compiled on --device, or ONNX Runtime "
        "or OpenVINO on the CPU" + ("; table: what --latency-table says" if table else "")
        + " (eager)",
    )  # fmt: skip
    if table:
        group.add_argument(
            "--latency-table", metavar="F",
            help="file that `latency-table` wrote on the device where the model will run",
        )  # fmt: skip
    group.add_argument(
        "--latency-batch-size", type=count, default=1, metavar="N",
        help="images of one call" + (", with --of latency (1)" if table else " (1)"),
    )  # fmt: skip
    group.add_argument(
        "--latency-threads", type=count, metavar="N",
        help="threads of one call on a CPU (as many as PyTorch uses)",
    )  # fmt: skip


def add_checkpointing(group: Any) -> None:
    """Add a choice of less memory in more time."""
    group.add_argument(
        "--grad-checkpointing", action="store_true",
        help="score with less memory, in more time (tpv)",
    )  # fmt: skip


def add_ignore(group: Any) -> None:
    """Add which layers stay whole."""
    group.add_argument(
        "--ignore", nargs="+", default=(), metavar="NAME", help="layers whose channels stay"
    )


def add_device(sub: Parser) -> None:
    """Add where the model runs."""
    sub.section("run").add_argument(
        "--device", default="cpu", metavar="DEV", help="cpu, cuda, cuda:1 (cpu)"
    )


def add_dry_run(sub: Parser) -> None:
    """Add the question of what would be done."""
    sub.section("run").add_argument(
        "--dry-run", action="store_true", help="say what would be done and how long it may take"
    )


def add_output(sub: Parser, text: str, default: str | None = None) -> None:
    """Add where the result goes."""
    group = sub.section("run")
    group.add_argument(
        "--output", type=Path, required=default is None, default=default, metavar="OUT", help=text
    )
    group.add_argument("--overwrite", action="store_true", help="replace what OUT holds")


# ---- what a flag's text may be --------------------------------------------------------------


def _checked(convert: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Any:
    def check(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}")
        return value

    return check


fraction = _checked(float, lambda x: 0 < x <= 1, "a fraction above 0 and up to 1")
points = _checked(float, lambda x: 0 < x < 100, "points above 0 and below 100")
# Tensors of 32 bits hold no numbers above 3e38.
positive = _checked(float, lambda x: 0 < x <= 1e30, "a number above 0, at most 1e30")
count = _checked(int, lambda n: n >= 1, "a whole number of at least 1")
_count_or_auto = _checked(
    lambda text: text if text == AUTO else int(text),
    lambda n: n == AUTO or n >= 1,
    "a whole number of at least 1, or auto",
)

STRUCTURES: dict[str | None, tuple[Literal["channel", "branch"], ...] | None] = {
    None: None,
    "channel": ("channel",),
    "head": ("channel",),
    "branch": ("branch",),
    "channel,branch": ("channel", "branch"),
}
"""Values of --granularity that change the structure -> what may leave; None: as the budget is."""
granularity = _checked(
    str,
    lambda g: g in STRUCTURES or re.fullmatch(r"weight|\d+:\d+", str(g)) is not None,
    "channel, head, branch, channel,branch, weight or 2:4",
)
word = _checked(str.strip, bool, "a name")


def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Read several values with commas between, each once."""
    return lambda text: list(dict.fromkeys(convert(part) for part in text.split(",")))


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
