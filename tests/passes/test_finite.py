"""Numbers that are not finite."""

import contextlib

import pytest
import torch
from torch import nn

from tpvprune.passes import finite


@pytest.mark.parametrize(("num_processes", "kinds"), [(1, ["16", "32"]), (2, ["32"])])
def test_processes_never_compute_in_unlike_precision(num_processes, kinds, monkeypatch):
    # One process may try again alone; several would wait for each other, or add up unlike sums.
    monkeypatch.setattr(finite, "num_processes", lambda: num_processes)
    model, seen = nn.Linear(2, 2).half(), []

    def compute(model):
        seen.append(str(model.weight.dtype)[-2:])
        if seen[-1] == "16":
            raise finite.NotFiniteError("overflow")
        return seen[-1]

    with (
        pytest.warns(UserWarning, match="float32")
        if num_processes == 1
        else contextlib.nullcontext()
    ):
        assert finite.retried_in_single(model, compute) == "32"
    assert seen == kinds
    assert model.weight.dtype == torch.float16
