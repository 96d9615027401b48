"""Label-free structured pruning of PyTorch vision models by test prediction variance."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpvprune.groups import (
        ChannelGroup,
        ChannelGroups,
        ParamSlice,
        find_groups,
        fold_weights,
        unfuse_attention,
    )
    from tpvprune.groups.removal import remove_channels
    from tpvprune.passes.costs import count_macs, count_params, measure_latency
    from tpvprune.passes.evaluation import Evaluation, agreement, evaluate
    from tpvprune.passes.forwards import own_forward, with_forward
    from tpvprune.passes.memory import keep_freed_memory
    from tpvprune.pipeline import PruningResult, Sizes, prune, prune_within, rank_channels
    from tpvprune.repairs.batchnorm import recalibrate_batchnorm
    from tpvprune.repairs.compensation import compensate_weights
    from tpvprune.repairs.distillation import distill
    from tpvprune.repairs.reconstruction import reconstruct_blocks
    from tpvprune.saved.checkpoint import load_pruned, save_pruned
    from tpvprune.saved.export import export_model
    from tpvprune.saved.hub import push_to_hub
    from tpvprune.saved.int8 import export_int8
    from tpvprune.scores.criteria import SCORERS, with_labels
    from tpvprune.scores.curves import variance_curves
    from tpvprune.scores.importance import TPVImportance
    from tpvprune.scores.taps import Probing
    from tpvprune.scores.tpv import Scores, tpv_scores
    from tpvprune.widths.allocation import allocate
    from tpvprune.widths.limits import Limits
    from tpvprune.widths.ranking import Ranking
    from tpvprune.widths.selection import select_channels

__version__: str

__all__ = [  # noqa: RUF022  (in the order of the flow)
    # the flow in one call
    "prune",
    "prune_within",
    "rank_channels",
    "PruningResult",
    "Limits",
    "Probing",
    "Ranking",
    "with_labels",
    # groups -> scores -> selection -> removal
    "find_groups",
    "unfuse_attention",
    "fold_weights",
    "with_forward",
    "own_forward",
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
    # speed on a CPU
    "keep_freed_memory",
    # files, and other people's pruners
    "save_pruned",
    "load_pruned",
    "push_to_hub",
    "export_model",
    "export_int8",
    "TPVImportance",
    "__version__",
    "Sizes",
]

_MODULES = {
    "widths.allocation": ("allocate",),
    "repairs.batchnorm": ("recalibrate_batchnorm",),
    "saved.checkpoint": ("load_pruned", "save_pruned"),
    "repairs.compensation": ("compensate_weights",),
    "passes.costs": ("count_macs", "count_params", "measure_latency"),
    "scores.criteria": ("SCORERS", "with_labels"),
    "scores.curves": ("variance_curves",),
    "repairs.distillation": ("distill",),
    "passes.evaluation": ("Evaluation", "agreement", "evaluate"),
    "saved.export": ("export_model",),
    "passes.forwards": ("own_forward", "with_forward"),
    "passes.memory": ("keep_freed_memory",),
    "groups": (
        "ChannelGroup",
        "ChannelGroups",
        "ParamSlice",
        "find_groups",
        "fold_weights",
        "unfuse_attention",
    ),
    "saved.hub": ("push_to_hub",),
    "saved.int8": ("export_int8",),
    "scores.importance": ("TPVImportance",),
    "pipeline": ("PruningResult", "Sizes", "prune", "prune_within", "rank_channels"),
    "repairs.reconstruction": ("reconstruct_blocks",),
    "groups.removal": ("remove_channels",),
    "scores.taps": ("Probing",),
    "scores.tpv": ("Scores", "tpv_scores"),
    "widths.limits": ("Limits",),
    "widths.ranking": ("Ranking",),
    "widths.selection": ("select_channels",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


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
