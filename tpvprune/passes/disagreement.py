"""Where a pruned model chooses another class than the dense one: by class, and on which images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tpvprune.passes.batches import unlabeled
from tpvprune.passes.costs import call_arguments
from tpvprune.passes.outputs import Chosen, Outputs, logits_of
from tpvprune.passes.running import evaluating
from tpvprune.processes.shares import summed

_THUMBNAIL = 96  # pixels of the longer side


@torch.no_grad()
def disagreement(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_samples: int = 12,
    outputs: Outputs | Chosen | None = None,
) -> dict[str, Any] | None:
    """Count agreement by the class that the dense model chooses, and show images that changed.

    Shown are those of which the dense model was most certain; outputs that are not finite count as
    changed. Among several processes the counts are those of all, the images those of the first.

    ``mean``, ``std``: of the preprocessing, per channel, in [0, 1]. ``outputs``: the classes are
    those of the first that counts. Returns plain data: images as data addresses, shares as softmax
    of the chosen class; None if any outputs are not [B, classes].
    """
    counts: Tensor | None = None
    samples: list[dict[str, Any]] = []
    with evaluating(model, dense):
        for inputs in unlabeled(batches):
            ours, theirs = (
                logits_of(m(*call_arguments(m, inputs)), outputs).double().cpu()
                for m in (model, dense)
            )
            if theirs.ndim != 2 or theirs.shape != ours.shape or theirs.shape[1] < 2:
                counts = None
                break
            if counts is None:
                counts = torch.zeros(2, theirs.shape[1], dtype=torch.float64)
            chosen = [x.softmax(1).max(1) for x in (theirs, ours)]
            before, after = (found.indices for found in chosen)
            finite = (ours.isfinite() & theirs.isfinite()).all(1)
            changed = (before != after) | ~finite  # what is not finite never agrees
            counts[0] += before.bincount(minlength=theirs.shape[1])
            counts[1] += before[~changed].bincount(minlength=theirs.shape[1])
            samples += [
                {
                    "dense": int(before[i]),
                    "pruned": int(after[i]),
                    "dense_share": float(chosen[0].values[i]),
                    "pruned_share": float(chosen[1].values[i]),
                    "input": inputs[i],
                }
                for i in (changed & finite).nonzero().flatten().tolist()
            ]
            # Of equals the first stays.
            samples = sorted(samples, key=lambda sample: -sample["dense_share"])[:num_samples]
    # A process may have no image at all, and learns here how many classes there are.
    width = 0 if counts is None else counts.shape[1]
    widths, counting = summed(*torch.tensor([width, width > 0], dtype=torch.float64))
    if not counting:
        return None
    if counts is None:
        counts = torch.zeros(2, round(float(widths / counting)), dtype=torch.float64)
    counts = summed(counts)[0]
    for sample in samples:
        sample["image"] = _picture(sample.pop("input"), mean, std)
    num, same = counts.sum(1).tolist()
    return {
        "num_images": int(num),
        "num_changed": int(num - same),
        "classes": [
            {"class": k, "num_images": int(n), "agreement": float(a / n)}
            for k, (n, a) in enumerate(counts.T.tolist())
            if n
        ],
        "samples": samples,
    }


def _picture(inputs: Tensor, mean: Sequence[float], std: Sequence[float]) -> str | None:
    """Return a normalised image [C, H, W] as a small PNG in a data address."""
    if len(inputs) not in (1, 3):
        return None
    scale, shift = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (std, mean))
    pixels = (inputs.float().cpu() * scale + shift).clamp(0, 1).mul(255).round().byte()
    array = pixels[0].numpy() if len(inputs) == 1 else pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
