"""Which positions of a map stand for all of it."""

import pytest
import torch

from tpvprune.passes.positions import sampled_rows


@pytest.mark.parametrize(("windows", "limit"), [(1, 5), (2, 6)])
def test_the_samples_together_cover_the_map_evenly(windows, limit):
    num, positions = 60, 50
    where = torch.arange(positions).double().expand(num * windows, 1, positions)
    whole = sampled_rows(where, torch.arange(num), limit)
    rows = whole.long().view(num * windows, limit // windows)
    assert all(len(row.unique()) == len(row) for row in rows)
    counts = rows.flatten().bincount(minlength=positions)
    assert (counts - rows.numel() / positions).abs().max() <= 2
    parts = zip(
        where.split([11 * windows, 49 * windows]), torch.arange(num).split([11, 49]), strict=True
    )
    assert torch.equal(torch.cat([sampled_rows(a, i, limit) for a, i in parts]), whole)
