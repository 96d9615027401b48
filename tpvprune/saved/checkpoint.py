"""Save a pruned model as a folder, and rebuild it: safetensors and JSON, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpvprune.depth import Removal, remove_branches
from tpvprune.disk.atomic import check_folder, written_folder
from tpvprune.disk.path_checks import BUFFER_FILE, RANKING_FILE, check_saved
from tpvprune.disk.tensors import load_tensors, read_state_dict, write_tensors
from tpvprune.disk.versions import versions
from tpvprune.groups.removal import attribute_changes, shrink_to
from tpvprune.reports.report import report_data, write_report
from tpvprune.saved.buffers import changed_buffers, is_equal, put_buffers, read_buffers
from tpvprune.saved.downloads import local_folder
from tpvprune.saved.skeleton import (
    build,
    check_fits,
    is_sizes,
    plain,
    plain_entries,
    prepared_as_saved,
    put_preprocessing,
    set_types,
    tensors_of,
)
from tpvprune.weights.masks import MASK_FILE, load_masks, save_masks

FORMAT_VERSION = 1
_KIND = {"format": "pt"}  # what safetensors of torch say of themselves
_MAX_CONFIG_BYTES = 64 * 2**20
# Elements of the dense model: at least these, or so many for each byte of the saved weights.
_LEAST_LIMIT, _MOST_PER_BYTE = 2**26, 32
_FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str, type(None)),
    "model_kwargs": (dict,),
    "pretrained_cfg": (dict,),
    "kept": (dict,),
    "attributes": (dict,),
    "shapes": (dict,),
    "provenance": (dict,),
}


def save_pruned(
    result_or_model: Any,
    folder: str | Path,
    *,
    overwrite: bool = False,
    dense: nn.Module | None = None,
    model_name: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    origin: str | Path | None = None,
    masks: Mapping[str, Tensor] | None = None,
    removed: Removal | None = None,
) -> Path:
    """Write a pruned model to a folder that ``load_pruned`` rebuilds bit for bit.

    The folder gets ``model.safetensors`` and ``config.json``, of a result also
    ``ranking.safetensors`` (:meth:`tpvprune.Ranking.load`), with a report ``report.json`` and
    ``report.html``; buffers that ``state_dict`` leaves out, if changed, go to
    ``buffers.safetensors``. It is written beside its place, read back and compared, then renamed: a
    crash leaves the old folder or the new one, never half. A ValueError tells if that is not
    possible, the dense model is not known, or a value is not plain JSON.

    Args:
        result_or_model: A ``PruningResult`` or a pruned module.
        folder: Where to write; its parents are made.
        overwrite: Replace a saved pruned model that is there already.
        dense: The model before pruning; needed where timm cannot build it.
        model_name: timm's name of it; by default what the model says of itself.
        model_kwargs: Keyword arguments of ``timm.create_model``; plain JSON values.
        pretrained_cfg: timm's preprocessing record; by default the model's own.
        provenance: Command, seed and the like; date and versions are added.
        report: Data of the report; by default the result's own, if there is one.
        origin: Folder that this model was loaded from before its weights changed, or channels
            left. What is not given is taken from there: name, arguments, preprocessing, masks,
            and in the provenance the dense weights; kept channels are counted in the dense model;
            its provenance becomes the ``origin`` entry of the new one.
        masks: Of single weights, True = stays, the others are zero; written as
            ``masks.safetensors`` for :func:`tpvprune.weights.masks.load_masks`.
        removed: Modules of branches that left; by default what a result says.

    Returns:
        The folder.
    """
    pruned, kept, ranking = result_or_model, {}, None
    if not isinstance(result_or_model, nn.Module):
        pruned, kept = result_or_model.model, result_or_model.kept
        ranking = getattr(result_or_model, "ranking", None)
        report = report_data(result_or_model) if report is None else report
        removed = getattr(result_or_model, "removed", None) if removed is None else removed
    folder = check_folder(folder, overwrite=overwrite)
    earlier: dict[str, Any] = {}
    chain, source = {}, {}
    if origin is not None:
        earlier = read_config(origin)
        model_name = model_name or earlier["model"]
        model_kwargs = earlier["model_kwargs"] if model_kwargs is None else model_kwargs
        masks = saved_masks(origin) if masks is None else masks
        chain = {"origin": earlier["provenance"]}
        source = {k: earlier["provenance"].get(k) for k in ("weights", "weights_sha256")}
    gone = (removed or Removal()).behind(Removal.read(earlier.get("removed", {})))
    name, kwargs, skeleton = _skeleton(pruned, model_name, model_kwargs, dense, gone)
    own_cfg = earlier.get("pretrained_cfg") or getattr(pruned, "pretrained_cfg", None) or {}
    made = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions("tpvprune", "torch", "timm", "safetensors"),
    }
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": name,
        "model_kwargs": kwargs,
        "pretrained_cfg": plain_entries(pretrained_cfg or own_cfg),
        "kept": _kept_of_dense(earlier.get("kept", {}), kept),
        "attributes": attribute_changes(skeleton, pruned),
        "removed": asdict(gone),
        "shapes": {key: list(value.shape) for key, value in tensors_of(pruned).items()},
        "buffers": [],
        "provenance": {**made, **source, **(provenance or {}), **chain},
    }
    text = _as_json(config)
    with written_folder(folder) as unfinished:
        (unfinished / "config.json").write_text(text, encoding="utf-8")
        write_tensors(tensors_of(pruned), unfinished / "model.safetensors", _KIND)
        if masks is not None:
            save_masks(masks, unfinished / MASK_FILE)
        if ranking is not None:
            ranking.save(unfinished / RANKING_FILE)
        if report is not None:
            write_report(dict(report), unfinished)
        _with_buffers(pruned, unfinished, config, model=None if name else dense)
    return folder


def _with_buffers(
    pruned: nn.Module, folder: Path, config: dict[str, Any], *, model: nn.Module | None
) -> None:
    """Add what does not load back by itself to a saved folder; ValueError if all does not then."""
    loaded = load_pruned(folder, model=model)
    if buffers := changed_buffers(pruned, loaded):
        write_tensors(buffers, folder / BUFFER_FILE, _KIND)
        text = _as_json({**config, "buffers": sorted(buffers)})
        (folder / "config.json").write_text(text, encoding="utf-8")
        loaded = load_pruned(folder, model=model)
    _check_same(pruned, loaded)


def saved_masks(folder: str | Path) -> dict[str, Tensor] | None:
    """Read which single weights of a saved model stay, by parameter name; None where all do.

    ValueError if the file is damaged.
    """
    return load_masks(folder) if (Path(folder) / MASK_FILE).exists() else None


def load_pruned(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a saved pruned model, in eval mode on the CPU.

    timm builds the dense architecture without weights, its parameters are shrunk to the
    saved shapes, then the weights are loaded strictly. Everything read is checked first:
    a folder from a stranger can at worst be refused. No pickle is read.

    Args:
        folder: What ``save_pruned`` wrote, or ``hf-hub:org/name[@revision]`` for what
            ``push_to_hub`` published.
        model: The dense model, for a model that timm does not build; left as it is.

    Returns:
        The pruned model, with the saved preprocessing in ``pretrained_cfg``.

    Raises:
        ValueError: If the folder is incomplete, damaged, of another format version, or
            does not fit the dense model.
    """
    folder = local_folder(folder)
    config = read_config(folder)
    weights = folder / "model.safetensors"
    tensors = _read_weights(weights, config["shapes"])
    loaded = model
    if loaded is None and config["model"] is None:
        raise ValueError(
            f"{folder}: expected a timm model, found one that timm does not build: "
            "pass load_pruned(..., model=the dense model)"
        )
    if loaded is None:
        limit = max(_LEAST_LIMIT, _MOST_PER_BYTE * weights.stat().st_size)
        loaded = build(config["model"], config["model_kwargs"], max_elements=limit)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    loaded = remove_branches(prepared_as_saved(loaded, shapes), Removal.read(config["removed"]))
    check_fits(loaded, shapes, types, config["attributes"])
    shrink_to(loaded, shapes, config["attributes"])
    set_types(loaded, types)
    load_tensors(loaded, tensors)
    put_buffers(loaded, read_buffers(folder, config["buffers"]))
    put_preprocessing(loaded, config["pretrained_cfg"])
    return loaded.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check the ``config.json`` of a saved pruned model.

    Returns ``format_version``, ``removed``, ``buffers``, and what ``_FIELDS`` names; ``kept`` is
    group -> channel indices. ValueError if it is missing, not JSON, or not of this format.
    """
    path = Path(folder) / "config.json"
    check_saved(folder)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_CONFIG_BYTES} bytes, found more")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found damage ({error}): save again") from error
    found = config.get("format_version") if isinstance(config, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {found!r:.80}: "
            "save again with this version of tpvprune"
        )
    for field, types in _FIELDS.items():
        if field not in config or type(config[field]) not in types:
            raise ValueError(
                f"{path}: expected {field!r} to be {' or '.join(t.__name__ for t in types)}, "
                f"found {type(config.get(field)).__name__}: save again"
            )
    _check_entries(path, config)
    return config


def _check_entries(path: Path, config: dict[str, Any]) -> None:
    removed, fields = config.setdefault("removed", {}), asdict(Removal())
    if not (
        isinstance(removed, dict)
        and removed.keys() <= fields.keys()
        and all(map(_are_names, removed.values()))
    ):
        raise ValueError(f"{path}: expected lists of modules in 'removed': save again")
    if not _are_names(config.setdefault("buffers", [])):
        raise ValueError(f"{path}: expected names in 'buffers', found others: save again")
    for name, indices in config["kept"].items():
        if not is_sizes(indices):
            raise ValueError(f"{path}: expected channel indices for {name!r:.120}: save again")
    for name, shape in config["shapes"].items():
        if not is_sizes(shape) or len(shape) > 8:
            raise ValueError(f"{path}: expected a shape for {name!r:.120}, found {shape!r:.60}")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _kept_of_dense(
    earlier: Mapping[str, list[int]], kept: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """Return the channels of the dense model that stay after an earlier cut and this one."""
    composed = dict(earlier)
    for group, mask in kept.items():
        before = earlier.get(group, range(len(mask)))
        if len(before) != len(mask):
            raise ValueError(
                f"origin: expected {len(mask)} kept channels of {group!r}, found {len(before)}: "
                "the folder is not the one that this model was loaded from"
            )
        composed[group] = [before[i] for i in mask.nonzero().flatten().tolist()]
    return composed


def _skeleton(
    pruned: nn.Module,
    name: str | None,
    kwargs: Mapping[str, Any] | None,
    dense: nn.Module | None,
    removed: Removal,
) -> tuple[str | None, dict[str, Any], nn.Module]:
    # The model that loading will start from, and how timm makes it, if it does.
    config = getattr(pruned, "pretrained_cfg", None) or {}
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    if name is None or ":" in name:  # hf-hub: and local-dir: names must not be followed later
        name = architecture
    if kwargs is None:
        kwargs = dict(getattr(pruned, "_model_args", None) or {})
        if isinstance(getattr(pruned, "num_classes", None), int):
            kwargs["num_classes"] = pruned.num_classes
    shapes = {k: tuple(v.shape) for k, v in tensors_of(pruned).items()}
    reason = "timm does not say which model it is"
    if name is not None:
        plain_kwargs = plain(dict(kwargs), "model_kwargs")
        try:
            whole = prepared_as_saved(build(name, plain_kwargs, max_elements=2**40), shapes)
            built = remove_branches(whole, removed)
            check_fits(built, shapes)
        except ValueError as error:
            reason = str(error)
        else:
            return name, plain_kwargs, built
    if dense is None:
        raise ValueError(
            f"the dense model cannot be rebuilt ({reason}): "
            "pass model_name and model_kwargs of timm.create_model, or dense"
        )
    return None, {}, remove_branches(prepared_as_saved(dense, shapes), removed)


def _check_same(pruned: nn.Module, loaded: nn.Module) -> None:
    found = tensors_of(loaded, persistent=False)
    differing = [
        name
        for name, tensor in tensors_of(pruned, persistent=False).items()
        if not is_equal(tensor.cpu(), found.get(name))
    ]
    differing += [path for path, values in attribute_changes(loaded, pruned).items() if values]
    if differing:
        raise ValueError(
            f"expected the saved model to load back as it is, found other values in "
            f"{', '.join(map(repr, differing[:3]))}: pass the model_kwargs that it was made with"
        )


def _read_weights(path: Path, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    tensors = read_state_dict(path)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    unequal = [name for name in {**found, **shapes} if found.get(name) != shapes.get(name)]
    if unequal:
        raise ValueError(
            f"{path}: expected {unequal[0]!r:.120} with shape {shapes.get(unequal[0])} as "
            f"config.json says, found {found.get(unequal[0])}: the files are not from one save"
        )
    return tensors


def _as_json(config: dict[str, Any]) -> str:
    return json.dumps(plain(config, "config"), indent=1, allow_nan=False) + "\n"


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")
