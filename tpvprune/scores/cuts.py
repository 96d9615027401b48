"""What an elimination needs of one pass: S, or u, of every reader of the groups, row by row."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tpvprune.groups import ChannelGroup, Reader
from tpvprune.passes.finite import NotFiniteError
from tpvprune.passes.moments import in_single
from tpvprune.processes.shares import global_indices, share
from tpvprune.scores.residuals import is_held, residual_map
from tpvprune.scores.second_moments import GradientMoments
from tpvprune.scores.taps import Probing, passes, reader_plan


class Cut:
    """One reader of a group: S [own, rows, n] (or u [own, rows, 1]), and the stand-in map.

    Both are where the network is; which columns are whose, and are left, the host keeps.
    """

    def __init__(
        self, reader: Reader, precision: Tensor | None, num_rows: int, device: torch.device
    ) -> None:
        self.index, self.channel = reader.index, reader.channel
        self.columns = _columns(reader.index, device)
        self.precision = precision
        # Filled batch by batch: joining thousands of parts would need twice the memory, and leave
        # it in pieces.
        width = 1 if precision is None else len(precision)
        self.s = torch.empty(len(reader.index), num_rows, width, device=device)
        self._filled = 0

    def add(self, rows: Tensor) -> None:
        """Take the next rows [rows, own, n]."""
        start, self._filled = self._filled, self._filled + len(rows)
        self.s[:, start : self._filled] = rows.transpose(0, 1)

    def complete(self) -> None:
        """Note that what no gradient has reached changes nothing that counts."""
        self.s[:, self._filled :] = 0

    def changes(self, num_channels: int) -> Tensor:
        """Return u [C, rows]: what each channel's leaving now would change."""
        rows = self.s.shape[1]
        if not len(self.index):
            return self.s.new_zeros(num_channels, rows)
        if self.precision is None:
            per_column = self.s[:, :, 0]
        else:
            weights = residual_map(self.precision, [(self.index, self.channel)])[:, self.index]
            per_column = torch.bmm(self.s, weights.T.float().unsqueeze(2)).squeeze(2)
        changes = self.s.new_zeros(num_channels, rows)
        return changes.index_add_(0, self.channel.to(changes.device), per_column)

    def remove(self, channels: Tensor) -> Tensor:
        """Return the joint change [rows] of channels that leave now; the others take over."""
        gone = torch.isin(self.channel, channels)
        columns = gone.nonzero().squeeze(1)
        if not len(columns):
            return self.s.new_zeros(self.s.shape[1])
        leaving, inputs = self.s[columns], self.index[columns]
        self._drop(gone)
        if self.precision is None:
            return leaving.sum((0, 2))
        p = self.precision[:, inputs]
        taken = torch.linalg.solve(p[inputs], p.T).T  # [n, |R|] = P[:, R] P_RR^-1
        # The inputs that stay predict those that leave: a_R ~ -P_RR^-1 P_RK a_K.
        share = -taken[self.index].float()
        self.s.flatten(1).addmm_(share, leaving.flatten(1))
        self.precision = self.precision - taken @ p.T
        self.precision[inputs] = 0
        self.precision[:, inputs] = 0
        # Rows of inputs that left are never used again; one keeps the matrix invertible.
        self.precision[inputs, inputs] = 1
        return torch.einsum("crj,jc->r", leaving, taken.float())

    def _drop(self, gone: Tensor) -> None:
        """Let the last columns that stay fill the places of those that leave: S is not copied."""
        stays = len(gone) - int(gone.sum())
        order = torch.arange(stays)
        holes = gone[:stays].nonzero().squeeze(1)
        order[holes] = (~gone[stays:]).nonzero().squeeze(1) + stays
        self.s[holes] = self.s[order[holes]]
        self.s = self.s[:stays]
        self.index, self.channel = self.index[order], self.channel[order]


class Size(NamedTuple):
    """How many rows of a group are measured, and their bytes."""

    rows: int
    num_bytes: int


def numbers_of(group: ChannelGroup, widths: Mapping[int, int]) -> int:
    """Return how many numbers a row of S, or a map, of all readers has."""
    return sum(widths.get(r.call, 1) * len(r.index) for r in group.readers)


def size_of(
    group: ChannelGroup,
    widths: Mapping[int, int],
    most_rows: int,
    max_bytes: int,
    rows_per_channel: float,
) -> Size | None:
    """Return the rows of a group; None where they are too few for its channels."""
    numbers = numbers_of(group, widths)
    rows = min(most_rows, max_bytes // (4 * max(numbers, 1)))
    if rows < max(1.0, rows_per_channel * group.num_channels):
        return None
    return Size(rows, 4 * rows * numbers)


def parts_of(sizes: Mapping[str, Size], max_bytes_held: int) -> Iterator[list[str]]:
    """Yield groups that are held together; those that want many inputs need few passes."""
    part: list[str] = []
    held = 0
    if not sizes:
        return
    for name in sorted(sizes, key=lambda name: -sizes[name].rows):
        if part and held + sizes[name].num_bytes > max_bytes_held:
            yield part
            part, held = [], 0
        part.append(name)
        held += sizes[name].num_bytes
    yield part


def collected(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    inputs: Iterable[Tensor],
    probing: Probing,
    *,
    num_inputs: int,
    means: Mapping[int, Tensor],
    precisions: Mapping[int, Tensor],
    sizes: Mapping[str, Size],
    gradients: GradientMoments,
) -> dict[str, list[Cut]]:
    """Measure the cuts of groups, and in the same pass what ``gradients`` still wants."""
    device = next(model.parameters()).device
    plan = reader_plan(groups)
    cuts: dict[tuple[str, int], Cut] = {}
    # The first images of the whole set, with all of their directions.
    probes = probing.num_probes
    wanted = {g.name: min(num_inputs, share(-(-sizes[g.name].rows // probes))) for g in groups}
    for group in groups:
        for r in group.readers:
            precision = precisions.get(r.call)
            num_rows = wanted[group.name] * probes
            cuts[group.name, r.call] = Cut(r, precision, num_rows, device)
    seen, most = 0, max(wanted.values(), default=0)
    if not groups and gradients.is_full:
        return {}
    read = [*groups, *(() if gradients.is_full else gradients.groups)]
    for x, directions, tap in passes(model, read, inputs, probing):
        summed_too = () if gradients.is_full else gradients.plan
        if summed_too:
            gradients.begin(global_indices(seen, len(x)), ~is_held(seen, len(x)))

        def collect(
            call: int,
            a: Tensor,
            grad: Tensor,
            *,
            v: Tensor,
            num: int = len(x),
            seen: int = seen,
            summed_too: Container[int] = summed_too,
        ) -> None:
            if call in summed_too:
                gradients.add(call, a, grad, v)
            if call not in plan or seen >= most:
                return
            a, grad = (_by_sample(plan[call][0][1], t, num) for t in (a, grad))
            for group, _ in plan[call]:
                take = max(0, wanted[group.name] - seen)
                rows, cut = in_single(a[:take]), cuts[group.name, call]
                own = in_single(grad[:take, :, cut.columns])
                if cut.precision is not None:
                    s = own.transpose(1, 2) @ (rows - means[call].to(rows))  # [B, own, n]
                else:
                    gone = rows[:, :, cut.columns]
                    if call in means:
                        gone = gone - means[call][cut.columns].to(gone)
                    s = (gone * own).sum(1).unsqueeze(2)
                cut.add(s)

        for v in directions:
            tap.backward(v, partial(collect, v=v))
        seen += len(x)
        if seen >= most and gradients.is_full:
            break
    found: dict[str, list[Cut]] = {g.name: [] for g in groups}
    for (name, _), cut in cuts.items():
        cut.complete()
        if not bool(cut.s.isfinite().all()):
            raise NotFiniteError(
                f"group {name!r}: expected finite output changes, found NaN or infinity: check "
                "the inputs and the weights for non-finite values"
            )
        found[name].append(cut)
    return found


def _columns(index: Tensor, device: torch.device) -> slice | Tensor:
    """Return what selects these positions: those that follow one another need no copy."""
    num, first = len(index), int(index[0]) if len(index) else 0
    run = torch.equal(index, torch.arange(first, first + num))
    return slice(first, first + num) if run else index.to(device)


def _by_sample(reader: Reader, t: Tensor, num: int) -> Tensor:
    """Return [B, positions, n]."""
    rows = reader.by_channel(t, num).transpose(1, 2)
    return rows.reshape(num, -1, rows.shape[2])
