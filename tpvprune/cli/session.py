"""From flags to a model that is ready on its device."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.cli.console import say
from tpvprune.cli.first_checks import NEITHER, NO_FILES
from tpvprune.disk.digest import file_digest
from tpvprune.disk.versions import versions
from tpvprune.images.preprocessing import Preprocessing, resolve_preprocessing
from tpvprune.passes.finite import check_outputs
from tpvprune.passes.forwards import forward_of, load_forward, said_of_forward, with_forward
from tpvprune.passes.running import tensors_of
from tpvprune.processes.shares import check_same
from tpvprune.saved.checkpoint import load_pruned, read_config, saved_masks
from tpvprune.saved.downloads import local_folder
from tpvprune.saved.models import ModelSource, is_factory, load_model

# What flags are called as arguments are.
_LOADING = ("pretrained", "checkpoint", "num_classes", "seed")
_PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")

Outcome = tuple[int, dict[str, Any]]
"""What a command returns: its exit code and its document."""


@dataclass(frozen=True)
class Subject:
    """A model on its device, and how images get into it.

    ``num_classes``: as the model says, or as many as its first output [B, K] has; None: it chooses
    no classes. Of a saved pruned model ``folder`` says where it lies, and ``skeleton`` is the dense
    one, whose weights do not count, if that is the user's own.
    """

    model: nn.Module
    made: ModelSource
    preprocessing: Preprocessing
    device: torch.device
    folder: Path | None = None
    skeleton: nn.Module | None = None
    num_classes: int | None = None

    @property
    def example(self) -> Tensor:
        """Two random inputs [2, C, H, W]; only their shape matters."""
        generator = torch.Generator().manual_seed(0)
        size = (2, *self.preprocessing.input_size)
        return torch.randn(size, generator=generator).to(self.device)


def open_subject(args: argparse.Namespace) -> Subject:
    """Load the model that the flags name and see that it runs on its input size."""
    if getattr(args, "folder", None) is not None:
        return _open_prunable(args)
    device = _device(args.device)
    input_size = _input_size(args)
    model, made = load_model(
        args.model,
        **{name: getattr(args, name) for name in _LOADING},
        input_size=input_size,
        model_kwargs=dict(args.model_kwargs),
        allow_import=True,
    )
    if made.weights == "random" and args.command != "groups":
        say("warning: random weights: --pretrained or --checkpoint F loads trained ones")
    subject = _checked_subject(args, model, made, device)
    if is_factory(args.model) and _input_size(args) is None:
        size = " x ".join(map(str, subject.preprocessing.input_size))
        say(f"note: inputs of {size} for a model of your own: --img-size N sets another side")
    return subject


def _open_prunable(args: argparse.Namespace) -> Subject:
    subject, _ = open_pruned(args)
    if saved_masks(args.folder) is not None:
        raise ValueError(
            f"{args.folder}: expected a model with all of its weights, found one with single "
            "weights set to zero, which a repair would fill again: remove channels first, single "
            "weights last"
        )
    say(f"note: {args.folder} is pruned further: --keep and `dense` refer to what it holds")
    return subject


def open_evaluated(
    args: argparse.Namespace, *, compared: bool = False
) -> tuple[Subject, nn.Module | None]:
    """Load what `evaluate` measures, and the dense model where `--dense` says its weights.

    ``compared``: of a saved pruned model also where the file that it came from is found.
    """
    if args.folder is not None and args.model is not None and not is_factory(args.model):
        raise ValueError(NEITHER)
    if args.folder is None:
        if args.dense is not None:
            raise ValueError("--dense: expected the folder of a pruned model to compare it with")
        return open_subject(args), None
    if compared and args.dense is None:
        args.folder = local_folder(args.folder)
        args.dense = known_weights(read_config(args.folder), args.folder)
    return open_pruned(args)


def known_weights(config: Mapping[str, Any], folder: str | Path) -> str | None:
    """Return the file that a saved model was pruned from, if it is there and still the same.

    The folder may be a stranger's: of the file that it names nothing is used, unless its contents
    are what the folder says they are.
    """
    weights, digest = (config["provenance"].get(key) for key in ("weights", "weights_sha256"))
    if not isinstance(weights, str) or weights in NO_FILES or not Path(weights).is_file():
        return None
    if not isinstance(digest, str) or file_digest(weights) != digest:
        return None
    say(f"dense weights: {weights}, the file that {folder} was pruned from (SHA-256)")
    return weights


def open_pruned(args: argparse.Namespace) -> tuple[Subject, nn.Module | None]:
    """Load a saved pruned model and, where `--dense` says its weights, the dense one."""
    device = _device(args.device)
    args.folder = local_folder(args.folder)
    config = read_config(args.folder)
    name, kwargs = config["model"], dict(config["model_kwargs"])
    own, factory = name is None, getattr(args, "model", None)
    _check_factory(args, config, factory)
    kwargs = dict(args.model_kwargs) if own else kwargs
    name = str(factory if own else name)
    skeleton = load_model(name, model_kwargs=kwargs, allow_import=True)[0] if own else None
    source = ModelSource(name, kwargs, str(args.folder))
    pruned = load_pruned(args.folder, model=skeleton)
    subject = replace(
        _checked_subject(args, pruned, source, device), folder=args.folder, skeleton=skeleton
    )
    given = getattr(args, "dense", None)
    if given is None:
        return subject, None
    checkpoint = None if given in NO_FILES else given
    _say_other_weights(config, args.folder, checkpoint)
    if given == "factory":  # timm may make the network, and the user's function its weights
        own, name, kwargs = True, str(factory), dict(args.model_kwargs)
    dense, _ = load_model(
        name,
        pretrained=given == "pretrained",
        checkpoint=checkpoint,
        num_classes=None if own else kwargs.get("num_classes"),
        model_kwargs=kwargs,
        allow_import=own,
    )
    return subject, _called_as_asked(args, dense)[0].to(device)


def _check_factory(
    args: argparse.Namespace, config: Mapping[str, Any], factory: str | None
) -> None:
    """Check that --model names a function where one is needed to load a saved model, or dense."""
    made_by = config["provenance"].get("model")
    again = f" (it was {made_by[:80]!r})" if isinstance(made_by, str) else ""
    makes_dense = getattr(args, "dense", None) == "factory"
    if config["model"] is None and factory is None:
        raise ValueError(
            f"{args.folder}: holds a model that timm does not make: pass --model "
            f"package.module:factory, torchvision/NAME or hf:NAME that makes the dense one{again}"
        )
    if makes_dense and factory is None:
        raise ValueError(
            f"{args.folder}: expected --model package.module:factory, whose weights it was pruned "
            f"from{again}, or --dense with a checkpoint of them"
        )
    if config["model"] is not None and factory is not None and not makes_dense:
        raise ValueError(f"{args.folder}: holds a model of timm's: leave out --model {factory}")


def _say_other_weights(config: Mapping[str, Any], folder: str | Path, dense: str | None) -> None:
    """Say it if a saved model was pruned from another file."""
    digest = config["provenance"].get("weights_sha256")
    if dense is not None and isinstance(digest, str) and file_digest(dense) != digest:
        say(f"note: {dense} is not the file that {folder} was pruned from (SHA-256)")


def _checked_subject(
    args: argparse.Namespace, model: nn.Module, made: ModelSource, device: torch.device
) -> Subject:
    preprocessing = resolve_preprocessing(
        model,
        input_size=_input_size(args),
        **{name: getattr(args, name) for name in _PREPROCESSING},
    )
    check_same("weights", model)
    model, notes = _called_as_asked(args, model)
    subject = Subject(model.to(device), made, preprocessing, device)
    try:
        with torch.no_grad():
            outputs = model(subject.example)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        size = " x ".join(map(str, preprocessing.input_size))
        raise ValueError(
            f"{made.name} does not run on inputs of {size} ({_reason(error)}): set --input-size"
        ) from error
    found = list(tensors_of(outputs))
    for output in found:
        check_outputs(model, subject.example, output)
    classes = getattr(model, "num_classes", None)
    if not isinstance(classes, int) and found and found[0].ndim == 2:
        classes = found[0].shape[1]
    for note in notes:
        say(f"note: {note}")
    return replace(subject, num_classes=classes if isinstance(classes, int) else None)


def _called_as_asked(args: argparse.Namespace, model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the model under the forward that counts, and what is to be said of it."""
    name = getattr(args, "forward", None)
    forward = load_forward(name) if name else forward_of(model)
    model = model if forward is None else with_forward(model, forward)
    return model, said_of_forward(forward)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        # Sums are formed in float64, which mps lacks; a device without memory has no answer.
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"--device {name}: cannot be used here: expected cpu, cuda or cuda:1 ({_reason(error)})"
        ) from error
    return device


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(first, 120, placeholder=" ...")


def _input_size(args: argparse.Namespace) -> tuple[int, ...] | None:
    if args.img_size is not None:
        return (3, args.img_size, args.img_size)
    return tuple(args.input_size) if args.input_size else None


def ignored(args: argparse.Namespace, subject: Subject) -> tuple[str, ...]:
    """Return the layers of `--ignore`."""
    names = dict(subject.model.named_modules())
    for name in args.ignore:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3)
            hint = f": did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"--ignore {name}: {subject.made.name} has no such layer{hint}")
    return tuple(args.ignore)


def provenance(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """Return what is needed to repeat a run: model, weights, input size, seed, versions."""
    return {
        "model": subject.made.name,
        "model_kwargs": subject.made.kwargs,
        "weights": subject.made.weights,
        "preprocessing": subject.preprocessing.config,
        "command": args.command_line,
        "device": str(subject.device),
        "seed": args.seed,
        "versions": {
            **versions("torch", "tpvprune", "timm", "torch-pruning"),
            "torch": str(torch.__version__),
        },
    }
