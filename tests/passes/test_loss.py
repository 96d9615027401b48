"""What a model loses: intervals against their definitions, counts against a loop over images."""

import math

import pytest
import torch
from cases import Poison, batches, build
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tpvprune
from tpvprune.passes.drawing import num_set_aside
from tpvprune.passes.loss import Loss, Losses, halves, images_needed, num_measured

Z = 1.959963984540054


@given(st.integers(1, 5000), st.floats(0, 1))
def test_ends_of_the_interval_of_agreement_solve_the_equation_of_wilson(num, part):
    lost = round(part * num)
    loss = Loss.of_agreement(lost, num)
    assert 0 <= loss.low <= loss.points <= loss.high + 1e-9 <= 100 + 1e-8
    for end in (loss.low / 100, loss.high / 100):
        # The estimate lies Z standard errors of that end from it.
        error = (lost / num - end) ** 2 - Z**2 * end * (1 - end) / num
        assert abs(error) < 1e-9
    assert (loss.low == 0) or lost


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 1000))
def test_the_interval_of_top_1_changes_sides_with_the_models(lost, won, alike):
    num = lost + won + alike + 1
    one, other = Loss.of_top1(lost, won, num), Loss.of_top1(won, lost, num)
    assert one.points == -other.points == pytest.approx(100 * (lost - won) / num)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    more = Loss.of_top1(100 * lost, 100 * won, 100 * num)
    assert more.width < one.width


@pytest.mark.parametrize("measure", ["agreement", "top-1"])
def test_intervals_hold_as_often_as_they_say(measure):
    generator = torch.Generator().manual_seed(0)
    lost_share, won_share, num, trials = 0.04, 0.02, 400, 4000
    draws = torch.rand(trials, num, generator=generator)
    lost = (draws < lost_share).sum(1).tolist()
    won = (draws > 1 - won_share).sum(1).tolist()
    if measure == "agreement":
        found, truth = [Loss.of_agreement(n, num) for n in lost], 100 * lost_share
    else:
        truth = 100 * (lost_share - won_share)
        found = [Loss.of_top1(a, b, num) for a, b in zip(lost, won, strict=True)]
    held = sum(loss.low <= truth <= loss.high for loss in found) / trials
    # Three standard errors of 4,000 trials, and what steps of whole images leave.
    assert abs(held - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials) + 0.01


@given(st.floats(0, 50), st.floats(0.2, 30))
def test_so_many_images_are_needed_and_no_fewer(points, width):
    num = images_needed(points, width)
    assert Loss.of_agreement(points / 100 * num, num).width <= width + 1e-9
    if num > 1:
        fewer = num - 1
        assert Loss.of_agreement(points / 100 * fewer, fewer).width > width - 1e-9
    assert Loss.of_agreement(points / 100 * num, num).needed(width) <= num
    assert 2 <= num_measured(width) <= 10_000


def test_counts_are_those_of_a_loop_over_images():
    dense, other = build("chain"), build("chain")
    with torch.no_grad():
        # Classes by what varies between images, not by the means.
        features = torch.cat([dense.eval()(x) for x in batches(60, 7)])
        dense.fc.bias -= features.mean(0)
        other.fc.bias -= features.mean(0) + 0.5 * features.std(0) * torch.tensor([1.0, 0, -1])
    data = batches(60, 7)
    labels = [torch.randint(0, 3, (len(x),)) for x in data]
    lost = won = differ = 0
    for x, y in zip(data, labels, strict=True):
        for image, label in zip(x, y, strict=True):
            a, b = (int(m.eval()(image[None]).argmax()) for m in (dense, other))
            differ += a != b
            lost += a == label != b
            won += b == label != a
    assert 0 < differ < 60 and lost and won
    # Once more: of the dense model only its classes are kept.
    unlabeled = Losses(dense, [(x, Poison()) for x in data])
    for _ in range(2):
        assert unlabeled.of(other) == Loss.of_agreement(differ, 60)
        assert unlabeled.of(dense).points == 0
    assert unlabeled.of(other).points == pytest.approx(
        100 * (1 - tpvprune.agreement(other, dense, data))
    )
    labelled = Losses(dense, list(zip(data, labels, strict=True)), labelled=True)
    assert labelled.of(other) == Loss.of_top1(lost, won, 60)


def test_outputs_that_are_not_finite_are_lost_and_positions_count_in_part():
    model = nn.Conv2d(3, 4, 1)
    broken = nn.Conv2d(3, 4, 1)
    broken.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 2, 2)
    losses = Losses(model, [x])
    assert losses.of(broken).points == 0
    with torch.no_grad():
        broken.weight.fill_(torch.nan)
    assert losses.of(broken).points == 100
    shifted = nn.Conv2d(3, 4, 1)
    shifted.load_state_dict(model.state_dict())
    with torch.no_grad():
        shifted.bias[0] += 0.3
    differ = (model(x).argmax(1) != shifted(x).argmax(1)).double().mean()
    assert losses.of(shifted).points == pytest.approx(100 * float(differ))


def test_a_model_without_classes_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    with pytest.raises(ValueError, match="max_loss: expected a model that chooses among classes"):
        Losses(model, [torch.randn(4, 3, 2, 2)]).of(model)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_halves_share_no_image_and_leave_none_out(sizes):
    numbers = torch.arange(sum(sizes)).split(sizes)
    one, other = (torch.cat([torch.empty(0), *half]) for half in halves(numbers))
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(sum(sizes)))
    assert 0 <= len(one) - len(other) <= 1
    pairs = halves([(x, -x) for x in numbers])[0]
    assert all(torch.equal(a, -b) for a, b in pairs)


@given(st.integers(8, 9000), st.none() | st.integers(2, 2000), st.integers(2, 5000))
def test_measuring_takes_what_is_left_or_a_quarter(num, num_images, wanted):
    aside = num_set_aside(num, num_images=num_images, wanted=wanted)
    assert 2 <= aside <= wanted
    assert aside == wanted or aside >= num // 4
    if num_images is not None and num >= num_images + wanted:
        assert aside == wanted
    assert aside <= max(num // 4, num - (num_images or num))
