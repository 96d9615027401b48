"""BatchNorm in eval mode, run as the affine map that it is."""

import pytest
import torch
from cases import build
from torch import nn

from tpvprune import find_groups, tpv_scores
from tpvprune.passes.batch_norms import affine_norms
from tpvprune.scores.sample_gradients import sample_gradients


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
    with affine_norms():
        found = layer(x)
    torch.testing.assert_close(found, layer(x))


def test_norms_in_training_and_of_other_types_run_as_they_are():
    x = torch.randn(3, 4, 5, 5)
    learning, twin = norm().train(), norm().train()
    with affine_norms():
        found = learning(x)
    assert torch.equal(found, twin(x))
    assert torch.equal(learning.running_mean, twin.running_mean)
    half = x.bfloat16()  # with statistics in float32
    with affine_norms():
        found = norm()(half)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, norm()(half))


class Direct(nn.Module):
    """Calls torch.batch_norm itself, whose arguments have another order."""

    def __init__(self, direct=True):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), norm(), nn.Linear(4, 3)
        self.direct = direct

    def forward(self, x):
        x, n = self.conv(x), self.norm
        given = n.weight, n.bias, n.running_mean, n.running_var
        x = torch.batch_norm(x, *given, False, 0.1, n.eps, True) if self.direct else n(x)
        return self.fc(x.relu().mean((2, 3)))


def test_a_call_of_torch_itself_is_the_norm():
    direct, layers, x = build(Direct), build(Direct, False), torch.randn(5, 3, 6, 6).double()
    layers.load_state_dict(direct.state_dict())
    with affine_norms():
        torch.testing.assert_close(direct(x), layers(x))
    groups = find_groups(direct, x[:2])
    scores = [tpv_scores(m, groups, [x])["conv"] for m in (direct, layers)]
    assert torch.equal(*scores)
    seen = [{}, {}]
    for model, found in zip((direct, layers), seen, strict=True):

        def note(name, _probe, _samples, gradients, found=found):
            found[name] = gradients.dense()

        assert list(sample_gradients(model, [x], note)) == [5]
    assert seen[0].keys() == seen[1].keys() > {"norm.weight", "norm.bias"}
    for name, gradients in seen[0].items():
        torch.testing.assert_close(gradients, seen[1][name])
