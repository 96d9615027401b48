"""How much memory may be filled: a share of what is free, whatever tells it."""

import ctypes
import subprocess
import sys
import textwrap

import pytest
import torch

from tpvprune.passes import memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("available", "left", "spare"),
    [
        (40 << 30, sys.maxsize, 10 << 30),
        (40 << 30, 20 << 30, 5 << 30),
        (2 << 30, sys.maxsize, 1 << 30),
        (0, sys.maxsize, 1 << 30),
        (40 << 30, -5, 1 << 30),
    ],
)
def test_a_quarter_of_what_is_free_but_one_gibibyte(available, left, spare, monkeypatch):
    monkeypatch.setattr(memory, "_available", lambda: available)
    monkeypatch.setattr(memory, "_below_limit", lambda: left)
    assert memory.spare_bytes(CPU) == spare


def test_what_this_system_tells_is_believable():
    assert memory._available() >= 0
    assert memory._below_limit() > 0
    assert memory.spare_bytes(CPU) >= 1 << 30


def test_a_system_that_tells_nothing_gives_the_least(monkeypatch):
    def missing(*_, **__):
        raise OSError("no such file")

    monkeypatch.setattr(memory.Path, "read_text", missing)
    assert memory.spare_bytes(CPU) == 1 << 30


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.parametrize(
    ("thread", "share"), [(False, 0.1), pytest.param(True, 0.5, marks=pytest.mark.long)]
)
def test_tensors_take_the_memory_that_others_left(thread, share):
    """Pages are touched anew by every tensor of a plain process, and once where they are kept.

    The allocator needs up to six tensors until it has found its places, now and then anew.
    """
    code = """
        import resource, sys, threading, torch
        from tpvprune import keep_freed_memory

        if sys.argv[1] == "kept":
            keep_freed_memory()

        def touch():
            for _ in range(60):
                torch.ones((1 << 23) + 4096)  # more than 32 MiB, which no heap of glibc holds

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        touch()
        before = faults()
        runner = threading.Thread(target=touch)
        runner.start() if sys.argv[2] == "True" else touch()
        if sys.argv[2] == "True":
            runner.join()
        print(faults() - before)
    """
    plain, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code), how, str(thread)],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for how in ("plain", "kept")
    )  # fmt: skip
    assert kept < share * plain
