"""Curves of wide groups: the order from second moments, the variance from other images.

With fewer rows (images times directions) than channels, joint output changes say little: signs that
cancel on these rows are found among so many channels whether they cancel elsewhere or not. Second
moments take all positions in one pass: P, the inverse covariance of a reader's inputs, shrunk
(:class:`tpvprune.scores.residuals.Inputs`), and G = E sum_p d d^T, the gradients there. What they
give (docs/method.md, "Curves of wide groups") takes residuals and gradients for independent, so it
is the order and the shape alone: how much it is at a few widths is measured, on images that neither
the maps nor the order were fitted to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, Reader
from tpvprune.passes.crossing import fetched, sent
from tpvprune.passes.finite import NotFiniteError
from tpvprune.processes.shares import summed, total
from tpvprune.scores.leaving import Leaving, Part
from tpvprune.scores.residuals import Inputs
from tpvprune.scores.taps import Probing, passes, reader_plan

MEASURED = (0.125, 0.25, 0.5, 0.75, 0.9375)  # fractions gone at which the variance is measured

_MAX_IMAGES = 683  # for the gradients, of which a quarter is held back: they settle early
_MAX_POSITIONS = 64  # of an image, for the gradients


class GradientMoments:
    """Sums up, on the way of passes over the inputs, what ``leaving.leaving_order`` goes by.

    ``mapped``: calls whose other inputs stand in for those that leave: G is measured. ``means``: by
    call, of readers whose inputs leave their means behind: E u_c^2 is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        probing: Probing,
        *,
        mapped: Set[int],
        means: Mapping[int, Tensor],
    ) -> None:
        self._white = probing.metric in {"logits", "features"}  # E v v^T = I
        self._num_probes = probing.num_probes
        self._device = next(model.parameters()).device
        self.groups, self.plan = groups, reader_plan(groups, self._device)
        self._modules = dict(model.named_modules())
        self._mapped, self.means = mapped, means
        self._sums = {
            (g.name, r.call): torch.zeros(
                [len(r.index)] * (2 if r.call in mapped else 1),
                dtype=torch.float64,
                device=self._device,
            )
            for g in groups
            for r in g.readers
        }
        self._count = self._next = 0

    @property
    def is_full(self) -> bool:
        """Whether there is nothing to measure, or more images would change little."""
        return not self.groups or self._next >= _MAX_IMAGES

    def begin(self, at: Tensor, mask: Tensor) -> None:
        """Announce a pass over images at these places of the whole set [B]; ``mask`` [B] count."""
        chosen = (mask & (at < _MAX_IMAGES)).nonzero().squeeze(1)
        self._num, self._at = len(mask), at[chosen].tolist()
        self._chosen = sent(chosen, self._device)
        self._next = int(at[-1]) + 1
        self._count += len(chosen)

    def add(self, call: int, a: Tensor, grad: Tensor, v: Tensor) -> None:
        """Take in what a reader reads, and the gradient there, for directions v [B, K]."""
        if not self._at:
            return
        for group, reader in self.plan[call]:
            if call in self._mapped:
                layer = self._modules[reader.module]
                exact = _exact_gram(layer, reader, grad, v) if self._white else None
                if exact is None:
                    d = reader.by_channel(grad, self._num).unflatten(0, (self._num, -1))
                    found = _gram(d[self._chosen][:, :, reader.index], self._at)
                else:
                    found = exact * len(self._at)
            else:
                u = _changes(reader, a, grad, self._num, self.means.get(call))
                found = u[self._chosen].square().sum(0)
            self._sums[group.name, call] += found.double()

    def parts(self, inputs: Mapping[int, Inputs]) -> dict[str, list[Part]]:
        """Return the parts of every group's readers; NotFiniteError if a gradient is not finite."""
        pooled = dict(zip(self._sums, summed(*self._sums.values()), strict=True))
        count = max(1.0, total(self._count * self._num_probes))
        parts: dict[str, list[Part]] = {g.name: [] for g in self.groups}
        for group in self.groups:
            for reader in group.readers:
                moments = pooled[group.name, reader.call] / count
                if not bool(moments.isfinite().all()):
                    raise NotFiniteError(
                        f"group {group.name!r}: expected finite gradients, found NaN or infinity: "
                        "check the inputs and the weights for non-finite values"
                    )
                parts[group.name].append(Part(reader, inputs.get(reader.call), moments))
        return parts


def _exact_gram(layer: nn.Module, reader: Reader, grad: Tensor, v: Tensor) -> Tensor | None:
    """Return E d d^T = W^T W of a linear layer whose output is the network's.

    Exact however few the images, for directions with E v v^T = I; None for other layers.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or weight is None or grad.ndim != 2:
        return None
    own = weight.detach()[:, reader.index].float()
    if len(own) != v.shape[1] or len(grad) != len(v):
        return None
    seen = grad[:, reader.index].float()
    same = torch.allclose(seen, v.float() @ own, rtol=1e-2, atol=1e-4)
    return own.T @ own if same else None


def _gram(d: Tensor, at: Sequence[int]) -> Tensor:
    """Return the sum over images, their windows and positions of d d^T: [own, own].

    ``d`` is [images, windows, own, positions], ``at`` where in the whole set each image stands: of
    large maps every so manieth position is read, from one that varies from image to image.
    """
    windows, positions = d.shape[1], d.shape[3]
    starts = [i for i in at for _ in range(windows)]
    d = d.flatten(0, 1).float()
    step = max(1, min(positions, positions * windows // _MAX_POSITIONS))
    if step == 1:
        flat = d.transpose(0, 1).flatten(1)
    else:
        images = zip(d, starts, strict=True)
        flat = torch.cat([image[:, i % step :: step] for image, i in images], 1)
    return flat @ flat.T * (len(d) * positions / flat.shape[1])


def _changes(reader: Reader, a: Tensor, grad: Tensor, num: int, mean: Tensor | None) -> Tensor:
    """Return u_c [B, own] of a reader that gets a mean, or nothing, in the place of each input."""
    a, grad = (reader.by_channel(t, num)[:, reader.index] for t in (a, grad))
    if mean is not None:
        a = a - mean.to(a)[reader.index][:, None]
    return (a * grad).sum(2).reshape(num, -1, len(reader.index)).sum(1).float()


# ---- the variance ---------------------------------------------------------------------------


def measured_at(num_channels: int) -> list[int]:
    """Return how many channels have gone where the variance is measured."""
    counts = {min(num_channels - 1, max(1, round(f * num_channels))) for f in MEASURED}
    return sorted(counts)


def measured_variance(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Tensor],
    probing: Probing,
    *,
    leaving: Mapping[str, Leaving],
    parts: Mapping[str, Sequence[Part]],
    means: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """Measure E[u_R^2] where some of the channels of a group have left in the given order.

    All by group name: the order and the shrinkages of maps, what readers' inputs predict of each
    other, and the variances at :func:`measured_at`, float64, on the CPU.
    """
    device = next(model.parameters()).device
    plan = reader_plan(groups, device)
    gone = {  # which channels have left [counts, C]
        g.name: leaving[g.name].order.argsort() < torch.tensor(measured_at(g.num_channels))[:, None]
        for g in groups
    }
    maps = {
        (name, part.reader.call): _maps(part, gone[name], shrinkages)
        for name in gone
        for part, shrinkages in zip(parts[name], leaving[name].shrinkages, strict=True)
    }
    gone = {name: g.to(device) for name, g in gone.items()}
    sums = {
        name: torch.zeros(len(g), dtype=torch.float64, device=device) for name, g in gone.items()
    }

    def add(call: int, a: Tensor, grad: Tensor, *, num: int, changes: dict[str, Tensor]) -> None:
        for group, reader in plan[call]:
            m = maps[group.name, call]
            if m is None:
                u = _changes(reader, a, grad, num, means.get(call))
                found = gone[group.name][:, reader.channel].to(u) @ u.T
            else:
                found = _joint(reader, a, grad, num, mean=means[call], maps=m)
            changes[group.name] += found

    seen = 0
    for x, directions, tap in passes(model, groups, batches, probing):
        for i, v in enumerate(directions, 1):
            changes = {n: torch.zeros(len(g), len(x), device=device) for n, g in gone.items()}
            collect = partial(add, num=len(x), changes=changes)
            tap.backward(v, collect, last=i == len(directions))
            for name, u in changes.items():
                sums[name] += u.double().square().sum(1)
        seen += len(x)
    count = max(1.0, total(seen)) * probing.num_probes
    pooled = fetched(*summed(*sums.values()))
    return {name: value / count for name, value in zip(sums, pooled, strict=True)}


def _maps(part: Part, gone: Tensor, shrinkages: Sequence[float]) -> Tensor | None:
    """Return the residual map of every set R of channels that have left: [sets, n, own]."""
    if part.inputs is None:
        return None
    index, precision = part.reader.index, part.inputs.precision
    maps = torch.zeros(len(gone), len(precision), len(index), device=precision.device)
    own = gone[:, part.reader.channel]
    for m, left, shrinkage in zip(maps, own, shrinkages, strict=True):
        m[:, left] = part.inputs.residual_map(index[left].to(m.device), shrinkage).float()
    return maps


def _joint(
    reader: Reader, a: Tensor, grad: Tensor, num: int, *, mean: Tensor, maps: Tensor
) -> Tensor:
    """Return u_R [sets, B] = sum_p (a - mean) M d."""
    a = reader.by_channel(a, num).float()
    d = reader.by_channel(grad, num)[:, reader.index].float()
    s = torch.bmm(a - mean.to(a)[:, None], d.transpose(1, 2))  # [L, n, own]
    u = s.flatten(1) @ maps.to(s).flatten(1).T
    return u.reshape(num, -1, len(maps)).sum(1).T


def fitted_curve(shape: Tensor, counts: Sequence[int], measured: Tensor) -> Tensor:
    """Return a curve through what was measured at some counts, of a shape, and never falling.

    ``shape``: from 0, never falling [C]. Returns [C]; between two counts it rises as the shape
    does, beyond the last in proportion to it.
    """
    at = torch.tensor([0, *counts])
    known = torch.cat([measured.new_zeros(1), measured]).cummax(0).values
    k = torch.arange(len(shape))
    hi = torch.searchsorted(at, k).clamp(1, len(at) - 1)
    lo = hi - 1
    rise = shape[at[hi]] - shape[at[lo]]
    part = (shape - shape[at[lo]]) / rise
    part = torch.where(rise > 0, part, (k - at[lo]) / (at[hi] - at[lo]))
    curve = known[lo] + part * (known[hi] - known[lo])
    last = shape[at[-1]]
    tail = known[-1] * (shape / last if last > 0 else torch.ones_like(shape))
    return torch.where(k > at[-1], tail, curve).cummax(0).values
