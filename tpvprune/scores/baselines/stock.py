"""torch-pruning as its users run it: its pruner, its defaults, brought to a budget."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.costs import count_macs
from tpvprune.passes.running import evaluating
from tpvprune.scores.baselines.gradients import add_to, labelled_pairs, loss_gradients
from tpvprune.scores.importance import cut_axis

STOCK: dict[str, Callable[[], Any]] = {
    "tp:magnitude": tp.importance.GroupMagnitudeImportance,
    "tp:lamp": tp.importance.LAMPImportance,
    "tp:fpgm": tp.importance.FPGMImportance,
    "tp:bn_scale": tp.importance.BNScaleImportance,
    "tp:random": tp.importance.RandomImportance,
    "tp:taylor": tp.importance.GroupTaylorImportance,
    "tp:hessian": tp.importance.GroupHessianImportance,
}
"""Name -> torch-pruning's importance, made with its own defaults."""

STOCK_NEEDS_LABELS: frozenset[str] = frozenset({"tp:taylor", "tp:hessian"})

_STRIDE = 0.05
_HALVINGS = 10


@dataclass(frozen=True)
class StockCut:
    """What torch-pruning left.

    ``kept`` says the same by our groups, and is None where it cannot be said, because
    torch-pruning narrowed attention heads or convolution groups that we remove as a whole.
    """

    model: nn.Module
    kept: Kept | None
    ratio: float
    macs: int


class _Task(NamedTuple):
    model: nn.Module
    groups: ChannelGroups
    example: Tensor
    criterion: str
    gradients: Mapping[str, Tensor]
    spared: frozenset[str]
    seed: int


def stock_prune(
    model: nn.Module,
    groups: ChannelGroups,
    example: Tensor,
    criterion: str,
    labelled_batches: Iterable[Any] = (),
    *,
    keep: float,
    seed: int = 0,
) -> StockCut:
    """Prune with torch-pruning's pruner to a share of the MACs.

    ``tp.pruner.BasePruner(global_pruning=True)`` with the importance's and its own defaults, in
    one step. Of the pruning ratios on the way up the first one that meets the budget is taken,
    refined by bisection. Out of its reach are the outputs of the network, whatever else tpvprune
    leaves whole, and the layers that write into zero-padded shortcuts, which it cannot follow.

    ``example``: inputs [B, ...] to trace with, on the model's device. ``criterion``: a key of
    ``STOCK``. ``labelled_batches``: pairs of inputs and class indices, for criteria that need them.
    ``keep``: fraction of the dense MACs that stays, in (0, 1]. ``seed``: of the random importance.
    ValueError if torch-pruning cannot prune the model, or not as far.
    """
    gradients = _gradients(model, criterion, labelled_batches)
    task = _Task(model, groups, example, criterion, gradients, _spared(groups), seed)
    budget = keep * count_macs(model, example)
    low, found = 0.0, _cut(task, 0.0)
    while found.macs > budget and found.ratio + _STRIDE < 1:
        low, found = found.ratio, _cut(task, found.ratio + _STRIDE)
    if found.macs > budget:
        raise ValueError(f"{criterion}: torch-pruning does not come down to {keep:g} of the MACs")
    for _ in range(_HALVINGS):
        middle = _cut(task, (low + found.ratio) / 2)
        if middle.macs <= budget:
            found = middle
        else:
            low = middle.ratio
    return found if _expressible(model, groups, found) else replace(found, kept=None)


def _gradients(model: nn.Module, criterion: str, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the gradients that the importance wants to find on the model, by parameter."""
    if criterion not in STOCK_NEEDS_LABELS:
        return {}
    names = [name for name, _ in model.named_parameters()]
    sums: dict[str, Tensor] = {}
    with evaluating(model):
        for inputs, targets in labelled_pairs(criterion, model, batches):
            if criterion == "tp:hessian":
                # It keeps the last image's squares only; see `hessian_scores`.
                sums = loss_gradients(model, names, inputs[-1:], targets[-1:])
            else:
                add_to(sums, loss_gradients(model, names, inputs, targets))
    return sums


def _spared(groups: ChannelGroups) -> frozenset[str]:
    """Return the modules that torch-pruning must leave whole."""
    padded = {
        name for pad in groups.pads for axis in (pad.front, pad.back) for name, _, _ in axis.members
    }
    slices = [s for name in padded for s in groups[name].slices if s.side == "producer"]
    outputs = {group.name for group in groups.blocked}
    return frozenset(outputs) | {part.param.rpartition(".")[0] for part in slices}


def _cut(task: _Task, ratio: float) -> StockCut:
    copied = copy.deepcopy(task.model).eval().requires_grad_(True)
    for name, parameter in copied.named_parameters():
        gradient = task.gradients.get(name)
        parameter.grad = None if gradient is None else gradient.clone()
    importance = STOCK[task.criterion]()
    if task.criterion == "tp:hessian":
        importance.accumulate_grad(copied)
    modules = dict(copied.named_modules())
    removed: dict[tuple[str, int], Tensor] = {}
    try:
        with torch.random.fork_rng([]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(task.seed)
            pruner = tp.pruner.BasePruner(
                copied,
                task.example,
                importance,
                global_pruning=True,
                pruning_ratio=ratio,
                ignored_layers=[modules[name] for name in task.spared if name in modules],
                # The defaults are dictionaries that all pruners share.
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
            )
            for group in pruner.step(interactive=True):
                removed.update(_removed(group))
                group.prune()
        macs = count_macs(copied, task.example)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AssertionError,
            AttributeError, NotImplementedError) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise ValueError(
            f"{task.criterion}: torch-pruning fails on this model ({reason})"
        ) from error
    for parameter, flag in zip(copied.parameters(), task.model.parameters(), strict=True):
        parameter.grad = None
        parameter.requires_grad_(flag.requires_grad)
    return StockCut(copied, _kept(task.groups, removed), ratio, macs)


def _removed(group: Any) -> dict[tuple[str, int], Tensor]:
    """Return what a torch-pruning group takes from the outputs of layers, by (parameter, dim)."""
    found = {}
    for item in group.items:
        axis = cut_axis(item.dep)
        if axis is not None and "out_channels" in item.dep.handler.__name__:
            found[axis] = torch.as_tensor(item.idxs)
    return found


def _kept(groups: ChannelGroups, removed: Mapping[tuple[str, int], Tensor]) -> Kept:
    kept = {}
    for group in groups:
        kept[group.name] = torch.ones(group.num_channels, dtype=torch.bool)
        for part in group.slices:
            gone = removed.get((part.param, part.dim))
            if gone is not None and part.side == "producer":
                kept[group.name][part.channel[torch.isin(part.index, gone)]] = False
    return kept


def _expressible(model: nn.Module, groups: ChannelGroups, found: StockCut) -> bool:
    """Return whether our own removal of what is not kept leaves the same weights."""
    assert found.kept is not None
    if not all(bool(mask.any()) for mask in found.kept.values()):
        return False
    ours = remove_channels(model, groups, found.kept).state_dict()
    theirs = found.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
