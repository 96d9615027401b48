"""What detectors of torchvision and ultralytics compute before their post-processing.

Boxes are clipped, sorted and suppressed without weights; how many are left depends on the image. In
front of that every detector has dense outputs, one entry per image and anchor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CELLS = 21  # of a feature map along the side of a box: torchvision's levels give a box 14 to 28

Forward = Callable[[nn.Module, Any], Any]
"""``forward(model, x)`` returns the outputs that count; inside, ``model(x)`` is the model's own."""


def detector_forward(model: nn.Module) -> Forward | None:
    """Return the forward of a detector without its post-processing; None for other models."""
    # Where a library has not been imported the model is none of its classes.
    if "torchvision.models.detection" in sys.modules:
        from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
        from torchvision.models.detection.ssd import SSD

        if isinstance(model, (RetinaNet, FCOS, SSD)):
            return dense_detections
        if isinstance(model, FasterRCNN):
            return region_detections
    if "ultralytics.nn.tasks" in sys.modules:
        from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

        if isinstance(model, DetectionModel) and not isinstance(model, RTDETRDetectionModel):
            return head_detections
    return None


def dense_detections(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the heads of a RetinaNet, FCOS or SSD: [B, anchors, ...] each."""
    outputs: dict[str, Tensor] = model.head(_features(model, x))
    return outputs


def region_detections(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the region proposal network, and of the heads on a fixed grid of boxes.

    The boxes that the model proposes depend on the image: here boxes of 21 x 21 cells tile every
    level of the feature pyramid. Returns [B, anchors] and [B, 4 anchors] over all levels, and of
    the heads [B, boxes, ...].
    """
    features, heads = _features(model, x), model.roi_heads
    objectness, deltas = model.rpn.head(features)
    found = {
        "objectness": torch.cat([level.flatten(1) for level in objectness], 1),
        "anchor_regression": torch.cat([level.flatten(1) for level in deltas], 1),
    }
    boxes = heads.box_head(_grid(features, heads.box_roi_pool))
    classes, regressions = heads.box_predictor(boxes)
    parts = {"class_logits": classes, "box_regression": regressions}
    for kind in ("mask", "keypoint"):
        if getattr(heads, f"has_{kind}")():
            pooled = _grid(features, getattr(heads, f"{kind}_roi_pool"))
            seen = getattr(heads, f"{kind}_head")(pooled)
            parts[f"{kind}_logits"] = getattr(heads, f"{kind}_predictor")(seen)
    rows = {name: part.reshape(len(x), -1, *part.shape[1:]) for name, part in parts.items()}
    return found | rows


def head_detections(model: nn.Module, x: Tensor) -> Any:
    """Return the outputs of the head of a YOLO of ultralytics, as it names them.

    [B, ..., anchors] each; of heads that come without suppression both kinds of assignment.
    """
    returned = model(x)
    return _without_maps(returned if isinstance(returned, Mapping) else returned[1])


def _without_maps(outputs: Any) -> Any:
    """Return the outputs without the feature maps that the head reads."""
    if not isinstance(outputs, Mapping):
        return outputs
    return {name: _without_maps(part) for name, part in outputs.items() if name != "feats"}


dense_detections.left_out = "its boxes, scores and their suppression"  # type: ignore[attr-defined]
head_detections.left_out = (  # type: ignore[attr-defined]
    "decoded boxes and their suppression, and the feature maps that its head reads"
)
region_detections.left_out = (  # type: ignore[attr-defined]
    "proposals, boxes and their suppression (its heads see a fixed grid of boxes, and MACs are "
    "those of this grid)"
)


def _features(model: Any, x: Tensor) -> list[Tensor]:
    """Return the feature maps of every level, [B, C, H, W] each."""
    images, _ = model.transform(list(x))
    features = model.backbone(images.tensors)
    return [features] if isinstance(features, Tensor) else list(features.values())


def _grid(features: list[Tensor], pool: Any) -> Tensor:
    """Return boxes that tile the feature maps of a pooler, [B * boxes, C, h, w], image by image."""
    high, wide = pool.output_size
    levels = []
    for level in features[: len(pool.featmap_names)]:
        rows, columns = (max(1, round(size / _CELLS)) for size in level.shape[2:])
        pooled = F.adaptive_avg_pool2d(level, (rows * high, columns * wide))
        cells = pooled.unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        levels.append(cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2))  # [B, boxes, C, h, w]
    return torch.cat(levels, 1).flatten(0, 1)
