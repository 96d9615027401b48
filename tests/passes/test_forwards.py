"""A model under another forward: the part that counts is cut, and the model itself works after."""

import copy
import sys

import pytest
import torch
from cases import batches
from torch import nn

from tpvprune import (
    count_macs,
    distill,
    find_groups,
    own_forward,
    prune,
    tpv_scores,
    with_forward,
)
from tpvprune.passes.detection import head_detections
from tpvprune.passes.forwards import forward_of, load_forward


class Boxes(nn.Module):
    """Returns what no score can be taken of: for each image as many rows as it likes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 12)

    def logits(self, x):
        return self.f(self.b(self.a(x).relu()).relu().mean((2, 3)))

    def forward(self, x):
        return [{"boxes": row[row > 0]} for row in self.logits(x)]


class Logits(Boxes):
    def forward(self, x):
        return self.logits(x)


def logits(model, x):
    return model.logits(x)


def test_scores_are_those_of_a_model_that_returns_what_counts():
    x = batches(8)
    model, plain = Boxes().double().eval(), Logits().double().eval()
    before = dict(model.__dict__)
    shared = with_forward(model, logits)
    scores = [tpv_scores(m, find_groups(m, x[0]), x) for m in (shared, plain)]
    assert set(scores[1]) == {"a", "b"}
    assert all(torch.equal(scores[0][n], scores[1][n]) for n in scores[1])
    assert count_macs(shared, x[0]) == count_macs(plain, x[0])
    assert model.__dict__ == before
    assert isinstance(model(x[0]), list)


def test_weights_are_shared_and_copies_stand_alone():
    model, x = Boxes().double().eval(), batches(4)[0]
    shared = with_forward(model, logits)
    copied = copy.deepcopy(shared)
    with torch.no_grad():
        shared.f.bias.add_(1)
    assert torch.equal(shared(x), model.logits(x))
    assert torch.allclose(copied(x) + 1, shared(x))
    assert isinstance(own_forward(copied)(x), list)
    assert own_forward(model) is model
    assert shared.state_dict().keys() == model.state_dict().keys()


def test_a_forward_may_call_the_model_itself():
    model, x = Logits().double().eval(), batches(4)[0]
    twice = with_forward(with_forward(model, lambda m, x: 3 * m(x)), lambda m, x: 2 * m(x))
    assert torch.equal(twice(x), 2 * model(x))


def test_pruning_returns_the_model_under_its_own_call():
    x = batches(24)
    model = Boxes().double().eval()
    result = prune(model, x, keep=0.6, forward=logits)
    plain = prune(Logits().double().eval(), x, keep=0.6)
    assert result.reached
    assert all(torch.equal(result.kept[n], plain.kept[n]) for n in plain.kept)
    assert torch.equal(result.model.logits(x[0]), plain.model(x[0]))
    assert isinstance(result.model(x[0]), list)
    assert any("along logits(model, x), not the model's own call" in w for w in result.warnings)
    assert torch.equal(
        prune(with_forward(model, logits), x, keep=0.6).model(x[0]), plain.model(x[0])
    )
    taught = distill(with_forward(result.model, logits), with_forward(model, logits), x, epochs=1)
    assert isinstance(own_forward(taught)(x[0]), list)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.at_all:f", "forward nowhere.at_all:f: cannot be imported"),
        ("math:nothing", "forward math:nothing: cannot be imported"),
        ("math:pi", "forward: expected package.module:function"),
        ("math", "forward: expected package.module:function"),
    ],
)
def test_forwards_that_are_none_are_said(name, said):
    with pytest.raises(ValueError, match=said):
        load_forward(name)
    assert load_forward("math:hypot") is sys.modules["math"].hypot


# ---- torchvision's detectors ----------------------------------------------------------------


class Backbone(nn.Sequential):
    out_channels = 32

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        )


def detector(kind):
    pytest.importorskip("torchvision", reason="its detectors are what is pruned")
    from torchvision.models import detection
    from torchvision.models.detection import anchor_utils, faster_rcnn, mask_rcnn, ssd
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    size = {"min_size": 64, "max_size": 64}
    anchors = anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    if kind == "retinanet":
        return detection.RetinaNet(Backbone(), 3, anchor_generator=anchors, **size)
    if kind == "fcos":
        single = anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
        return detection.FCOS(Backbone(), 3, anchor_generator=single, **size)
    if kind == "ssd":
        boxes = anchor_utils.DefaultBoxGenerator([[2]])
        head = ssd.SSDHead([32], boxes.num_anchors_per_location(), 3)
        return ssd.SSD(Backbone(), boxes, (64, 64), 3, head=head)
    pool = MultiScaleRoIAlign(["0"], 3, 2)
    options = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": pool,
        "box_head": faster_rcnn.TwoMLPHead(32 * 9, 24),
        "box_predictor": faster_rcnn.FastRCNNPredictor(24, 3),
        **size,
    }
    if kind == "maskrcnn":
        options["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 4, 2)
        options["mask_head"] = mask_rcnn.MaskRCNNHeads(32, (8,), 1)
        options["mask_predictor"] = mask_rcnn.MaskRCNNPredictor(8, 8, 3)
        return detection.MaskRCNN(Backbone(), None, **options)
    return detection.FasterRCNN(Backbone(), None, **options)


def targets(num):
    boxes = torch.tensor([[5.0, 5.0, 40.0, 30.0]])
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 5:30, 5:40] = 1
    return [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks} for _ in range(num)]


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "ssd", "fasterrcnn", "maskrcnn"])
@pytest.mark.long
def test_detectors_are_pruned_along_backbone_and_heads(kind):
    model = detector(kind).eval()
    generator = torch.Generator().manual_seed(1)
    x = list(torch.rand(40, 3, 64, 64, generator=generator).split(10))
    result = prune(model, x, keep=0.6, repair_factors=False)
    assert result.reached
    assert any("left out are" in w and "suppression" in w for w in result.warnings)
    names = {g.name for g in result.groups}
    assert {"backbone.0", "backbone.3"} <= names
    heads = ("rpn.head.", "roi_heads.") if "rcnn" in kind else ("head.",)
    assert kind == "ssd" or all(any(n.startswith(h) for n in names) for h in heads)
    shares = result.report["variance_share"]
    assert shares["compensate"] < shares["none"]
    found = result.model([torch.rand(3, 64, 48, generator=generator)])
    assert found[0].keys() >= {"boxes", "labels", "scores"}
    losses = result.model.train()(list(x[0][:2]), targets(2))
    total = sum(losses.values())
    assert bool(total.isfinite())
    total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in result.model.parameters())


def test_dense_outputs_are_those_that_post_processing_reads():
    """Of a RetinaNet: run its own post-processing on them, and its detections come out."""
    model = detector("retinanet").eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = with_forward(model, forward_of(model))(x)
        images, _ = model.transform(list(x))
        features = [model.backbone(images.tensors)]
        anchors = model.anchor_generator(images, features)
        split = {name: [output] for name, output in found.items()}
        boxes = model.postprocess_detections(split, [[a] for a in anchors], images.image_sizes)
        for ours, theirs in zip(boxes, model(list(x)), strict=True):
            assert torch.equal(ours["boxes"], theirs["boxes"])
            assert torch.equal(ours["scores"], theirs["scores"])


def test_other_models_keep_their_own_call():
    assert forward_of(nn.Linear(2, 2)) is None


# ---- YOLOs of ultralytics -------------------------------------------------------------------


class Head(nn.Module):
    """What such a head returns: decoded boxes besides in evaluation mode, and what it has read."""

    def forward(self, x):
        one = {"boxes": x + 1, "scores": x + 2, "feats": [x]}
        raw = {"one2many": one, "one2one": dict(one)}
        return raw if self.training else (x.sort().values, raw)


@pytest.mark.parametrize("training", [False, True])
def test_of_a_yolo_the_outputs_of_its_head_count(training):
    x = torch.rand(2, 4, 3)
    found = head_detections(Head().train(training), x)
    assert found.keys() == {"one2many", "one2one"}
    for outputs in found.values():
        assert outputs.keys() == {"boxes", "scores"}
        assert torch.equal(outputs["boxes"], x + 1) and torch.equal(outputs["scores"], x + 2)


def test_a_yolo_is_pruned_along_its_head_and_called_as_before():
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason="pip install ultralytics")
    model = tasks.DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()
    x = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    result = prune(model, x.split(4), keep=0.7, criterion="magnitude", repair="none")
    assert result.reached
    assert {b.name for b in result.groups.blocked} == {"model.22.cv2.0.2", "model.22.cv3.0.2"}
    with torch.no_grad():
        decoded, raw = result.model(x)
    assert decoded.shape == model(x)[0].shape and raw.keys() == model(x)[1].keys()
