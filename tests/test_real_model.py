"""The promise on a real network and real images: scores are right, the pruned model works.

Needs the CIFAR-10 tars and weights in a folder 'shared' beside the checkout; skips without.
"""

import pytest
import torch
from shared_files import shared

from tpvprune import evaluate, find_groups, prune, tpv_scores
from tpvprune.diagnostics import ablation_scores, spearman
from tpvprune.images.loading import choose_images, in_memory
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.saved.models import load_model


@pytest.fixture(scope="module")
def model():
    checkpoint = shared("weights/cifar_resnet20.safetensors")
    return load_model("cifar_resnet20", checkpoint=str(checkpoint))[0].eval()


def images(model, name, num, labelled=False):
    source = open_images(str(shared(f"data/{name}.tar")), labelled=labelled)
    batches = choose_images(
        source, resolve_preprocessing(model), num_images=num, seed=0, batch_size=125, workers=2,
        labelled=labelled,
    )  # fmt: skip
    return in_memory(batches)


@pytest.mark.long
def test_scores_rank_channels_as_removing_them_does(model):
    unlabeled = images(model, "cifar10-train", 125)
    groups = find_groups(model, next(iter(unlabeled))[:1])
    truth = ablation_scores(model, groups, unlabeled, max_channels=6)
    scores = tpv_scores(model, groups, unlabeled, compensated=False)
    measured, scored = (torch.cat([s[g.name] for g in groups]) for s in (truth, scores))
    known = measured.isfinite()
    # 0.988 over all channels and 500 images; a sixth of the channels and 125 images lose a little.
    assert spearman(measured[known], scored[known]) > 0.95


@pytest.mark.long
def test_half_of_the_network_still_works_without_a_label(model):
    result = prune(model, images(model, "cifar10-train", 125), keep=0.5)
    test = images(model, "cifar10-test", 1000, labelled=True)
    assert 0.48 <= result.report["pruned"]["macs"] / result.report["dense"]["macs"] <= 0.5
    # 86 % on all test images with 1,000 unlabeled ones; an uncompensated cut is below 40 %.
    assert evaluate(result.model, test).top1 > 0.80
    assert result.report["output_variance"]["compensate"] < result.report["output_variance"]["none"]
