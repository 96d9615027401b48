import pytest
import torch
from cases import CASES, LinearBehind, batches, build, images
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from tpvprune.diagnostics import tpv
from tpvprune.diagnostics.jacobian_norms import Estimate, jacobian_norms
from tpvprune.groups import find_groups
from tpvprune.passes.outputs import Outputs
from tpvprune.reports.charts import scatter_chart
from tpvprune.scores import sample_gradients as module
from tpvprune.scores.sample_gradients import SampleGradients, sample_gradients


class Odd(nn.Module):
    """What no layer knows: a weight used twice, a standardised one, a position embedding."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 4, 8, 8))
        self.twice = nn.Conv2d(4, 4, 1)
        self.standard = nn.Conv2d(4, 4, 3, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.table = nn.Linear(2, 4)
        self.fc = nn.Linear(4, 3)
        self.register_buffer("grid", torch.randn(6, 2))

    def forward(self, x):
        x = F.relu_(self.conv(x)) + self.position
        x = self.twice(F.gelu(self.twice(x)))
        weight = self.standard.weight - self.standard.weight.mean((1, 2, 3), keepdim=True)
        x = self.norm(F.conv2d(x, weight, self.standard.bias, 2))
        return self.fc(x.mean((2, 3)) * self.table(self.grid).sum(0))


class BatchStatistics(nn.Sequential):
    """A BatchNorm that normalises by what it sees, in eval mode as well."""

    def __init__(self):
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(nn.Conv2d(3, 4, 3), norm, nn.SiLU(), pool, nn.Flatten(), nn.Linear(4, 3))


ALL = {**CASES, "odd": Odd}


def jacobian(model, x):
    """Return {parameter: [B, K, *shape]}."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return jacrev(lambda w: functional_call(model, w, (x,)))(weights)


def gradients(model, inputs, **options):
    """Return [{parameter: [N, *shape]}], probe by probe."""
    found = []

    def collect(name, probe, samples, part):
        while len(found) <= probe:
            found.append({})
        found[probe].setdefault(name, []).append(part.dense())

    assert sum(sample_gradients(model, inputs, collect, **options)) == sum(map(len, inputs))
    return [{name: torch.cat(parts) for name, parts in probe.items()} for probe in found]


@pytest.mark.parametrize("large", [1, 10**9])
@pytest.mark.parametrize("case", ALL)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_are_those_of_the_dense_jacobian(case, large, monkeypatch, untouched):
    monkeypatch.setattr(module, "_LARGE_MAP", large)
    monkeypatch.setattr(module, "_CHUNK", 400)
    model, x = build(ALL[case]), images(7)
    exact = jacobian(model, x)
    signs = torch.randint(0, 2, (7, 2, 3), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    with untouched(model):
        found = gradients(model, [x[:5], x[5:]], num_probes=2, seed=3)
    assert set(found[0]) == set(exact)
    # Probes are drawn sample by sample, so the split into batches does not matter.
    for probe in range(2):
        for name, jac in exact.items():
            truth = torch.einsum("bk,bk...->b...", signs[:, probe].double(), jac)
            assert torch.allclose(found[probe][name], truth, rtol=1e-9, atol=1e-12), name


def test_what_layers_do_not_know_is_found_out():
    model = build(Odd)
    counted = Outputs.measured(model, [images(4)])
    wanted = dict(model.requires_grad_(False).named_parameters())
    known = module._known(model, wanted, images(4), counted)
    unknown = {n for n, _ in model.named_parameters()} - known
    assert unknown == {
        "position", "twice.weight", "twice.bias", "standard.weight", "table.weight", "table.bias"
    }  # fmt: skip


def test_a_norm_without_running_statistics_sees_each_image_alone():
    torch.manual_seed(0)
    model, x = BatchStatistics().eval().double(), images(5)
    parts = [jacobian(model, one) for one in x.split(1)]
    alone = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    signs = torch.randint(0, 2, (5, 1, 3), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    (found,) = gradients(model, [x[:3], x[3:]], seed=3)
    assert set(found) == set(alone)
    for name, jac in alone.items():
        truth = torch.einsum("bk,bk...->b...", signs[:, 0].double(), jac)
        assert torch.allclose(found[name], truth, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("positions", [2, 50])
def test_both_ways_to_the_norm_agree(positions):
    left, right = torch.randn(3, 2, 9, positions), torch.randn(3, 2, positions, 8)
    left, right = left.double(), right.double()
    one = SampleGradients(torch.Size([18, 8]), left, (right,))
    two = SampleGradients(torch.Size([18, 4, 2]), left, (right[..., :4], right[..., 4:]))
    truth = torch.einsum("bgop,bgpi->bgoi", left, right).square().sum((1, 2, 3))
    assert torch.allclose(one.squared_norms(), truth)
    assert torch.allclose(two.squared_norms(), truth)
    assert torch.allclose(two.dense().square().flatten(1).sum(1), truth)


@pytest.mark.parametrize("case", ["chain", "attention", "odd"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_trace_agrees_with_the_dense_jacobian_within_its_error(case):
    model, x = build(ALL[case]), images(24)
    found = jacobian_norms(model, [x], num_probes=4, seed=1)
    exact = {name: j.square().flatten(1).sum(1) for name, j in jacobian(model, x).items()}
    per_sample = torch.stack(list(exact.values()), 1)
    # Samples are the same, so only the probes err: 4 of them on 24 images.
    spread = (found.squares.sum(1) - per_sample.sum(1)).std() / 24**0.5
    assert abs(found.trace().value - per_sample.sum(1).mean()) < 4 * spread
    assert spread < found.trace().stderr
    many = jacobian_norms(model, [x], num_probes=100).squares
    assert torch.allclose(many.mean(0), per_sample.mean(0), rtol=0.1)


def test_trace_weighs_parameters():
    norms = jacobian_norms(build("chain"), batches())
    parts = norms.by_parameter()
    some = norms.trace({"conv1.weight": 2.0, "fc.bias": 0.5})
    assert some.value == pytest.approx(
        2 * parts["conv1.weight"].value + 0.5 * parts["fc.bias"].value
    )
    assert parts["fc.bias"].value == pytest.approx(3)  # df/db is the identity
    assert parts["fc.bias"].stderr == pytest.approx(0, abs=1e-9)


def test_norms_refuse_what_is_not_finite():
    model = build("chain")
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite gradients"):
        jacobian_norms(model, batches())
    with pytest.raises(ValueError, match="num_probes: expected at least 1, found 0"):
        jacobian_norms(model, batches(), num_probes=0)


# ---- perturbations --------------------------------------------------------------------------


def linear_model():
    """Linear in its weights, so that first order is exact."""
    return build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))


def test_trace_and_monte_carlo_agree_where_first_order_is_exact(untouched):
    model, x = linear_model(), batches(16)
    norms = jacobian_norms(model, x, num_probes=50)
    variances = {"1.weight": 0.01, "1.bias": 0.04}
    truth = 0.01 * 3 * torch.cat(x).square().sum((1, 2, 3)).mean().item() + 0.04 * 3
    assert norms.trace(variances).value == pytest.approx(truth, rel=0.05)
    steps = {name: (12 * v) ** 0.5 for name, v in variances.items()}
    with untouched(model):
        for draw in (tpv.gaussian(variances), tpv.uniform(steps)):
            found = tpv.perturbed_variance(model, x, draw, num_draws=200)
            assert abs(found.value - truth) < 4 * found.stderr < 0.2 * truth


def test_quantization_steps_follow_the_ranges():
    model = linear_model()
    with torch.no_grad():
        model[1].weight.uniform_(-1, 1)
        model[1].weight[0, :2] = torch.tensor([-1.0, 2.0])
        model[1].bias.copy_(torch.tensor([0.0, 5.0, 1.0]))
    one = tpv.quantization_steps(model, bits=4)
    own = tpv.quantization_steps(model, bits=4, step_of="tensor")
    assert one == pytest.approx({"1.weight": 6 / 15, "1.bias": 6 / 15})
    assert own == pytest.approx({"1.weight": 3 / 15, "1.bias": 5 / 15})
    rounded = tpv.quantized(model, bits=4, step_of="tensor")
    error = (rounded[1].weight - model[1].weight).detach()
    assert error.abs().max() <= 0.1 + 1e-12
    assert len(rounded[1].weight.unique()) <= 16
    assert error.square().mean() == pytest.approx(0.2**2 / 12, rel=0.15)
    with pytest.raises(ValueError, match="bits: expected 1 to 16, found 0"):
        tpv.quantization_steps(model, bits=0)
    with pytest.raises(ValueError, match="step_of: expected 'model' or 'tensor', found 'row'"):
        tpv.quantization_steps(model, bits=8, step_of="row")


def test_sgd_variance_is_half_the_rate_over_the_batch():
    assert tpv.sgd_variances(linear_model(), lr=0.1, batch_size=5) == pytest.approx(
        {"1.weight": 0.01, "1.bias": 0.01}
    )


def test_label_noise_of_one_step_has_a_closed_form(untouched):
    model, x = build("chain"), images(8)
    jac = torch.cat([j.flatten(2) for j in jacobian(model, x).values()], 2)  # [B, K, p]
    outputs = model(x).detach()
    generator = torch.Generator().manual_seed(4)
    eps = torch.randn(outputs.shape, generator=generator).double() * 0.1 * outputs.abs().mean()
    step = 0.01 * 2 / outputs.numel() * torch.einsum("bkp,bk->p", jac, eps)
    with untouched(model):
        found = tpv.label_noise_variance(
            model, [x], [[x], [x[:3]]], linear=True, num_draws=1, epochs=1, lr=0.01, seed=4
        )
    for estimate, part in zip(found, (jac, jac[:3]), strict=True):
        assert estimate.value == pytest.approx((part @ step).square().sum(1).mean().item())


def test_label_noise_forms_agree_where_the_network_is_linear():
    model, x = linear_model(), batches(16)
    options = {"num_draws": 3, "epochs": 4, "lr": 0.005}
    linear, real = (
        tpv.label_noise_variance(model, x, [x], linear=flag, **options)[0] for flag in (True, False)
    )
    assert linear.value == pytest.approx(real.value, rel=1e-9)
    assert real.stderr > 0
    # A network that fits every target moves by the noise itself.
    free = tpv.label_noise_variance(model, x, [x], num_draws=6, epochs=150, lr=0.01)[0]
    outputs = torch.cat([model(b) for b in x]).detach()
    assert free.value == pytest.approx(3 * (0.1 * outputs.abs().mean().item()) ** 2, rel=0.2)


def test_label_noise_says_that_training_diverged():
    x = batches(8)
    with pytest.raises(ValueError, match="training diverged at 1e"):
        tpv.label_noise_variance(linear_model(), x, [x], num_draws=1, epochs=300, lr=1e9)
    with pytest.raises(ValueError, match="num_draws: expected at least 1, found 0"):
        tpv.label_noise_variance(linear_model(), x, [x], num_draws=0)


def test_a_selection_is_predicted_exactly_where_all_behind_it_is_linear():
    model, x = build(LinearBehind), batches(24)
    groups = find_groups(model, x[0])
    name = next(g.name for g in groups if g.name.startswith("conv1"))
    kept = {name: torch.tensor([True, False, True, False, True])}
    predicted, measured = tpv.selection_variance(model, groups, kept, x, num_probes=300)
    assert predicted.value == pytest.approx(measured, rel=0.03)


def test_rows_compare_training_with_held_out_inputs():
    model = build("chain")
    rows = tpv.stability_rows(
        model, batches(16), batches(16, seed=1), bits=(8,), num_draws=3,
        label_noise={"num_draws": 2, "epochs": 1},
    )  # fmt: skip
    assert [(r["perturbation"], r["form"]) for r in rows] == [
        ("sgd noise", "trace"),
        ("sgd noise", "monte carlo"),
        ("8-bit quantization", "trace"),
        ("8-bit quantization", "monte carlo"),
        ("8-bit quantization", "rounding"),
        ("label noise", "trace"),
        ("label noise", "monte carlo"),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["train"] / row["held_out"])
        assert (row["train_stderr"] is None) == (row["form"] == "rounding")
    same = tpv.stability_rows(model, batches(16), batches(16), bits=(), num_draws=2)
    assert [r["ratio"] for r in same] == [1, 1]


def test_scatter_chart_draws_every_point_and_the_diagonal():
    near, far = (Estimate(1.0, 0.1), Estimate(1.1, 0.1)), (Estimate(90, 9), Estimate(80, 5))
    points = [("a<b", *near), ("c", *far)]
    chart = scatter_chart(points, "training set", "held-out set")
    assert chart.startswith("<svg")
    assert chart.count("<circle") == 2
    assert "a&lt;b" in chart
    assert "a<b" not in chart
    assert "training set" in chart
    assert "held-out set" in chart
    with pytest.raises(ValueError, match="expected a point with two positive values"):
        scatter_chart([("zero", Estimate(0, 0), Estimate(1, 0))], "a", "b")
