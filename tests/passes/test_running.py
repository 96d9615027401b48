"""Images are laid out in memory as convolutions like it best, where the model can take it."""

import subprocess
import sys

import pytest
import torch
from cases import batches
from torch import nn

from tpvprune import prune
from tpvprune.passes.evaluation import evaluate, output_variance
from tpvprune.passes.running import fast_layout
from tpvprune.repairs.distillation import distill


class Viewing(nn.Module):
    """Sees its feature maps as vectors, which channels-last memory does not allow."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.blocks = nn.Sequential(self.conv1, nn.ReLU(), self.conv2, nn.ReLU())
        self.fc = nn.Linear(12 * 8 * 8, 4)

    def forward(self, x):
        x = self.blocks(x)
        return self.fc(x.view(len(x), -1))


class Flattening(Viewing):
    def forward(self, x):
        return self.fc(self.blocks(x).flatten(1))


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


def test_layout_is_fast_where_the_model_takes_it():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    assert is_channels_last(fast_layout(x, Flattening()))
    assert not is_channels_last(fast_layout(x, Viewing()))
    assert torch.equal(fast_layout(x, Flattening()), x)
    assert fast_layout(x[:0], Viewing()).shape == (0, 3, 8, 8)
    tokens = torch.randn(4, 5, 3)
    assert fast_layout(tokens, nn.Linear(3, 2)) is tokens


def test_asking_leaves_no_trace(untouched):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    with untouched(model):
        fast_layout(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), model)


@pytest.mark.parametrize("repair", ["compensate", "reconstruct"])
def test_model_that_views_its_maps_is_pruned_like_one_that_flattens_them(repair):
    torch.manual_seed(0)
    viewing, flattening = Viewing().double(), Flattening().double()
    flattening.load_state_dict(viewing.state_dict())
    data = batches(64, 16)
    pruned = [prune(m, data, keep=0.6, repair=repair).model for m in (viewing, flattening)]
    shapes = [[p.shape for p in m.parameters()] for m in pruned]
    assert shapes[0] == shapes[1]
    assert output_variance(*pruned, data) < 1e-12
    taught = distill(pruned[0], viewing, data, epochs=1)
    labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in data]
    assert evaluate(taught, labelled, dense=viewing).agreement >= 0


def test_forward_mode_derivatives_do_not_warn_of_torch_itself():
    code = (
        "import torch; from tpvprune.passes import running; running.prepare_forward_mode(); "
        "torch.func.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))"
    )
    # A process of its own: torch warns once.
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True
    )
    assert "jit" not in done.stderr
