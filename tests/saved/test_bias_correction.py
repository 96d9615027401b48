"""Biases take from a layer the mean that rounding its weights adds, and nothing else."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tpvprune.saved.export import export_model
from tpvprune.saved.int8 import export_int8

needed = ("onnx", "onnxscript", "onnxruntime")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in needed),
    reason="onnx, onnxscript or onnxruntime is missing: pip install 'tpvprune[onnx]'",
)


def rounded(weight):
    """Return weights as 8 bits have them, a scale for each output channel, in float64."""
    weight = weight.detach().double()
    scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / 127
    return (weight / scale).round() * scale


class Affine(nn.Module):
    """A product and a bias apart, as transformers' layers are exported."""

    def __init__(self, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.bias = nn.Parameter(torch.randn(5)) if bias else None

    def forward(self, x):
        y = x @ self.weight.t()
        return y if self.bias is None else y + self.bias


LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 9)),
    "strided, padded, dilated": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2),
        (4, 9, 9),
    ),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 9, 9)),
    "grouped, no bias": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (4, 9, 9)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "linear on tokens": (lambda: nn.Linear(6, 5), (7, 6)),
    "product and bias": (Affine, (7, 6)),
}


def corrected_file(layer, x, folder):
    """Return what the corrected file computes for each input, and how many layers it corrected."""
    from tpvprune.saved import quantization

    calibration = list(x.split(2))
    export_model(layer, x[:2], folder / "whole.onnx")
    quantization._quantize(folder / "whole.onnx", folder / "small.onnx", calibration, "min-max", 8)
    count = quantization.correct_biases(
        folder / "whole.onnx", folder / "small.onnx", folder / "corrected.onnx", calibration
    )
    run = quantization.OnnxModule(folder / "corrected.onnx") if count else layer
    return run(x).double(), count


def channel_means(y, layer):
    axis = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d) else y.ndim - 1
    return y.movedim(axis, 0).flatten(1).mean(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_mean_with_rounded_weights_is_that_without(kind, tmp_path):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().eval()
    x = torch.rand(8, *shape) + 0.5  # of one sign, as behind a ReLU: rounding does move the mean
    found, count = corrected_file(layer, x, tmp_path)
    assert count == 1
    exact = type(layer).forward(layer, x).double().detach()
    error = rounded(layer.weight) - layer.weight.detach().double()
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        conv = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        moved = conv(
            x.double(), error, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    else:
        moved = x.double() @ error.t()
    expected, shift = channel_means(exact, layer), channel_means(moved, layer)
    assert shift.abs().max() > 1e-4
    torch.testing.assert_close(
        channel_means(found, layer) + shift, expected, rtol=0, atol=2e-3 * float(shift.abs().max())
    )
    # A shift for each channel, the same everywhere.
    apart = (found - exact).movedim(1 if "Conv" in type(layer).__name__ else -1, 0).flatten(1)
    assert (apart.amax(1) - apart.amin(1)).max() < 1e-5


def test_product_without_a_bias_is_left_alone(tmp_path):
    torch.manual_seed(0)
    layer, x = Affine(bias=False).eval(), torch.rand(8, 7, 6)
    _, count = corrected_file(layer, x, tmp_path)
    assert count == 0
    assert not (tmp_path / "corrected.onnx").exists()


def test_a_file_that_is_too_large_is_left_alone(tmp_path, monkeypatch):
    from tpvprune.saved import bias_correction

    monkeypatch.setattr(bias_correction, "_LARGEST", 100)
    torch.manual_seed(0)
    _, count = corrected_file(nn.Linear(6, 5).eval(), torch.rand(8, 6), tmp_path)
    assert count == 0


def test_layers_that_share_a_bias_are_corrected_each_by_itself(tmp_path):
    """The exporter stores equal biases once."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)]
    with torch.no_grad():
        for conv in convs:
            conv.bias.zero_().add_(0.25)
    model, x = nn.Sequential(convs[0], nn.ReLU(), convs[1]).eval(), torch.rand(8, 3, 5, 5)
    found, count = corrected_file(model, x, tmp_path)
    assert count == 2
    with torch.no_grad():
        inner = model[1](convs[0](x))
        shifts = [
            channel_means(F.conv2d(inputs.double(), rounded(c.weight) - c.weight.double()), c)
            for inputs, c in zip([x, inner], convs, strict=True)
        ]
        for conv, shift in zip(convs, shifts, strict=True):
            conv.bias -= shift.float()
        torch.testing.assert_close(found, model(x).double(), rtol=0, atol=1e-6)


class Depthwise(nn.Module):
    """Layers whose outputs sum few products, of inputs of one sign."""

    def __init__(self):
        super().__init__()
        blocks = []
        for _ in range(4):
            blocks += [nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU()]
            blocks += [nn.Conv2d(16, 16, 1), nn.ReLU()]
        self.body, self.fc = (
            nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), *blocks),
            nn.Linear(16, 8),
        )

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def test_an_int8_file_is_closer_on_images_that_took_no_part(tmp_path):
    torch.manual_seed(0)
    model = Depthwise().eval()
    with torch.no_grad():  # one weight of a channel is large: the others are rounded coarsely
        for layer in model.body:
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                layer.weight[:, :, 0, 0] *= 8
    found = export_int8(
        model, [torch.rand(90, 3, 8, 8)], tmp_path / "x.onnx", ranges=["min-max"],
        weight_bits=[7], latency_repeats=0,
    )  # fmt: skip
    by_correction = {way.biases_corrected: entry for way, entry in found.tried_weights.items()}
    assert found.weights.biases_corrected
    assert by_correction[True].share < 0.5 * by_correction[False].share
    assert found.difference.share < 0.5 * by_correction[False].share
