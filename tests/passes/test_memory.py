"""How much memory may be filled: a share of what is free, whatever tells it."""

import sys

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
