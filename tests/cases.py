"""Tiny networks, one structural feature each, in float64 with random BatchNorm statistics.

All take images [B, 3, 8, 8] and return logits [B, 3], in a few thousand MACs.
"""

import torch
from torch import nn
from torch.nn import functional as F

NUM_CLASSES = 3


class Chain(nn.Module):
    """conv-BN-ReLU twice, pooling, linear."""

    def __init__(self, width=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    """A stem and two blocks on one stream."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.conv1 = nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.conv3 = nn.Conv2d(5, 6, 1)
        self.conv4 = nn.Conv2d(6, 5, 1)
        self.fc = nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        x = F.relu(self.conv4(F.relu(self.conv3(x))) + x)
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, read by one convolution."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 3, 1)
        self.mix = nn.Conv2d(7, 5, 1)
        self.fc = nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.fc(F.relu(self.mix(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """Expand, strided depthwise, project."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 6, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.project = nn.Conv2d(6, 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        x = F.relu6(self.bn1(self.expand(x)))
        x = F.relu6(self.bn2(self.depthwise(x)))
        return self.fc(self.bn3(self.project(x)).mean((2, 3)))


class Gate(nn.Module):
    """A squeeze-and-excitation gate: channels are also multiplied."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.reduce = nn.Conv2d(5, 4, 1)
        self.expand = nn.Conv2d(4, 5, 1)
        self.conv2 = nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        x = F.silu(self.conv1(x))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return self.fc(F.silu(self.conv2(x * gate.sigmoid())).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution in three groups of two channels: units are whole groups."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.conv3 = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(F.relu(self.conv3(x)).mean((2, 3)))


class Flatten(nn.Module):
    """Each channel becomes four inputs of a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(16, 6)
        self.fc2 = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class NoNorm(nn.Module):
    """Plain ReLU convolutions with biases, the last one strided and dilated."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 4, 3, stride=2, padding=2, dilation=2)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class Attention(nn.Module):
    """A pre-norm transformer block over 16 patches, three heads of two channels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, stride=2)
        self.norm1 = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.proj = nn.Linear(6, 6)
        self.norm2 = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 6)
        self.head = nn.Linear(6, NUM_CLASSES)
        self.num_heads = 3

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attend(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


class InPlace(nn.Module):
    """The activation is overwritten after one layer has read it and before another does."""

    def __init__(self, inplace=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.linear = nn.Conv2d(5, 4, 1)
        self.rectified = nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(4, NUM_CLASSES)
        self.inplace = inplace

    def forward(self, x):
        x = self.conv1(x)
        y = self.linear(x)
        x = x.relu_() if self.inplace else x.relu()
        return self.fc((y * self.rectified(x)).mean((2, 3)))


class LinearBehind(nn.Module):
    """All that follows the cut behind ``conv1`` is linear, so removal is its own linearisation."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 4, 3, stride=2)
        self.skip = nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        return self.fc(torch.cat([self.conv2(x).mean((2, 3)), self.skip(x).mean((2, 3))], 1))


class Blocks(nn.Module):
    """Three residual blocks on a stream of fixed width: their costs do not depend on each other."""

    def __init__(self, widths=(4, 5, 6)):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.expand = nn.ModuleList(nn.Conv2d(4, w, 1 + 2 * (w % 2), padding=w % 2) for w in widths)
        self.project = nn.ModuleList(nn.Conv2d(w, 4, 1) for w in widths)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for expand, project in zip(self.expand, self.project, strict=True):
            x = x + project(F.relu(expand(x)))
        return self.fc(x.mean((2, 3)))


class ConcatResidual(nn.Module):
    """Two branches side by side are added to a stream: one group, several producers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.left = nn.Conv2d(5, 3, 3, padding=1)
        self.right = nn.Conv2d(5, 2, 1)
        self.fc = nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + torch.cat([self.left(x), self.right(x)], 1)
        return self.fc(F.relu(x).mean((2, 3)))


CASES = {
    "chain": Chain,
    "residual": Residual,
    "concat": Concat,
    "depthwise": Depthwise,
    "gate": Gate,
    "grouped": Grouped,
    "flatten": Flatten,
    "no_norm": NoNorm,
    "attention": Attention,
    "linear_behind": LinearBehind,
    "concat_residual": ConcatResidual,
}


def build(case, *args, seed=0, **kwargs):
    """Return a random float64 network of one case, in eval mode."""
    constructor = CASES[case] if isinstance(case, str) else case
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = constructor(*args, **kwargs).double().eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2)
    return model


class Tabled(nn.Module):
    """A table of offsets makes a bias, as in the attention of Swin V2: its layers see no image."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offsets", torch.randn(1, 5, 5, 2))
        self.table = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4))
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu())
        return self.fc((x + self.table(self.offsets).permute(0, 3, 1, 2)).mean((2, 3)))


class Poison:
    """A label that raises whenever it is looked at."""

    def __getattribute__(self, name):
        raise AssertionError(f"a label was read: {name}")

    __len__ = __iter__ = __bool__ = __getitem__ = lambda *_: (_ for _ in ()).throw(
        AssertionError("a label was read")
    )


def images(num=24, *, seed=0):
    """Return smooth random images [num, 3, 8, 8], float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x + F.avg_pool2d(x, 3, stride=1, padding=1) * 3


def batches(num=24, size=8, *, seed=0):
    """Return the same images in batches."""
    return list(images(num, seed=seed).split(size))


@torch.no_grad()
def duplicate_channel(chain, source=0, copy=1):
    """Make one channel behind ``conv1`` a copy of another."""
    chain.conv1.weight[copy] = chain.conv1.weight[source]
    for tensor in (chain.bn1.weight, chain.bn1.bias, chain.bn1.running_mean, chain.bn1.running_var):
        tensor[copy] = tensor[source]
    return chain


@torch.no_grad()
def kill_channel(chain, channel=2):
    """Make one channel behind ``conv1`` zero on every input."""
    chain.bn1.weight[channel] = 0
    chain.bn1.bias[channel] = -1
    return chain
