"""Weights that are as trained networks have them: dead channels, variances of 0, tiny scales."""

import copy

import pytest
import timm
import torch
from cases import Chain, Residual, batches, build, images, kill_channel
from shared_files import SHARED
from torch import nn

import tpvprune
from tpvprune.groups.verification import _jitter
from tpvprune.passes.finite import NotFiniteError

LITE0 = SHARED / "weights/tf_efficientnet_lite0.safetensors"


def names(groups):
    return [g.name for g in groups]


@torch.no_grad()
def kill(model, share=0.5):
    """Let a share of every BatchNorm's channels be dead: no weights, no variance."""
    for conv, norm in ((model.conv1, model.bn1), (model.conv2, model.bn2)):
        gone = int(share * norm.num_features)
        conv.weight[:gone] = 0
        for tensor in (norm.running_mean, norm.running_var, norm.bias):
            tensor[:gone] = 0
    return model


class Held(nn.Module):
    """A norm layer of one's own: its statistics have other names."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.zeros(width))

    def forward(self, x):
        shape = (1, -1, 1, 1)
        return (x - self.center.view(shape)) / (self.spread.view(shape) + 1e-5).sqrt()


class OtherNorm(Residual):
    """Instance norms that hold statistics, or norms of one's own, in place of BatchNorm."""

    def __init__(self, norm):
        super().__init__()
        self.bn, self.bn1, self.bn2 = (norm(n) for n in (5, 4, 5))


def instance_norm(width):
    return nn.InstanceNorm2d(width, affine=True, track_running_stats=True)


NORMS = [nn.BatchNorm2d, instance_norm, Held, timm.layers.FrozenBatchNormAct2d]


@pytest.mark.parametrize("norm", NORMS)
def test_variances_of_zero_block_nothing(norm):
    model = OtherNorm(norm).double().eval()
    expected = names(tpvprune.find_groups(model, images(2)))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("running_var", "spread")):
                buffer.zero_()
    assert names(tpvprune.find_groups(model, images(2))) == expected
    assert len(expected) == 3


@pytest.mark.parametrize("seed", range(20))
def test_a_jitter_changes_every_number_and_no_sign(seed):
    generator = torch.Generator().manual_seed(seed)
    variances = torch.rand(50, generator=generator, dtype=torch.float64)
    variances[::3] = 0
    moved = variances.clone()
    _jitter(moved, generator, signed=False)
    assert bool((moved > 0).all())
    assert bool((moved != variances).all())
    weights = torch.randn(50, generator=generator, dtype=torch.float64)
    moved = weights.clone()
    _jitter(moved, generator)
    assert torch.equal(moved.sign(), weights.sign())
    assert bool((moved != weights).all())


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_dead_channels_block_nothing_and_the_result_is_finite(share):
    model = build("chain")
    expected = names(tpvprune.find_groups(model, images(2)))
    dead = kill(model, share)
    assert names(tpvprune.find_groups(dead, images(2))) == expected
    for repair in ("none", "bn", "compensate"):
        result = tpvprune.prune(dead, batches(), keep=0.5, repair=repair)
        assert result.report["reached"]
        assert result.model(images()).isfinite().all()


def test_a_checkpoint_in_half_precision_whose_variances_are_rounded_to_zero():
    model = build("chain").float()
    with torch.no_grad():
        model.bn1.running_var[:3] = 1e-9
    half = copy.deepcopy(model).half()
    assert not half.bn1.running_var[:3].any()
    expected = names(tpvprune.find_groups(model, images(2).float()))
    assert names(tpvprune.find_groups(half, images(2).half())) == expected


def test_recalibration_over_dead_filters_and_then_pruning_again():
    model = build("residual")
    with torch.no_grad():
        model.conv1.weight[:2] = 0
        model.conv2.weight[1:3] = 0
    first = tpvprune.prune(model, batches(), keep=0.8, repair="bn")
    again = tpvprune.recalibrate_batchnorm(first.model, batches())
    variances = [m.running_var for m in again.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(bool((v == 0).any()) for v in variances)
    expected = names(tpvprune.find_groups(first.model, images(2), verify=False))
    assert names(tpvprune.find_groups(again, images(2))) == expected
    second = tpvprune.prune(again, batches(), keep=0.6)
    assert second.report["reached"]
    assert second.model(images()).isfinite().all()


class Scaled(nn.Module):
    """Residual branches that end in a LayerScale, over a stream with massive activations."""

    def __init__(self, gamma=1e-6, massive=1.0):
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.gamma = nn.Parameter(torch.full((16,), gamma))
        self.massive = massive
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x.flatten(1)[:, :12]) * self.massive
        x = x + self.gamma * self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x)


@pytest.mark.parametrize("gamma", [1e-6, 0.0, 1.0])
@pytest.mark.parametrize("massive", [1.0, 1e4])
def test_tiny_scales_and_massive_activations_hide_no_group(gamma, massive):
    model = Scaled(gamma, massive).eval()
    with torch.no_grad():
        model.stem.bias[3] += 1e4
    groups = tpvprune.find_groups(model, images(2).float())
    assert names(groups) == ["stem", "up"]
    result = tpvprune.prune(model, [x.float() for x in batches()], keep=0.5)
    assert result.model(images().float()).isfinite().all()


def test_outputs_that_are_not_finite_are_named_once():
    model = build("chain")
    model.conv2.weight.data[1, 1, 1, 1] = torch.nan
    with pytest.raises(
        NotFiniteError, match=r"expected finite outputs.*found NaN.*check"
    ) as caught:
        tpvprune.find_groups(model, images(2))
    assert "\n" not in str(caught.value)
    assert len(tpvprune.find_groups(model, images(2), verify=False)) == 2


def test_a_channel_that_is_zero_on_every_input_is_no_reason():
    model = kill_channel(build(Chain))
    assert names(tpvprune.find_groups(model, images(2))) == ["conv1", "conv2"]


def test_efficientnet_lite_with_its_weights_has_its_groups():
    if not LITE0.exists():
        pytest.skip("needs weights/tf_efficientnet_lite0.safetensors in a folder 'shared'")
    x = torch.randn(2, 3, 64, 64)
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    trained = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(LITE0)).eval()
    assert any(b.eq(0).any() for n, b in trained.named_buffers() if n.endswith("running_var"))
    expected = names(tpvprune.find_groups(plain, x, verify=False))
    assert names(tpvprune.find_groups(trained, x)) == expected
