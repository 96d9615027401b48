"""Numerical trouble: it is named, falls back and says so, or makes no difference."""

import copy

import pytest
import timm
import torch
from image_cases import write_images
from torch import nn

import tpvprune
from tpvprune.cli.entry import main
from tpvprune.passes.finite import NotFiniteError, retried_in_single
from tpvprune.scores.curves import variance_curves
from tpvprune.scores.residuals import ridge_inverse


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.inner(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))


@pytest.fixture
def model():
    return Net().eval()


def batches(num=12, size=4):
    return list(torch.randn(num, 3, 6, 6).split(size))


def groups_of(model):
    return tpvprune.find_groups(model, torch.randn(2, 3, 6, 6), verify=False)


def scores_and_curves(model, inputs):
    groups = groups_of(copy.deepcopy(model).float())
    return (
        lambda: tpvprune.tpv_scores(model, groups, inputs),
        lambda: tpvprune.tpv_scores(model, groups, inputs, compensated=False),
        lambda: variance_curves(model, groups, inputs),
    )


def test_nan_names_the_layer_and_the_image(model):
    inputs = batches()
    sound = groups_of(model)
    model.inner.weight.data[3, 2, 1, 1] = torch.nan
    expected = r"found NaN in layer 'inner', image 0 of batch 0: check the weights"
    for compensated in (True, False):
        with pytest.raises(ValueError, match=expected):
            tpvprune.tpv_scores(model, sound, inputs, compensated=compensated)
    with pytest.raises(ValueError, match=expected):
        variance_curves(model, sound, inputs)


def test_a_model_that_gives_nan_is_refused_before_anything_is_done(model, tmp_path, capsys):
    model.inner.weight.data[3, 2, 1, 1] = torch.nan
    expected = "found NaN in layer 'inner', image 0 of batch 0: check the weights"
    with pytest.raises(ValueError, match=expected):
        tpvprune.prune(model, batches(), keep=0.5, criterion="magnitude")
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    state["layer2.0.conv2.weight"][0] = torch.nan
    torch.save(state, tmp_path / "weights.pt")
    argv = ["--model", "test_resnet", "--checkpoint", str(tmp_path / "weights.pt")]
    images = str(write_images(tmp_path / "images", 2))
    for command in (["groups", *argv], ["evaluate", *argv, "--data-dir", images]):
        assert main([*command, "--img-size", "24"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "found NaN in layer 'layer2.0.conv2': check the weights" in line


def test_overflow_names_the_one_image_that_it_happens_for(model, untouched):
    inputs = batches()
    inputs[1][2] *= 1e30  # finite, and so is what the first layer makes of it
    model.norm.weight.data *= 1e30
    expected = "found infinity in layer 'norm', image 2 of batch 1: check the weights and the image"
    for compute in scores_and_curves(model, inputs):
        with untouched(model), pytest.raises(ValueError, match=expected):
            compute()


@pytest.mark.parametrize("dead", ["zero", "constant"])
def test_dead_and_constant_channels_score_nothing_and_go_first(model, dead):
    model.norm.weight.data[[1, 4]] = 0
    model.norm.bias.data[[1, 4]] = 0 if dead == "zero" else 0.7
    inputs = batches(40, 8)
    groups = groups_of(model)
    scores = tpvprune.tpv_scores(model, groups, inputs)
    # What is constant can be predicted, so that compensated it costs nothing.
    assert scores["stem"][[1, 4]].abs().max() < 1e-9 * scores["stem"].max()
    order = variance_curves(model, groups, inputs)["stem"].order
    assert set(order[:2].tolist()) == {1, 4}
    pruned = tpvprune.prune(model, inputs, keep=0.5).model
    assert all(p.isfinite().all() for p in pruned.state_dict().values())


@pytest.mark.parametrize("repair", ["none", "bn", "compensate", "reconstruct", "auto"])
@pytest.mark.parametrize(("num", "size"), [(2, 1), (3, 3), (5, 1)])
def test_batches_of_one_and_fewer_images_than_channels(repair, num, size):
    # 1x1 positions: no more rows than images, of more channels.
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    result = tpvprune.prune(model, batches(num, size), keep=0.5, repair=repair)
    assert all(p.isfinite().all() for p in result.model.state_dict().values())
    scores = result.scores
    assert all(scores[name].isfinite().all() for name in scores)


def test_scores_do_not_depend_on_batches_of_one(model):
    inputs, groups = torch.randn(9, 3, 6, 6), groups_of(model)
    ones, all_at_once = (tpvprune.tpv_scores(model, groups, list(inputs.split(n))) for n in (1, 9))
    for name in ones:
        assert torch.allclose(ones[name], all_at_once[name], rtol=1e-4)  # float32 convolutions


class TestSingularCovariance:
    def test_with_a_ridge_it_is_inverted_without_a_word(self, recwarn):
        a = torch.randn(50, 3, dtype=torch.float64)
        covariance = torch.cat([a, a], 1).T.cov()
        found = ridge_inverse(covariance, 1e-3)
        eye = torch.eye(6, dtype=torch.float64)
        ridge = 1e-3 * covariance.diagonal().mean() * eye
        assert torch.allclose(found @ (covariance + ridge), eye, atol=1e-9)
        assert not recwarn.list

    @pytest.mark.parametrize("rank", [0, 1, 3])
    def test_without_one_it_falls_back_and_says_so(self, rank):
        a = torch.randn(50, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64)
        covariance = a.T @ a / 50
        with pytest.warns(UserWarning, match="covariance of 6 inputs is singular at a ridge of 0"):
            found = ridge_inverse(covariance, 0.0)
        assert found.isfinite().all()
        # Where there is variance it is the pseudo-inverse: rounding of 1e-16, times 1e10.
        error = (covariance @ found @ covariance - covariance).abs().max()
        assert error <= 1e-5 * covariance.abs().max()

    def test_nan_stays_nan(self):
        covariance = torch.eye(4, dtype=torch.float64)
        covariance[1, 2] = torch.nan
        assert ridge_inverse(covariance, 1e-3).isnan().all()

    def test_scores_without_a_ridge_are_finite_and_it_is_said(self, model):
        model.norm.weight.data[[1, 4]] = 0
        with pytest.warns(UserWarning, match="singular"):
            scores = tpvprune.tpv_scores(model, groups_of(model), batches(), ridge=0.0)
        assert all(scores[name].isfinite().all() for name in scores)


class TestHalfPrecision:
    def test_float16_that_overflows_is_scored_in_float32_and_it_is_said(self, model, untouched):
        model.inner.weight.data *= 3e5  # above the largest float16 inside, not in the weights
        model.inner.bias.data *= 1e3
        model.fc.weight.data *= 1e-5
        half = copy.deepcopy(model).half()
        single = copy.deepcopy(half).float()
        assert all(p.isfinite().all() for p in half.parameters())
        inputs = batches()
        for in_half, in_single in zip(
            scores_and_curves(half, inputs), scores_and_curves(single, inputs), strict=True
        ):
            with untouched(half), pytest.warns(UserWarning, match="float16 overflows"):
                found = in_half()
            expected = in_single()
            for name in expected:
                value, wanted = found[name], expected[name]
                if not isinstance(value, torch.Tensor):
                    value, wanted = value.variance, wanted.variance
                assert torch.equal(value, wanted)

    def test_float16_that_does_not_overflow_stays(self, model, recwarn):
        for compute in scores_and_curves(model.half(), batches()):
            compute()
        assert not recwarn.list

    def test_float32_has_no_second_try(self, model):
        def fail(_):
            raise NotFiniteError("once")

        with pytest.raises(NotFiniteError, match="once"):
            retried_in_single(model, fail)
