import pytest
import timm
import torch
from shared_files import shared
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import nn

from tpvprune.cifar_resnet import PadShortcut

DEPTHS = (20, 32, 44, 56, 110)


def with_weights(name):
    weights = shared(f"weights/{name}.safetensors")
    return timm.create_model(name, checkpoint_path=str(weights)).eval()


def correct_of(model, *, every):
    """Count correct answers on every ``every``-th image of CIFAR-10's test set."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset("", root=str(shared("data/cifar10-test.tar")), transform=transform)
    subset = torch.utils.data.Subset(dataset, range(0, len(dataset), every))
    correct = 0
    with torch.inference_mode():
        for images, targets in torch.utils.data.DataLoader(subset, batch_size=250):
            correct += int((model(images).argmax(1) == targets).sum())
    return correct, len(subset)


def conv_and_linear_macs(model):
    total = 0

    def count(module, _, output):
        nonlocal total
        total += module.weight.numel() * output[0].numel() // module.weight.shape[0]

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 32, 32))
    return total


@pytest.mark.parametrize(
    ("depth", "params", "macs"),
    [
        (20, 0.27e6, 40.6e6),
        (32, 0.46e6, 69e6),
        (44, 0.66e6, 97e6),
        (56, 0.85e6, 125.5e6),
        (110, 1.7e6, 253e6),
    ],
)
def test_sizes_are_those_of_the_paper(depth, params, macs):
    model = timm.create_model(f"cifar_resnet{depth}").eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=0.03)
    assert conv_and_linear_macs(model) == pytest.approx(macs, rel=0.005)


def test_timm_lists_the_models():
    assert {f"cifar_resnet{depth}" for depth in DEPTHS} == set(timm.list_models("cifar_resnet*"))


def test_preprocessing_leaves_32_pixel_images_whole():
    config = resolve_model_data_config(timm.create_model("cifar_resnet20"))
    image = torch.rand(3, 32, 32)
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    transform = create_transform(**config, is_training=False)
    pixels = (image * 255).round().to(torch.uint8)
    from_pil = transform(_to_pil(pixels))
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(from_pil, expected)


def _to_pil(pixels):
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def test_pad_shortcut_places_the_strided_input_between_zeros():
    x = torch.arange(2 * 5 * 4, dtype=torch.float32).reshape(1, 2, 5, 4)
    out = PadShortcut(stride=2, front=1, back=3)(x)
    assert out.shape == (1, 6, 3, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, :1].any()
    assert not out[:, 3:].any()


def test_pad_shortcut_follows_changed_attributes():
    shortcut = PadShortcut(stride=1, front=1, back=1)
    shortcut.front, shortcut.back = 0, 2
    x = torch.rand(1, 3, 2, 2)
    assert torch.equal(shortcut(x), torch.cat([x, torch.zeros(1, 2, 2, 2)], dim=1))


def test_shortcuts_are_parameter_free():
    model = timm.create_model("cifar_resnet20")
    assert not [key for key in model.state_dict() if "shortcut" in key]
    pads = [m for m in model.modules() if isinstance(m, PadShortcut)]
    assert [(p.stride, p.front, p.back) for p in pads] == [(2, 8, 8), (2, 16, 16)]


def test_timm_arguments_and_head_methods():
    model = timm.create_model("cifar_resnet20", num_classes=7, in_chans=1).eval()
    x = torch.rand(2, 1, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 8)
    assert model.forward_head(features, pre_logits=True).shape == (2, 64)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert torch.equal(model(x), features.mean((2, 3)))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    headless = timm.create_model("cifar_resnet20", num_classes=0, global_pool="").eval()
    assert headless(torch.rand(2, 3, 32, 32)).shape == (2, 64, 8, 8)


def test_features_only_gives_the_three_stages():
    model = timm.create_model("cifar_resnet20", features_only=True)
    shapes = [tuple(f.shape[1:]) for f in model(torch.rand(1, 3, 32, 32))]
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert model.feature_info.channels() == [16, 32, 64]


# Every tenth image for ResNet-20, every fortieth for ResNet-56: the whole set takes minutes.
# Three images of slack for ties that differ between machines' arithmetic.
@pytest.mark.parametrize(("depth", "every", "correct"), [(20, 10, 912), (56, 40, 229)])
def test_given_weights_load_strictly_and_classify(depth, every, correct):
    count, total = correct_of(with_weights(f"cifar_resnet{depth}"), every=every)
    assert total == 10_000 // every
    assert abs(count - correct) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "correct"), [(20, 9173), (56, 9339)])
def test_accuracy_on_the_whole_test_set(depth, correct):
    count, total = correct_of(with_weights(f"cifar_resnet{depth}"), every=1)
    assert total == 10_000
    assert abs(count - correct) <= 3
