"""Every public function that takes batches takes a labelled loader, and reads no label."""

import functools
import inspect

import pytest
import torch
from cases import Poison, Residual, batches, build, images

import tpvprune
from tpvprune import diagnostics
from tpvprune.depth import branch_scores, find_branches
from tpvprune.diagnostics import tpv
from tpvprune.passes.disagreement import disagreement
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS
from tpvprune.weights import choice, pruning, repair
from tpvprune.weights.scores import WEIGHT_SCORERS

UNLABELED = {"batches", "inputs", "train_batches", "held_out_batches"}
# These ask a function of the caller's, or several, for what they measure.
ELSEWHERE = {"setting_of"}


@functools.cache
def subject():
    """Return a model, its groups, what of them stays, and the smaller model; none is written to."""
    model = confident()
    groups = tpvprune.find_groups(model, images(2))
    kept = {g.name: torch.arange(g.num_channels) > 0 for g in groups}
    return model, groups, kept, tpvprune.remove_channels(model, groups, kept)


def calls(data):
    """Return every function that takes unlabeled batches as name -> a call of it."""
    model, groups, kept, small = subject()
    masks = {"fc.weight": model.fc.weight.abs() > 0.1}
    cut = {"groups": groups, "kept": kept}
    shown = {"mean": [0.5] * 3, "std": [0.5] * 3}
    found = {
        "prune": lambda: tpvprune.prune(model, data, keep=0.6, repair="auto"),
        "prune branches": lambda: tpvprune.prune(
            model, data, keep=0.6, granularity=("channel", "branch"), max_depth_removed=1
        ),
        "branch_scores": lambda: branch_scores(model, find_branches(model, images(2)), data),
        "prune_within": lambda: tpvprune.prune_within(model, data, max_loss=50, num_sizes=2),
        "sizes": lambda: [tpvprune.Sizes(model, data).prune(keep) for keep in (0.8, 0.6)],
        "rank_channels": lambda: tpvprune.rank_channels(model, data),
        "tpv_scores": lambda: tpvprune.tpv_scores(model, groups, data),
        "tpv_scores until": lambda: tpvprune.tpv_scores(model, groups, data, until=0.5),
        "compensate_weights": lambda: tpvprune.compensate_weights(small, model, data, **cut),
        "reconstruct_blocks": lambda: tpvprune.reconstruct_blocks(
            small, model, data, **cut, rounds=1, iterations=1
        ),
        "recalibrate_batchnorm": lambda: tpvprune.recalibrate_batchnorm(model, data),
        "distill": lambda: tpvprune.distill(small, model, data, epochs=1),
        "agreement": lambda: tpvprune.agreement(small, model, data),
        "disagreement": lambda: disagreement(small, model, data, **shown),
        "ablation_scores": lambda: diagnostics.ablation_scores(model, groups, data, max_channels=1),
        "channel_tpv": lambda: diagnostics.channel_tpv(model, groups, data),
        "own_predictions": lambda: diagnostics.own_predictions(model, data),
        "input_lipschitz": lambda: diagnostics.input_lipschitz(model, data, num_iterations=1),
        "jacobian_norms": lambda: diagnostics.jacobian_norms(model, data),
        "local_volume": lambda: diagnostics.local_volume(model, data, num_directions=2),
        "perturbed_variance": lambda: diagnostics.perturbed_variance(
            model, data, tpv.gaussian(tpv.sgd_variances(model, lr=0.1, batch_size=8)), num_draws=1
        ),
        "selection_variance": lambda: diagnostics.selection_variance(model, groups, kept, data),
        "label_noise_variance": lambda: diagnostics.label_noise_variance(
            model, data, [data], num_draws=1, epochs=1, lr=0.01, momentum=0.0
        ),
        "stability_rows": lambda: diagnostics.stability_rows(
            model, data, data, lr=0.1, batch_size=8, num_draws=1
        ),
        "joint_weight_masks": lambda: choice.joint_weight_masks(model, data, keep=0.5),
        "compensate_masked": lambda: repair.compensate_masked(model, data, masks),
        "prune_weights": lambda: pruning.prune_weights(model, data, keep=0.5),
    }
    for stand_in in ("map", "mean", "zero"):
        found[f"variance_curves {stand_in}"] = lambda kind=stand_in: tpvprune.variance_curves(
            model, groups, data, stand_in=kind
        )
    for name in sorted(set(SCORERS) - NEEDS_LABELS - {"bn_scale"}):
        found[f"scorer {name}"] = lambda n=name: SCORERS[n](model, groups, data)
    for name, scorer in WEIGHT_SCORERS.items():
        found[f"weight scorer {name}"] = lambda s=scorer: s(model, data)
    return found


def confident():
    model = build(Residual)
    with torch.no_grad():
        model.fc.weight.mul_(100)
    return model


NAMES = list(calls(batches(8, 4)))


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_dropped_unread(name):
    poisoned = [(x, Poison()) for x in batches(16, 8)]
    calls(poisoned)[name]()


def test_no_function_is_left_out():
    covered = {name.split()[0] for name in NAMES} | ELSEWHERE | {"export_model", "export_int8"}
    for module in (tpvprune, diagnostics):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and UNLABELED & set(inspect.signature(value).parameters):
                assert name in covered, name


def test_an_export_is_compared_on_labelled_batches_too(tmp_path):
    model, data = build("chain"), [(x.float(), Poison()) for x in batches(4, 2)]
    exported = tpvprune.export_model(
        model.float(), images(2).float(), tmp_path / "model.pt2", format="pt2", batches=data
    )
    assert exported is not None


def test_curves_with_and_without_labels_are_the_same():
    model, data = confident(), batches(16, 8)
    groups = tpvprune.find_groups(model, images(2))
    plain = tpvprune.variance_curves(model, groups, data)
    labelled = tpvprune.variance_curves(model, groups, [(x, Poison()) for x in data])
    for name, curve in plain.items():
        assert torch.equal(curve.order, labelled[name].order)
        assert torch.equal(curve.variance, labelled[name].variance)


def test_branches_go_alike_with_and_without_labels():
    model, data = confident(), batches(16, 8)
    options = {"keep": 0.6, "granularity": ("channel", "branch"), "max_depth_removed": 1}
    plain, labelled = (
        tpvprune.prune(model, d, **options) for d in (data, [(x, Poison()) for x in data])
    )
    assert plain.report["branches"] == labelled.report["branches"]
    assert not labelled.report["used_labels"] and "trials of depth" in labelled.report["timings"]
    for one, other in zip(plain.model.parameters(), labelled.model.parameters(), strict=True):
        assert torch.equal(one, other)
