"""Baseline criteria against formulas written out by hand."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from tpvprune import find_groups
from tpvprune.groups import ChannelGroup, ParamSlice, Reader
from tpvprune.scores.baselines.activations import activation_variance_scores
from tpvprune.scores.baselines.filters import fpgm_scores, whc_scores
from tpvprune.scores.baselines.hessian import hessian_scores, lfh_scores
from tpvprune.scores.baselines.jacobian import jacobian_scores, jbr_scores
from tpvprune.scores.baselines.taylor import taylor_scores
from tpvprune.scores.baselines.weights import (
    bn_scale_scores,
    lamp_scores,
    magnitude_scores,
    random_scores,
)
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS
from tpvprune.scores.criterion_names import NAMES

C = 5  # channels of the one group of Net


class Net(nn.Module):
    """Conv-BN-ReLU, then a 1x1 convolution and a flattened linear layer read it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, C, 3, padding=1)
        self.bn = nn.BatchNorm2d(C)
        self.mix = nn.Conv2d(C, 2, 1)
        self.fc = nn.Linear(2 * 4 + C * 4, 4)

    def forward(self, x):
        a = F.relu(self.bn(self.conv(x)))
        pooled = F.adaptive_avg_pool2d(a, 2)
        return self.fc(torch.cat([self.mix(pooled).flatten(1), pooled.flatten(1)], 1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        model.bn.weight.normal_()
        model.bn.bias.normal_()
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        model.fc.weight.mul_(25)  # confident predictions for jbr
    return model.eval()


@pytest.fixture
def groups():
    channels = torch.arange(C)
    flat = channels.repeat_interleave(4)
    wide = torch.arange(C * 4) + 8

    def part(param, dim, index=channels, channel=channels, side="producer"):
        return ParamSlice(param, dim, index, channel, side)

    slices = [part(f"conv.{leaf}", 0) for leaf in ("weight", "bias")]
    slices += [part(f"bn.{leaf}", 0) for leaf in ("weight", "bias", "running_mean")]
    slices.append(part("mix.weight", 1, side="consumer"))
    slices.append(part("fc.weight", 1, wide, flat, side="consumer"))
    readers = (
        Reader(1, "mix", 1, channels, channels),
        Reader(2, "fc", -1, wide, flat),
    )
    return [ChannelGroup("conv", C, tuple(slices), readers, "channel", None)]


@pytest.fixture
def labelled():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64) * 2,
            torch.randint(4, (8,), generator=generator),
        )
        for _ in range(3)
    ]


@pytest.fixture
def images(labelled):
    return [x for x, _ in labelled]


def loss_gradients(model, x, y):
    model = copy.deepcopy(model)
    F.cross_entropy(model(x), y).backward()
    return {name: (p.detach(), p.grad) for name, p in model.named_parameters()}


def flat_columns(weight):
    """Return fc's columns of channel c as [4 outputs, C, 4 positions]."""
    return weight[:, 8:].reshape(4, C, 4)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_sums_weights_of_both_sides_without_biases(net, groups, p):
    want = [
        net.conv.weight[c].abs().pow(p).sum()
        + net.bn.weight[c].abs() ** p
        + net.mix.weight[:, c].abs().pow(p).sum()
        + flat_columns(net.fc.weight)[:, c].abs().pow(p).sum()
        for c in range(C)
    ]
    got = magnitude_scores(net, groups, p=p)
    torch.testing.assert_close(got["conv"], torch.stack(want).detach())
    assert got.criterion == ("magnitude" if p == 2 else "magnitude_l1")
    assert not got.used_labels


def test_magnitude_refuses_other_powers(net, groups):
    with pytest.raises(ValueError, match="p must be 1 or 2, found 3"):
        magnitude_scores(net, groups, p=3)


def test_bn_scale_is_the_absolute_scale(net, groups):
    got = bn_scale_scores(net, groups)["conv"]
    torch.testing.assert_close(got, net.bn.weight.detach().abs())


def test_bn_scale_names_the_group_without_batchnorm(groups):
    net = Net()
    net.bn = nn.Identity()
    group = groups[0]
    slices = tuple(s for s in group.slices if not s.param.startswith("bn"))
    bare = ChannelGroup("conv", C, slices, group.readers, "channel", None)
    with pytest.raises(ValueError, match="'conv' has none"):
        bn_scale_scores(net, [bare])


def test_fpgm_sums_distances_between_filters(net, groups):
    w = net.conv.weight.detach()
    want = [sum((w[c] - w[j]).norm() for j in range(C)) for c in range(C)]
    torch.testing.assert_close(fpgm_scores(net, groups)["conv"], torch.stack(want))


def test_fpgm_is_zero_for_equal_filters(net, groups):
    net.conv.weight.data[:] = net.conv.weight.data[:1]
    assert (fpgm_scores(net, groups)["conv"] == 0).all()


def test_fpgm_joins_the_positions_of_a_head():
    linear = nn.Linear(2, 6, bias=False).double()
    channel = torch.tensor([0, 1, 0, 1, 0, 1])  # three positions each, interleaved
    part = ParamSlice("weight", 0, torch.arange(6), channel, "producer")
    group = ChannelGroup("", 2, (part,), (), "head", None)
    w = linear.weight.detach()
    want = (w[0::2] - w[1::2]).norm().expand(2)
    torch.testing.assert_close(fpgm_scores(linear, [group])[""], want)


def test_whc_weighs_the_angles_between_filters_by_their_norms(net, groups):
    w = net.conv.weight.detach().flatten(1)
    want = torch.zeros(C, dtype=torch.float64)
    for c in range(C):
        for j in range(C):
            if j != c:
                cosine = F.cosine_similarity(w[c], w[j], dim=0)
                want[c] += w[c].norm() * w[j].norm() * (1 - cosine.abs())
    torch.testing.assert_close(whc_scores(net, groups)["conv"], want)


def test_whc_is_zero_for_parallel_and_for_empty_filters(net, groups):
    w = net.conv.weight.data
    w[:] = w[:1] * torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0], dtype=w.dtype)[:, None, None, None]
    got = whc_scores(net, groups)["conv"]
    torch.testing.assert_close(got, torch.zeros_like(got))


def test_lamp_is_the_share_of_what_would_be_left(net, groups):
    size = magnitude_scores(net, groups)["conv"]
    want = torch.stack([s / size[size >= s].sum() for s in size])
    got = lamp_scores(net, groups)["conv"]
    torch.testing.assert_close(got, want)
    assert got.max() == 1


def test_lamp_of_a_group_without_weights_is_zero(net, groups):
    for layer in (net.conv, net.bn, net.mix, net.fc):
        layer.weight.data.zero_()
    assert (lamp_scores(net, groups)["conv"] == 0).all()


def test_random_scores_follow_the_seed(net, groups):
    first, again, other = (random_scores(net, groups, seed=s)["conv"] for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_activation_variance_is_the_variance_of_what_is_read(net, groups, images):
    x = torch.cat(images)
    pooled = F.adaptive_avg_pool2d(F.relu(net.bn(net.conv(x))), 2).detach()
    by_conv = pooled.movedim(1, 0).flatten(1).var(1, correction=0)
    by_linear = pooled.flatten(2).var(0, correction=0).sum(1)
    got = activation_variance_scores(net, groups, images)
    torch.testing.assert_close(got["conv"], by_conv + by_linear)
    assert got.num_samples == len(x)


def test_activation_variance_does_not_depend_on_the_split(net, groups, images):
    a = activation_variance_scores(net, groups, images)["conv"]
    b = activation_variance_scores(net, groups, torch.cat(images).split(5))["conv"]
    torch.testing.assert_close(a, b)


def test_fixed_taylor_is_the_gradient_by_a_gate(net, groups, labelled):
    x, y = (torch.cat(t) for t in zip(*labelled, strict=True))
    gate = torch.ones(C, dtype=torch.float64, requires_grad=True)
    pooled = F.adaptive_avg_pool2d(F.relu(net.bn(net.conv(x))), 2)
    pooled = pooled * gate[None, :, None, None]
    logits = net.fc(torch.cat([net.mix(pooled).flatten(1), pooled.flatten(1)], 1))
    (want,) = torch.autograd.grad(F.cross_entropy(logits, y), gate)
    got = taylor_scores(net, groups, labelled)
    torch.testing.assert_close(got["conv"], want.abs())
    assert got.used_labels
    assert got.num_samples == 24


def chain(bias=True):
    """Return a model for torch-pruning and its group of C channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, C, 3, bias=bias), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 4, 3),
        nn.Flatten(), nn.Linear(16, 4),
    ).double()  # fmt: skip
    nn.init.normal_(model[1].weight)
    channels = torch.arange(C)
    slices = [
        ParamSlice(name, dim, channels, channels, side)
        for name, dim, side in [
            ("0.weight", 0, "producer"),
            ("0.bias", 0, "producer"),
            ("1.weight", 0, "producer"),
            ("1.bias", 0, "producer"),
            ("3.weight", 1, "consumer"),
        ]
        if bias or name != "0.bias"
    ]
    return model.eval(), [ChannelGroup("0", C, tuple(slices), (), "channel", None)]


def by_torch_pruning(model, importance):
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 3, 6, 6).double())
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=list(range(C)))
    return importance(group).double()


SUMMED = {"group_reduction": "sum", "normalizer": None}
# torch-pruning sums in float32 whatever the model's type.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-8}


def test_stock_taylor_equals_torch_pruning(labelled):
    model, groups = chain()
    got = taylor_scores(model, groups, labelled, variant="torch_pruning")["0"]
    for x, y in labelled:
        F.cross_entropy(model(x), y).backward()
    want = by_torch_pruning(model, tp.importance.GroupTaylorImportance(**SUMMED))
    torch.testing.assert_close(got, want, **FLOAT32)


def test_lamp_equals_torch_pruning():
    model, groups = chain()
    want = by_torch_pruning(model, tp.importance.LAMPImportance())
    torch.testing.assert_close(lamp_scores(model, groups)["0"], want, **FLOAT32)


def test_stock_hessian_equals_torch_pruning_and_its_last_image(labelled):
    model, groups = chain()
    got = hessian_scores(model, groups, labelled, variant="torch_pruning")["0"]
    importance = tp.importance.GroupHessianImportance(**SUMMED)
    for x, y in labelled:
        for loss in F.cross_entropy(model(x), y, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
    torch.testing.assert_close(got, by_torch_pruning(model, importance), **FLOAT32)
    x, y = labelled[-1]
    alone = hessian_scores(model, groups, [(x[-1:], y[-1:])], variant="torch_pruning")["0"]
    torch.testing.assert_close(got, alone)


def test_stock_obdc_equals_torch_pruning(labelled):
    model, groups = chain(bias=False)
    got = hessian_scores(model, groups, labelled, variant="obdc_torch_pruning")["0"]
    importance = tp.importance.OBDCImportance(**SUMMED)
    for layer in (model[0], model[3]):  # its own set-up takes attention only, and fails here
        layer.register_forward_pre_hook(importance._save_input)
        layer.register_full_backward_hook(importance._save_grad_output)
        importance.modules.append(layer)
    for x, y in labelled:
        F.cross_entropy(model(x.requires_grad_()), y).backward()
        importance.step()
    torch.testing.assert_close(got, by_torch_pruning(model, importance), **FLOAT32)


def per_sample_gradients(model, labelled):
    for x, y in labelled:
        for i in range(len(x)):
            yield loss_gradients(model, x[i : i + 1], y[i : i + 1])


def test_fixed_hessian_is_the_fisher_weighted_size_of_the_group(net, groups, labelled):
    want = torch.zeros(C, dtype=torch.float64)
    for gradients in per_sample_gradients(net, labelled):
        squares = {k: (w * g).square() for k, (w, g) in gradients.items()}
        for c in range(C):
            want[c] += squares["conv.weight"][c].sum()
            want[c] += squares["bn.weight"][c]
            want[c] += squares["mix.weight"][:, c].sum()
            want[c] += flat_columns(squares["fc.weight"])[:, c].sum()
    got = hessian_scores(net, groups, labelled)
    torch.testing.assert_close(got["conv"], want / 24)
    assert got.num_samples == 24


def test_fixed_hessian_is_torch_prunings_with_a_working_sum(labelled):
    model, groups = chain()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for gradients in per_sample_gradients(model, labelled):
        for name, parameter in model.named_parameters():
            parameter.grad += gradients[name][1].square() / 24
    want = by_torch_pruning(model, tp.importance.GroupHessianImportance(**SUMMED))
    torch.testing.assert_close(hessian_scores(model, groups, labelled)["0"], want, **FLOAT32)


def test_fixed_hessian_does_not_depend_on_the_split(net, groups, labelled):
    x, y = (torch.cat(t) for t in zip(*labelled, strict=True))
    other = list(zip(x.split(7), y.split(7), strict=True))
    a, b = (hessian_scores(net, groups, batches)["conv"] for batches in (labelled, other))
    torch.testing.assert_close(a, b)


def filter_traces(model, images):
    """Return E_x ‖∂f/∂w_c‖² of conv's filters from the whole Jacobian, [C]."""
    params = {k: p.detach() for k, p in model.named_parameters()}

    def outputs(weight, x):
        return torch.func.functional_call(model, params | {"conv.weight": weight}, (x[None],))[0]

    samples = torch.cat(images)
    jacobians = [torch.func.jacrev(outputs)(params["conv.weight"], x) for x in samples]
    return torch.stack(jacobians).square().sum((1, 3, 4, 5)).mean(0)


def test_lfh_is_the_trace_times_the_mean_squared_weight(net, groups, images):
    # One output: every probe is +1 or -1 and its square is exact.
    net.fc = nn.Linear(2 * 4 + C * 4, 1).double()
    w = net.conv.weight.detach().flatten(1)
    want = filter_traces(net, images) * w.square().sum(1) / w.shape[1]
    got = lfh_scores(net, groups, images)
    torch.testing.assert_close(got["conv"], want)
    assert not got.used_labels


def test_lfh_converges_to_the_trace_over_all_outputs(net, groups, images):
    few = [images[0][:2]]
    w = net.conv.weight.detach().flatten(1)
    want = filter_traces(net, few) * w.square().mean(1)
    got = lfh_scores(net, groups, few, num_probes=400, seed=1)["conv"]
    # (vᵀa)² of random signs has a standard deviation below √2 of its mean: 0.05 over 800 draws.
    torch.testing.assert_close(got, want, rtol=0.2, atol=0)
    assert not torch.equal(got, lfh_scores(net, groups, few, num_probes=400, seed=2)["conv"])


def test_lfh_does_not_depend_on_the_split(net, groups, images):
    a = lfh_scores(net, groups, images)["conv"]
    b = lfh_scores(net, groups, torch.cat(images).split(5))["conv"]
    torch.testing.assert_close(a, b)


def test_lfh_needs_a_probe(net, groups, images):
    with pytest.raises(ValueError, match="num_probes: expected at least 1, found 0"):
        lfh_scores(net, groups, images, num_probes=0)


@pytest.mark.parametrize("score", [taylor_scores, hessian_scores, jacobian_scores])
def test_criteria_with_labels_ask_for_them(net, groups, images, score):
    with pytest.raises(ValueError, match="needs labelled batches"):
        score(net, groups, images)
    with pytest.raises(ValueError, match="found none"):
        score(net, groups, [])


def confident_batches(model, images, size, confidence=0.9):
    x = torch.cat(images)
    with torch.no_grad():
        top = model(x).softmax(1).max(1)
    sure = top.values > confidence
    return list(zip(x[sure].split(size), top.indices[sure].split(size), strict=True))


def squared_changes(model, batches):
    """Return the formula of the Jacobian criteria, written out."""
    total = torch.zeros(C, dtype=torch.float64)
    for x, y in batches:
        wg = {k: w * g for k, (w, g) in loss_gradients(model, x, y).items()}
        for c in range(C):
            total[c] += (wg["conv.weight"][c].sum() + wg["conv.bias"][c]) ** 2
            total[c] += (wg["bn.weight"][c] + wg["bn.bias"][c]) ** 2
            total[c] += wg["mix.weight"][:, c].sum() ** 2
            total[c] += flat_columns(wg["fc.weight"])[:, c].sum(0).square().sum()
    return total


def test_jacobian_is_the_formula_of_the_authors_code(net, groups, labelled):
    got = jacobian_scores(net, groups, labelled)
    torch.testing.assert_close(got["conv"], squared_changes(net, labelled))
    assert got.num_samples == 24


def test_jacobian_with_predictions_for_labels_is_jbr(net, groups, images):
    predicted = [(x, net(x).argmax(1)) for x in images]
    want = jbr_scores(net, groups, images, confidence=0)["conv"]
    torch.testing.assert_close(jacobian_scores(net, groups, predicted)["conv"], want)


def test_jbr_is_the_formula_of_the_reference_code(net, groups, images):
    batches = confident_batches(net, images, 8)
    assert len(batches) >= 2
    got = jbr_scores(net, groups, images)
    torch.testing.assert_close(got["conv"], squared_changes(net, batches))
    assert got.num_samples == sum(len(x) for x, _ in batches)
    assert not got.used_labels


def test_jbr_takes_pseudo_labels_from_the_dense_model(net, groups, images):
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.fc.weight.copy_(other.fc.weight.flip(0))
    mine = jbr_scores(net, groups, images)["conv"]
    theirs = jbr_scores(net, groups, images, dense=other)["conv"]
    assert not torch.allclose(mine, theirs)


def test_jbr_needs_a_confident_image(net, groups, images):
    with pytest.raises(ValueError, match="confidence > 1"):
        jbr_scores(net, groups, images, confidence=1)


def test_gradient_criteria_refuse_a_model_without_class_scores(groups, labelled):
    class Features(Net):
        def forward(self, x):
            return self.conv(x)

    with pytest.raises(ValueError, match="class scores"):
        taylor_scores(Features().double(), groups, labelled)


def rescaled(model, factor):
    """Scale channel 0's filter by the factor and its readers by the inverse."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.bn.weight[0] *= factor
        model.bn.bias[0] *= factor
        model.mix.weight[:, 0] /= factor
        model.fc.weight[:, 8:12] /= factor
    return model


def test_rescaling_changes_magnitude_but_not_the_gradient_criteria(net, groups, labelled, images):
    scaled = rescaled(net, 3.0)
    torch.testing.assert_close(scaled(images[0]), net(images[0]))
    for score in (magnitude_scores, bn_scale_scores):
        before, after = score(net, groups)["conv"], score(scaled, groups)["conv"]
        assert not torch.isclose(before[0], after[0], rtol=1e-2)
        assert torch.equal(before[1:], after[1:])
    for score, batches in (
        (taylor_scores, labelled),
        (hessian_scores, labelled),
        (jacobian_scores, labelled),
        (jbr_scores, images),
    ):
        before = score(net, groups, batches)["conv"]
        torch.testing.assert_close(score(scaled, groups, batches)["conv"], before)


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )


def assert_unchanged(before, after):
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]), key
    assert before[1] == after[1]
    assert before[2] == after[2]
    for mine, theirs in zip(before[3], after[3], strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    assert before[4] == after[4]
    assert torch.equal(before[5], after[5])
    assert before[6] == after[6]


BASELINES = sorted(SCORERS.keys() - {"tpv"})


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_leave_the_model_as_it_was(net, groups, labelled, images, name):
    net.train()
    net.bn.eval()
    net.conv.weight.requires_grad_(False)
    net.fc.bias.grad = torch.ones(4, dtype=torch.float64)
    before = snapshot(net)
    SCORERS[name](net, groups, labelled if name in NEEDS_LABELS else images, seed=0)
    assert_unchanged(before, snapshot(net))


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_take_frozen_parameters_and_any_grad_mode(net, groups, labelled, images, name):
    batches = labelled if name in NEEDS_LABELS else images
    want = SCORERS[name](net, groups, batches, seed=0)["conv"]
    net.requires_grad_(False)
    with torch.inference_mode():
        got = SCORERS[name](net, groups, batches, seed=0)["conv"]
    assert torch.equal(got, want)
    assert got.shape == (C,)
    assert got.dtype == torch.float64


@pytest.mark.parametrize(
    "name", ["activation_variance", "jbr", "lfh", "taylor", "hessian", "jacobian"]
)
def test_baselines_leave_the_model_as_it_was_after_an_exception(net, groups, labelled, name):
    class Breaks(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken layer")

    net.train()
    net.mix = Breaks()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="broken layer"):
        SCORERS[name](net, groups, labelled)
    assert_unchanged(before, snapshot(net))


def test_label_free_criteria_drop_labels_unread(net, groups, labelled, images):
    for name in ("activation_variance", "jbr", "lfh"):
        poisoned = [(x, object()) for x in images]
        got = SCORERS[name](net, groups, poisoned)
        assert torch.equal(got["conv"], SCORERS[name](net, groups, images)["conv"])
        assert not got.used_labels


def test_only_the_labelled_criteria_say_that_they_used_labels(net, groups, labelled):
    for name in BASELINES:
        scores = SCORERS[name](net, groups, labelled)
        assert scores.used_labels == (name in NEEDS_LABELS)
        assert scores.criterion == name


def test_names_are_those_of_the_scorers():
    assert tuple(SCORERS) == NAMES
    assert set(NAMES) > NEEDS_LABELS


@pytest.mark.parametrize("criterion", sorted(set(SCORERS) - {"jbr"}))  # it needs confidence
def test_where_nothing_can_go_there_are_no_scores(criterion):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    groups = find_groups(model, x[:2], ignore=["conv", "mix"])
    labelled = [(x, torch.zeros(4, dtype=torch.long))]
    scores = SCORERS[criterion](model, groups, labelled if criterion in NEEDS_LABELS else [x])
    assert not len(groups) and not len(scores)
