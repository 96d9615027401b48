"""Our scores inside torch-pruning: an importance that its pruners call unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.importance import Importance

from tpvprune.groups import ChannelGroups

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


class TPVImportance(Importance):  # type: ignore[misc]  # torch-pruning is untyped
    """Answer torch-pruning's question for the importance of a group with given scores.

    Works with any pruner that calls ``importance(group)``, such as ``tp.pruner.BasePruner``. For
    every channel of a group's root layer the scores of all our channels that torch-pruning would
    remove with it are added (output variances of different channels add to first order).

    Groups without scores get None, which torch-pruning leaves whole: blocked or ignored ones, and
    those whose unit is a "conv group", because torch-pruning does not remove such units but one
    channel of each. The scores hold for one model only: once it has been pruned, score it again
    and set ``pruner.importance`` before the next step. It ranks channels alone; whole residual
    branches are removed by ``tpvprune.prune(granularity=...)``.

    Args:
        scores: Group name -> Tensor [C], bigger = keep; groups not named are left whole.
        groups: The channel groups that were scored.
        heads: Score attention heads, for pruners with ``prune_num_heads=True,
            prune_head_dims=False``. By default attention is left whole, because torch-pruning's
            default narrows every head instead of removing heads, which is not what was scored.

    Raises:
        ValueError: If a score is of another length than its group; when called, if the model is
            not the one that was scored or has been pruned since.

    Example:
        >>> import timm, torch, torch_pruning as tp
        >>> from tpvprune import TPVImportance, find_groups, tpv_scores
        >>> model, images = timm.create_model("test_resnet").eval(), torch.randn(4, 3, 32, 32)
        >>> groups = find_groups(model, images)
        >>> importance = TPVImportance(tpv_scores(model, groups, [images]), groups)
        >>> pruner = tp.pruner.BasePruner(
        ...     model, images, importance, pruning_ratio=0.5, ignored_layers=[model.fc]
        ... )
        >>> pruner.step()
    """

    def __init__(
        self, scores: Mapping[str, Tensor], groups: ChannelGroups, *, heads: bool = False
    ) -> None:
        self._scores: list[Tensor] = []
        self._owners: dict[tuple[str, int], Tensor] = {}  # group [size] and channel [size]
        self._params = frozenset(groups.param_sizes)
        self._sizes = {
            (p, d): axis.size for p, axes in groups.param_axes.items() for d, axis in axes
        }
        units = {"channel", "head"} if heads else {"channel"}
        for group in groups:
            if group.name not in scores or group.unit not in units:
                continue
            score = torch.as_tensor(scores[group.name]).detach().cpu().double()
            if score.shape != (group.num_channels,):
                raise ValueError(
                    f"group {group.name!r}: expected {group.num_channels} scores, found shape "
                    f"{tuple(score.shape)}: pass the groups that were scored"
                )
            for part in group.slices:
                axis = part.param, part.dim
                owners = self._owners.setdefault(axis, torch.full((2, self._sizes[axis]), -1))
                owners[0, part.index] = len(self._scores)
                owners[1, part.index] = part.channel
            self._scores.append(score)

    @torch.no_grad()
    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """Return the importance of the channels of a torch-pruning group.

        ``group``: a ``tp.dependency.Group``. Returns tensor [n] in the order of the root layer's
        indices; None: leave the group whole. ValueError if the model is not the one that was scored
        or has been pruned since.
        """
        cuts = [(axis, item) for item in group.items if (axis := cut_axis(item.dep)) is not None]
        if not cuts:
            return None
        if not any(param in self._params for (param, _), _ in cuts):
            raise ValueError(
                f"{cuts[0][0][0]}: expected a parameter of the model that was scored, found an "
                "unknown one: score the very module that the pruner gets"
            )
        position = {root: i for i, root in enumerate(group[0].root_idxs)}
        found = []
        for axis, item in cuts:
            self._check_size(axis, item.dep.target.module)
            owned = self._owned(axis, item.idxs)
            if owned is None:
                return None
            roots = torch.as_tensor([position.get(root, -1) for root in item.root_idxs])
            found.append(torch.cat([roots[None], owned])[:, roots >= 0])
        return self._summed(torch.cat(found, 1), len(position))

    def _check_size(self, axis: tuple[str, int], module: nn.Module) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        expected = self._sizes.get(axis)
        if expected is not None and weight.shape[axis[1]] != expected:
            raise ValueError(
                f"{axis[0]}: expected {expected} channels along dimension {axis[1]} as scored, "
                f"found {weight.shape[axis[1]]}: the model was pruned since, score it again"
            )

    def _owned(self, axis: tuple[str, int], idxs: list[int]) -> Tensor | None:
        """Return whose the positions are, group and channel [2, n]; None if one has no score."""
        if axis not in self._owners:
            return None
        owned = self._owners[axis][:, torch.as_tensor(idxs, dtype=torch.long)]
        return None if bool((owned < 0).any()) else owned

    def _summed(self, found: Tensor, num_roots: int) -> Tensor:
        # A channel counts once per root, in however many layers both appear.
        roots, owner, channel = found.unique(dim=1)
        values = torch.zeros(roots.shape[0], dtype=torch.float64)
        for i in owner.unique().tolist():
            values[owner == i] = self._scores[i][channel[owner == i]]
        return torch.zeros(num_roots, dtype=torch.float64).index_add_(0, roots, values)


def cut_axis(dep: Any) -> tuple[str, int] | None:
    """Return (parameter, dimension) that a dependency cuts, for convolutions and linear layers."""
    module, handler = dep.target.module, dep.handler.__name__
    if not isinstance(module, _LAYERS) or dep.target._name is None:
        return None
    reads = "in_channels" in handler
    if reads and getattr(module, "groups", 1) > 1:
        return None  # its weight has no dimension for all inputs
    return f"{dep.target._name}.weight", int(reads != getattr(module, "transposed", False))
