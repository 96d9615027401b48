"""Recalibrated statistics are those of the concatenated activations."""

import copy

import pytest
import torch
from cases import CASES, batches, build, images
from torch import nn
from torch.nn import functional as F

from tpvprune import recalibrate_batchnorm
from tpvprune.repairs.batchnorm import rebase_batchnorm

NORMED = ["chain", "residual", "depthwise"]


def is_statistic(name):
    return name.endswith(("running_mean", "running_var"))


def test_statistics_are_those_of_the_concatenated_activations():
    model = build("chain")
    recalibrated = recalibrate_batchnorm(model, batches(30, 8))  # 8, 8, 8, 6
    activations = model.conv1(images(30)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(recalibrated.bn1.running_mean, activations.mean(1))
    torch.testing.assert_close(recalibrated.bn1.running_var, activations.var(1, correction=0))


def test_deeper_layers_see_batch_statistics():
    model = build("chain")
    recalibrated = recalibrate_batchnorm(model, batches(30, 8))
    seen = []
    for x in batches(30, 8):
        normed = F.batch_norm(
            model.conv1(x), None, None, model.bn1.weight, model.bn1.bias, training=True
        )
        seen.append(model.conv2(F.relu(normed)))
    seen = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(recalibrated.bn2.running_mean, seen.mean(1))
    torch.testing.assert_close(recalibrated.bn2.running_var, seen.var(1, correction=0))


def test_first_statistics_do_not_depend_on_batch_split():
    model = build("residual")
    a, b = (recalibrate_batchnorm(model, p) for p in ([images(24)], images(24).split([1, 20, 3])))
    torch.testing.assert_close(a.bn.running_mean, b.bn.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.bn.running_var, b.bn.running_var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", NORMED)
def test_only_statistics_move(case):
    model = build(case)
    after = recalibrate_batchnorm(model, batches()).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, after[name]) != is_statistic(name), name
        assert tensor.dtype == after[name].dtype


@pytest.mark.parametrize("case", sorted(CASES.keys() - NORMED))
def test_models_without_batchnorm_come_back_unchanged(case):
    model = build(case)
    after = recalibrate_batchnorm(model, batches())
    assert after is not model
    assert all(torch.equal(t, after.state_dict()[n]) for n, t in model.state_dict().items())


def test_recalibrating_twice_changes_nothing_in_the_first_layer():
    once = recalibrate_batchnorm(build("chain"), batches())
    twice = recalibrate_batchnorm(once, batches())
    torch.testing.assert_close(once.bn1.running_var, twice.bn1.running_var, rtol=0, atol=0)


def test_one_big_batch_gives_the_training_mode_outputs():
    model = build("residual")
    recalibrated = recalibrate_batchnorm(model, [images(24)])
    outputs = recalibrated(images(24))
    torch.testing.assert_close(outputs, model.train()(images(24)), rtol=1e-10, atol=1e-12)


def test_a_single_value_per_channel_is_not_an_error():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    recalibrated = recalibrate_batchnorm(model, x.split(8))  # 8 and 1
    hidden = model[0](x)
    torch.testing.assert_close(recalibrated[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(recalibrated[1].running_var, hidden.var(0, correction=0))


def test_frozen_and_training_layers_stay_so(untouched):
    model = build("residual").train()
    model.bn1.eval()
    model.bn2.momentum = None
    model.stem.requires_grad_(False)
    with untouched(model):
        after = recalibrate_batchnorm(model, batches())
    assert [m.training for m in after.modules()] == [m.training for m in model.modules()]
    assert after.bn2.momentum is None
    assert not after.stem.weight.requires_grad
    assert not after.bn._forward_pre_hooks


def test_labels_are_dropped_unread():
    model = build("chain")
    a = recalibrate_batchnorm(model, batches())
    b = recalibrate_batchnorm(model, [(x, None) for x in batches()])
    assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_rebased_statistics_are_the_true_ones_and_the_function_stays():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
        nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False),
    ).double()  # fmt: skip
    for norm in model[1], model[5], model[6]:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4)
    for norm in model[1], model[5]:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    model.eval()
    x = torch.randn(40, 3, 4, 4, dtype=torch.float64)
    before, plain = model(x), copy.deepcopy(model[6].state_dict())
    rebase_batchnorm(model, [x[:30], x[30:]])
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-12)
    assert not model.training
    var, mean = torch.var_mean(model[0](x), (0, 2, 3), correction=0)
    assert torch.allclose(model[1].running_mean, mean)
    assert torch.allclose(model[1].running_var, var)
    assert all(torch.equal(v, plain[k]) for k, v in model[6].state_dict().items())
    model[:6].train()  # what the batch's own statistics now do is what the running ones did
    assert torch.allclose(model(x), before, rtol=1e-4, atol=1e-6)
