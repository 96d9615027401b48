"""Run one function on many chunks of inputs at the same pace, so that they can pool what they know.

Every chunk runs in a thread of its own; the threads take turns, never two at a time, and wait for
each other at agreed points.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class _StoppedError(BaseException):
    """Ends a thread whose result nobody waits for any more; no handler of a model may catch it."""


class Lockstep(Generic[Result]):
    """Threads that take turns and meet.

    ``at_meeting``: called by the caller's thread, with the key, once all have come to a meeting.
    """

    def __init__(self, num: int, at_meeting: Callable[[Hashable], None]) -> None:
        self._at_meeting = at_meeting
        self._turns = [threading.Semaphore(0) for _ in range(num)]
        self._back = threading.Semaphore(0)
        self._keys: list[Hashable | None] = [None] * num
        self._results: list[Result | None] = [None] * num
        self._error: BaseException | None = None
        self._stopped = False
        self._own = threading.local()

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """Return the results of ``work(i)``; RuntimeError if the threads come to other meetings."""
        threads = [
            threading.Thread(target=self._thread, args=(i, work), daemon=True)
            for i in range(len(self._turns))
        ]
        for thread in threads:
            thread.start()
        try:
            while True:
                keys = [self._turn(i) for i in range(len(threads))]
                if len(set(keys)) > 1:
                    raise RuntimeError(
                        "expected a network that runs the same layers for all inputs, found one "
                        "whose layers depend on the input: leave its repair out (repair='bn')"
                    )
                if keys[0] is None:
                    return self._results  # type: ignore[return-value]
                self._at_meeting(keys[0])
        finally:
            self._stopped = True
            for turn in self._turns:
                turn.release()
            for thread in threads:
                thread.join()

    def meet(self, key: Hashable) -> None:
        """Wait, in a thread, until all have come here and the meeting was held."""
        i = self._own.number
        self._keys[i] = key
        self._back.release()
        self._turns[i].acquire()
        if self._stopped:
            raise _StoppedError

    def _turn(self, i: int) -> Hashable | None:
        """Let a thread run to a meeting, and return its key; None when it is done."""
        self._keys[i] = None
        self._turns[i].release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self._keys[i]

    def _thread(self, i: int, work: Callable[[int], Result]) -> None:
        self._own.number = i
        self._turns[i].acquire()
        try:
            if not self._stopped:
                self._results[i] = work(i)
        except _StoppedError:
            return
        except BaseException as error:  # handed on to the caller's thread
            self._error = error
        self._back.release()
