"""Label-free structured pruning of PyTorch vision models by test prediction variance."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpvprune.groups import ChannelGroup as ChannelGroup
    from tpvprune.groups import ChannelGroups as ChannelGroups
    from tpvprune.groups import ParamSlice as ParamSlice
    from tpvprune.groups import find_groups as find_groups
    from tpvprune.groups import fold_weights as fold_weights
    from tpvprune.groups import unfuse_attention as unfuse_attention
    from tpvprune.groups.removal import remove_channels as remove_channels
    from tpvprune.passes.costs import count_macs as count_macs
    from tpvprune.passes.costs import count_params as count_params
    from tpvprune.passes.costs import measure_latency as measure_latency
    from tpvprune.passes.evaluation import Evaluation as Evaluation
    from tpvprune.passes.evaluation import agreement as agreement
    from tpvprune.passes.evaluation import evaluate as evaluate
    from tpvprune.passes.forwards import own_forward as own_forward
    from tpvprune.passes.forwards import with_forward as with_forward
    from tpvprune.passes.memory import keep_freed_memory as keep_freed_memory
    from tpvprune.pipeline import PruningResult as PruningResult
    from tpvprune.pipeline import Sizes as Sizes
    from tpvprune.pipeline import prune as prune
    from tpvprune.pipeline import prune_within as prune_within
    from tpvprune.pipeline import rank_channels as rank_channels
    from tpvprune.repairs.batchnorm import recalibrate_batchnorm as recalibrate_batchnorm
    from tpvprune.repairs.compensation import compensate_weights as compensate_weights
    from tpvprune.repairs.distillation import distill as distill
    from tpvprune.repairs.reconstruction import reconstruct_blocks as reconstruct_blocks
    from tpvprune.saved.checkpoint import load_pruned as load_pruned
    from tpvprune.saved.checkpoint import save_pruned as save_pruned
    from tpvprune.saved.export import export_model as export_model
    from tpvprune.saved.hub import push_to_hub as push_to_hub
    from tpvprune.saved.int8 import export_int8 as export_int8
    from tpvprune.scores.criteria import SCORERS as SCORERS
    from tpvprune.scores.criteria import with_labels as with_labels
    from tpvprune.scores.curves import variance_curves as variance_curves
    from tpvprune.scores.importance import TPVImportance as TPVImportance
    from tpvprune.scores.taps import Probing as Probing
    from tpvprune.scores.tpv import Scores as Scores
    from tpvprune.scores.tpv import tpv_scores as tpv_scores
    from tpvprune.widths.allocation import allocate as allocate
    from tpvprune.widths.limits import Limits as Limits
    from tpvprune.widths.ranking import Ranking as Ranking
    from tpvprune.widths.selection import select_channels as select_channels

__version__: str

_MODULES = {  # in the order of the flow
    # the flow in one call
    "pipeline": ("prune", "prune_within", "rank_channels", "PruningResult", "Sizes"),
    "widths.limits": ("Limits",),
    "scores.taps": ("Probing",),
    "widths.ranking": ("Ranking",),
    # groups -> scores -> selection -> removal
    "groups": (
        "find_groups",
        "unfuse_attention",
        "fold_weights",
        "ChannelGroup",
        "ChannelGroups",
        "ParamSlice",
    ),
    "passes.forwards": ("with_forward", "own_forward"),
    "scores.tpv": ("tpv_scores", "Scores"),
    "scores.criteria": ("SCORERS", "with_labels"),
    "widths.selection": ("select_channels",),
    "scores.curves": ("variance_curves",),
    "widths.allocation": ("allocate",),
    "groups.removal": ("remove_channels",),
    # repairs
    "repairs.compensation": ("compensate_weights",),
    "repairs.reconstruction": ("reconstruct_blocks",),
    "repairs.batchnorm": ("recalibrate_batchnorm",),
    "repairs.distillation": ("distill",),
    # proof
    "passes.evaluation": ("evaluate", "Evaluation", "agreement"),
    "passes.costs": ("count_macs", "count_params", "measure_latency"),
    # speed on a CPU
    "passes.memory": ("keep_freed_memory",),
    # files, and other people's pruners
    "saved.checkpoint": ("save_pruned", "load_pruned"),
    "saved.hub": ("push_to_hub",),
    "saved.export": ("export_model",),
    "saved.int8": ("export_int8",),
    "scores.importance": ("TPVImportance",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_HOME, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    # Imported on first use: `tpvprune --help` need not wait for torch.
    if name == "__version__":
        return importlib.import_module(f"{__name__}.disk.versions").versions(__name__)[__name__]
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
