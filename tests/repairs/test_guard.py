"""A result is judged on images that it was not fitted to, and what is broken is said."""

import copy
import dataclasses
import math

import pytest
import torch
from cases import Chain, batches, build, images
from torch import nn

from tpvprune import prune, variance_curves
from tpvprune.passes.evaluation import Difference, difference
from tpvprune.pipeline import run
from tpvprune.repairs.guard import best_repair, cannot_be_true, facts, further, warnings_of
from tpvprune.widths import ranking


def found(share, agreement=0.9, variance=1.0):
    return Difference(50, agreement, 0.1, variance, share)


class Outputs(nn.Module):
    """Logits that are what another model says, changed."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


# ---- what is measured -----------------------------------------------------------------------


def test_differences_equal_their_formulas():
    dense, other = build("chain", seed=0), build("chain", seed=1)
    x = images(40)
    f, g = dense(x).detach(), other(x).detach()
    measured = difference(other, dense, x.split([7, 1, 32]))
    assert measured.num_images == 40
    assert measured.agreement == pytest.approx((f.argmax(1) == g.argmax(1)).double().mean())
    pairs = (f.argmax(1)[:, None] == g.argmax(1)[None]).double()
    assert measured.chance == pytest.approx(pairs.mean())  # of independent images
    assert measured.output_variance == pytest.approx((f - g).square().sum(1).mean())
    f, g = (t - t.mean(1, keepdim=True) for t in (f, g))
    share = (f - g).square().sum(1).mean() / f.var(0, correction=0).sum()
    assert measured.share == pytest.approx(share)


def test_a_common_shift_of_all_logits_is_no_difference():
    dense = build("chain")
    measured = difference(Outputs(dense, lambda y: y + 100 * y[:, :1]), dense, batches())
    assert measured.agreement == 1
    assert measured.output_variance > 1
    assert measured.share < 1e-12
    assert not measured.is_broken


def test_outputs_of_other_images_are_broken():
    dense = build("chain")
    turned = Outputs(dense, lambda y: y.roll(1, 0))
    measured = difference(turned, dense, [images(400)])
    assert measured.share == pytest.approx(2, abs=0.3)  # two independent draws
    assert measured.is_broken


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_broken(value):
    dense = build("chain")
    measured = difference(Outputs(dense, lambda y: y * value), dense, batches())
    assert measured.agreement == 0
    assert measured.is_broken


# ---- what follows ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "wanted", "best"),
    [
        ({"none": 0.9, "compensate": 0.2}, "compensate", "compensate"),
        ({"none": 0.1, "compensate": 0.2}, "compensate", "none"),
        ({"none": 0.9, "compensate": 0.1, "reconstruct": 0.2}, "reconstruct", "compensate"),
        ({"none": 0.9, "compensate": 0.1, "reconstruct": 0.1}, "reconstruct", "reconstruct"),
        ({"none": 0.9, "bn": 0.5, "compensate": math.nan}, "compensate", "bn"),
        ({"none": math.nan, "compensate": math.inf}, "compensate", "compensate"),
        ({"none": 0.9, "bn": 0.5, "compensate": 0.6}, "bn", "bn"),
        ({"none": 0.4, "bn": 0.5, "compensate": 0.6}, "auto", "none"),
    ],
)
def test_a_cheaper_repair_that_is_closer_is_taken(shares, wanted, best):
    measured = {name: found(share) for name, share in shares.items()}
    assert best_repair(measured, wanted) == best
    lines = warnings_of(measured, wanted, best)
    assert bool(lines) == (wanted not in {best, "auto"} or measured[best].is_broken)


def test_what_is_broken_is_said_first():
    measured = {"none": found(1.5, agreement=0.2), "compensate": found(2.0, agreement=0.1)}
    lines = warnings_of(measured, "compensate", "none")
    assert lines[0].startswith("BROKEN")
    assert "20.0 %" in lines[0]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("wanted", "advice"),
    [
        ("none", "repair compensate"),
        ("compensate", "repair reconstruct"),
        ("auto", "repair reconstruct"),
        ("reconstruct", "distillation"),
    ],
)
def test_a_repair_that_was_tried_is_not_advised(wanted, advice):
    differences = {"none": found(1.2, 0.1), "compensate": found(1.21, 0.1)}
    differences["reconstruct"] = found(1.22, 0.1)
    first, *others = warnings_of(differences, wanted, "none")
    assert first.endswith(f"more images, or {advice}")
    if others:
        assert "1.2 of its variance" not in others[0].replace("none 1.2)", "")  # told apart


def test_few_images_are_said_to_tell_little():
    one = dataclasses.replace(found(math.inf, agreement=1.0), num_images=1)
    assert not one.is_broken
    (line,) = warnings_of({"none": one}, "none", "none")
    assert line.startswith("1 of the images held back: too few to tell")
    broken = dataclasses.replace(one, agreement=0.0)
    first, then = warnings_of({"none": broken}, "none", "none")
    assert first.startswith("BROKEN")
    assert "too few to be sure of that" in then


@pytest.mark.parametrize("decided_by", [None, "divergence", "labels"])
@pytest.mark.parametrize("agreement", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("variance", [1.0, 2.0, 3.0])
def test_what_ends_further_than_it_began_is_said(agreement, variance, decided_by):
    before = found(0.1, agreement=0.9, variance=2.0)
    saved = found(0.1, agreement=agreement, variance=variance)
    lines = further(before, saved, decided_by=decided_by)
    assert len(lines) == (agreement < 0.9 or variance > 2.0)
    for line in lines:
        assert ("agreement" in line, "output variance" in line) == (agreement < 0.9, variance > 2)
        assert "a lower rate" in line
    features = dataclasses.replace(saved, has_classes=False)
    assert len(further(before, features, decided_by=decided_by)) == (variance > 2.0)
    assert not further(before, before, decided_by=decided_by)


@pytest.mark.parametrize("share", [0.5, 1.5, math.nan])
@pytest.mark.parametrize("agreement", [0.1, 0.9])
def test_features_are_broken_by_their_variance_alone(share, agreement):
    features = dataclasses.replace(found(share, agreement=agreement), has_classes=False)
    assert features.is_broken == (not share <= 1.0)
    told = facts(features)
    assert told["agreement"] is told["chance_agreement"] is None
    one = dataclasses.replace(features, num_images=1, output_variance=math.nan)
    assert one.is_broken  # its outputs are no numbers


def test_only_a_broken_result_far_from_its_prediction_cannot_be_true():
    assert cannot_be_true(found(2.0, agreement=0.1, variance=100), 1.0)
    assert cannot_be_true(found(math.nan, agreement=0.0, variance=math.nan), 1.0)
    assert not cannot_be_true(found(2.0, agreement=0.1, variance=100), 50.0)
    assert not cannot_be_true(found(0.2, agreement=0.9, variance=100), 1.0)


# ---- through prune --------------------------------------------------------------------------


def test_a_repair_that_destroys_is_not_returned(monkeypatch):
    def destroyed(pruned, *_, **__):
        noise = copy.deepcopy(pruned)
        for p in noise.parameters():
            p.data.mul_(-3)
        return noise

    monkeypatch.setattr(run, "compensate_weights", destroyed)
    result = prune(build("residual"), batches(60, 20), keep=0.8, repair_factors=False)
    assert result.report["repair"] == "compensate"
    assert result.report["repair_chosen"] in {"none", "bn"}
    assert any("repair" in line for line in result.report["warnings"])
    shares = result.report["variance_share"]
    assert shares[result.report["repair_chosen"]] <= shares["compensate"]


def lying(model, groups, *args, **kwargs):
    """Return curves of which that of the channels that matter most promises no damage."""
    curves = variance_curves(model, groups, *args, **kwargs)
    name = max(curves, key=lambda n: float(curves[n].variance[-1]))
    free = torch.zeros_like(curves[name].variance)
    return curves | {name: dataclasses.replace(curves[name], variance=free)}


def test_curves_that_lie_are_found_out(monkeypatch):
    model, data = build(Chain, 12), batches(80, 20)
    given = {"keep": 0.5, "repair": "none", "allocation": "curves", "repair_factors": False}
    monkeypatch.setattr(ranking, "variance_curves", lying)
    report = prune(model, data, **given).report
    monkeypatch.setattr("tpvprune.repairs.guard.cannot_be_true", lambda *_: False)
    believed = prune(model, data, **given).report
    assert believed["held_back"]["broken"]
    assert believed["warnings"][0].startswith("BROKEN")
    assert any("ranked" in line for line in report["warnings"])
    assert report["held_back"]["variance_share"] < believed["held_back"]["variance_share"]


@pytest.mark.parametrize("repair", ["none", "bn"])
@pytest.mark.parametrize("case", ["residual", "depthwise"])
def test_without_a_refit_the_better_of_curves_and_ranks_is_the_default(case, repair):
    model, data = build(case), batches(80, 20)

    def left(allocation):
        report = prune(model, data, keep=0.4, repair=repair, allocation=allocation).report
        return report["variance_share"][repair]

    assert left(None) == pytest.approx(min(left("curves"), left("rank")), rel=1e-6)


def test_each_step_ranks_once(monkeypatch):
    """Curves and ranks are both cut from the same scores."""
    model, data = build(Chain, 12), batches(80, 20)
    ranked, counts = ranking.RankBy.ranked, []

    def counted(self, *given):
        counts.append(1)
        return ranked(self, *given)

    monkeypatch.setattr(ranking.RankBy, "ranked", counted)
    prune(model, data, keep=0.4, repair="bn", steps=3)
    assert len(counts) == 3


def test_nothing_of_it_reads_a_label():
    x, labels = images(60), torch.full((60,), 10**6)
    pairs = list(zip(x.split(20), labels.split(20), strict=True))
    with_labels = prune(build("residual"), pairs, keep=0.7).report
    without = prune(build("residual"), x.split(20), keep=0.7).report
    assert with_labels["held_back"] == without["held_back"]
