"""Repair 1: refit every layer to the dense network, in network order, without a gradient step.

A layer of the pruned network sees fewer inputs, and inputs that earlier repairs have changed.
Ridge least squares, towards its present weights, makes its pre-activation that of the dense
network again. Where the pre-activation is added to a shortcut, the target is dense branch + dense
shortcut - pruned shortcut, so that errors made upstream are corrected too.

All calibration inputs advance together, call by call: a layer is refitted when its turn comes and
its outputs are computed with the new weights, so one pass through the network does the whole
sequential repair. Gram matrices are formed from a random sample of positions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpvprune.batches import unlabeled
from tpvprune.branches import Branch, BranchFollower, Layer, Plan, layers_by_weight, positions_first
from tpvprune.distributed import share, spread_weights, summed
from tpvprune.groups import ChannelGroups
from tpvprune.membership import num_processes
from tpvprune.memory import is_lack_of_memory, release_memory
from tpvprune.moments import in_single
from tpvprune.patches import count_positions, gather, patches_of, window_of
from tpvprune.running import evaluating, fast_layout, on_device
from tpvprune.targets import Targets, dense_targets, plan_for

Constrain = Callable[[str, Tensor, Tensor], Tensor]
"""``constrain(layer, refitted weights, curvature)``; see :func:`refit_run`."""


def compensate_weights(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    ridge: float = 1e-3,
    rows_per_input: int = 24,
    min_rows: int = 16384,
    max_bytes: int = 4 << 30,
    seed: int = 0,
) -> nn.Module:
    r"""Return a copy of the pruned model whose layers are refitted to the dense one.

    For each convolution or linear layer, in the order of execution,

    .. math:: \min_{W, b} \; E \| W x + b - y^* \|^2 + \lambda \| W - W_0 \|^2

    with x the inputs of the layer in the (already repaired) pruned network, W_0 its present
    weights, y* the dense pre-activation (residual-corrected, see the module). The intercept b
    goes into the layer's bias or the BatchNorm behind it; layers with neither get none.

    Args:
        pruned: ``remove_channels(dense, groups, kept)``, or a later stage of it.
        dense: The model it came from.
        batches: Re-iterable of unlabeled inputs.
        groups: Channel groups of ``dense``.
        kept: What stayed, as given to :func:`tpvprune.remove_channels`.
        ridge: lambda relative to the mean square of the layer's inputs.
        rows_per_input: Sampled positions per unknown of a row of W ...
        min_rows: ... but at least so many, where the inputs have them.
        max_bytes: Memory for the activations of all inputs together; the first inputs that fit
            are used (at 224 px a ResNet-50 takes about 20 MB each). The dense values that are
            fitted to may take half as much again: large models look at fewer positions.
        seed: Of the sampled positions.

    Returns:
        The repaired copy.
    """
    return refitted(
        pruned,
        dense,
        batches,
        groups=groups,
        kept=kept,
        ridge=ridge,
        rows_per_input=rows_per_input,
        min_rows=min_rows,
        max_bytes=max_bytes,
        seed=seed,
    )


def refitted(
    pruned: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    groups: ChannelGroups | None,
    kept: Mapping[str, Tensor],
    ridge: float,
    rows_per_input: int,
    min_rows: int,
    max_bytes: int,
    seed: int,
    constrain: Constrain | None = None,
) -> nn.Module:
    """Return a copy of the pruned model, every layer refitted in one pass over the inputs.

    The arguments are those of :func:`compensate_weights` and of :func:`refit_run`.
    """

    def refit(inputs: list[Tensor]) -> nn.Module:
        repaired = copy.deepcopy(pruned)
        plan = Plan(sum(map(len, inputs)), rows_per_input, min_rows, seed)
        plan = plan_for(plan, dense, inputs[0][:1], max_bytes // 2)
        run = refit_run(
            repaired,
            dense,
            inputs,
            groups=groups,
            kept=kept,
            plan=plan,
            ridge=ridge,
            constrain=constrain,
        )
        moved = fast_layout(torch.cat([on_device(x, repaired) for x in inputs]), repaired)
        with evaluating(repaired), torch.no_grad(), run:
            repaired(moved)
        spread_weights(repaired)
        return repaired

    inputs = first_inputs(unlabeled(batches), dense, max_bytes)
    while True:
        try:
            return refit(inputs)
        except Exception as error:
            num = sum(map(len, inputs))
            if not is_lack_of_memory(error) or num == 1 or num_processes() > 1:
                raise
        # Outside of the handler, where the error no longer holds what filled the memory.
        inputs = [torch.cat(inputs)[: num // 2]]
        warnings.warn(
            f"out of memory: the weights are refitted on {num // 2} inputs instead of {num}",
            stacklevel=3,
        )
        release_memory()


def refit_run(
    pruned: nn.Module,
    dense: nn.Module,
    inputs: Iterable[Tensor],
    *,
    groups: ChannelGroups | None,
    kept: Mapping[str, Tensor],
    plan: Plan,
    ridge: float = 1e-3,
    constrain: Constrain | None = None,
    without: Sequence[str] = (),
) -> RefitRun:
    """Run the dense network, and return the mode under which the pruned one is refitted.

    Args:
        pruned: What is refitted, in place, when it runs once on all inputs together.
        dense: The model it came from.
        inputs: Batches, in the order in which the pruned model will see them.
        groups: Channel groups of ``dense``; None where every width is as it was.
        kept: What stayed.
        plan: Sampled positions.
        ridge: See :func:`compensate_weights`.
        constrain: Called with a layer's name, its refitted weights [groups, outputs, unknowns]
            and the curvature of the fit [groups, unknowns, unknowns]; returns the weights to take.
        without: Modules whose layers stay as they are.

    Returns:
        The mode.
    """
    targets = dense_targets(dense, inputs, plan, without=without)
    layers = layers_by_weight(dense).values() if groups is not None else ()
    rows = {r.name: _kept_rows(groups, kept, r.name) for r in layers if groups is not None}
    own = layers_by_weight(pruned, without)
    return RefitRun(own, plan, targets, rows, ridge, constrain=constrain)


def first_inputs(inputs: Iterable[Tensor], dense: nn.Module, max_bytes: int) -> list[Tensor]:
    """Return the first inputs whose activations fit into ``max_bytes``, at least one.

    The bound is on all processes together: what is fitted to does not depend on their number.
    """
    chosen: list[Tensor] = []
    room = 0
    for x in inputs:
        if not chosen:
            room = max(num_processes(), max_bytes // _bytes_per_input(dense, x[:1]))
        take = x[: share(room) - sum(map(len, chosen))]
        if not len(take):
            break
        chosen.append(take)
    return chosen


def _bytes_per_input(model: nn.Module, x: Tensor) -> int:
    """Return what one input needs: a few activations of the largest size are alive at a time."""
    largest = _LargestOutput()
    with evaluating(model), torch.no_grad(), largest:
        model(on_device(x, model))
    return 6 * largest.num_bytes


class _LargestOutput(TorchFunctionMode):
    num_bytes = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.num_bytes = max(self.num_bytes, out.numel() * out.element_size())
        return out


def _kept_rows(groups: ChannelGroups, kept: Mapping[str, Tensor], module: str) -> Tensor | None:
    for dim, axis in groups.param_axes.get(f"{module}.weight", ()):
        if dim == 0:
            return axis.kept(kept).nonzero().squeeze(1)
    return None


@dataclass
class _Pending:
    """A layer whose refit waits for the addition that ends its branch."""

    layer: Layer
    func: Any
    args: Any
    kwargs: Any
    patches: Tensor


class RefitRun(BranchFollower):
    """Refits every layer when its turn comes in one forward of the pruned network."""

    def __init__(
        self,
        layers: dict[int, Layer],
        plan: Plan,
        targets: Targets,
        rows: Mapping[str, Tensor | None],
        ridge: float,
        *,
        constrain: Constrain | None = None,
    ) -> None:
        super().__init__(layers, plan)
        self._constrain = constrain
        self._targets, self._rows, self._ridge = targets, rows, ridge
        self._pending: dict[int, _Pending] = {}
        self._norm_of: dict[int, Tensor] = {}

    def on_layer(self, layer: Layer, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Refit a layer, or let it wait for the addition or norm behind it.

        Returns:
            Its output, refitted or not yet.
        """
        module, call = layer.module, self.call
        x, window = args[0], window_of(args, kwargs)
        num_positions = count_positions(x, window, self.plan.num_inputs)
        positions = self.plan.positions(call, module, num_positions)
        patches = patches_of(x, window, positions, getattr(module, "groups", 1))
        pending = _Pending(layer, func, args, kwargs, patches)
        if call in self._targets.sums or (call in self._targets.normed and module.bias is None):
            self._pending[call] = pending
        else:
            target = self._kept(self._targets.outputs[call], layer.name)
            self._refit(pending, target, Branch(call))
        return func(*args, **kwargs)

    def on_add(self, func: Any, args: Any, branch: Branch, tensor: Tensor, other: Tensor) -> Any:
        """Refit the layer whose branch ends here, towards dense sum - pruned shortcut.

        Returns:
            The sum.
        """
        pending = self._pending.pop(branch.call, None)
        if pending is None:
            return func(*args)
        module = pending.layer.module
        num = self.plan.num_inputs
        rows = positions_first(other, module, num)
        positions = self.plan.positions(branch.call, module, rows.shape[1])
        shortcut = gather(rows, positions)
        target = self._kept(self._targets.sums[branch.call], pending.layer.name) - shortcut
        if branch.scale is not None and branch.shift is not None:
            dead = branch.scale.abs() < 1e-8
            target = (target - branch.shift) / torch.where(dead, 1.0, branch.scale)
            if bool(dead.any()):  # what nobody sees stays as it is
                target[..., dead] = _outputs(pending.patches, module).view_as(target)[..., dead]
        self._refit(pending, target, branch)
        value = pending.func(*pending.args, **pending.kwargs)
        if branch.scale is not None:
            shape = [-1] + [1] * (value.ndim - 2) if not isinstance(module, nn.Linear) else [-1]
            scale, shift = branch.scale, self._shift(branch, module)
            value = value * scale.reshape(shape) + shift.reshape(shape)
        tensor.copy_(value)
        return func(*args)

    def on_norm(self, branch: Branch, args: Any, kwargs: Any) -> Branch | None:
        """Refit a layer without a bias: the mean of its norm takes up the intercept.

        Returns:
            The branch behind the norm, if it goes on there.
        """
        through = super().on_norm(branch, args, kwargs)
        waits = branch.call in self._pending and branch.call not in self._targets.sums
        if through is None or not waits:
            return through
        pending = self._pending.pop(branch.call)
        self._refit(
            pending, self._kept(self._targets.outputs[branch.call], pending.layer.name), through
        )
        args[0].copy_(pending.func(*pending.args, **pending.kwargs))
        return super().on_norm(branch, args, kwargs)

    def _kept(self, values: Tensor, name: str) -> Tensor:
        rows = self._rows.get(name)
        return values if rows is None else values[..., rows]

    def _shift(self, branch: Branch, module: Any) -> Tensor:
        """Return the shift of the BatchNorm behind the layer after it took up the intercept."""
        assert branch.shift is not None and branch.scale is not None
        moved = self._norm_of.get(branch.call)
        return branch.shift if moved is None else branch.shift + moved * branch.scale

    def _refit(self, pending: _Pending, target: Tensor, branch: Branch) -> None:
        module, bias = pending.layer.module, pending.args[2]
        if bias is not None and bias is not module.bias:  # made elsewhere, as in Swin V2: it stays
            target = target - bias
        free = module.bias is not None or branch.norm is not None
        constrain = self._constrain and partial(self._constrain, pending.layer.name)
        change, intercept = _solve(
            pending.patches,
            target.reshape(-1, target.shape[-1]),
            module,
            ridge=self._ridge,
            free=free,
            constrain=constrain,
        )
        module.weight.add_(change)
        if module.bias is not None:
            module.bias.add_(intercept)
        elif branch.norm is not None:
            branch.norm.sub_(intercept)  # BN(y + b): the running mean takes up -b
            self._norm_of[branch.call] = intercept


def _outputs(patches: Tensor, module: Any) -> Tensor:
    """Return the layer's outputs [rows, outputs] of patches [groups, rows, unknowns]."""
    groups, num_rows, unknowns = patches.shape
    weight = module.weight.reshape(groups, -1, unknowns).to(patches)
    outputs = torch.einsum("gru,gou->rgo", patches, weight).reshape(num_rows, -1)
    return outputs if module.bias is None else outputs + module.bias.to(patches)


def _solve(
    patches: Tensor,
    target: Tensor,
    module: Any,
    *,
    ridge: float,
    free: bool,
    constrain: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the ridge change of the weights and the intercept, both in the layer's layout."""
    patches, target = in_single(patches), in_single(target)
    groups, num_rows, unknowns = patches.shape
    error = (target - _outputs(patches, module)).reshape(num_rows, groups, -1).transpose(0, 1)
    count, x_mean, e_mean = summed(
        torch.tensor(float(num_rows), dtype=torch.float64),
        patches.sum(1, keepdim=True, dtype=torch.float64),
        error.sum(1, keepdim=True, dtype=torch.float64),
    )
    # Without an intercept nothing takes up the means.
    x_mean, e_mean = (mean / count if free else torch.zeros_like(mean) for mean in (x_mean, e_mean))
    x, e = patches - x_mean.to(patches), error - e_mean.to(error)
    gram, cross = summed((x.transpose(1, 2) @ x).double(), (x.transpose(1, 2) @ e).double())
    gram, cross = gram / count, cross / count
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(unknowns, dtype=torch.float64, device=gram.device)
    curvature = gram + ridge * scale[:, None, None] * eye
    change = torch.linalg.solve(curvature, cross)  # [g, u, o]
    if constrain is not None:
        present = module.weight.reshape(groups, -1, unknowns).double()
        change = (constrain(present + change.mT, curvature) - present).mT
    intercept = (e_mean - x_mean @ change).reshape(-1)
    change = change.transpose(1, 2).reshape(module.weight.shape)
    return change.to(module.weight), intercept.to(module.weight)
