"""Measures of a whole network against dense Jacobians and Hessians, and their invariances."""

import copy
import itertools
import math

import cases
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

from tpvprune import distill, find_groups, tpv_scores
from tpvprune.diagnostics.folding import folded, layers_of
from tpvprune.diagnostics.measures import (
    channel_tpv,
    l2_norm,
    own_predictions,
    pac_bayes_origin,
    path_norm,
    sharpness,
)
from tpvprune.diagnostics.normalized_loss import fit_line, normalized_loss
from tpvprune.diagnostics.rescaling import rescale
from tpvprune.diagnostics.trajectory import Trajectory, input_lipschitz
from tpvprune.diagnostics.volume import local_volume
from tpvprune.scores.baselines.weights import magnitude_scores

RELU_NETS = [cases.Chain, cases.Residual, cases.NoNorm, cases.Flatten, cases.Concat]


def net(case, seed=0):
    torch.manual_seed(seed)
    model = case().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) for n in (5, 4)]


def rescaled(model, images, **options):
    return rescale(model, find_groups(model, images[0]), images[0], **options)


# ---- rescaling ------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize("case", [*RELU_NETS, cases.InPlace])
def test_rescaling_leaves_every_output_as_it_is(case, per, images):
    model = net(case)
    found = rescaled(model, images, per=per)
    assert found.factors
    with torch.no_grad():
        assert torch.equal(found.model(images[0]), model(images[0]))
    moved = [
        name
        for (name, a), b in zip(model.named_parameters(), found.model.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert len(moved) >= 2


def test_rescaling_goes_through_depthwise_layers(images):
    class Expanded(cases.Depthwise):
        def forward(self, x):
            x = self.bn2(self.depthwise(self.bn1(self.expand(x)).relu())).relu()
            return self.fc(self.bn3(self.project(x)).mean((2, 3)))

    model = net(Expanded)
    found = rescaled(model, images)
    assert {"expand", "project"} <= set(found.factors)
    with torch.no_grad():
        torch.testing.assert_close(found.model(images[0]), model(images[0]), rtol=1e-12, atol=0)


def test_activations_that_level_off_are_left_alone(images):
    found = rescaled(net(cases.Depthwise), images)  # ReLU6
    assert set(found.factors) == {"project"}
    assert "positive factors" in found.left["expand"]
    assert set(rescaled(net(cases.Gate), images).factors) <= {"reduce"}  # SiLU and sigmoid


def test_rescaling_leaves_the_argument_as_it_was(images, untouched):
    model = net(cases.Chain).train()
    groups = find_groups(model, images[0])
    with untouched(model):
        found = rescale(model, groups, images[0])
    assert found.model.training


def test_rescaling_refuses_what_it_does_not_know(images):
    model = net(cases.Chain)
    groups = find_groups(model, images[0])
    with pytest.raises(ValueError, match="per: expected 'channel' or 'layer'"):
        rescale(model, groups, images[0], per="net")
    with pytest.raises(ValueError, match="octaves: expected at least 1"):
        rescale(model, groups, images[0], octaves=0)


# ---- folding --------------------------------------------------------------------------------


def test_layers_know_the_batchnorm_behind_them(images):
    found = layers_of(net(cases.Chain), images[0])
    assert found == {"conv1": "bn1", "conv2": "bn2", "fc": None}


def test_folding_keeps_the_outputs(images):
    for case in RELU_NETS:
        model = net(case)
        copied, names = folded(model, images[0])
        with torch.no_grad():
            torch.testing.assert_close(copied(images[0]), model(images[0]))
        assert names[-1].startswith("fc")


def test_folding_refuses_standardised_weights(images):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, w / w.std((1, 2, 3), keepdim=True))

    model = nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model[1].running_var.fill_(3.0)
    with pytest.raises(ValueError, match="folding BatchNorm: expected the same outputs"):
        folded(model, images[0].float())


# ---- measures against slow oracles ----------------------------------------------------------


def flat_hessian(model, x, y):
    """Return the Hessian of the mean loss by all parameters [P, P]."""
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [v.numel() for v in values]

    def loss(vector):
        parts = vector.split(sizes)
        weights = {n: p.reshape(v.shape) for n, p, v in zip(names, parts, values, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, weights, (x,)), y)

    return hessian(loss)(torch.cat([v.detach().flatten() for v in values]))


def test_sharpness_is_the_trace_of_the_hessian(images):
    model = net(cases.Chain)
    labelled = own_predictions(model, images)
    dense = sum(len(x) * flat_hessian(model, x, y).trace() for x, y in labelled) / 9
    found = sharpness(model, labelled, num_probes=150)
    assert abs(found.value - float(dense)) < 3 * found.stderr
    assert found.stderr < 0.2 * abs(float(dense))


def test_sharpness_of_one_weight_is_exact():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    x = torch.tensor([[2.0]], dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.zero_()
    # p = 1/2, so the Hessian of each logit is p(1-p) x^2 = 1 and the probes differ by +-1.
    many = sharpness(model, [(x, torch.tensor([0]))], num_probes=400)
    assert many.value == pytest.approx(2, abs=4 * many.stderr)


def test_path_norm_is_the_sum_over_paths():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)
    ).double()
    w1, b1, w2 = model[1].weight, model[1].bias, model[3].weight
    total = 0.0
    for k, h in itertools.product(range(2), range(4)):
        paths = [*(w1[h, i] for i in range(3)), b1[h]]
        total += sum(float((w2[k, h] * p) ** 2) for p in paths)
    found = path_norm(model, torch.zeros(1, 3, dtype=torch.float64))
    assert found.value == pytest.approx(math.sqrt(total))


def test_path_norm_goes_through_a_batchnorm_before_a_layer():
    torch.manual_seed(0)
    norm, linear = nn.BatchNorm1d(3), nn.Linear(3, 2)
    model = nn.Sequential(norm, nn.ReLU(), linear).double().eval()
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        paths = (linear.weight * scale).square() + (linear.weight * shift).square()
        wanted = (paths.sum() + linear.bias.square().sum()).sqrt()
    found = path_norm(model, torch.randn(2, 3, dtype=torch.float64))
    assert found.value == pytest.approx(float(wanted))


def test_path_norm_refuses_other_activations(images):
    with pytest.raises(ValueError, match="positive factors"):
        path_norm(net(cases.Gate), images[0])
    with pytest.raises(ValueError, match="another layer"):
        path_norm(net(cases.Attention), images[0])


def test_pac_bayes_finds_the_noise_that_costs_a_tenth():
    """One weight w on inputs x > 0 against 0: it fails when w + sigma z < 0, z the same draws."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
    x = torch.ones(10, 1, dtype=torch.float64)
    labelled = own_predictions(model, [x])
    draws = 400
    found = pac_bayes_origin(model, labelled, num_draws=draws, num_training=1000, seed=3).value
    # P(1 + s z1 < s z2) = 0.1 at s = 1 / (1.2816 sqrt 2)
    sigma = 1 / (1.2816 * math.sqrt(2))
    wanted = math.sqrt((1 / (4 * sigma**2) + math.log(1000 / sigma) + 10) / 1000)
    assert found == pytest.approx(wanted, rel=0.03)


def test_input_lipschitz_is_the_largest_singular_value(images):
    for case in (cases.Chain, cases.Residual, cases.Attention):
        model = net(case)
        x = torch.cat(images)
        jacobians = vmap(jacrev(lambda one, model=model: model(one[None])[0]))(x).flatten(2)
        wanted = torch.linalg.svdvals(jacobians)[:, 0].mean()
        found = input_lipschitz(model, images, num_iterations=60)
        assert found.value == pytest.approx(float(wanted), rel=1e-4)


def test_channel_tpv_sums_the_scores(images):
    model = net(cases.Residual)
    groups = find_groups(model, images[0])
    scores = tpv_scores(model, groups, images, compensated=False)
    found = channel_tpv(model, groups, images)
    assert found.value == pytest.approx(sum(float(scores[g.name].sum()) for g in groups))


# ---- volume ---------------------------------------------------------------------------------


class Linear(nn.Module):
    """Linear in its weights: the output variance is a quadratic form, the set an ellipsoid."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, x):
        return x @ self.w[:, None]


def ellipsoid(x, weights, share):
    spread = (x @ weights).var(unbiased=False)
    form = x.T @ x / len(x)
    n = len(weights)
    ball = n / 2 * math.log(math.pi) - math.lgamma(n / 2 + 1)
    return ball + n / 2 * math.log(share * spread) - 0.5 * float(torch.logdet(form))


@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
def test_volume_of_an_ellipsoid(coordinates):
    torch.manual_seed(2)
    x = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1.0, 0.5, 2.0])
    model = Linear()
    found = local_volume(model, [x], coordinates=coordinates, num_directions=400, share=0.2)
    wanted = ellipsoid(x, model.w.detach(), 0.2)
    if coordinates == "relative":
        wanted -= float(model.w.abs().log().sum())
    assert abs(found.log_volume - wanted) < 3 * found.log_volume_stderr
    assert found.log_volume_stderr < 0.1
    assert found.lower_bound < wanted
    assert found.num_weights == 3
    assert 1 <= found.effective <= 400


def test_volume_error_covers_the_truth_as_often_as_it_says():
    torch.manual_seed(2)
    x = torch.randn(30, 3, dtype=torch.float64)
    model = Linear()
    wanted = ellipsoid(x, model.w.detach(), 0.1)
    found = [
        local_volume(model, [x], coordinates="absolute", num_directions=30, seed=s)
        for s in range(40)
    ]
    hits = sum(abs(f.log_volume - wanted) < 2 * f.log_volume_stderr for f in found)
    assert hits >= 34


def test_volume_refuses_constant_outputs_and_odd_arguments(images):
    model = net(cases.Chain)
    with pytest.raises(ValueError, match="num_directions, share"):
        local_volume(model, images, num_directions=1)
    with pytest.raises(ValueError, match="coordinates: expected"):
        local_volume(model, images, coordinates="log")
    nn.init.zeros_(model.fc.weight)
    with pytest.raises(ValueError, match="outputs that differ"):
        local_volume(model, images)


# ---- invariance -----------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["channel", "layer"])
def test_what_rescaling_moves_and_what_not(per, images):
    model = net(cases.Residual)
    groups = find_groups(model, images[0])
    other = rescale(model, groups, images[0], per=per, seed=1)
    assert len(other.factors) == len(groups)
    labelled = own_predictions(model, images)

    def both(measure):
        return measure(model), measure(other.model)

    for still in (
        lambda m: channel_tpv(m, groups, images).value,
        lambda m: path_norm(m, images[0]).value,
        lambda m: local_volume(m, images, num_directions=2).log_volume,
        lambda m: input_lipschitz(m, images).value,
    ):
        before, after = both(still)
        assert after == pytest.approx(before, rel=1e-5)
    for moving in (
        lambda m: l2_norm(m, images[0]).value,
        lambda m: sharpness(m, labelled).value,
    ):
        before, after = both(moving)
        assert abs(after / before - 1) > 0.05
    before, after = both(lambda m: normalized_loss(m, labelled).below_chance)
    if per == "layer":
        assert after == pytest.approx(before, rel=1e-5)
    else:
        assert abs(after / before - 1) > 0.05

    scores, rescaled_scores = both(lambda m: tpv_scores(m, groups, images, compensated=False))
    weights, rescaled_weights = both(lambda m: magnitude_scores(m, groups, images))
    for group in groups:
        torch.testing.assert_close(rescaled_scores[group.name], scores[group.name], rtol=1e-5,
                                   atol=0)  # fmt: skip
        if per == "channel":  # within a layer magnitude is relative
            assert not torch.allclose(rescaled_weights[group.name], weights[group.name], rtol=0.01)


def test_absolute_volume_shifts_by_the_determinant():
    torch.manual_seed(0)
    x = torch.rand(40, 3, dtype=torch.float64)
    model, other = Linear(), Linear()
    alpha = torch.tensor([2.0, 0.25, 4.0], dtype=torch.float64)
    with torch.no_grad():
        other.w.mul_(alpha)  # on x / alpha the same function
    for coordinates, wanted in (("absolute", float(alpha.log().sum())), ("relative", 0.0)):
        one, two = (
            local_volume(m, [inputs], coordinates=coordinates, num_directions=800)
            for m, inputs in ((model, x), (other, x / alpha))
        )
        error = math.hypot(one.log_volume_stderr, two.log_volume_stderr)
        assert abs(two.log_volume - one.log_volume - wanted) < 3 * error
        assert error < 0.3


# ---- normalized loss ------------------------------------------------------------------------


def test_normalized_loss_is_that_of_layers_of_norm_one(images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3, bias=False)
    ).double()
    labelled = own_predictions(model, images)
    unit = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (unit[0], unit[3]):
            layer.weight.div_(layer.weight.norm())
        x, y = (torch.cat(t) for t in zip(*labelled, strict=True))
        wanted = float(nn.functional.cross_entropy(unit(x), y))
    found = normalized_loss(model, labelled)
    assert found.loss == pytest.approx(wanted)
    assert found.below_chance == pytest.approx(math.log(3) - wanted)
    assert found.error == 0


def test_normalized_loss_keeps_its_digits_in_deep_networks(images):
    model = net(cases.Chain)
    labelled = own_predictions(model, images)
    before = normalized_loss(model, labelled)
    with torch.no_grad():
        model.fc.weight.mul_(2.0**60)
        model.fc.bias.mul_(2.0**60)
    # f grows as the norm does, so nothing changes.
    assert normalized_loss(model, labelled).below_chance == pytest.approx(before.below_chance)
    with torch.no_grad():
        model.bn2.weight[0] = model.bn2.bias[0] = 0
        model.fc.weight[:, 0] *= 2.0**60  # the norm grows, by weights that read nothing
    tiny = normalized_loss(model, labelled)
    assert 0 < tiny.below_chance < 1e-15
    assert tiny.loss == pytest.approx(math.log(3))


def test_normalized_loss_names_a_layer_without_weights(images):
    model = net(cases.Chain)
    nn.init.zeros_(model.bn2.weight)
    with pytest.raises(ValueError, match="only zeros in 'conv2'"):
        normalized_loss(model, own_predictions(model, images))


def test_line_is_that_of_least_squares():
    x = torch.tensor([0.0, 1, 2, 5], dtype=torch.float64)
    y = torch.tensor([1.0, 2, 4, 8], dtype=torch.float64)
    found = fit_line(x, y)
    design = torch.stack([x, torch.ones(4)], 1)
    slope, intercept = torch.linalg.lstsq(design, y[:, None]).solution.flatten().tolist()
    rest = y - slope * x - intercept
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept))
    assert found.r2 == pytest.approx(1 - float(rest.var(unbiased=False) / y.var(unbiased=False)))
    assert found.rmse == pytest.approx(float(rest.square().mean().sqrt()))
    with pytest.raises(ValueError, match="at least three points"):
        fit_line([1, 1, 1], [1, 2, 3])


# ---- trajectory -----------------------------------------------------------------------------


def test_trajectory_adds_up(images):
    model = net(cases.Chain)
    watch = Trajectory(model, images[0])
    places = [torch.cat([p.detach().flatten() for p in model.parameters()])]
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        watch(model)
        places.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    steps = [(b - a).norm() for a, b in itertools.pairwise(places)]
    assert watch.weights.length == pytest.approx(float(sum(steps)))
    assert watch.weights.distance == pytest.approx(float((places[-1] - places[0]).norm()))
    seen = torch.stack(places[1:])
    spread = (seen - seen.mean(0)).square().sum(1).mean()
    assert watch.weights.variance == pytest.approx(float(spread))
    assert watch.weights.num_steps == 5
    # The first layer is followed by a BatchNorm: its bias counts.
    start = net(cases.Chain).bn1.bias
    assert watch.first_bias.distance == pytest.approx(float((model.bn1.bias - start).norm()))


def test_distillation_shows_every_update(images):
    dense, small = net(cases.Chain, seed=1), net(cases.Chain)
    watch = Trajectory(small, images[0])
    student = distill(small, dense, images, epochs=2, watch=watch)
    assert watch.weights.num_steps == 2 * len(images)
    ends = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (small, student)]
    assert watch.weights.distance == pytest.approx(float((ends[1] - ends[0]).norm()))
    assert watch.weights.length >= watch.weights.distance > 0


# ---- nothing is left behind -----------------------------------------------------------------


def test_measures_leave_the_model_as_it_was(images, untouched):
    model = net(cases.Chain).train()
    model.fc.weight.requires_grad_(False)
    groups = find_groups(model, images[0])
    with untouched(model):
        labelled = own_predictions(model, images)
        channel_tpv(model, groups, images)
        l2_norm(model, images[0])
        path_norm(model, images[0])
        sharpness(model, labelled)
        pac_bayes_origin(model, labelled, num_draws=8)
        normalized_loss(model, labelled)
        local_volume(model, images, num_directions=2)
        input_lipschitz(model, images)
        Trajectory(model, images[0])(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, y: sharpness(m, y, num_probes=0), "num_probes: expected at least 1"),
        (lambda m, y: pac_bayes_origin(m, y, more_errors=1.0), "more_errors, num_draws"),
        (lambda m, y: pac_bayes_origin(m, y, more_errors=0.999), "PAC-Bayes: expected noise"),
        (lambda m, y: input_lipschitz(m, [x for x, _ in y], num_iterations=0), "num_iterations"),
    ],
)
def test_odd_arguments_are_refused(call, message, images):
    model = net(cases.Chain)
    with pytest.raises(ValueError, match=message):
        call(model, own_predictions(model, images))
