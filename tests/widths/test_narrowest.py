"""The smallest reachable cost: nothing that works costs less, and a cut gets there."""

import itertools
import json

import pytest
import timm
import torch
from cases import CASES, build, images
from image_cases import write_images

import tpvprune.cifar_resnet  # noqa: F401  (registers its models with timm)
from tpvprune.cli.entry import main
from tpvprune.groups import find_groups
from tpvprune.groups.budget import cost
from tpvprune.groups.removal import remove_channels, restore_empty
from tpvprune.passes.evaluation import count_macs, count_params
from tpvprune.pipeline import prune
from tpvprune.widths.limits import Limits
from tpvprune.widths.narrowest import narrowest

MOST = 11  # channels of a model whose every selection is tried
SIZE = ["--img-size", "16", "--crop-pct", "1"]


def every_selection(groups):
    sizes = [g.num_channels for g in groups]
    for bits in itertools.product([False, True], repeat=sum(sizes)):
        parts = torch.tensor(bits).split(sizes)
        kept = dict(zip([g.name for g in groups], parts, strict=True))
        if all(part.any() for part in parts):
            restored = restore_empty(groups, kept)
            if all(torch.equal(restored[n], kept[n]) for n in kept):
                yield kept


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_that_works_costs_less(case, of):
    groups = find_groups(build(case), images(2))
    if sum(g.num_channels for g in groups) > MOST:
        pytest.skip("too many selections to try them all")
    found = cost(groups, narrowest(groups, of), of)
    assert found == pytest.approx(min(cost(groups, k, of) for k in every_selection(groups)))


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_cut_and_costs_what_is_said(case):
    model = build(case)
    groups = find_groups(model, images(2))
    kept = narrowest(groups)
    smaller = remove_channels(model, groups, kept)
    assert count_macs(smaller, images(1)) == pytest.approx(groups.macs(kept))
    assert count_params(smaller) == groups.params(kept)


def test_limits_hold_and_what_they_ask_for_is_cheap():
    groups = padded_stream()[1]
    for limits in (
        Limits(min_channels=3),
        Limits(max_removed=0.5),
        Limits(round_to=4),
        Limits(round_to="auto"),
    ):
        kept = narrowest(groups, limits=limits)
        for group in groups:
            assert kept[group.name].sum() == limits.least(group)
        first = {g.name: torch.arange(g.num_channels) < kept[g.name].sum() for g in groups}
        assert groups.macs(kept) <= groups.macs(restore_empty(groups, first))


def padded_stream():
    """A model some of whose channels run through one stage, others through all."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", num_classes=3).eval()
    return model, find_groups(model, torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("criterion", ["tpv", "magnitude"])
def test_a_budget_below_it_is_cut_down_to_it(criterion):
    model, groups = padded_stream()
    batches = [torch.randn(8, 3, 16, 16)]
    result = prune(model, batches, keep=1e-4, criterion=criterion, repair="none")
    assert not result.report["reached"]
    assert result.report["pruned"]["macs"] == pytest.approx(groups.macs(narrowest(groups)))


def test_groups_and_plans_say_what_a_cut_reaches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "flat", 4, size=16)
    model = ["--model", "cifar_resnet20", *SIZE, "--json"]
    cut = ["prune", *model, "--data-dir", "flat", "--criterion", "magnitude", "--repair", "none"]
    cut += ["--keep", "0.001", "--latency-repeats", "0", "--output", "out"]
    found = []
    for argv, code in ((["groups", *model], 0), ([*cut, "--dry-run"], 3), (cut, 3)):
        assert main(argv) == code
        document = json.loads(capsys.readouterr().out)
        found.append(document["pruned" if argv is cut else "smallest"])
    assert len({round(counts["macs"]) for counts in found}) == 1
