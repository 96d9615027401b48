"""Whatever a network returns: what is verified, what is scored, and what is said."""

from dataclasses import dataclass

import pytest
import torch
from cases import batches
from torch import nn

from tpvprune import find_groups, prune, tpv_scores
from tpvprune.passes.running import first_output


@dataclass
class Record:
    classes: torch.Tensor
    logits: torch.Tensor


class Net(nn.Module):
    def __init__(self, wrap, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 5)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.f(self.b(self.a(x).relu()).relu().mean((2, 3))))


WRAPS = {
    "anchors beside": lambda y: (y, torch.zeros(7, 4)),
    "stacked": lambda y: (y, torch.stack([y, y, y])),
    "classes first": lambda y: {"classes": y.argmax(1), "logits": y},
    "record": lambda y: Record(y.argmax(1), y),
    "deep": lambda y: [[], ({"boxes": [y]}, None)],
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_outputs_of_any_kind_are_pruned(wrap):
    result = prune(Net(wrap).eval().double(), batches(24), keep=0.6)
    assert result.report["reached"]
    assert result.report["variance_share"]["compensate"] < result.report["variance_share"]["none"]
    assert {g.name for g in result.groups} == {"a", "b"}


@pytest.mark.parametrize("name", ["classes first", "record", "deep"])
def test_scores_are_those_of_the_first_real_output(name):
    x = batches(12)
    plain, other = (Net(w).eval().double() for w in (lambda y: y, WRAPS[name]))
    scores = [tpv_scores(m, find_groups(m, x[0]), x) for m in (plain, other)]
    for group in ("a", "b"):
        assert torch.equal(scores[0][group], scores[1][group])


def test_places_of_what_is_true_are_not_followed_but_do_not_break():
    model = Net(lambda y: y * (1 + torch.where(y > 0)[0].double().mean())).eval().double()
    groups = find_groups(model, batches(4)[0])
    assert {g.name for g in groups} == {"a", "b"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: [{"scores": row} for row in y],
        lambda y: y.reshape(-1, 1),
        lambda y: y.sum(),
        lambda y: y[:, 0],
    ],
)
def test_outputs_that_are_not_one_for_each_image_are_said(wrap):
    model = Net(wrap).eval().double()
    said = "expected outputs with one entry per image along dimension 0, found shape .*: wrap the"
    with pytest.raises(ValueError, match=said):
        prune(model, batches(16), keep=0.6)
    groups = find_groups(model, batches(4)[0])
    with pytest.raises(ValueError, match=said):
        tpv_scores(model, groups, batches(16))


@pytest.mark.parametrize("outputs", [torch.arange(3), [], None, {"a": "b"}, [[torch.arange(2)]]])
def test_nothing_to_score_is_said(outputs):
    with pytest.raises(ValueError, match="expected a model that returns a tensor of real numbers"):
        first_output(outputs)


class Beside(nn.Module):
    """A second output, a million times smaller, to which a cut would do something else."""

    def __init__(self):
        super().__init__()
        self.a, self.f, self.g = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        h = self.a(x).relu().mean((2, 3))
        # Whether the first channel is there is not seen where its value is zero.
        return self.f(h), 1e-12 * self.g(h) * (1 + h.shape[1])


def test_a_small_output_does_not_hide_beside_a_large_one():
    groups = find_groups(Beside().eval().double(), batches(4)[0])
    assert not len(groups)
    (why,) = [g.blocked for g in groups.blocked if g.name == "a"]
    assert "differ by" in why


class TwoHeads(nn.Module):
    """Each head has layers of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Conv2d(3, 16, 3)
        self.a, self.b = nn.Conv2d(16, 32, 3), nn.Conv2d(16, 32, 3)
        self.classes, self.map = nn.Linear(32, 10), nn.Conv2d(32, 2, 1)

    def forward(self, x):
        h = self.trunk(x).relu()
        return self.classes(self.a(h).relu().mean((2, 3))), self.map(self.b(h).relu())


@pytest.mark.parametrize("criterion", ["tpv", "magnitude", "activation_variance"])
def test_what_serves_further_outputs_only_stays_and_it_is_said(criterion):
    result = prune(TwoHeads().eval().double(), batches(24), keep=0.8, criterion=criterion)
    assert {g.name for g in result.groups} == {"trunk", "a"}
    assert "only the first" in {g.name: g.blocked for g in result.groups.blocked}["b"]
    assert any("returns 2 outputs" in w for w in result.report["warnings"])
    assert result.report["reached"]


def test_one_output_needs_no_word():
    result = prune(Net(lambda y: y).eval().double(), batches(24), keep=0.8)
    assert not any("outputs" in w for w in result.report["warnings"])
