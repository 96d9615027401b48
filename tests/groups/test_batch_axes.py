"""Images lie where they lie: scores are sums over one image, whatever dimension holds the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tpvprune
from tpvprune.scores.curves import variance_curves


class Layout(nn.Module):
    """An MLP over the tokens of an image; ``inside`` lays them out, ``outside`` takes it back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 12, 2, 2), nn.LayerNorm(12)
        self.one, self.two, self.fc = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def inside(self, tokens: Tensor) -> Tensor:
        return tokens

    def outside(self, tokens: Tensor, num: int) -> Tensor:
        return tokens

    def mlp(self, tokens: Tensor) -> Tensor:
        return tokens + self.two(self.one(self.norm(tokens)).relu())

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)  # [B, T, C]
        return self.fc(self.outside(self.mlp(self.inside(tokens)), len(x)).mean(1))


class SequenceFirst(Layout):
    def inside(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1)

    def outside(self, tokens: Tensor, num: int) -> Tensor:
        return tokens.transpose(0, 1)


class FoldedBehind(Layout):
    def inside(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(0, 1)  # [B * T, C]

    def outside(self, tokens: Tensor, num: int) -> Tensor:
        return tokens.unflatten(0, (num, -1))


class FoldedBefore(Layout):
    def inside(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1).flatten(0, 1)  # [T * B, C]

    def outside(self, tokens: Tensor, num: int) -> Tensor:
        return tokens.unflatten(0, (-1, num)).transpose(0, 1)


class HalvesConcatenated(Layout):
    def inside(self, tokens: Tensor) -> Tensor:
        return torch.cat(tokens.chunk(2, 1))  # [2 * B, T / 2, C]

    def outside(self, tokens: Tensor, num: int) -> Tensor:
        return torch.cat(tokens.chunk(2), 1)


class BatchInTheMiddle(Layout):
    def inside(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (4, 4)).permute(1, 0, 2, 3).flatten(1, 2)  # [4, B * 4, C]

    def outside(self, tokens: Tensor, num: int) -> Tensor:
        return tokens.unflatten(1, (num, 4)).permute(1, 0, 2, 3).flatten(1, 2)


LAYOUTS = [SequenceFirst, FoldedBehind, FoldedBefore, HalvesConcatenated, BatchInTheMiddle]


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(96, 3, 1, 1, generator=generator)
    return torch.randn(96, 3, 8, 8, generator=generator) + common


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compensated", [False, True])
def test_scores_are_those_of_the_usual_layout(layout, compensated, images):
    found = []
    for model in (Layout().eval(), layout().eval()):
        groups = tpvprune.find_groups(model, images[:3])
        batches = list(images[:24].split(8))
        found.append(tpvprune.tpv_scores(model, groups, batches, compensated=compensated))
    usual, other = found
    assert usual.keys() == other.keys() and len(other) == 2
    for name, scores in usual.items():
        torch.testing.assert_close(other[name], scores, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_do_not_depend_on_how_many_images_share_a_batch(layout, images):
    """Alone in its batch an image cannot be taken for another."""
    model = layout().eval()
    groups = tpvprune.find_groups(model, images[:2])
    alone, together = (
        tpvprune.tpv_scores(model, groups, list(images[:12].split(size)), compensated=False)
        for size in (1, 6)
    )
    for name, scores in alone.items():
        torch.testing.assert_close(together[name], scores, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("layout", [SequenceFirst, FoldedBefore, HalvesConcatenated])
def test_curves_and_repairs_are_those_of_the_usual_layout(layout, images):
    batches = list(images.split(16))
    curves, shares = [], []
    for model in (Layout().eval(), layout().eval()):
        groups = tpvprune.find_groups(model, images[:2])
        curves.append(variance_curves(model, groups, batches))
        result = tpvprune.prune(model, batches, keep=0.5, repair="compensate")
        shares.append(result.report["variance_share"])
        assert shares[-1]["compensate"] < shares[-1]["none"]
    usual, other = curves
    for name, curve in usual.items():
        torch.testing.assert_close(other[name].variance, curve.variance, rtol=1e-3, atol=1e-9)
    assert shares[1]["none"] == pytest.approx(shares[0]["none"], rel=1e-3)


class AcrossImages(Layout):
    """Every token sees the mean of the batch."""

    def inside(self, tokens: Tensor) -> Tensor:
        return tokens + tokens.mean(0, keepdim=True)


class AcrossAll(Layout):
    """Every token sees one number of the whole batch: a tensor without dimensions."""

    def inside(self, tokens: Tensor) -> Tensor:
        return tokens + tokens.abs().mean() * torch.arange(float(tokens.shape[2]))


class Noisy(Layout):
    """Random numbers in evaluation, too."""

    def inside(self, tokens: Tensor) -> Tensor:
        return tokens + 0.1 * torch.randn_like(tokens)


class NoneOfThem(Layout):
    """The layer reads a table that all images share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 12))

    def inside(self, tokens: Tensor) -> Tensor:
        return tokens + self.table(torch.ones(tokens.shape[1], 2))


@pytest.mark.parametrize(
    ("model", "group", "reason"),
    [
        (AcrossImages, "one", "several images at a time"),
        (AcrossAll, "one", "several images at a time"),
        (AcrossAll, "stem", "which makes one number of all there is"),
        (Noisy, "one", "other numbers every time that the model runs"),
        (NoneOfThem, "table.0", "sees no input"),
    ],
)
def test_what_belongs_to_no_one_image_stays_whole_with_the_reason(model, group, reason, images):
    groups = tpvprune.find_groups(model().eval(), images[:2])
    assert group not in groups
    assert reason in {b.name: b.blocked for b in groups.blocked}[group]


class SomeOfThem(Layout):
    """Another layer reads as many tokens as are far from zero: on small images none."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.last = nn.Linear(12, 6), nn.Linear(6, 12)

    def inside(self, tokens: Tensor) -> Tensor:
        far = tokens[tokens.detach().abs().sum(2) > 1e6]
        return tokens + self.last(self.extra(far)).sum()


def test_a_layer_that_reads_nothing_at_all_is_no_error(images):
    groups = tpvprune.find_groups(SomeOfThem().eval(), images[:2])
    assert "one" in groups and "extra" not in groups
