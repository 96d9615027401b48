"""What output positions see: multiplied with the weights it is what the layer gives there."""

import pytest
import torch
from torch.nn import functional as F

from tpvprune.passes.patches import count_positions, gather, patches_of, window_of

NUM = 3


@pytest.mark.parametrize("per_input", [1, 4], ids=["one map", "four maps of an input"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding": 1},
        {"padding": (2, 0), "stride": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"stride": 3, "padding": 1},
        {"stride": (2,), "padding": (1,), "dilation": (2,)},
    ],
)
@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_patches_times_weights_are_the_outputs_of_a_convolution(per_input, groups, how, order):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM * per_input, 8, 7, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 8 // groups, 3, 3, generator=generator, dtype=torch.float64)
    wanted = F.conv2d(x, weight, groups=groups, **how).movedim(1, -1).reshape(NUM, -1, 16)
    window = window_of((x, weight), how)
    assert count_positions(x, window, NUM) == wanted.shape[1]
    noise = torch.rand(NUM, wanted.shape[1], generator=generator)
    positions = noise.topk(5, 1).indices
    order = None if order is None else torch.tensor(order)
    patches = patches_of(x, window, positions, groups, order=order)
    assert patches.shape == (groups, NUM * 5, 9 * 8 // groups)
    found = (patches @ weight.reshape(groups, 16 // groups, -1).mT).transpose(0, 1)
    expected = gather(wanted, positions, order)
    torch.testing.assert_close(found.reshape(NUM, 5, 16), expected)
    rows = range(NUM) if order is None else order.tolist()
    explicit = torch.stack([wanted[i, positions[i]] for i in rows])
    torch.testing.assert_close(expected, explicit, rtol=0, atol=0)
