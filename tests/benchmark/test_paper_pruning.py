"""benchmarks/paper_pruning.py: counts, rankings and labels are those of the paper's code."""

import importlib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import timm
import torch
from cases import build
from image_cases import write_classes

from tpvprune import find_groups
from tpvprune.passes.clock import Clock
from tpvprune.scores.baselines.jacobian import jbr_scores
from tpvprune.scores.criteria import SCORERS
from tpvprune.widths.limits import Limits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("paper_pruning")


@pytest.fixture
def model():
    return build("residual")


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 3) for _ in range(2)]


def key(criterion, **more):
    return {"criterion": criterion, "repair": "none", "ratio": 0.6, "steps": 3, "seed": 0} | more


def kept_by_hand(groups, scores, num):
    """Sort all channels by score; the last of every group stays."""
    kept = {g.name: torch.ones(g.num_channels, dtype=torch.bool) for g in groups}
    channels = [
        (float(scores[g.name][c]), g.name, c) for g in groups for c in range(g.num_channels)
    ]
    left = len(channels)
    for _, name, channel in sorted(channels):
        if left > num and int(kept[name].sum()) > 1:
            kept[name][channel] = False
            left -= 1
    return kept


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("criterion", ["magnitude_l1", "taylor_torch_pruning", "tpv"])
def test_the_lowest_scores_go_whichever_layer_they_are_in(tool, model, pairs, criterion, share):
    inputs = [x for x, _ in pairs]
    groups = find_groups(model, inputs[0])
    num = round(share * sum(g.num_channels for g in groups))
    by = tool.ranked_by(key(criterion), pairs, 1)
    ranking = by.ranked(model, groups, inputs, Clock(None))
    found = ranking.choose(
        groups, keep=num / sum(g.num_channels for g in groups), of=tool.CHANNELS, limits=Limits()
    )
    expected = kept_by_hand(groups, ranking.scores, num)
    assert sum(int(mask.sum()) for mask in found.values()) == num
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("criterion", ["tpv", "tpv_curves", "jbr", "jacobian", "random", "fpgm"])
def test_every_step_takes_its_share_of_the_channels(tool, model, pairs, criterion):
    total = sum(g.num_channels for g in find_groups(model, pairs[0][0]))
    wide = [module.out_channels for module in model.modules() if hasattr(module, "out_channels")]
    steps = list(tool.steps_down(model, pairs, key(criterion), 1))
    assert [step for step, _, _ in steps] == [1, 2, 3]
    for step, share, pruned in steps:
        assert share * total == pytest.approx(round(total * (1 - 0.2 * step)))
        widths = [m.out_channels for m in pruned.modules() if hasattr(m, "out_channels")]
        assert min(widths) >= 1
        assert sum(widths) < sum(wide)


def test_jbr_is_the_jacobian_criterion_with_the_dense_networks_classes(
    tool, model, pairs, monkeypatch
):
    inputs = [x.double() for x, _ in pairs]
    with torch.no_grad():
        sureness = torch.cat([model(x).softmax(1).amax(1) for x in inputs])
    half = float(sureness.median())
    monkeypatch.setattr(tool, "CONFIDENCE", half)
    sure = tool.pseudo_labelled(model, inputs)
    groups = find_groups(model, inputs[0])
    expected = jbr_scores(model, groups, inputs, confidence=half)
    assert 0 < expected.num_samples < sum(map(len, inputs))
    assert sum(len(y) for _, y in sure) == expected.num_samples
    ranking = tool.ranked_by(key("jbr"), sure, 1).ranked(model, groups, inputs, Clock(None))
    for group in groups:
        torch.testing.assert_close(ranking.scores[group.name], expected[group.name])


def test_statistics_are_recalibrated_and_weights_are_not_touched(tool, model, pairs):
    (_, _, plain), *_ = tool.steps_down(model, pairs, key("fpgm"), 1)
    (_, _, fresh), *_ = tool.steps_down(model, pairs, key("fpgm", repair="bn"), 1)
    changed = {
        name
        for name, tensor in plain.state_dict().items()
        if not torch.equal(tensor, fresh.state_dict()[name])
    }
    assert changed
    assert all("running_" in name for name in changed)


def test_what_is_ranked_without_images_sees_none(tool, model, pairs):
    groups = find_groups(model, pairs[0][0])
    blind = [(torch.full_like(x, float("nan")), y) for x, y in pairs]
    for criterion in sorted(tool.NO_IMAGES - {"bn_scale"}):  # not every group here has a BatchNorm
        seed = int(criterion in tool.WEIGHTS_ALONE)  # these draw nothing either
        before = SCORERS[criterion](model, groups, pairs, seed=0)
        after = SCORERS[criterion](model, groups, blind, seed=seed)
        assert all(torch.equal(before[g.name], after[g.name]) for g in groups)


@pytest.mark.long
def test_a_run_writes_rows_a_table_and_a_chart_and_goes_on(tool, tmp_path, monkeypatch, capsys):
    for name, num in (("train", 8), ("test", 3)):
        write_classes(tmp_path / name, ["a", "b"], num)
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", num_classes=2).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    given = [
        "--model", "test_resnet", "--checkpoint", tmp_path / "weights.pt", "--train-dir",
        tmp_path / "train", "--test-dir", tmp_path / "test", "--num-images", 12, "--batch-size", 4,
        "--criteria", "tpv", "magnitude_l1", "--ratio", 0.4, "--steps", 2, "--every", 1,
        "--repair", "none", "--output", tmp_path,
    ]  # fmt: skip
    words = [str(word) for word in given]
    assert tool.main([*words, "--repeats", "1"]) == 0
    path = tmp_path / "paper-pruning-test_resnet-12.csv"
    first = path.read_text()
    assert len(first.splitlines()) == 1 + 2 * 2
    assert tool.main([*words, "--repeats", "2"]) == 0
    assert path.read_text().startswith(first)
    # L1 sees no image and draws nothing: one run; TPV has two seeds.
    assert len(path.read_text().splitlines()) == 1 + 2 * (2 + 1)
    monkeypatch.setattr(tool, "measure", None)  # nothing is left to do
    capsys.readouterr()
    assert tool.main([*words, "--repeats", "2"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| repair | criterion | labels | 0.80 | 0.60 | repeats |"
    assert [line.split(" | ")[-1] for line in lines].count("1 |") == 1
    assert ET.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert tool.main([*words, "--steps", "5"]) == 2
    assert "holds rows of ratio 0.4, steps 2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as failure:
        tool.main([*words, "--ratio", "1"])
    assert failure.value.code == 2
