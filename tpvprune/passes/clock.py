"""Seconds per stage of a long run, and the caller's progress display."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``."""


@dataclass
class Clock:
    """Times stages; ``seconds`` holds those of each stage, all its rounds together."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str, done: int = 1, total: int = 1) -> Iterator[None]:
        """Time round number ``done``, from 1, of a stage."""
        if self.progress is not None:
            self.progress(stage, done - 1, total)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        if self.progress is not None:
            self.progress(stage, done, total)


class Counted(Iterable[Any]):
    """Batches whose passes are told as progress of a stage."""

    def __init__(
        self, batches: Any, stage: str, progress: Progress | None, *, passes: int = 1
    ) -> None:
        """Expect so many passes over all of the batches; others than lists are not counted."""
        self._batches, self._stage, self._progress = batches, stage, progress
        self._total = passes * len(batches) if isinstance(batches, Sequence) else 0
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            try:
                yield batch
            finally:  # also of the last one that is asked for
                self._done += 1
                if self._progress is not None and self._done <= self._total:
                    self._progress(self._stage, self._done, self._total)
