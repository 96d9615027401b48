"""Prove that a cut is right before it is made: masking and removing must give the same outputs.

The check runs in float64 on a copy whose parameters are jittered, so that zero-initialised
branches cannot hide a misaligned cut. All groups are tried together first; where that fails,
halves are tried, down to single groups, so that one bad group costs a few forwards, not the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroups, with_blocked
from tpvprune.removal import MaskedChannels, remove_channels

TOLERANCE = 1e-10  # relative, float64: rounding is below 1e-12 here, a misaligned cut above 1e-6


def verify_groups(model: nn.Module, groups: ChannelGroups, inputs: tuple[Any, ...]) -> ChannelGroups:
    """Block every group for which masking and removal differ.

    Args:
        model: The dense model; untouched.
        groups: Its groups.
        inputs: Positional arguments of its forward.

    Returns:
        The groups, those that failed moved to ``.blocked`` with the reason.
    """
    checker = _Checker(model, groups, inputs)
    reasons: dict[str, str] = {}
    for part in _failing([g.name for g in groups], checker):
        reasons[part] = checker.error
    for name in reasons:
        checker.compare([name])
        reasons[name] = checker.error or "fails only together with other groups"
    accepted = [g.name for g in groups if g.name not in reasons]
    if reasons and accepted and not checker.compare(accepted):
        # Passing alone but failing together: keep what a running set of survivors accepts.
        survivors: list[str] = []
        for name in accepted:
            if checker.compare([*survivors, name]):
                survivors.append(name)
            else:
                reasons[name] = f"together with other groups: {checker.error}"
    return with_blocked(groups, reasons)


def _failing(names: Sequence[str], checker: _Checker) -> list[str]:
    if not names or checker.compare(names):
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    return _failing(names[:half], checker) + _failing(names[half:], checker)


class _Checker:
    """Compares masked and removed outputs for a set of groups; ``error`` says how they differ."""

    def __init__(self, model: nn.Module, groups: ChannelGroups, inputs: tuple[Any, ...]) -> None:
        self.groups = groups
        self.error = ""
        generator = torch.Generator().manual_seed(0)
        self.model = copy.deepcopy(model).eval().cpu().double()
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                    scale = tensor.std() if tensor.numel() > 1 and tensor.std() > 0 else torch.tensor(0.1)
                    # Multiplicative where there is something to multiply: variances stay positive.
                    tensor.copy_(torch.where(tensor == 0, 0.1 * scale * noise, tensor * (1 + 0.1 * noise.tanh())))
        self.inputs = tuple(
            i.detach().cpu().double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs
        )
        self.kept = {}
        for group in groups:
            mask = torch.rand(group.num_channels, generator=generator) > 1 / 3
            mask[torch.randint(group.num_channels, (1,), generator=generator)] = False
            if not mask.any():
                mask[0], mask[1] = True, False
            self.kept[group.name] = mask
        with torch.no_grad():
            self.dense = _outputs(self.model(*self.inputs))

    def compare(self, names: Sequence[str]) -> bool:
        """Return whether masking and removing these groups agree."""
        kept = {name: self.kept[name] for name in names}
        try:
            with torch.no_grad():
                small = remove_channels(self.model, self.groups, kept)
                removed = _outputs(small(*self.inputs))
                with MaskedChannels(self.groups, kept):
                    masked = _outputs(self.model(*self.inputs))
        except Exception as error:  # noqa: BLE001  (whatever a model raises, the group stays whole)
            text = str(error).strip().splitlines()
            self.error = f"removal breaks the forward: {type(error).__name__}: {text[0][:120] if text else ''}"
            return False
        if removed.shape != masked.shape:
            self.error = f"removal changes the output shape to {tuple(removed.shape)}"
            return False
        scale = masked.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        gap = float((removed - masked).abs().max() / scale)
        if not gap <= TOLERANCE:
            self.error = f"masking and removal differ by {gap:.1e} (relative, float64)"
            return False
        if torch.equal(masked, self.dense):
            self.error = "has no effect on the outputs, so its cut cannot be verified"
            return False
        self.error = ""
        return True


def _outputs(value: Any) -> Tensor:
    """Concatenate everything a model returns into one vector."""
    if isinstance(value, Tensor):
        return value.double().reshape(len(value) if value.ndim else 1, -1)
    if isinstance(value, dict):
        value = list(value.values())
    return torch.cat([_outputs(v) for v in value if isinstance(v, Tensor | tuple | list | dict)], 1)
