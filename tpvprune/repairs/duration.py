"""How long a training runs, and where it stands in its schedule: by updates, or by a clock."""

from __future__ import annotations

from time import monotonic

import torch

from tpvprune.processes.shares import from_first

PARTS = 10
"""A budget of time counts as so many epochs where a schedule speaks of epochs."""
TICKS = 10_000
"""Steps of the schedule over a budget of time."""


class Duration:
    """A number of updates, or of minutes in which as many updates are made as there is time for.

    A clock goes on whatever a step costs, so the schedule follows it: it is as far down as the
    time is gone, and ends near 0 on any machine. Minutes count from now on.
    """

    def __init__(self, epochs: int | None, minutes: float | None, num_batches: int) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self.epochs = PARTS if epochs is None else epochs
        self.updates_per_epoch = num_batches if minutes is None else TICKS // PARTS
        self.total = self.epochs * self.updates_per_epoch
        self._start = monotonic()
        self._first: tuple[float, int] | None = None

    @property
    def used(self) -> float:
        """Seconds since the beginning, those of a run that this one goes on from included."""
        return monotonic() - self._start

    def go_on(self, used: float) -> None:
        """Count the seconds that an earlier, unfinished run has used."""
        self._start -= used

    def step(self, updates: int) -> int | None:
        """Return the step of the schedule, of ``total``, at which the update after others stands.

        It is equal in all processes; None if the run is over: if all updates are made, or if
        another one, of the mean duration of those before, would end too late. The first update of
        a new run is always made.
        """
        if self._seconds is None:
            return updates if updates < self.total else None
        here = int(from_first(torch.tensor(self._by_clock(self._seconds, updates))))
        return None if here < 0 else here

    def _by_clock(self, seconds: float, updates: int) -> int:
        used = self.used
        self._first = self._first or (used, updates)
        since, before = used - self._first[0], updates - self._first[1]
        each = since / before if before else 0.0
        # What is gone before a first update, such as statistics of BatchNorm, does not prevent it.
        if updates and (used >= seconds or used + each > seconds):
            return -1
        return min(int(self.total * used / seconds), self.total - 1)
