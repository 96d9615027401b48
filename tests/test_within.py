"""The smallest model within a limit of loss: the search, and which images see what."""

import pytest
import torch
from cases import Poison, Residual, batches, build
from hypothesis import given
from hypothesis import strategies as st

import tpvprune
from tpvprune.passes import loss
from tpvprune.pipeline import within
from tpvprune.pipeline.within import bisect


@given(st.floats(0, 1), st.integers(1, 12))
def test_bisection_finds_the_smallest_size_of_a_loss_that_falls(edge, num_sizes):
    tried = {}

    def lost(keep):
        tried[keep] = 0.0 if keep >= edge else 5.0
        return keep, tried[keep]

    bisect(lost, 1.0, num_sizes)
    assert len(tried) == num_sizes
    kept = [keep for keep, points in tried.items() if points <= 1.0]
    smallest = min(kept, default=1.0)
    assert 0 <= smallest - edge <= 2.0**-num_sizes or (not kept and edge > 1 - 2.0**-num_sizes)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_below_the_smallest_possible_size_only_one_is_tried(smallest, edge):
    tried = []

    def lost(keep):
        tried.append(max(keep, smallest))
        return tried[-1], 0.0 if tried[-1] >= edge else 5.0

    bisect(lost, 1.0, 12)
    assert tried.count(smallest) <= 2  # the second where it is a size that was asked for itself
    assert len(set(tried)) >= len(tried) - 1


def test_a_loss_that_rises_in_between_still_gives_the_smallest_size_that_kept_the_limit():
    noisy = {0.5: 0.2, 0.25: 3.0, 0.375: 0.9, 0.3125: 1.1, 0.34375: 0.7}
    tried = []
    bisect(lambda keep: (keep, (tried.append(keep), noisy[keep])[1]), 1.0, 5)
    assert tried == [0.5, 0.25, 0.375, 0.3125, 0.34375]


def rows(data):
    return {row.numpy().tobytes() for x in data for row in x}


@pytest.fixture
def shown(monkeypatch):
    """Note what images are pruned with, and what each half that measures is given."""
    fit, measured = [], []

    class Sizes(tpvprune.Sizes):
        def __init__(self, model, data, **options):
            fit.extend(list(data))
            super().__init__(model, data, **options)

    class Losses(loss.Losses):
        def __init__(self, dense, data, **options):
            super().__init__(dense, data, **options)
            measured.append(list(self._inputs))

    monkeypatch.setattr(within, "Sizes", Sizes)
    monkeypatch.setattr(within, "Losses", Losses)
    return fit, measured


@pytest.mark.parametrize(("num_images", "aside"), [(24, 24), (40, 12), (None, 12)])
def test_images_that_decide_judge_and_fit_are_different_ones(shown, num_images, aside):
    model, data = build(Residual), batches(48, 8)
    # 24 are wanted: they are left beside 24; beside 40 fewer than a quarter would be.
    result = tpvprune.prune_within(
        model, data, max_loss=30, num_images=num_images, images_to_measure=24, num_sizes=3,
        repair="none",
    )  # fmt: skip
    fit, (deciding, judging) = rows(shown[0]), map(rows, shown[1])
    assert len(deciding) + len(judging) == aside and len(fit) == 48 - aside
    assert not fit & deciding and not fit & judging and not deciding & judging
    quality = result.report["quality"]
    assert quality["promised"]["num_images"] == len(deciding)
    assert quality["measured"]["num_images"] == len(judging)
    assert result.reached == quality["met"]


def test_the_result_is_that_of_prune_at_its_size_and_labels_only_choose_it():
    model, data = build(Residual), batches(48, 8)
    poisoned = [(x, Poison()) for x in data]
    labelled = [(x, torch.randint(0, 3, (len(x),))) for x in batches(32, 8)]
    result = tpvprune.prune_within(model, poisoned, max_loss=25, labelled=labelled, num_sizes=3)
    keep = result.report["keep"]
    alone = tpvprune.prune(model, data, keep=keep)
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name])
    quality = result.report["quality"]
    assert quality["of"] == "top-1" and not result.report["used_labels"]
    judging = [(x[1::2], y[1::2]) for x, y in labelled]
    dense, pruned = (tpvprune.evaluate(m, judging).top1 for m in (model, result.model))
    assert quality["measured"]["points"] == pytest.approx(100 * (dense - pruned))
    met = [size["keep"] for size in quality["sizes"] if size["loss"]["points"] <= 25]
    assert keep == min(met, default=max(size["keep"] for size in quality["sizes"]))


def test_a_limit_that_cannot_be_kept_is_said_with_the_largest_size(monkeypatch):
    monkeypatch.setattr(loss.Losses, "of", lambda *_: loss.Loss.of_agreement(2, 10))
    said = []
    result = tpvprune.prune_within(
        build(Residual), batches(48, 8), max_loss=5, num_sizes=3, repair="none",
        notice=said.append,
    )  # fmt: skip
    assert not result.reached and result.report["keep"] == 0.875
    assert any(line.startswith("even keep 0.875, the largest size") for line in result.warnings)
    assert any("10 images decide, which leaves an interval of" in line for line in result.warnings)
    assert not any("the ranking was given" in line for line in result.warnings)
    again = tpvprune.prune_within(
        build(Residual), batches(48, 8), max_loss=5, num_sizes=1, repair="none",
        ranking=result.ranking,
    )  # fmt: skip
    assert any("the ranking was given" in line for line in again.warnings)
    assert [line.split(":")[0] for line in said] == [f"size {i} of at most 3" for i in (1, 2, 3)]


def test_a_judgement_far_beyond_the_promise_is_said(monkeypatch):
    found = iter([loss.Loss.of_agreement(0, 400), loss.Loss.of_agreement(80, 400)])
    monkeypatch.setattr(loss.Losses, "of", lambda *_: next(found))
    result = tpvprune.prune_within(
        build(Residual), batches(48, 8), max_loss=5, num_sizes=1, repair="none"
    )
    assert result.reached and result.warnings[-1].startswith("on images that took no part 20.00")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_loss": 0}, "max_loss: expected points above 0 and below 100, found 0"),
        ({"max_loss": float("nan")}, "max_loss: expected points above 0"),
        ({"max_loss": 1, "num_sizes": 0}, "num_sizes: expected at least 1, found 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tpvprune.prune_within(build(Residual), batches(16, 8), **options)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="batches: expected at least 8 images"):
        tpvprune.prune_within(build(Residual), batches(6, 2), max_loss=5)
