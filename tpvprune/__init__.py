"""Label-free structured pruning of PyTorch vision models by test prediction variance."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpvprune.allocation import allocate
    from tpvprune.batchnorm import recalibrate_batchnorm
    from tpvprune.checkpoint import load_pruned, save_pruned
    from tpvprune.compensation import compensate_weights
    from tpvprune.costs import count_macs, count_params, measure_latency
    from tpvprune.criteria import SCORERS
    from tpvprune.curves import variance_curves
    from tpvprune.distillation import distill
    from tpvprune.evaluation import Evaluation, agreement, evaluate
    from tpvprune.export import export_model
    from tpvprune.groups import ChannelGroup, ChannelGroups, ParamSlice, find_groups
    from tpvprune.hub import push_to_hub
    from tpvprune.importance import TPVImportance
    from tpvprune.pipeline import PruningResult, prune
    from tpvprune.reconstruction import reconstruct_blocks
    from tpvprune.removal import remove_channels
    from tpvprune.scores import Scores, tpv_scores
    from tpvprune.selection import select_channels

__version__: str

__all__ = [  # noqa: RUF022  (in the order of the flow)
    # the flow in one call
    "prune",
    "PruningResult",
    # groups -> scores -> selection -> removal
    "find_groups",
    "ChannelGroup",
    "ChannelGroups",
    "ParamSlice",
    "tpv_scores",
    "Scores",
    "SCORERS",
    "select_channels",
    "variance_curves",
    "allocate",
    "remove_channels",
    # repairs
    "compensate_weights",
    "reconstruct_blocks",
    "recalibrate_batchnorm",
    "distill",
    # proof
    "evaluate",
    "Evaluation",
    "agreement",
    "count_macs",
    "count_params",
    "measure_latency",
    # files, and other people's pruners
    "save_pruned",
    "load_pruned",
    "push_to_hub",
    "export_model",
    "TPVImportance",
    "__version__",
]

_MODULES = {
    "allocation": ("allocate",),
    "batchnorm": ("recalibrate_batchnorm",),
    "checkpoint": ("load_pruned", "save_pruned"),
    "compensation": ("compensate_weights",),
    "costs": ("count_macs", "count_params", "measure_latency"),
    "criteria": ("SCORERS",),
    "curves": ("variance_curves",),
    "distillation": ("distill",),
    "evaluation": ("Evaluation", "agreement", "evaluate"),
    "export": ("export_model",),
    "groups": ("ChannelGroup", "ChannelGroups", "ParamSlice", "find_groups"),
    "hub": ("push_to_hub",),
    "importance": ("TPVImportance",),
    "pipeline": ("PruningResult", "prune"),
    "reconstruction": ("reconstruct_blocks",),
    "removal": ("remove_channels",),
    "scores": ("Scores", "tpv_scores"),
    "selection": ("select_channels",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Imported on first use: `tpvprune --help` need not wait for torch.
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "not installed"
