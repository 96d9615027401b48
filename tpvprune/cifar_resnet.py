"""CIFAR ResNets of He et al. (2015), section 4.2, registered with timm.

These are the models of the pruning literature that timm lacks. Importing this module
makes ``timm.create_model("cifar_resnet20")`` and its deeper siblings work; no weights
are downloaded, pass ``checkpoint_path`` for those.
"""

from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "PadShortcut",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
]


class PadShortcut(nn.Module):
    """Carry a residual stream to a coarser, wider stage without parameters (option A).

    Every ``stride``-th row and column is kept; ``front`` channels of zeros are put before
    the input's channels and ``back`` after them. The three numbers are plain attributes,
    so that removing channels on either side of the shortcut can set them anew.

    Args:
        stride: Spatial step, >= 1.
        front: Zero channels before the input's own, >= 0.
        back: Zero channels after the input's own, >= 0.

    Reference:
        He et al. 2015, section 3.3, option (A), https://arxiv.org/abs/1512.03385
    """

    def __init__(self, stride: int, front: int, back: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = front
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, front + C + back, ceil(H / stride), ceil(W / stride)] for [B, C, H, W]."""
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        """Return the three numbers for the model's printout."""
        return f"stride={self.stride}, front={self.front}, back={self.back}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut.

    Args:
        in_channels: Channels of the incoming residual stream.
        out_channels: Channels of the outgoing one, >= ``in_channels``.
        stride: Spatial step of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            front = (out_channels - in_channels) // 2
            back = out_channels - in_channels - front
            self.shortcut = PadShortcut(stride, front, back)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out, H / stride, W / stride] for [B, in, H, W]."""
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.act2(branch + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32-pixel images: three stages of n blocks, 16/32/64 wide.

    Args:
        blocks_per_stage: n, >= 1.
        num_classes: Outputs of the classifier; 0 leaves the pooled features.
        in_chans: Channels of the input image.
        global_pool: Name of a timm pooling ("avg", "max", ...), "" for none.

    Reference:
        He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385
    """

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        self.layer1 = _stage(16, 16, stride=1, num_blocks=blocks_per_stage)
        self.layer2 = _stage(16, 32, stride=2, num_blocks=blocks_per_stage)
        self.layer3 = _stage(32, 64, stride=2, num_blocks=blocks_per_stage)
        self.feature_info = [
            {"num_chs": 16, "reduction": 1, "module": "layer1"},
            {"num_chs": 32, "reduction": 2, "module": "layer2"},
            {"num_chs": 64, "reduction": 4, "module": "layer3"},
        ]
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Put a new, untrained classifier on the present features.

        Args:
            num_classes: Outputs of the new classifier; 0 leaves the pooled features.
            global_pool: Name of a timm pooling, "" for none.
        """
        self.num_classes = num_classes
        self.global_pool, self.linear = create_classifier(
            self.num_features, num_classes, pool_type=global_pool
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's output [B, 64, H / 4, W / 4] for images [B, in_chans, H, W]."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled features, of the last stage's output."""
        pooled = self.global_pool(x)
        return pooled if pre_logits else self.linear(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] for images [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))


def _stage(in_channels: int, out_channels: int, *, stride: int, num_blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(
        first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1))
    )


# The weights in circulation were trained and tested with ImageNet's mean and std.
_PREPROCESSING = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "linear",
}

default_cfgs = generate_default_cfgs(
    {f"cifar_resnet{depth}": dict(_PREPROCESSING) for depth in (20, 32, 44, 56, 110)}
)


def _create(variant: str, depth: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        CifarResNet,
        variant,
        pretrained,
        blocks_per_stage=(depth - 2) // 6,
        feature_cfg={"out_indices": (0, 1, 2)},
        **kwargs,
    )


# timm's registry names a model after its function and passes it keyword arguments.
@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-20: 0.27 M parameters, 41 M MACs at 32 px."""
    return _create("cifar_resnet20", 20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-32: 0.46 M parameters, 69 M MACs at 32 px."""
    return _create("cifar_resnet32", 32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-44: 0.66 M parameters, 97 M MACs at 32 px."""
    return _create("cifar_resnet44", 44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-56: 0.85 M parameters, 125 M MACs at 32 px."""
    return _create("cifar_resnet56", 56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return ResNet-110: 1.73 M parameters, 253 M MACs at 32 px."""
    return _create("cifar_resnet110", 110, pretrained, **kwargs)
