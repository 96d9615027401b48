"""Models of torchvision and transformers by name; nothing is downloaded."""

import sys

import pytest
import torch

from tpvprune.saved.models import load_model


def test_a_model_of_torchvision_is_made_by_its_name():
    models = pytest.importorskip("torchvision").models
    model, made = load_model("torchvision/squeezenet1_1", num_classes=7, allow_import=True, seed=3)
    torch.manual_seed(3)
    same = models.squeezenet1_1(num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), same(x))
    assert (made.name, made.kwargs) == ("torchvision/squeezenet1_1", {"num_classes": 7})


def test_a_segmentation_model_asks_for_no_weights_of_its_backbone(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: 1 / 0)
    model, _ = load_model("torchvision/lraspp_mobilenet_v3_large", allow_import=True)
    assert not model.training


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_model_of_transformers_is_read_from_a_folder(tmp_path, pretrained):
    library = pytest.importorskip("transformers", reason="pip install transformers")
    config = library.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=32, patch_size=16,
    )  # fmt: skip
    saved = library.ViTForImageClassification(config).eval()
    saved.save_pretrained(tmp_path)
    model, made = load_model(f"hf:{tmp_path}", allow_import=True, pretrained=pretrained, seed=5)
    assert type(model) is type(saved)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x).logits, saved(x).logits) == pretrained
    assert made.weights == ("pretrained" if pretrained else "random")
    body, _ = load_model(
        f"hf:{tmp_path}", allow_import=True, model_kwargs={"architecture": "ViTModel"}
    )
    assert type(body) is library.ViTModel


@pytest.mark.parametrize(
    ("name", "library", "kwargs", "said"),
    [
        ("torchvision/resnet18", "torchvision", {}, "pip install torchvision"),
        ("hf:google/vit", "transformers", {}, "pip install transformers"),
        ("torchvision/resnet1", None, {}, "has no 'resnet1'"),
        ("torchvision/resnet18", None, {"depth": 3}, "cannot be built"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(monkeypatch, name, library, kwargs, said):
    if library:
        monkeypatch.setitem(sys.modules, library, None)
    else:
        pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=said) as caught:
        load_model(name, allow_import=True, model_kwargs=kwargs)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_no_library_is_asked_for_a_name_that_was_read_from_a_file():
    with pytest.raises(ValueError, match="unknown model"):
        load_model("torchvision/resnet18")
