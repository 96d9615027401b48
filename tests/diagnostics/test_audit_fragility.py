"""Changes that should not matter, and how far criteria and measures move under them."""

from dataclasses import replace

import cases
import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from tpvprune import find_groups, select_channels
from tpvprune.diagnostics.catalogue import MEASURES, Measure, setting_of
from tpvprune.diagnostics.changes import Change, changes_of
from tpvprune.diagnostics.fragility import CRITERIA, fragility, kendall, same_cut
from tpvprune.diagnostics.measures import Measurement, own_predictions


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = cases.Residual().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
        model.fc.weight.mul_(20)  # confident: a small step changes no class
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(64, 3, 8, 8, generator=generator).split(16))


@pytest.fixture
def setting(net, images):
    return setting_of(net, find_groups(net, images[0]), images[:2])


# ---- rankings -------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [4, 1000])  # many ties, hardly any
def test_kendall_agrees_with_scipy(high):
    a, b = torch.randint(high, (2, 50), generator=torch.Generator().manual_seed(high)).double()
    assert kendall(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert kendall(a, a) == pytest.approx(1)
    assert kendall(a, -a) == pytest.approx(-1)


def test_kendall_refuses_vectors_of_two_lengths():
    with pytest.raises(ValueError, match="one length"):
        kendall(torch.ones(3), torch.ones(4))


def test_same_cut_counts_common_removals(setting):
    generator = torch.Generator().manual_seed(0)
    scores, others = (
        {g.name: torch.rand(g.num_channels, generator=generator) for g in setting.groups}
        for _ in range(2)
    )
    gone = []
    for ranking in (scores, others):
        kept = select_channels(setting.groups, ranking, keep=0.5)
        gone.append({(n, c) for n, k in kept.items() for c in (~k).nonzero().flatten().tolist()})
    wanted = len(gone[0] & gone[1]) / max(map(len, gone))
    assert 0 < wanted < 1
    assert same_cut(setting.groups, scores, others, keep=0.5) == pytest.approx(wanted)
    assert same_cut(setting.groups, scores, scores, keep=0.5) == 1
    assert same_cut(setting.groups, scores, others, keep=1.0) == 1


# ---- changes --------------------------------------------------------------------------------


def test_changes_keep_what_the_model_says(setting, images, untouched):
    with untouched(setting.model):
        changes, missing = changes_of(setting, images[2:])
    assert not missing
    assert [c.kind for c in changes] == [
        *("rescaling",) * 2, *("images",) * 2, "seed", *("training",) * 3
    ]  # fmt: skip
    x = torch.cat(images[:2])
    with torch.no_grad():
        before = setting.model(x)
        for change in changes:
            after = change.setting.model(x)
            if change.kind == "rescaling":
                assert torch.equal(after, before)
                assert change.setting.model is not setting.model
            elif change.kind == "training":
                assert not torch.equal(after, before)
                agreed = (after.argmax(1) == before.argmax(1)).double().mean()
                assert change.moved == pytest.approx(float(agreed) - 1)
            else:
                assert change.setting.model is setting.model
    assert torch.equal(torch.cat(changes[2].setting.batches), torch.cat(images[2:]))
    assert sum(map(len, changes[3].setting.batches)) == 16
    assert changes[4].setting.seed == setting.seed + 1


def test_training_steps_get_shorter_until_they_do_no_harm(setting, images, monkeypatch):
    rates = []

    def harmful(model, labelled, *, recipe):
        rates.append(recipe.lr)
        other = cases.Residual().eval()
        other.load_state_dict(model.state_dict())
        if recipe.lr > 1e-3:
            with torch.no_grad():
                other.fc.bias.copy_(1e3 * torch.arange(3.0))
        return other

    monkeypatch.setattr("tpvprune.diagnostics.changes.finetune", harmful)
    changes, _ = changes_of(setting, images[2:])
    first = next(c for c in changes if c.name == "sgd steps, rate 0.01")
    assert rates[:3] == pytest.approx([0.01, 0.0025, 0.000625])
    assert first.neutral
    assert "points by" in first.note


def test_a_change_that_matters_is_not_neutral(setting):
    assert Change("x", "training", setting, moved=0.002).neutral
    assert not Change("x", "training", setting, moved=-0.0021).neutral


def test_labels_count_as_accuracy(net, images):
    groups = find_groups(net, images[0])
    classes = [y for _, y in own_predictions(net, images)]
    wrong = [(x, (y + (torch.arange(len(y)) % 2)) % 3) for x, y in zip(images, classes,
                                                                     strict=True)]  # fmt: skip
    setting = setting_of(net, groups, images[:2], labelled=wrong[:2], eval_images=wrong)
    changes, _ = changes_of(setting, images[2:], labelled_others=wrong[2:])
    assert changes[0].moved == 0
    assert changes[2].setting.labelled is not None
    assert torch.equal(changes[2].setting.labelled[0][1], wrong[2][1])


# ---- fragility ------------------------------------------------------------------------------


def test_fragility_tells_invariant_from_fragile(setting, images):
    changes, missing = changes_of(setting, images[2:])
    found = fragility(
        setting,
        [change for change in changes if change.kind in {"rescaling", "seed"}] + changes[2:3],
        measures=MEASURES,
        criteria=("tpv_uncompensated", "magnitude", "activation_variance"),
        left_out=missing,
    )
    assert not found.left_out
    assert set(found.moved) == set(MEASURES)
    for change in ("rescaled by channel", "rescaled by layer"):
        for name in ("channel_tpv", "path_norm", "log_radius", "input_lipschitz"):
            assert abs(found.moved[name][change]) < 1e-5
        for name in ("l2_norm", "sharpness"):
            assert abs(found.moved[name][change]) > 0.01
        assert found.tau["tpv_uncompensated"][change] == 1
        assert found.overlap["tpv_uncompensated"][change] == 1
        assert found.tau["activation_variance"][change] < 0.99
    assert abs(found.moved["normalized_loss"]["rescaled by layer"]) < 1e-5
    assert found.tau["magnitude"]["rescaled by channel"] < 0.99
    assert found.moved["l2_norm"]["other images"] == 0
    assert found.moved["channel_tpv"]["other images"] != 0
    assert found.tau["magnitude"]["another seed"] == 1


def test_fragility_reports_relative_change(setting):
    probe = Measure("probe", lambda s: Measurement(2.0 + s.seed), False, "0", "yes", "here")
    change = Change("another seed", "seed", replace(setting, seed=1))
    stages = []
    found = fragility(
        setting,
        [change],
        measures={"probe": probe},
        criteria=(),
        progress=lambda *step: stages.append(step),
    )
    assert found.values["probe"].value == 2
    assert found.moved["probe"]["another seed"] == pytest.approx(0.5)
    assert stages == [("probe", 0, 2), ("probe", 1, 2)]


def test_what_cannot_be_measured_is_left_out_with_the_reason(images):
    torch.manual_seed(0)
    model = cases.Attention().eval()
    setting = setting_of(model, find_groups(model, images[0]), images[:2])
    changes, missing = changes_of(setting, images[2:])
    assert set(missing) == {"rescaled by channel", "rescaled by layer"}
    found = fragility(
        setting,
        changes[:1],
        measures={"path_norm": MEASURES["path_norm"], "l2_norm": MEASURES["l2_norm"]},
        criteria=("bn_scale", "taylor", "magnitude"),
        left_out=missing,
    )
    assert set(found.moved) == {"l2_norm"}
    assert set(found.tau) == {"magnitude"}
    assert "another layer" in found.left_out["path_norm"]
    assert "labelled" in found.left_out["taylor"]


def test_fragility_refuses_unknown_criteria(setting):
    with pytest.raises(ValueError, match="criteria: expected names of"):
        fragility(setting, [], measures={}, criteria=("tvp",))
    assert "tpv_uncompensated" in CRITERIA
