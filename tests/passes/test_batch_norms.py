"""BatchNorm in eval mode, run as the affine map that it is."""

import pytest
import torch
from torch import nn

from tpvprune.passes.batch_norms import AffineNorms


def norm(**options):
    torch.manual_seed(0)
    made = nn.BatchNorm2d(4, **options).eval()
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    if made.affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("affine", [True, False])
def test_the_affine_map_is_the_norm(affine):
    layer, x = norm(affine=affine).double(), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    with AffineNorms():
        found = layer(x)
    torch.testing.assert_close(found, layer(x))


def test_norms_in_training_and_of_other_types_run_as_they_are():
    x = torch.randn(3, 4, 5, 5)
    learning, twin = norm().train(), norm().train()
    with AffineNorms():
        found = learning(x)
    assert torch.equal(found, twin(x))
    assert torch.equal(learning.running_mean, twin.running_mean)
    half = x.bfloat16()  # with statistics in float32
    with AffineNorms():
        found = norm()(half)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, norm()(half))
