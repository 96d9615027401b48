"""Gradient checkpointing: the same numbers, with the insides of blocks not held."""

import pytest
import timm
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import tpvprune
from tpvprune.passes.recomputation import segments_of
from tpvprune.scores.curves import variance_curves
from tpvprune.scores.taps import Probing, passes

MODELS = {"test_resnet": 24, "test_vit": 48, "test_convnext": 64, "test_efficientnet": 32}


class Overwriting(nn.Module):
    """Blocks that write into activations after they were read."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))
            for _ in range(2)
        )
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = y.add_(x.relu_())
        return self.fc(x.mean((2, 3)))


def subject(name):
    torch.manual_seed(0)
    kwargs = {"img_size": MODELS[name]} if name == "test_vit" else {}
    model = (
        Overwriting() if name == "overwriting" else timm.create_model(name, num_classes=5, **kwargs)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    size = MODELS.get(name, 8)
    batches = [torch.randn(3, 3, size, size) for _ in range(2)]
    return model.eval(), tpvprune.find_groups(model, batches[0][:1], verify=False), batches


@pytest.mark.parametrize("name", [*MODELS, "overwriting"])
def test_scores_are_the_same(name, untouched):
    model, groups, batches = subject(name)
    assert segments_of(model)
    with untouched(model):
        for metric, num_probes in (("logits", 2), ("pseudo", 1)):
            options = {"metric": metric, "num_probes": num_probes}
            held, again = (
                tpvprune.tpv_scores(model, groups, batches, grad_checkpointing=g, **options)
                for g in (False, True)
            )
            assert all(torch.equal(held[n], again[n]) for n in held)


@pytest.mark.parametrize("name", ["test_vit", "overwriting"])
def test_curves_are_the_same(name, untouched):
    model, groups, batches = subject(name)
    with untouched(model):
        held, again = (
            variance_curves(model, groups, batches, grad_checkpointing=g) for g in (False, True)
        )
    assert all(torch.equal(held[n].order, again[n].order) for n in held)
    assert all(torch.equal(held[n].variance, again[n].variance) for n in held)


def test_pruned_models_are_the_same():
    model, _, batches = subject("test_resnet")
    held, again = (
        tpvprune.prune(model, batches, keep=0.6, probing=Probing(grad_checkpointing=g)).model
        for g in (False, True)
    )
    for name, value in held.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_no_module_is_inside_another():
    for name in MODELS:
        segments = segments_of(subject(name)[0])
        inside = {inner for s in segments for inner in s.modules() if inner is not s}
        assert not inside & set(segments)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_activations_inside_blocks_are_not_held(grad_checkpointing):
    model, groups, batches = subject("test_vit")
    seen = []
    handles = [
        m.register_forward_hook(
            lambda _m, _a, out: seen.append(StorageWeakRef(out.untyped_storage()))
        )
        for m in model.blocks.modules()
        if isinstance(m, nn.GELU)
    ]
    probing = Probing(grad_checkpointing=grad_checkpointing)
    for _, (direction,), tap in passes(model, groups, batches[:1], probing):
        alive = [not ref.expired() for ref in seen[-len(handles) :]]
        seen.clear()
        assert all(alive) != grad_checkpointing
        assert any(alive) != grad_checkpointing
        found = {}
        tap.backward(direction, lambda call, a, grad, found=found: found.update({call: a.shape}))
        assert len(found) == len({r.call for g in groups for r in g.readers})
        assert len(seen) == len(handles) * grad_checkpointing


def test_a_model_without_blocks_is_scored_as_ever():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.randn(6, 3, 3, 3)
    groups = tpvprune.find_groups(model, x[:1])
    assert not segments_of(model)
    held, again = (
        tpvprune.tpv_scores(model, groups, [x], grad_checkpointing=g) for g in (False, True)
    )
    assert all(torch.equal(held[n], again[n]) for n in held)
