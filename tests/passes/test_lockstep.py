"""Threads that take turns: one at a time, in order, together at meetings, and none left behind."""

import threading
import time

import pytest
import torch

from tpvprune.passes.lockstep import Lockstep, _StoppedError

NUM = 4


class _InterruptedError(BaseException):
    """What ends a program, as KeyboardInterrupt does: no ``except Exception`` holds it."""


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def met(work, *, num=NUM, at_meeting=lambda key: None):
    """Run ``work(i, meet)`` in lockstep."""
    lockstep = Lockstep(num, at_meeting)
    return lockstep.run(lambda i: work(i, lockstep.meet))


# ---- turns ----------------------------------------------------------------------------------


def test_never_two_at_once():
    inside, seen = [], []

    def busy(i):
        inside.append(i)
        time.sleep(0.002)  # lets any other thread that may run run
        seen.append(len(inside))
        inside.remove(i)

    def work(i, meet):
        for key in range(3):
            busy(i)
            meet(key)
        busy(i)

    met(work, at_meeting=lambda _: busy("caller"))
    assert seen == [1] * (4 * NUM + 3)


def test_all_come_before_a_meeting_and_go_on_after_it_in_order():
    log = []

    def work(i, meet):
        for key in ("a", "b"):
            log.append((i, key))
            meet(key)
        log.append((i, "end"))

    met(work, at_meeting=lambda key: log.append(("meeting", key)))
    wanted = []
    for key in ("a", "b"):
        wanted += [*((i, key) for i in range(NUM)), ("meeting", key)]
    assert log == [*wanted, *((i, "end") for i in range(NUM))]


def test_meetings_are_held_by_the_thread_of_the_caller():
    where = []
    met(lambda _, meet: meet("a"), at_meeting=lambda _: where.append(threading.current_thread()))
    assert where == [threading.current_thread()]


@pytest.mark.parametrize("num", [1, 2, 7])
def test_results_come_in_order(num):
    def work(i, meet):
        meet("a")
        return i * i

    assert met(work, num=num) == [i * i for i in range(num)]


def test_what_a_meeting_does_is_seen_by_all():
    sums, parts = [], []

    def work(i, meet):
        parts.append(i + 1)
        meet("sum")
        return sums[-1]

    assert met(work, at_meeting=lambda _: sums.append(sum(parts))) == [10] * NUM


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, _InterruptedError, KeyboardInterrupt])
@pytest.mark.parametrize("culprit", [0, 2, NUM - 1])
@pytest.mark.parametrize("num_meetings", [0, 1])
def test_an_exception_of_a_thread_reaches_the_caller_as_it_is(kind, culprit, num_meetings):
    error, ended = kind("spoilt"), []

    def work(i, meet):
        try:
            for key in range(num_meetings):
                meet(key)
            if i == culprit:
                raise error
            meet("never held")
        finally:
            ended.append(i)

    with pytest.raises(kind) as caught:
        met(work)
    assert caught.value is error
    # Those that had begun end; with no meeting before, those behind the culprit never begin.
    assert sorted(ended) == list(range(NUM if num_meetings else culprit + 1))


def test_no_handler_of_a_model_holds_up_the_end():
    def work(i, meet):
        if i == 1:
            raise ValueError("spoilt")
        try:
            meet("a")
        except Exception:  # as a model might
            return "caught"

    with pytest.raises(ValueError, match="spoilt"):
        met(work)
    assert not issubclass(_StoppedError, Exception)


@pytest.mark.parametrize("kind", [ValueError, _InterruptedError])
def test_an_error_of_a_meeting_ends_all_threads(kind):
    error, ended = kind("spoilt"), []

    def work(i, meet):
        try:
            meet("a")
            meet("b")
        finally:
            ended.append(i)

    def fail(key):
        if key == "b":
            raise error

    with pytest.raises(kind) as caught:
        met(work, at_meeting=fail)
    assert caught.value is error
    assert sorted(ended) == list(range(NUM))


@pytest.mark.parametrize("odd", ["another", "none"])
def test_different_meetings_are_refused(odd):
    held = []

    def work(i, meet):
        meet("a")
        if i != 2:
            meet("b")
        elif odd == "another":
            meet("c")

    with pytest.raises(RuntimeError, match="layers depend on the input"):
        met(work, at_meeting=held.append)
    assert held == ["a"]


# ---- manners --------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_modes_of_the_caller_stay(enabled, fails):
    seen = []

    def work(i, meet):
        torch.set_grad_enabled(not enabled)
        meet("a")
        assert torch.is_grad_enabled() != enabled  # its own, also after others ran
        if fails and i == 1:
            raise ValueError

    def meeting(_):
        seen.append(torch.is_grad_enabled())

    dtype = torch.get_default_dtype()
    with torch.set_grad_enabled(enabled):
        try:
            met(work, at_meeting=meeting)
        except ValueError:
            assert fails
        assert torch.is_grad_enabled() == enabled
    assert seen == [enabled]
    assert torch.get_default_dtype() == dtype
