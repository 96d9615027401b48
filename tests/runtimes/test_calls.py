"""Layers and networks give in a runtime what they give in PyTorch."""

import importlib.util

import pytest
import torch
from cases import build, images
from torch import nn

from tpvprune.runtimes import names
from tpvprune.runtimes.calls import graph_call, model_call, openvino_nodes_ms
from tpvprune.runtimes.layers import LayerCall

ELSEWHERE = ["onnxruntime", "openvino"]
LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 7)),
    "dilated": (nn.Conv2d(4, 6, (3, 1), padding=(2, 0), dilation=(2, 1)), (2, 4, 9, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 9, 7)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 7)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "linear": (nn.Linear(4, 6), (2, 4)),
    "tokens": (nn.Linear(4, 6), (2, 5, 4)),
}


def outputs_of(found):
    return torch.as_tensor(next(iter(found.values())) if hasattr(found, "values") else found[0])


@pytest.mark.parametrize("runtime", ELSEWHERE)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_in_a_runtime_what_it_does_in_torch(runtime, name):
    pytest.importorskip(runtime)
    module, shape = LAYERS[name]
    call = LayerCall.of(module, torch.ones(shape))
    for num_in, num_out in ((4, 6), (3, 2)):
        expected = call.run(num_in, num_out, torch.device("cpu"))()
        found = outputs_of(graph_call(runtime, *call.graph(num_in, num_out))())
        assert torch.allclose(expected, found)


def test_grouped_convolutions_have_no_widths_of_their_own():
    assert LayerCall.of(nn.Conv2d(4, 6, 3, groups=2), torch.ones(1, 4, 8, 8)) is None


@pytest.mark.parametrize("runtime", ["eager", *ELSEWHERE])
def test_a_network_computes_in_a_runtime_what_it_does_in_torch(runtime, untouched):
    if runtime != "eager":
        pytest.importorskip(runtime)
    model, x = build("residual").float().eval(), images(2).float()
    with untouched(model), torch.no_grad():
        expected = model(x)
        found = model_call(runtime, model, x)()
    found = found if runtime == "eager" else outputs_of(found)
    assert torch.allclose(expected, found, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_network_computes_what_it_does_in_torch(untouched):
    model, x = build("residual").float().eval(), images(2).float()
    with untouched(model), torch.no_grad():
        assert torch.allclose(model(x), model_call("compile", model, x)(), atol=1e-5)


def test_openvino_tells_the_time_of_nodes():
    pytest.importorskip("openvino")
    call = LayerCall.of(nn.Conv2d(4, 6, 3), torch.ones(1, 4, 32, 32))
    small, large = (openvino_nodes_ms(*call.graph(width, width)) for width in (8, 256))
    assert 0 <= min(small() for _ in range(5)) < min(large() for _ in range(5))


class Odd(nn.Module):
    """What no exporter takes: the path depends on the values."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) > 0 else x


def test_what_cannot_be_exported_is_refused_in_one_line():
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="cannot be exported to onnx") as caught:
        model_call("onnxruntime", Odd(), torch.ones(1, 3))
    assert "\n" not in str(caught.value)
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="does not run in onnxruntime"):
        graph_call("onnxruntime", b"no file", torch.ones(1))


@pytest.mark.parametrize("runtime", ELSEWHERE)
def test_a_missing_package_is_named(runtime, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        names.importlib.util, "find_spec", lambda name: None if name == runtime else found(name)
    )
    extra = {"onnxruntime": "onnx"}.get(runtime, runtime)
    with pytest.raises(ValueError, match=rf"found no .*{runtime}: pip install 'tpvprune\[{extra}"):
        names.check_runtime(runtime)
    names.check_runtime("eager")
