"""Prove that a cut is right before it is made: masking and removing must give the same outputs.

The check runs in float64 (float32 where the forward allows no other) on a copy whose parameters
are jittered, so that zero-initialised branches cannot hide a misaligned cut. All groups are tried
together first. Where that fails, families are tried (groups that have the same place in repeated
blocks), then single groups, so that one bad group costs a few forwards, not the rest; of two that
pass alone and fail as a pair, the one that saves more MACs stays. The number of trials is bounded,
not their time: what is blocked must depend neither on how busy a machine is nor on which of several
processes asks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.groups.masking import MaskedChannels
from tpvprune.groups.records import ChannelGroups, with_blocked
from tpvprune.groups.removal import removed_view, restore_empty
from tpvprune.passes.finite import NotFiniteError
from tpvprune.passes.running import clear_caches, relative_gap, tensors_of

# Relative: in float64 rounding is below 1e-12, a misaligned cut above 1e-6. In float32, for models
# whose forward fixes it, rounding is below 1e-5: there a cut that moves less goes unseen.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
# Comparisons after the first. Of 200 groups, three families and three pairs that fail take 126.
MAX_TRIALS = 128

_UNTRIED = "could not be verified within the limit of trials"


def verify_groups(
    model: nn.Module,
    groups: ChannelGroups,
    inputs: tuple[Any, ...],
    *,
    max_trials: int = MAX_TRIALS,
) -> ChannelGroups:
    """Block every group for which masking and removal differ, or that is not verified in time.

    ``max_trials``: so many sets of groups are tried after all together. NotFiniteError if the
    outputs of the jittered model are not finite: no cut can be told from another then.
    """
    checker = _Checker(model, groups, inputs)
    names = [g.name for g in groups]
    if not names or checker.compare(names):
        return groups
    checker.trials_left = max_trials
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    reasons: dict[str, str] = {}
    for family in _failing(list(families.values()), checker):
        reasons.update(_failing_members(family, checker))
    reasons.update(_failing_together([n for n in names if n not in reasons], checker))
    return with_blocked(groups, reasons)


def _failing(families: Sequence[list[str]], checker: _Checker) -> list[list[str]]:
    """Return the families that fail, found by halving."""
    if not families or checker.compare([n for family in families for n in family]):
        return []
    if len(families) == 1:
        return [families[0]]
    half = len(families) // 2
    return _failing(families[:half], checker) + _failing(families[half:], checker)


def _failing_members(family: list[str], checker: _Checker) -> dict[str, str]:
    """Return the members that fail alone, with the reason; three that fail speak for all."""
    reasons: dict[str, str] = {}
    probes = list(dict.fromkeys([family[0], family[-1], family[len(family) // 2]]))
    for name in probes:
        if not checker.compare([name]):
            reasons[name] = checker.error
    if len(reasons) == len(probes):
        return {name: reasons.get(name, reasons[probes[0]]) for name in family}
    rest = [[name] for name in family if name not in probes]
    for (name,) in _failing(rest, checker):
        reasons[name] = checker.error if not checker.compare([name]) else "fails only with others"
    return reasons


def _failing_together(names: list[str], checker: _Checker) -> dict[str, str]:
    """Return what passes alone but not together: keep what a growing set accepts."""
    if not names or checker.compare(names):
        return {}
    reasons: dict[str, str] = {}
    accepted: list[str] = []
    step = max(len(names) // 8, 1)
    parts = [names[i : i + step] for i in range(0, len(names), step)]
    for part in parts:
        if checker.compare([*accepted, *part]):
            accepted += part
            continue
        for name in part:
            if len(part) == 1 or not checker.compare([*accepted, name]):
                accepted, refused = _joined(accepted, name, checker)
                reasons.update(refused)
            else:
                accepted.append(name)
    return reasons


def _joined(accepted: list[str], name: str, checker: _Checker) -> tuple[list[str], dict[str, str]]:
    """Return what is accepted, and refused, once ``name`` has failed: what saves more stays."""
    error = checker.error
    partner = _partner(accepted, name, checker)
    if partner is None:
        return accepted, {name: f"together with other groups: {error}"}
    others = [a for a in accepted if a != partner]
    if checker.saving(name) > checker.saving(partner) and checker.compare([*others, name]):
        return [*others, name], {partner: f"together with {name}: {error}"}
    return accepted, {name: f"together with {partner}: {error}"}


def _partner(accepted: list[str], name: str, checker: _Checker) -> str | None:
    """Return the group with which ``name`` fails as a pair, if there is one."""
    low, high = 0, len(accepted)  # accepted[:low] passes with the name, accepted[:high] fails
    while high - low > 1:
        middle = (low + high) // 2
        if checker.compare([*accepted[:middle], name]):
            low = middle
        else:
            high = middle
    # More than two may be needed for a failure, and trials may be used up: then nobody is to blame.
    if not accepted or checker.compare([accepted[low], name]) or checker.error == _UNTRIED:
        return None
    return accepted[low]


class _Checker:
    """Compares masked and removed outputs for a set of groups; ``error`` says how they differ."""

    def __init__(self, model: nn.Module, groups: ChannelGroups, inputs: tuple[Any, ...]) -> None:
        self.groups = groups
        self.error = ""
        self.trials_left = 1
        self.dtype = torch.float64
        try:
            self._run(model, inputs)
        except Exception:  # a norm in float32, a state made in the forward
            self.dtype = torch.float32
            self._run(model, inputs)
        generator = torch.Generator().manual_seed(0)
        half: dict[str, Tensor] = {}
        for group in groups:
            order = torch.randperm(group.num_channels, generator=generator)
            half[group.name] = torch.zeros(group.num_channels, dtype=torch.bool)
            half[group.name][order[: group.num_channels // 2]] = True
        # Between the two trials every channel is removed once.
        others = {name: ~mask for name, mask in half.items()}
        self.trials = [restore_empty(groups, kept) for kept in (others, half)]
        if not all(bool(t.isfinite().all()) for t in self.dense):
            raise NotFiniteError(
                "expected finite outputs to verify the groups on, found NaN or infinity (in "
                f"{_name(self.dtype)}, weights and buffers moved by a tenth): check the inputs, "
                "the weights and the running variances, or pass verify=False"
            )

    def _run(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Run a copy in ``dtype``, its parameters and buffers disturbed."""
        self.model = jittered(model, self.dtype)
        with torch.no_grad():
            self.inputs = on_cpu(inputs, self.dtype)
            self.dense = _outputs(self.model(*self.inputs))

    def compare(self, names: Sequence[str]) -> bool:
        """Return whether masking and removing these groups agree."""
        if not self.trials_left:
            self.error = _UNTRIED
            return False
        self.trials_left -= 1
        return all(self._compare({name: trial[name] for name in names}) for trial in self.trials)

    def saving(self, name: str) -> float:
        """Return the MACs that half of a group's channels are worth."""
        return self.groups.macs() - self.groups.macs({name: self.trials[0][name]})

    def _compare(self, kept: dict[str, Tensor]) -> bool:
        try:
            with torch.no_grad():
                small = removed_view(self.model, self.groups, kept)
                removed = _outputs(small(*self.inputs))
                with MaskedChannels(self.groups, kept):
                    masked = _outputs(self.model(*self.inputs))
        except Exception as error:
            first = str(error).strip().partition("\n")[0][:120]
            self.error = f"removal breaks the forward: {type(error).__name__}: {first}"
            return False
        shapes = [t.shape for t in removed]
        if shapes != [t.shape for t in masked]:
            found = ", ".join(str(tuple(shape)) for shape in shapes)
            self.error = f"removal changes the output shape to {found}"
            return False
        # Each by its own scale: a small output must not hide beside a large one.
        gap = float(relative_gap(removed, masked))
        if not gap <= TOLERANCES[self.dtype]:
            self.error = f"masking and removal differ by {gap:.1e} (relative, {_name(self.dtype)})"
            return False
        if all(torch.equal(m, d) for m, d in zip(masked, self.dense, strict=False)):
            self.error = "has no effect on the outputs, so its cut cannot be verified"
            return False
        self.error = ""
        return True


def on_cpu(inputs: Iterable[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return inputs whose tensors lie on the CPU, those of real numbers in ``dtype``."""
    return tuple(
        i.detach().to("cpu", dtype if i.is_floating_point() else None)
        if isinstance(i, Tensor)
        else i
        for i in inputs
    )


@torch.no_grad()
def jittered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in eval mode on the CPU, disturbed so that nothing in it is without effect."""
    generator = torch.Generator().manual_seed(1)
    copied = copy.deepcopy(model).eval().cpu().to(dtype)
    clear_caches(copied)
    for tensor in [*copied.parameters(), *copied.buffers()]:
        if tensor.is_floating_point():
            signed = isinstance(tensor, nn.Parameter) or bool((tensor < 0).any())
            _jitter(tensor, generator, signed=signed)
    return copied


def _jitter(tensor: Tensor, generator: torch.Generator, *, signed: bool = True) -> None:
    """Disturb a parameter or buffer in place; what is zero, too, and no sign changes.

    Running variances, by whatever name a norm layer holds them, are buffers without a negative
    entry: there what is zero (a dead channel, or what float16 rounds to it) becomes positive.
    """
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    deviation = tensor.std() if tensor.numel() > 1 else torch.zeros(())
    scale = deviation if deviation > 0 else torch.tensor(0.1)
    new = noise if signed else noise.abs()
    tensor.copy_(torch.where(tensor == 0, 0.1 * scale * new, tensor * (1 + 0.1 * noise.tanh())))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _outputs(value: Any) -> list[Tensor]:
    """Return every tensor of real numbers that a model returns."""
    return [t.double() for t in tensors_of(value) if t.is_floating_point()]
