"""A pruning run that was stopped goes on to what an unbroken one gives, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tpvprune
from tpvprune.cli.console import Stages


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


@pytest.fixture
def model():
    torch.manual_seed(1)
    blocks = [Block() for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    ).eval()  # fmt: skip


def batches():
    generator = torch.Generator().manual_seed(2)
    return list(torch.randn(40, 3, 12, 12, generator=generator).split(8))


def stop_at(number):
    """Return progress that stops the run at its so-manieth call, as Ctrl-C does."""
    calls = []

    def progress(*call):
        calls.append(call)
        if len(calls) == number:
            raise KeyboardInterrupt

    return progress, calls


@pytest.mark.parametrize(
    "options", [{"criterion": "tpv"}, {"criterion": "magnitude"}, {"repair": "bn"}]
)
@pytest.mark.long
def test_a_stopped_run_gives_what_an_unbroken_one_does(model, tmp_path, options):
    options = {"keep": 0.4, "steps": 2, "repair": "reconstruct", **options}
    progress, calls = stop_at(None)
    unbroken = tpvprune.prune(model, batches(), **options, progress=progress)
    went_on = 0
    moments = range(1, len(calls) + 1, 13)
    for number in moments:
        state = tmp_path / f"{number}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            tpvprune.prune(model, batches(), **options, state=state, progress=stop_at(number)[0])
        progress, again = stop_at(None)
        found = tpvprune.prune(model, batches(), **options, state=state, progress=progress)
        went_on += len(again) < len(calls)
        for name, value in unbroken.model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], value)
        for name in unbroken.kept:
            assert torch.equal(found.kept[name], unbroken.kept[name])
            assert torch.equal(found.scores[name], unbroken.scores[name])
        timings = found.report.pop("timings")
        assert timings.keys() == unbroken.report["timings"].keys()
        assert found.report == {k: v for k, v in unbroken.report.items() if k != "timings"}
    assert went_on > len(moments) / 4


def test_the_state_of_another_run_is_not_taken(model, tmp_path):
    state = tmp_path / "state.safetensors"
    tpvprune.prune(model, batches(), keep=0.5, state=state)
    changed = batches()
    changed[0][0, 0, 0, 0] += 1
    for inputs, keep, seed in [(changed, 0.5, 0), (batches(), 0.6, 0), (batches(), 0.5, 1)]:
        expected = tpvprune.prune(model, inputs, keep=keep, seed=seed)
        found = tpvprune.prune(model, inputs, keep=keep, seed=seed, state=state)
        for name, value in expected.model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], value)
    curves = {
        name: replace(curve, order=curve.order.flip(0))
        for name, curve in expected.ranking.curves.items()
    }
    given = replace(expected.ranking, curves=curves)
    tpvprune.prune(model, batches(), keep=0.5, state=state)
    other = tpvprune.prune(model, batches(), keep=0.5, ranking=given)
    found = tpvprune.prune(model, batches(), keep=0.5, ranking=given, state=state)
    assert all(torch.equal(found.kept[n], other.kept[n]) for n in other.kept)
    state.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="state of an unfinished run"):
        tpvprune.prune(model, batches(), keep=0.5, state=state)


def test_progress_counts_up_to_the_whole(model):
    progress, calls = stop_at(None)
    tpvprune.prune(model, batches(), keep=0.4, progress=progress)
    parts = {}
    for stage, done, total in calls:
        parts.setdefault((stage, total), []).append(done)
    named = {stage for stage, _ in parts}
    assert {"curves", "elimination", "repair factors", "compensation"} <= named
    for (stage, total), found in parts.items():
        assert found == sorted(found), stage
        assert found[-1] == total, stage


def test_the_line_tells_what_is_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    shown = Stages()
    assert shown.line() == ""
    shown.update("curves", 0, 8)
    now = 106.0
    assert shown.line() == "curves 0/8 ... 6 s"
    shown.update("curves", 2, 8)
    assert shown.line() == "curves 2/8 ... 6 s, about 18 s left"
    shown.update("removal", 0, 1)
    assert shown.line() == "removal ... 0 s"
