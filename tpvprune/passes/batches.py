"""Unlabeled batches: labels are dropped here, before anything else sees them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tpvprune.passes.crossing import sent
from tpvprune.processes.membership import num_processes

_END = object()


@dataclass(frozen=True, eq=False)
class UnlabeledBatches:
    """Re-iterable input tensors of a (possibly labelled) loader; see `unlabeled`."""

    batches: Iterable[Any]
    device: torch.device | str | None
    dtype: torch.dtype | None
    seed: int

    def __len__(self) -> int:
        """Return the number of batches; TypeError where the source has no length."""
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Tensor]:
        """Check and move one batch after the other, [B, ...]."""
        count = 0
        for batch in private_randomness(self.batches, seed=self.seed):
            with_labels = isinstance(batch, (tuple, list)) and batch
            inputs = _checked(batch[0] if with_labels else batch, count)
            count += 1
            device = inputs.device if self.device is None else torch.device(self.device)
            yield sent(inputs, device, self.dtype)
        # Of very few images some processes may have none.
        if count == 0 and num_processes() == 1:
            raise ValueError("batches: expected at least one batch, found none: pass images")


def unlabeled(
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> UnlabeledBatches:
    """Return the inputs [B, ...] of re-iterable batches; what follows them in a tuple is unread.

    Every pass starts from the same private random state: a shuffling loader yields the same order
    each time. ``device``, ``dtype``: what each input is moved to; None leaves it. ``seed``: of the
    random state; None: 0, or that of batches that are unlabeled already. A pass raises ValueError
    for an empty source, a batch without a floating-point tensor, or values that are not finite.
    """
    if isinstance(batches, UnlabeledBatches):
        # Not wrapped again: the random state of the inner one would hide the seed.
        device, dtype = device or batches.device, dtype or batches.dtype
        return replace(
            batches, device=device, dtype=dtype, seed=batches.seed if seed is None else seed
        )
    if isinstance(batches, (Tensor, Mapping, str)) or not hasattr(batches, "__iter__"):
        is_set = isinstance(batches, Dataset)
        raise ValueError(
            "batches: expected a re-iterable of input tensors, found "
            f"{type(batches).__name__}: "
            + ("pass a DataLoader of it" if is_set else "wrap a single batch in a list")
        )
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches: expected a re-iterable (several passes are made), found "
            f"{type(batches).__name__}: pass list(...) of it or a DataLoader"
        )
    return UnlabeledBatches(batches, device, dtype, seed or 0)


def _checked(inputs: Any, position: int) -> Tensor:
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"batches: expected a tensor or (inputs, labels), found "
            f"{type(inputs).__name__} in batch {position}: yield input tensors"
        )
    if not inputs.is_floating_point():
        raise ValueError(
            f"batches: expected floating-point inputs, found {inputs.dtype} in batch "
            f"{position}: apply the model's preprocessing first"
        )
    if inputs.ndim == 0 or inputs.shape[0] == 0:
        raise ValueError(
            f"batches: expected at least one sample per batch, found shape "
            f"{tuple(inputs.shape)} in batch {position}: drop empty batches"
        )
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError(
            f"batches: expected finite inputs, found NaN or infinity in batch "
            f"{position}: check the images and their preprocessing"
        )
    return inputs


class Again:
    """Re-iterable of what a function yields, which is called for every pass."""

    def __init__(self, call: Callable[..., Iterator[Any]], *args: Any) -> None:
        self._call = partial(call, *args)

    def __iter__(self) -> Iterator[Any]:
        return self._call()


def private_randomness(batches: Iterable[Any], *, seed: int = 0) -> Iterator[Any]:
    """Iterate with an own random state, swapped in only while a batch is made.

    A DataLoader draws a seed from the global generator on every pass, even without shuffling.
    """
    state = (torch.Generator().manual_seed(seed).get_state(), random.Random(seed).getstate())
    iterator: Iterator[Any] | None = None
    while True:
        outside = (torch.get_rng_state(), random.getstate())
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator, _END)
        finally:
            state = (torch.get_rng_state(), random.getstate())
            torch.set_rng_state(outside[0])
            random.setstate(outside[1])
        if batch is _END:
            return
        yield batch
