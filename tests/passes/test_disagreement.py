"""Agreement by class and the images that changed, against plain loops."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from torch import nn

from tpvprune.passes.disagreement import disagreement
from tpvprune.passes.evaluation import agreement
from tpvprune.reports.pictures import classes, samples

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Linear(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(3 * 4 * 4, 5)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.fixture
def case():
    model, dense = Linear(0), Linear(1)
    with torch.no_grad():  # close to each other, so that some images agree
        model.fc.weight.lerp_(dense.fc.weight, 0.6)
    pixels = torch.randint(0, 256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(2))
    scale, shift = (torch.tensor(x)[:, None, None] for x in (STD, MEAN))
    return model, dense, pixels, (pixels / 255 - shift) / scale


def test_counts_and_samples_are_those_of_a_plain_loop(case, untouched):
    model, dense, _, x = case
    with untouched(model), untouched(dense):
        found = disagreement(model, dense, list(x.split(7)), mean=MEAN, std=STD, num_samples=3)
    before, after = dense(x).argmax(1), model(x).argmax(1)
    for row in found["classes"]:
        mine = before == row["class"]
        assert row["num_images"] == int(mine.sum())
        assert row["agreement"] == pytest.approx(float((after == before)[mine].float().mean()))
    assert sum(row["num_images"] for row in found["classes"]) == found["num_images"] == 40
    assert 1 - found["num_changed"] / 40 == pytest.approx(agreement(model, dense, [x]))
    share = dense(x).softmax(1).amax(1).where(before != after, -torch.inf)
    expected = share.topk(3)
    assert [s["dense_share"] for s in found["samples"]] == pytest.approx(expected.values.tolist())
    assert [s["pruned"] for s in found["samples"]] == after[expected.indices].tolist()


def test_pictures_are_the_images_before_normalisation(case):
    model, dense, pixels, x = case
    found = disagreement(model, dense, [x], mean=MEAN, std=STD, num_samples=40)
    before, after = dense(x).argmax(1), model(x).argmax(1)
    share = dense(x).softmax(1).amax(1).tolist()
    order = (before != after).nonzero().flatten().tolist()
    order.sort(key=lambda i: -share[i])
    assert len(found["samples"]) == len(order)
    for i, sample in zip(order, found["samples"], strict=True):
        content = base64.b64decode(sample["image"].partition(",")[2])
        shown = torch.tensor(list(Image.open(io.BytesIO(content)).tobytes()))
        assert torch.equal(shown.reshape(4, 4, 3), pixels[i].permute(1, 2, 0).long())


def test_what_is_not_finite_counts_as_changed_and_is_not_shown(case):
    model, dense, _, x = case

    class Overflowing(nn.Module):
        def forward(self, x):
            return model(x).masked_fill(x[:, 0, 0, :1] > 0, torch.nan)

    num = int((x[:, 0, 0, 0] > 0).sum())
    shown = {"mean": MEAN, "std": STD, "num_samples": 40}
    found = disagreement(Overflowing(), dense, list(x.split(7)), **shown)
    assert 0 < num < found["num_changed"]
    assert 1 - found["num_changed"] / 40 == pytest.approx(agreement(Overflowing(), dense, [x]))
    assert len(found["samples"]) == found["num_changed"] - num
    json.dumps(found, allow_nan=False)


def test_outputs_that_are_no_classes_give_nothing():
    for model in (nn.Conv2d(3, 2, 1), nn.Sequential(nn.Flatten(), nn.Linear(48, 1))):
        x = torch.randn(2, 3, 4, 4)
        assert disagreement(model, model, [x], mean=MEAN, std=STD) is None


def test_sections_escape_names_and_take_only_pictures_of_ours(case):
    model, dense, _, x = case
    found = disagreement(model, dense, [x], mean=MEAN, std=STD)
    data = {"disagreement": found, "class_names": ["<b>"] * 5}
    for text in (classes(data), samples(data)):
        assert "<b>" not in text
        assert "&lt;b&gt;" in text
    found["samples"] = [{**found["samples"][0], "image": 'x" onerror="alert(1)'}]
    assert samples(data) == ""
    assert classes({}) == samples({}) == ""
