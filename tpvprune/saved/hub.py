"""Publish a saved pruned model on the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from tpvprune.disk.path_checks import BUFFER_FILE
from tpvprune.reports.card import card
from tpvprune.saved.checkpoint import load_pruned, read_config, save_pruned
from tpvprune.saved.downloads import is_unreachable
from tpvprune.weights.masks import MASK_FILE

_TAGS = ("image-classification", "timm", "pruning", "tpvprune")
_FILES = ("config.json", "model.safetensors", BUFFER_FILE, MASK_FILE, "report.json")


def push_to_hub(
    result_or_folder: Any,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    include_report: bool = False,
    dense: nn.Module | None = None,
    revision: str | None = None,
    commit_message: str = "Upload pruned model",
    token: str | None = None,
) -> str:
    """Publish a pruned model; ``load_pruned("hf-hub:" + repo_id)`` then loads it anywhere.

    Uploaded are the weights, ``config.json``, ``report.json`` and a model card with the numbers,
    the command and how to load it. The command and the names of images and checkpoint are
    published as they were typed. The folder is loaded once before anything is sent.

    Args:
        result_or_folder: A ``PruningResult``, a pruned timm model, or a folder of
            ``save_pruned``.
        repo_id: ``org/name``; made where it is not there.
        private: Of a new repository: not visible to others.
        license: For the card, as the hub names it. By default that of the parent model where
            timm knows it and the weights came from timm's; otherwise the card says that it is
            not known.
        include_report: Upload ``report.html`` and the pictures in ``report.json`` too: they may
            show some of your images.
        dense: See ``save_pruned``.
        revision: Branch to write to; the main one by default.
        commit_message: Title of the commit.
        token: Of the hub; by default that of ``hf auth login``.

    Returns:
        The address of the model.

    Raises:
        ValueError: If the folder is not complete, the name is not one of the hub's, the hub
            cannot be reached, or it refuses.
    """
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place) / "model"
        folder = result_or_folder
        if not isinstance(folder, (str, Path)):
            folder = save_pruned(result_or_folder, Path(place) / "saved", dense=dense)
        _copy(Path(folder), staged, include_report=include_report)
        config = read_config(staged)
        if config["model"] is not None:
            load_pruned(staged)
        text = model_card(staged, repo_id, license=license)
        (staged / "README.md").write_text(text, encoding="utf-8")
        api = HfApi(token=token, library_name="tpvprune")
        try:
            url = api.create_repo(repo_id, private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                revision=revision,
                commit_message=commit_message,
            )
        except HFValidationError as error:
            raise ValueError(f"repo_id: expected org/name, found {repo_id!r}") from error
        except HfHubHTTPError as error:
            line = " ".join(str(error).split())[:160]
            raise ValueError(f"{repo_id}: the hub refused ({line})") from error
        except Exception as error:
            if not is_unreachable(error):
                raise
            raise ValueError(
                f"{repo_id}: the hub cannot be reached: check the network; the model is safe "
                "where it was saved, push_to_hub(folder, ...) sends it later"
            ) from error
        return str(url)


def model_card(folder: str | Path, repo_id: str, *, license: str | None = None) -> str:
    """Write the model card of a saved pruned model."""
    folder = Path(folder)
    config = read_config(folder)
    report = _read(folder / "report.json")
    parent = _parent(config)
    known = license or parent.get("license") or None
    data = ModelCardData(
        license=known,
        library_name="tpvprune",
        pipeline_tag="image-classification",
        base_model=parent.get("hf_hub_id"),
        tags=[*_TAGS, *(["label-free"] if report.get("used_labels") is False else [])],
    )
    text = card(repo_id, config, report, license=known)
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _parent(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return licence and hub name of the weights that were pruned, where they are timm's."""
    weights = str(config["provenance"].get("weights"))
    if config["model"] is None or not (weights == "pretrained" or weights.startswith("hf-hub:")):
        return {}
    timm = import_module("timm")
    saved = config["pretrained_cfg"]
    name = ".".join(filter(None, (config["model"].split(".")[0], saved.get("tag"))))
    own = timm.get_pretrained_cfg(name, allow_unregistered=True)
    found = {**(own.to_dict() if own else {}), **saved}
    return {key: found[key] for key in ("license", "hf_hub_id") if isinstance(found.get(key), str)}


def _copy(folder: Path, to: Path, *, include_report: bool) -> None:
    read_config(folder)
    to.mkdir()
    for name in (*_FILES, *(("report.html",) if include_report else ())):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
    report = _read(to / "report.json")
    if not include_report and report.pop("disagreement", None) is not None:  # with pictures
        (to / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}
