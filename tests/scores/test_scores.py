"""The score against torch.func and brute force, and the laws that it must obey."""

import copy
import gc

import pytest
import torch
from cases import (
    CASES,
    NUM_CLASSES,
    InPlace,
    batches,
    build,
    duplicate_channel,
    images,
    kill_channel,
)
from oracles import all_signs, output_changes, removal_variance, unpredictable
from torch import nn

import tpvprune.scores.taps
from tpvprune import find_groups, tpv_scores
from tpvprune.scores.baselines.weights import magnitude_scores
from tpvprune.scores.curves import variance_curves

EXACT = {"rtol": 1e-10, "atol": 1e-13}  # float64, the same sums in another order


def found(model):
    return find_groups(model, images(2))


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **{**EXACT, **tolerance})


@pytest.fixture
def every_direction(monkeypatch):
    """Let the scorer average over all sign vectors: E_v (v^T u)^2 = |u|^2, exactly."""

    def directions(outputs, metric, num_probes, generator):
        return [v.expand(len(outputs), -1).to(outputs) for v in all_signs(outputs.shape[1])]

    monkeypatch.setattr(tpvprune.scores.taps, "probe_directions", directions)


# ---- oracles --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_jacobian_contraction(case, every_direction):
    model = build(case)
    groups = found(model)
    scores = tpv_scores(model, groups, batches(), compensated=False)
    for group in groups:
        u = output_changes(model, group, images(24))
        torch.testing.assert_close(scores[group.name], u.square().sum(1).mean(0), **EXACT)


@pytest.mark.parametrize("case", ["residual", "concat", "flatten", "attention"])
def test_compensated_scores_equal_jacobian_contraction_of_residuals(case, every_direction):
    model, ridge = build(case), 1e-3
    groups = found(model)
    scores = tpv_scores(model, groups, batches(32, 20), ridge=ridge)
    x = images(32)
    for group in groups:
        for c in range(group.num_channels):
            replace = unpredictable(model, group, x, [c], ridge=ridge)
            u = output_changes(model, group, x, replace)[:, :, c]
            torch.testing.assert_close(
                # The Gram matrix squares the condition number of the design.
                scores[group.name][c],
                u.square().sum(1).mean(),
                rtol=1e-8,
                atol=1e-13,
            )


def test_scores_with_one_probe_equal_contraction_with_that_probe(monkeypatch):
    model = build("residual")
    groups, drawn = found(model), []
    original = tpvprune.scores.taps.probe_directions

    def record(*args):
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(tpvprune.scores.taps, "probe_directions", record)
    scores = tpv_scores(model, groups, batches(), compensated=False, num_probes=2, seed=3)
    v = torch.cat([torch.stack(d, 1) for d in drawn])  # [B, probes, K]
    assert v.shape == (24, 2, NUM_CLASSES)
    assert set(v.unique().tolist()) == {-1, 1}
    for group in groups:
        u = v @ output_changes(model, group, images(24))
        torch.testing.assert_close(scores[group.name], u.square().mean((0, 1)), **EXACT)


def test_pseudo_scores_equal_contraction_with_the_predicted_class():
    model = build("gate")
    groups, x = found(model), images(24)
    scores = tpv_scores(model, groups, batches(), compensated=False, metric="pseudo")
    p = model(x).softmax(1)
    v = p - nn.functional.one_hot(p.argmax(1), NUM_CLASSES)
    for group in groups:
        u = torch.einsum("bk,bkc->bc", v, output_changes(model, group, x))
        torch.testing.assert_close(scores[group.name], u.square().mean(0), **EXACT)


def test_fisher_scores_converge_to_the_fisher_metric():
    model = build("chain")
    groups, x = found(model), images(24)
    scores = tpv_scores(model, groups, [x], compensated=False, metric="fisher", num_probes=256)
    p = model(x).softmax(1)
    fisher = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)  # E_y (p - e_y)(p - e_y)^T
    for group in groups:
        u = output_changes(model, group, x)
        expected = torch.einsum("bkc,bkl,blc->bc", u, fisher, u).mean(0)
        # 24 * 256 draws of a weighted square: a few per cent.
        torch.testing.assert_close(scores[group.name], expected, rtol=0.1, atol=1e-12)


def test_probe_estimate_converges():
    model = build("residual")
    groups, x = found(model), images(24)
    scores = tpv_scores(model, groups, [x], compensated=False, num_probes=128)
    for group in groups:
        expected = output_changes(model, group, x).square().sum(1).mean(0)
        torch.testing.assert_close(scores[group.name], expected, rtol=0.1, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "name"), [("linear_behind", "conv1"), ("no_norm", "conv2"), ("flatten", "fc1")]
)
def test_scores_equal_removal_where_the_rest_is_linear(case, name, every_direction):
    model = build(case)
    groups = found(model)
    scores = tpv_scores(model, groups, batches(), compensated=False)
    expected = removal_variance(model, groups[name], images(24))
    torch.testing.assert_close(scores[name], expected, **EXACT)


# ---- laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["logits", "pseudo", "fisher"])
@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("compensated", [False, True])
def test_scores_do_not_depend_on_batch_split(metric, num_probes, compensated):
    model = build("residual")
    groups = found(model)
    once, split = (
        tpv_scores(
            model, groups, parts, metric=metric, num_probes=num_probes, compensated=compensated
        )
        for parts in ([images(24)], images(24).split([1, 7, 3, 13]))
    )
    assert_same(once, split, rtol=1e-9)
    assert_same(once.stderr, split.stderr, rtol=1e-7)
    assert once.num_samples == split.num_samples == 24


def test_scores_do_not_depend_on_batch_split_where_positions_are_sampled():
    model, x = build("chain"), images(24)
    x = nn.functional.interpolate(x, size=12)  # 144 positions, of which 64 make the stand-in maps
    once, split = (tpv_scores(model, found(model), parts) for parts in ([x], x.split([5, 19])))
    assert_same(once, split, rtol=1e-9)


def test_scores_permute_with_the_channels():
    model = build("chain")
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in permuted.state_dict().items():
            if name.startswith(("conv1.", "bn1.")) and tensor.ndim:
                tensor.copy_(tensor[order])
        permuted.conv2.weight.copy_(model.conv2.weight[:, order])
    a, b = (tpv_scores(m, found(m), batches()) for m in (model, permuted))
    torch.testing.assert_close(a["conv1"][order], b["conv1"], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(a["conv2"], b["conv2"], rtol=1e-9, atol=1e-13)


def rescaled(model, factors):
    """Scale the channels behind conv1 and undo it in conv2: the function stays (ReLU)."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.conv1.weight.mul_(factors.reshape(-1, 1, 1, 1))
        model.conv1.bias.mul_(factors)
        model.conv2.weight.div_(factors.reshape(1, -1, 1, 1))
    return model


def test_scores_survive_rescaling_that_keeps_the_function():
    model = build("no_norm")
    other = rescaled(model, torch.tensor([0.1, 1, 3, 10, 0.5], dtype=torch.float64))
    torch.testing.assert_close(model(images()), other(images()))
    a, b = (tpv_scores(m, found(m), batches(), compensated=False) for m in (model, other))
    assert_same(a, b)


def test_compensated_scores_survive_one_factor_for_all_channels():
    model = build("no_norm")
    other = rescaled(model, torch.full((5,), 7.0, dtype=torch.float64))
    a, b = (tpv_scores(m, found(m), batches()) for m in (model, other))
    assert_same(a, b, rtol=1e-8)


def test_magnitude_does_not_survive_rescaling():
    model = build("no_norm")
    other = rescaled(model, torch.tensor([0.1, 1, 3, 10, 0.5], dtype=torch.float64))
    a, b = (magnitude_scores(m, found(m), batches())["conv1"] for m in (model, other))
    assert (a.argsort() != b.argsort()).any()


@pytest.mark.parametrize("compensated", [False, True])
def test_dead_channel_scores_zero(compensated):
    model = kill_channel(build("chain"), 2)
    scores = tpv_scores(model, found(model), batches(), compensated=compensated)
    assert scores["conv1"][2] < 1e-25
    assert (scores["conv1"] > 1e-12).sum() == 4


def test_duplicated_data_scores_the_same():
    model = build("residual")
    once = tpv_scores(model, found(model), batches(), metric="pseudo")
    twice = tpv_scores(model, found(model), batches() * 2, metric="pseudo")
    assert_same(once, twice, rtol=1e-9)
    assert twice.num_samples == 48


def test_duplicated_channel_scores_nothing_once_compensated():
    model = duplicate_channel(build("chain"), 0, 1)
    groups = found(model)
    plain = tpv_scores(model, groups, batches(), compensated=False)["conv1"]
    compensated = tpv_scores(model, groups, batches(), ridge=1e-7)["conv1"]
    assert (compensated[:2] < 1e-10 * plain[:2]).all()
    assert (compensated[2:] > 1e-4 * plain[2:]).all()


def test_overwritten_activations_score_as_if_they_were_not():
    scores = [
        tpv_scores(m, found(m), batches(), compensated=compensated)
        for compensated in (False, True)
        for m in (build(InPlace, inplace=True), build(InPlace, inplace=False))
    ]
    assert_same(scores[0], scores[1])
    assert_same(scores[2], scores[3])


def test_standard_error_is_that_of_the_mean_over_samples():
    model = build("chain")
    groups = found(model)
    scores = tpv_scores(model, groups, batches(), metric="pseudo", compensated=False)
    singles = [
        tpv_scores(model, groups, [x[None]], metric="pseudo", compensated=False) for x in images(24)
    ]
    for name in scores:
        per_sample = torch.stack([s[name] for s in singles])
        torch.testing.assert_close(scores[name], per_sample.mean(0), **EXACT)
        torch.testing.assert_close(
            scores.stderr[name], per_sample.std(0) / 24**0.5, rtol=1e-7, atol=1e-13
        )


@pytest.mark.parametrize("measure", [tpv_scores, variance_curves])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.long
def test_leaves_no_activation_to_the_garbage_collector(case, measure):
    model = build(case)
    groups = found(model)
    measure(model, groups, batches(4))  # what torch and the groups keep for the next time

    def held():
        return {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}

    gc.collect()
    gc.disable()
    try:
        before = held()
        measure(model, groups, batches(4))
        left = len(held() - before)
    finally:
        gc.enable()
    assert left == 0


def test_seed_decides_the_directions():
    model = build("chain")
    groups = found(model)
    a, b, c = (tpv_scores(model, groups, batches(), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


def test_inputs_that_require_gradients_change_nothing():
    model = build("linear_behind")
    groups = found(model)
    a = tpv_scores(model, groups, [images(8)])
    x = images(8).requires_grad_()
    b = tpv_scores(model, groups, [x])
    assert_same(a, b)
    assert x.grad is None


@pytest.mark.parametrize("mode", ["train", "frozen", "no_grad"])
def test_scores_do_not_depend_on_the_state_of_the_model(mode):
    model = build("residual")
    groups = found(model)
    expected = tpv_scores(model, groups, batches())
    model.train(mode == "train")
    model.requires_grad_(mode != "frozen")
    with torch.set_grad_enabled(mode != "no_grad"):
        scores = tpv_scores(model, groups, batches())
    assert_same(expected, scores)


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_probes": 0}, "num_probes"),
        ({"until": 0.0}, "until: expected"),
        ({"amp": torch.float16}, "amp: expected torch.bfloat16"),
        ({"metric": "loss"}, "metric: expected logits"),
    ],
)
def test_scores_reject_bad_arguments(arguments, message):
    model = build("chain")
    with pytest.raises(ValueError, match=message):
        tpv_scores(model, found(model), batches(), **arguments)


def test_scores_reject_weights_that_are_not_finite():
    model = build("chain")
    groups = found(model)
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite activations, found NaN in layer 'fc'"):
        tpv_scores(model, groups, batches())


# ---- as many samples as it takes ------------------------------------------------------------


def test_stops_once_half_of_the_channels_are_known_well_enough():
    model = build("residual")
    groups = found(model)
    many = images(640).split(16)
    seen = []

    def stream():
        for number, batch in enumerate(many):
            seen.append(number)
            yield batch

    class Again:
        def __iter__(self):
            return stream()

    scores = tpv_scores(model, groups, Again(), compensated=False, until=0.2)
    num = scores.num_samples
    assert 64 <= num < 640
    assert len(seen) == num // 16  # the rest was not even read
    assert_same(scores, tpv_scores(model, groups, many[: num // 16], compensated=False))

    def uncertainty(n):
        some = tpv_scores(model, groups, many[:n], compensated=False)
        return torch.cat([some.stderr[g] / some[g] for g in some]).median()

    assert uncertainty(num // 16) <= 0.2
    assert num == 64 or uncertainty(num // 16 - 1) > 0.2


def test_sees_everything_if_that_is_not_enough():
    model = build("chain")
    scores = tpv_scores(model, found(model), images(96).split(32), until=1e-9)
    assert scores.num_samples == 96


# ---- mixed precision ------------------------------------------------------------------------


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("case", ["residual", "attention"])
def test_mixed_precision_gives_nearly_the_same_scores(case, compensated):
    model = build(case).float()
    data = [x.float() for x in images(64).split(16)]
    groups = find_groups(model, data[0])
    options = {"compensated": compensated, "num_probes": 4}
    exact = tpv_scores(model, groups, data, **options)
    mixed = tpv_scores(model, groups, data, amp=torch.bfloat16, **options)
    a, b = (torch.cat(list(s.values())) for s in (exact, mixed))
    assert not torch.equal(a, b)
    assert ((a - b).abs() / a).median() < 0.02
    assert all(t.dtype == torch.float32 for t in model.parameters())
