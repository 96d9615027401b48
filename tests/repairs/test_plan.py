"""Which positions a layer is fitted to, and which a preconditioner is measured at."""

import torch
from torch import nn

from tpvprune.repairs.blocks import BlockCall
from tpvprune.repairs.branches import Plan
from tpvprune.repairs.preconditioner import _moments, _with_graph


def test_positions_are_drawn_for_every_input_from_the_whole_map():
    layer, num, positions, each = nn.Linear(4, 2), 400, 30, 3
    plan = Plan(num, each * num / 4, 0, seed=0)
    found = plan.positions(0, layer, positions)
    assert found.shape == (num, each)
    assert all(len(row.unique()) == each for row in found)
    mean = num * each / positions  # of counts with a standard deviation of about 6
    assert (found.flatten().bincount(minlength=positions) - mean).abs().max() < 4 * mean**0.5
    assert torch.equal(plan.positions(0, layer, positions), found)
    assert not torch.equal(plan.positions(1, layer, positions), found)


def test_factors_are_measured_at_positions_of_the_whole_map():
    layer = nn.Sequential(nn.Conv2d(1, 1, 1)).double()
    x = torch.zeros(8, 1, 20, 20, dtype=torch.float64)
    x[:, :, 10:] = 1
    seen, out = _with_graph(layer, ["0.weight"], BlockCall((x,), {}, layer(x).detach()))
    generator = torch.Generator().manual_seed(0)
    squares, rows, *_ = _moments(layer[0].weight, seen["0.weight"], torch.ones_like(out), generator)
    assert rows < x.numel() / 2
    assert abs(float(squares[0, 0, 0]) / rows - 0.5) < 0.1
