"""timm models by name, with weights from a file, the hub or chance."""

from __future__ import annotations

import codecs
import difflib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

import tpvprune.cifar_resnet  # noqa: F401  (registers its models with timm)
from tpvprune.disk.path_checks import check_checkpoint
from tpvprune.disk.tensors import load_tensors
from tpvprune.groups import fold_weights, unfuse_attention
from tpvprune.saved.buffers import is_equal
from tpvprune.saved.downloads import HUB, is_unreachable, offline_if_unreachable
from tpvprune.saved.registries import is_registered, registered_model

_MAX_NAMED = 3
_ZIP, _PICKLE, _POINTER = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
_FACTORY = re.compile(r"(?!hf-hub:|hf_hub:|local-dir:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class ModelSource:
    """How a model was made, enough to make its architecture again.

    Attributes:
        name: timm's name of the architecture, package.module:factory, torchvision/NAME or hf:NAME.
        kwargs: Keyword arguments of `timm.create_model`, or of the factory.
        weights: "random", "pretrained", "factory" (those that a function of the user's own has
            given it) or the path of the checkpoint.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str = "random"


def load_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    input_size: Sequence[int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow_import: bool = False,
) -> tuple[nn.Module, ModelSource]:
    """Make a timm model, or one of the user's own, in evaluation mode, on the CPU.

    Args:
        name: timm's name, with or without a tag, or hf-hub:... or local-dir:..., or
            package.module:factory, a function of the user's own that returns a module, or
            torchvision/NAME or hf:NAME (:mod:`tpvprune.saved.registries`).
        pretrained: Load timm's pretrained weights.
        checkpoint: Safetensors file, or torch file that loads as weights only.
        num_classes: Size of the classifier; read from the checkpoint if None.
        input_size: (channels, height, width), for models that are built for a size.
        model_kwargs: Further keyword arguments of the model.
        seed: Of the random weights.
        allow_import: Take package.module:factory, which runs code: only for a name that the
            user has typed, never for one that was read from a file.

    Returns:
        The model and how it was made. In one of the user's own ``nn.MultiheadAttention`` is
        replaced (:func:`tpvprune.unfuse_attention`), and what ``weight_norm`` and its like compute
        is folded (:func:`tpvprune.fold_weights`).

    Raises:
        ValueError: If the model is unknown, cannot be built, or the checkpoint is
            missing, unreadable or of other keys or shapes.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("expected one of pretrained and a checkpoint, found both")
    is_own = allow_import and is_factory(name)
    if not is_own:
        _check_name(name)
    elif pretrained and not is_registered(name):
        raise ValueError(f"{name}: expected a model of timm's for --pretrained")
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    kwargs = ({} if is_own else _input_kwargs(name, input_size)) | dict(model_kwargs or {})
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    make = _own_maker(name, pretrained) if is_own else partial(_of_timm, name, pretrained)
    try:
        model = _seeded(make, kwargs, seed)
        if state is not None and num_classes is None and not is_own:
            found = _classes_of(model, state)
            if found not in (None, getattr(model, "num_classes", None)):
                kwargs["num_classes"] = found
                model = _seeded(make, kwargs, seed)
    except Exception as error:
        raise ValueError(f"model {name!r}: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {name!r}: expected a function that returns a torch.nn.Module, found one that "
            f"returns {type(model).__name__}"
        )
    if state is not None:
        _load(model, state, str(checkpoint))
    weights = str(checkpoint) if checkpoint else "pretrained" if pretrained else "random"
    if is_own:
        drawn = weights != "random" or not _is_same(model, _seeded(make, kwargs, seed + 1))
        weights = weights if drawn else "factory"
        # After its weights: a checkpoint has the names from before.
        return unfuse_attention(fold_weights(model)).eval(), ModelSource(name, kwargs, weights)
    architecture = str(pretrained_config(model).get("architecture") or name)
    from_hub = pretrained and name.startswith("hf-hub:")
    return model.eval(), ModelSource(architecture, kwargs, name if from_hub else weights)


def _seeded(make: Callable[..., Any], kwargs: Mapping[str, Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**kwargs)


def _is_same(model: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models of one function have the same weights, which chance has not made."""
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(is_equal(t, two[name]) for name, t in one.items())


def _of_timm(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    asks = pretrained or name.startswith(HUB)
    with offline_if_unreachable() if asks else nullcontext():
        return timm.create_model(name, pretrained=pretrained, **kwargs)


def _own_maker(name: str, pretrained: bool) -> Callable[..., Any]:
    if is_registered(name):
        return partial(registered_model, name, pretrained=pretrained)
    return _imported(name)


def is_factory(name: str) -> bool:
    """Tell whether a name is that of a function: package.module:factory, torchvision/N, hf:N."""
    return is_registered(name) or _FACTORY.fullmatch(name) is not None


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    # At the end: nothing that lies in the working folder can stand in for an installed package.
    sys.path.append(folder)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(f"model {name!r}: cannot be imported ({_first_line(error)})") from error
    finally:
        sys.path.remove(folder)
    if not callable(found) or (inspect.isclass(found) and not issubclass(found, nn.Module)):
        raise ValueError(f"model {name!r}: {module} has no function or module class {attribute!r}")
    return found


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict without ever running pickled code.

    Args:
        path: Safetensors file, or a torch file that loads with `weights_only=True`.
            A training checkpoint's EMA weights are taken where it has some.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: If the file is missing, not a checkpoint, or holds no tensors.
    """
    check_checkpoint(path)
    try:
        state = load_state_dict(str(path), weights_only=True)
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    except Exception as error:
        found = _found_instead(path, _first_line(error))
        raise ValueError(
            f"{path}: expected a safetensors file or a torch checkpoint of weights, found {found}"
        ) from error
    if not tensors:
        raise ValueError(f"{path}: expected tensors, found none")
    return tensors


def _found_instead(path: str | Path, reason: str) -> str:
    """Say what a file is that could not be read as weights, from its first bytes; none are run."""
    with Path(path).open("rb") as file:
        head = file.read(512)
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


def pretrained_config(model: nn.Module) -> dict[str, Any]:
    """Return a timm model's `pretrained_cfg`, empty for any other model."""
    config: Any = getattr(model, "pretrained_cfg", None)
    return dict(config) if config else {}


def _check_name(name: str) -> None:
    if name.startswith("local-dir:"):
        _check_local(name)
    if name.startswith((*HUB, "local-dir:")):
        return
    if Path(name).is_dir():
        raise ValueError(
            f"unknown model {name!r}, it is a folder: a saved pruned model is named without "
            "--model, a folder of timm's as local-dir:..."
        )
    base = name.split(".", 1)[0]
    if timm.is_model(base):
        return
    close = difflib.get_close_matches(base, timm.list_models(), n=4, cutoff=0.6)
    home, _, rest = name.partition("/")
    if rest and difflib.get_close_matches(home, ["torchvision"]):
        close = [f"torchvision/{rest}"]
    hint = f": did you mean {', '.join(close)}?" if close else ""
    raise ValueError(f"unknown model {name!r}{hint}")


def _check_local(name: str) -> None:
    path = Path(name.partition(":")[2]) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name!r}: expected {path} of timm, found none") from error
    if isinstance(config, dict) and "format_version" in config:
        raise ValueError(
            f"model {name!r}: this is a saved pruned model: name the folder {path.parent} "
            "instead of --model (evaluate, groups, distill, export)"
        )
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"model {name!r}: expected 'architecture' in {path}, found none")


def _input_kwargs(name: str, input_size: Sequence[int] | None) -> dict[str, Any]:
    if input_size is None:
        return {}
    kwargs: dict[str, Any] = {}
    if input_size[0] != 3:
        kwargs["in_chans"] = input_size[0]
    config = None if ":" in name else timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        kwargs["img_size"] = tuple(input_size[1:])
    return kwargs


def _classes_of(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Return the number of rows of the classifier in `state`, if it is there."""
    names = pretrained_config(model).get("classifier") or ()
    if isinstance(names, str):
        names = (names,)
    for name in names:
        weight = state.get(f"{name}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return None


def _load(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    own = model.state_dict()
    # Checkpoints from before PyTorch 0.4.1, and many since, lack these counters.
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    state = {**counters, **state}
    missing = [key for key in own if key not in state]
    surplus = [key for key in state if key not in own]
    surplus.sort(key=lambda key: key.endswith("num_batches_tracked"))  # tell the least: named last
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if not (missing or surplus or shapes):
        load_tensors(model, state)
        return
    total = len(own) - len(counters)
    fit, hint, named = total - len(missing) - len(shapes), "", _MAX_NAMED
    if 2 * fit < total:
        hint = f" ({fit} of {total} tensors do: is it another network's? check --model)"
        named = 1  # of the other network's names one tells enough
    found = {"lacks": missing, "has unknown": surplus, "has shape": shapes}
    differing = [
        f"{what} {', '.join(keys[:named])}"
        + (f" and {len(keys) - named} more" if len(keys) > named else "")
        for what, keys in found.items()
        if keys
    ]
    raise ValueError(f"{path}: does not fit the model{hint}: {'; '.join(differing)}")


def _reason(error: Exception) -> str:
    if is_unreachable(error):
        return (
            "its weights are not in the local cache, and the hub cannot be reached: check the "
            "network, or pass --checkpoint F with a file that you have"
        )
    if isinstance(error, FileNotFoundError):
        return f"cannot be found ({_first_line(error)})"
    return f"cannot be built ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0][:120] if lines else type(error).__name__
