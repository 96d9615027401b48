"""The whole flow: budgets, repairs, reports, and labels that nobody reads."""

import json

import pytest
import torch
from cases import CASES, Poison, batches, build, images

from tpvprune import (
    Ranking,
    compensate_weights,
    count_macs,
    count_params,
    find_groups,
    prune,
    rank_channels,
    reconstruct_blocks,
    remove_channels,
    tpv_scores,
    variance_curves,
)
from tpvprune.cifar_resnet import cifar_resnet20
from tpvprune.passes.drawing import drawn_indices, hold_back
from tpvprune.passes.evaluation import agreement, output_variance
from tpvprune.pipeline import setup
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS, with_labels
from tpvprune.scores.taps import Probing
from tpvprune.scores.tpv import Scores
from tpvprune.widths import ranking
from tpvprune.widths.allocation import allocate
from tpvprune.widths.limits import Limits


def data(num=40, size=16):
    return batches(num, size)


def labelled(num=40, size=16):
    return [(x, torch.arange(len(x)) % 3) for x in data(num, size)]


def confident(model):
    """Scale the logits up, so that the criterion that reads confident inputs only has some."""
    with torch.no_grad():
        model.fc.weight.mul_(100)
    return model


# ---- the budget -----------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("case", CASES)
def test_budget_is_met_and_measured(case, of):
    model = build(case)
    result = prune(model, data(), keep=0.6, of=of)
    assert result.report["reached"]
    pruned, dense = result.report["pruned"], result.report["dense"]
    assert pruned[of] <= 0.6 * dense[of] * (1 + 1e-9)
    assert pruned["macs"] == pytest.approx(count_macs(result.model, images(2)), rel=1e-9)
    assert pruned["params"] == count_params(result.model)
    assert dense == {"macs": count_macs(model, images(2)), "params": count_params(model)}
    assert result.model(images()).isfinite().all()


@pytest.mark.parametrize("allocation", ["curves", "rank"])
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.3, 0.1])
def test_every_layer_keeps_a_channel(allocation, keep):
    model = build("concat_residual")
    result = prune(model, data(), keep=keep, allocation=allocation)
    fits = count_macs(result.model, images(2)) <= keep * count_macs(model, images(2))
    assert result.report["reached"] == fits
    assert min(p.numel() for p in result.model.parameters()) > 0


@pytest.mark.parametrize("keep", [0.3, 0.08])
def test_a_budget_is_met_where_layers_would_be_left_without_channels(keep):
    # By these scores many layers of the padded stream lose all; channels put back cost.
    model = build(cifar_resnet20, num_classes=3)
    result = prune(model, data(16), keep=keep, criterion="random", repair="none")
    assert result.report["reached"]
    assert result.report["pruned"]["macs"] <= keep * result.report["dense"]["macs"]


def test_unreachable_budget_is_said_and_still_works():
    result = prune(build("chain"), data(), keep=0.001)
    assert not result.report["reached"]
    assert all(g["kept"] == 1 for g in result.report["groups"])
    assert result.model(images()).isfinite().all()


@pytest.mark.parametrize("repair", ["none", "compensate"])
def test_keeping_everything_returns_the_same_function(repair):
    model = build("residual")
    result = prune(model, data(), keep=1.0, repair=repair)
    assert all(mask.all() for mask in result.kept.values())
    torch.testing.assert_close(result.model(images()), model(images()), rtol=1e-9, atol=1e-11)
    assert result.report["output_variance"][repair] < 1e-18


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("allocation", ["curves", "rank"])
def test_steps_go_down_to_the_budget(steps, allocation):
    model = build("residual")
    result = prune(model, data(), keep=0.5, steps=steps, allocation=allocation)
    history = result.report["steps"]
    assert len(history) == steps
    dense = count_macs(model, images(2))
    for step, entry in enumerate(history, 1):
        assert entry["macs"] <= 0.5 ** (step / steps) * dense * (1 + 1e-9)
    assert history[-1]["macs"] == count_macs(result.model, images(2))
    for group in result.report["groups"]:
        assert group["kept"] == result.kept[group["name"]].sum()


def test_floors_and_ignored_modules_hold():
    result = prune(
        build("residual"),
        data(),
        keep=0.5,
        limits=Limits(min_channels=2, max_removed=0.5, ignore=("stem",)),
    )
    assert "stem" not in {g["name"] for g in result.report["groups"]}
    assert any("ignored" in b["reason"] for b in result.report["blocked"])
    for mask in result.kept.values():
        assert mask.sum() >= max(2, 0.5 * len(mask))
    rounded = prune(build("attention"), data(), keep=0.7, limits=Limits(round_to=4))
    for group in rounded.report["groups"]:
        assert group["unit"] == "head" or group["kept"] in {group["num_channels"], 4}


# ---- rankings -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"allocation": "rank"}, {"criterion": "magnitude"}])
def test_a_ranking_serves_other_budgets(options, monkeypatch):
    model = build("residual")
    first = prune(model, data(), keep=0.8, **options)
    alone = prune(model, data(), keep=0.5, **options)

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(ranking.RankBy, "ranked", never)
    monkeypatch.setattr(setup, "measured_factors", never)
    again = prune(model, data(), keep=0.5, ranking=first.ranking, **options)
    assert all(torch.equal(again.kept[n], alone.kept[n]) for n in alone.kept)
    weights = again.model.state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in alone.model.state_dict().items())
    assert again.reached
    assert again.warnings == again.report["warnings"]


@pytest.mark.parametrize("options", [{}, {"repair": "bn"}, {"criterion": "magnitude"}])
def test_channels_can_be_ranked_by_themselves(options):
    model = build("residual")
    ranked = rank_channels(model, data(), **options)
    given = prune(model, data(), keep=0.6, ranking=ranked, **options)
    alone = prune(model, data(), keep=0.6, **options)
    assert alone.ranking.factors == ranked.factors
    weights = given.model.state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in alone.model.state_dict().items())


def test_what_the_repair_makes_up_for_belongs_to_the_ranking(tmp_path):
    model = build("residual")
    found = prune(model, data(), keep=0.8).ranking
    assert found.factors is not None and found.factors.keys() == found.curves.keys()
    found.save(tmp_path / "ranking.safetensors")
    loaded = Ranking.load(tmp_path / "ranking.safetensors")
    assert loaded.factors == found.factors and loaded.stand_in == "map"
    without = prune(model, data(), keep=0.8, ranking=found, repair_factors=False).ranking
    assert without.factors is None


def test_a_ranking_of_something_else_is_refused():
    found = prune(build("chain"), data(), keep=0.8, repair="none").ranking
    with pytest.raises(ValueError, match="ranking: expected one of the groups of this model"):
        prune(build("residual"), data(), keep=0.5, repair="none", ranking=found)
    other = prune(build("chain"), data(), keep=0.8, criterion="magnitude").ranking
    with pytest.raises(
        ValueError, match="ranking: expected one by criterion 'activation_variance'"
    ):
        prune(build("chain"), data(), keep=0.8, criterion="activation_variance", ranking=other)
    with pytest.raises(ValueError, match=r"where a map takes the place .* where a zero does"):
        prune(build("chain"), data(), keep=0.5, ranking=found)
    with pytest.raises(
        ValueError, match="ranking: expected one for allocation 'rank', found one for 'curves'"
    ):
        prune(build("chain"), data(), keep=0.5, ranking=found, allocation="rank")


def test_a_scorer_of_ones_own_decides():
    model = build("chain")

    def by_index(model, groups, batches, *, seed):
        assert sum(map(len, batches)) == 36
        assert seed == 7
        values = {g.name: torch.arange(g.num_channels, dtype=torch.float64) for g in groups}
        return Scores(values, criterion="by index")

    result = prune(model, data(), keep=0.5, criterion=by_index, allocation="plain", seed=7)
    assert "by_index" in result.report["criterion"]
    for mask in result.kept.values():  # the last ones stay
        assert mask.tolist() == sorted(mask.tolist())


# ---- criteria and repairs -------------------------------------------------------------------


@pytest.mark.parametrize("criterion", SCORERS)
def test_every_criterion_meets_the_budget(criterion):
    needs = criterion in NEEDS_LABELS
    result = prune(
        confident(build("chain")), data(), keep=0.6, criterion=with_labels(criterion, labelled()),
    )  # fmt: skip
    assert result.report["reached"]
    assert result.report["criterion"] == criterion
    assert result.report["used_labels"] == needs
    assert result.scores.used_labels == needs


@pytest.mark.parametrize("repair", ["none", "bn", "compensate", "auto"])
def test_every_repair_is_measured_on_held_back_inputs(repair):
    model = build("residual")
    result = prune(model, data(), keep=0.5, repair=repair)
    variances, chosen = result.report["output_variance"], result.report["repair_chosen"]
    held = [images(40)[drawn_indices(40)[1]]]
    assert chosen in variances
    assert variances[chosen] == pytest.approx(output_variance(result.model, model, held))
    assert result.report["num_held_back"] == 4
    assert result.report["num_images"] == 36
    if repair == "auto":
        assert set(variances) == {"none", "bn", "compensate", "compensate+bn"}
        shares = result.report["variance_share"]
        assert shares[chosen] == min(shares.values())
    elif chosen != repair:  # a cheaper one is closer, and it is said
        shares = result.report["variance_share"]
        assert shares[chosen] < shares[repair]
        assert f"repair {chosen} was taken" in result.report["warnings"][-1]
    assert set(variances) >= {"none"}


@pytest.mark.parametrize("repair", [compensate_weights, reconstruct_blocks])
def test_weights_are_fitted_to_mirror_images_where_that_is_asked_for(repair):
    model, name = build("residual"), repair.__name__.partition("_")[0]
    told = prune(model, data(), keep=0.5, repair=name, mirrored=True)
    alone = prune(model, data(), keep=0.5, repair=name, ranking=told.ranking)
    removed = remove_channels(model, told.groups, told.kept)
    fit, held = hold_back(data())
    with torch.no_grad():
        fitted = repair(removed, model, fit, groups=told.groups, kept=told.kept, num_views=2)
        wanted = fitted(held[0])
        assert told.report["repair_chosen"] == alone.report["repair_chosen"] == name
        torch.testing.assert_close(told.model(held[0]), wanted)
        assert not torch.allclose(alone.model(held[0]), wanted)


def test_compensation_beats_doing_nothing():
    result = prune(build("residual"), data(120, 40), keep=0.5)
    variances = result.report["output_variance"]
    assert variances["compensate"] < 0.5 * variances["none"]


# ---- the report -----------------------------------------------------------------------------


def test_report_is_plain_data_with_the_documented_keys():
    model = build("attention")
    result = prune(model, data(), keep=0.6, seed=3)
    report = json.loads(json.dumps(result.report, allow_nan=False))
    assert report.keys() >= {
        "keep", "of", "criterion", "used_labels", "repair", "repair_chosen", "seed", "reached",
        "dense", "pruned", "output_variance", "output_second_moment", "steps", "groups", "blocked",
        "timings",
    }  # fmt: skip
    assert report["seed"] == 3
    assert report["used_labels"] is False
    held = images(40)[drawn_indices(40, seed=3)[1]]
    moment = model(held).square().sum(1).mean().item()
    assert report["output_second_moment"] == pytest.approx(moment)
    assert report["steps"][-1]["agreement"] == agreement(result.model, model, [held])
    assert {g["unit"] for g in report["groups"]} == {"channel", "head"}
    assert all(b["reason"] for b in report["blocked"])
    assert all(seconds >= 0 for seconds in report["timings"].values())


def test_progress_is_told_stage_by_stage():
    calls = []
    prune(build("chain"), data(), steps=2, progress=lambda *call: calls.append(call))
    assert {stage for stage, _, _ in calls} >= {"groups", "ranking", "removal", "compensation"}
    assert all(0 <= done <= total for _, done, total in calls)
    assert [c for c in calls if c[0] == "removal"][-1] == ("removal", 2, 2)


# ---- labels and randomness ------------------------------------------------------------------


@pytest.mark.parametrize("repair", ["compensate", "auto"])
def test_poisoned_labels_give_the_same_bits(repair):
    model = build("residual")
    plain = prune(model, data(), keep=0.5, repair=repair)
    poisoned = prune(model, [(x, Poison()) for x in data()], keep=0.5, repair=repair)
    assert all(torch.equal(plain.kept[n], poisoned.kept[n]) for n in plain.kept)
    assert all(torch.equal(plain.scores[n], poisoned.scores[n]) for n in plain.scores)
    weights = poisoned.model.state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in plain.model.state_dict().items())
    del plain.report["timings"], poisoned.report["timings"]
    assert plain.report == poisoned.report


@pytest.mark.parametrize("criterion", sorted(set(SCORERS) - NEEDS_LABELS))
def test_criteria_without_labels_never_look_at_them(criterion):
    model = confident(build("chain"))
    poisoned = prune(model, [(x, Poison()) for x in data()], criterion=criterion)
    assert not poisoned.report["used_labels"]


@pytest.mark.parametrize(("repair", "stand_in"), [("none", "zero"), ("bn", "mean")])
def test_without_a_refit_no_channel_is_counted_on_to_stand_in(repair, stand_in):
    model = build("residual")
    result = prune(model, data(), keep=0.5, repair=repair)
    groups, (fit, _) = result.groups, hold_back(data())
    curves = variance_curves(model, groups, fit, stand_in=stand_in)
    kept = allocate(groups, curves, keep=0.5)
    for g in groups:
        assert torch.equal(result.scores[g.name], curves[g.name].alone)
        assert torch.equal(result.kept[g.name], kept[g.name])


@pytest.mark.parametrize("compensated", [False, True])
def test_what_a_channel_changes_alone_is_its_score(compensated):
    model = build("residual")
    groups = prune(model, data(), keep=0.9).groups
    batches = [torch.randn(32, 3, 8, 8, dtype=torch.float64) for _ in range(6)]
    stand_in = "map" if compensated else "zero"
    curves = variance_curves(model.double(), groups, batches, stand_in=stand_in)
    scores = tpv_scores(model, groups, batches, compensated=compensated)
    for g in groups:
        torch.testing.assert_close(curves[g.name].alone, scores[g.name], rtol=1e-4, atol=0)
        torch.testing.assert_close(curves[g.name].stderr, scores.stderr[g.name], rtol=0.1, atol=0)


def test_same_seed_gives_the_same_bits():
    model = build("residual")
    a, b = (prune(model, data(), keep=0.5, seed=5).model.state_dict() for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("criterion", sorted(NEEDS_LABELS))
def test_criteria_that_need_labels_say_so(criterion):
    with pytest.raises(ValueError, match=r"needs labels: pass tpvprune\.with_labels"):
        prune(build("chain"), data(), criterion=criterion)


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep: expected a fraction"),
        ({"of": "watts"}, "of: expected"),
        ({"criterion": "luck"}, "criterion: expected one of tpv"),
        ({"repair": "prayer"}, "repair: expected one of none"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"mirrored": True, "repair": "bn"}, "mirrored: expected only with a repair that fits"),
        ({"reconstructions": 2}, "reconstructions: expected at least 1, and more only with"),
        ({"reconstructions": 0, "repair": "reconstruct"}, "expected at least 1, and more only"),
        (
            {"reconstructions": 99, "repair": "reconstruct"},
            "as many as there are batches, found 99",
        ),
        ({"allocation": "curves", "criterion": "magnitude"}, "allocation"),
        ({"limits": Limits(ignore=("nobody",))}, "ignore: expected the name of a module"),
    ],
)
def test_bad_arguments_are_rejected(arguments, message, untouched):
    model = build("chain")
    with untouched(model), pytest.raises(ValueError, match=message):
        prune(model, data(), **arguments)


@pytest.mark.parametrize("arguments", [{"num_probes": 0}, {"amp": torch.float16}])
def test_probing_is_checked_where_it_is_made(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Probing(**arguments)


def test_inputs_of_several_shapes_are_rejected():
    with pytest.raises(ValueError, match=r"one shape, found \[3, 8, 8\] and \[3, 9, 9\]"):
        prune(build("chain"), [torch.randn(8, 3, 8, 8), torch.randn(8, 3, 9, 9)])


def test_inference_mode_is_refused_as_it_has_no_gradients():
    model = build("chain")
    groups = find_groups(model, images(2))
    with torch.inference_mode():
        for call in (
            lambda: prune(model, data()),
            lambda: find_groups(model, images(2)),
            lambda: tpv_scores(model, groups, data()),
            lambda: variance_curves(model, groups, data()),
        ):
            with pytest.raises(ValueError, match="expected a call outside of"):
                call()
    with torch.no_grad():
        prune(model, data())


def test_too_few_inputs_are_rejected():
    with pytest.raises(ValueError, match="at least 2 inputs, found 1"):
        prune(build("chain"), [images(1)])


def test_models_with_nothing_to_prune_are_rejected():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).double()
    with pytest.raises(ValueError, match="found none"):
        prune(model, data())


def test_an_unknown_argument_is_named_with_the_function():
    with pytest.raises(TypeError, match=r"prune\(\) got an unexpected keyword argument 'kep'"):
        prune(build("chain"), batches(), kep=0.5)
