"""Weights that are computed from others: folded, the network is the same and can be pruned."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import tpvprune
from tpvprune.groups import folded_if_equal
from tpvprune.weights.pruning import prune_weights


class Halved(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight):
        return weight / 2


class Drawn(nn.Module):
    """Another weight in every forward."""

    def forward(self, weight):
        return weight + torch.rand(())


def own(layer):
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def with_noise(layer):
    parametrize.register_parametrization(layer, "weight", Drawn())
    return layer


def sparse(layer):
    return prune.l1_unstructured(layer, "weight", 0.3)


BY_PARAMETRIZATION = [parametrizations.weight_norm, parametrizations.spectral_norm, own]
BY_HOOK = [utils.weight_norm, utils.spectral_norm, sparse]
every = pytest.mark.parametrize("wrap", [*BY_PARAMETRIZATION, *BY_HOOK])


def network(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(
        wrap(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(32, 5)),
    )  # fmt: skip
    model(images())  # in training mode: spectral norms find their vectors
    return model.eval()


def images(num=24):
    return torch.randn(num, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@every
@pytest.mark.parametrize("training", [False, True])
def test_folded_it_computes_the_same_of_plain_parameters(wrap, training):
    model, x = network(wrap).train(training), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = tpvprune.fold_weights(model)
    assert folded.training is training
    torch.testing.assert_close(folded.eval()(x), model.eval()(x), rtol=1e-6, atol=1e-6)
    assert folded.state_dict().keys() == network(lambda layer: layer).state_dict().keys()
    # And the argument is as it was: it computes its weights, and trains.
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every
def test_frozen_parameters_stay_frozen(wrap):
    model = network(wrap)
    model[0].requires_grad_(False)
    with torch.no_grad():
        folded = tpvprune.fold_weights(model)
    assert [p.requires_grad for p in folded[0].parameters()] == [False, False]
    assert all(p.requires_grad for p in folded[6].parameters())
    copy.deepcopy(folded)


@every
def test_it_is_pruned_as_the_plain_network_is(wrap):
    model, x = network(wrap), images()
    result = tpvprune.prune(model, x.split(8), keep=0.5, repair="none")
    plain = tpvprune.prune(tpvprune.fold_weights(model), x.split(8), keep=0.5, repair="none")
    assert result.reached and not any("fold_weights" in note for note in plain.warnings)
    assert all(torch.equal(result.kept[n], plain.kept[n]) for n in plain.kept)
    assert torch.equal(result.model(x), plain.model(x))
    (said,) = [note for note in result.warnings if "fold_weights" in note]
    assert said.startswith("0.weight and 1 more: ")


@every
def test_what_is_saved_loads_with_the_dense_model_as_it_was_or_folded(wrap, tmp_path):
    model, x = network(wrap), images()
    result = tpvprune.prune(model, x.split(8), keep=0.5)
    tpvprune.save_pruned(result, tmp_path / "small", dense=model)
    for dense in (model, tpvprune.fold_weights(model)):
        loaded = tpvprune.load_pruned(tmp_path / "small", model=dense)
        assert torch.equal(loaded(x), result.model(x))


def test_folding_that_would_change_the_outputs_is_not_done():
    """The weight of ``Drawn`` is another in every forward: no parameter can stand for it."""
    torch.manual_seed(0)
    model = with_noise(nn.Linear(4, 3))
    same, (said,) = folded_if_equal(model, torch.randn(2, 4))
    assert same is model and "left so" in said and parametrize.is_parametrized(model)


def test_a_network_without_any_is_returned_as_it_is():
    model = nn.Linear(4, 3)
    assert folded_if_equal(model, torch.randn(2, 4)) == (model, [])


@pytest.mark.parametrize("wrap", BY_PARAMETRIZATION)
def test_the_groups_of_a_parametrized_network_list_the_layer_with_the_remedy(wrap):
    groups = tpvprune.find_groups(network(wrap), images())
    assert "0" not in [g.name for g in groups]
    assert "tpvprune.fold_weights" in {g.name: g.blocked for g in groups.blocked}["0"]


@pytest.mark.parametrize("wrap", BY_HOOK)
def test_the_groups_of_a_network_with_hooks_are_refused_with_the_remedy(wrap):
    with pytest.raises(ValueError, match=r"^0\.weight: .*tpvprune\.fold_weights"):
        tpvprune.find_groups(network(wrap), images())


@every
def test_single_weights_are_those_of_the_folded_layers(wrap):
    result = prune_weights(network(wrap), images().split(8), keep=0.5, criterion="magnitude")
    assert {"0.weight", "2.weight", "6.weight"} == result.masks.keys()
    assert any("fold_weights" in note for note in result.report["warnings"])
