"""TPVImportance inside torch-pruning's own pruner, against the ranking of the scores themselves."""

import copy

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

import tpvprune.cifar_resnet  # noqa: F401  (registers its models)
from tpvprune.groups import find_groups
from tpvprune.scores.importance import TPVImportance


def subject(name, size=32, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    images = torch.randn(2, 3, size, size)
    return model, images, find_groups(model, images, verify=False)


def drawn(groups):
    generator = torch.Generator().manual_seed(1)
    return {g.name: torch.rand(g.num_channels, generator=generator) for g in groups}


def pruner(model, images, importance, **options):
    options = {"pruning_ratio": 0.5, "ignored_layers": [model.get_classifier()], **options}
    return tp.pruner.BasePruner(model, images, importance, **options)


def best(score, ratio=0.5):
    """The channels that stay when the pruner removes the lowest of one layer."""
    num_kept = int(len(score) * (1 - ratio))
    return score.argsort(descending=True)[:num_kept].sort().values


def test_the_lowest_scores_leave_a_resnet():
    model, images, groups = subject("resnet18")
    scores = drawn(groups)
    dense = copy.deepcopy(model)
    pruner(model, images, TPVImportance(scores, groups)).step()
    inner = [name for name in scores if name.startswith("layer") and name.endswith("conv1")]
    assert len(inner) == 8
    # Where the input was cut too, the rows are looked at through the stream's kept columns.
    streams = {"layer1": "conv1", "layer2": "layer2.0.conv2"}
    for name in ("layer1.0.conv1", "layer1.1.conv1", "layer2.1.conv1"):
        rows, columns = best(scores[name]), best(scores[streams[name[:6]]])
        expected = dense.get_submodule(name).weight[rows][:, columns]
        assert torch.equal(model.get_submodule(name).weight, expected)
    assert model(images).shape == (2, 10)


def test_channels_inside_the_blocks_of_a_cifar_resnet_leave_by_rank():
    model, images, groups = subject("cifar_resnet20")
    # torch-pruning cannot follow the padded shortcuts, so the streams get no scores.
    scores = {n: s for n, s in drawn(groups).items() if n.endswith(".conv1")}
    dense = copy.deepcopy(model)
    pruner(model, images, TPVImportance(scores, groups)).step()
    for name, score in scores.items():
        expected = dense.get_submodule(name).weight[best(score)]
        assert torch.equal(model.get_submodule(name).weight, expected)
    assert model.conv1.out_channels == 16
    assert model(images).shape == (2, 10)


def test_global_ranking_compares_scores_of_different_layers():
    model, images, groups = subject("cifar_resnet20")
    scores = {n: s for n, s in drawn(groups).items() if n.endswith(".conv1")}
    scores["layer1.0.conv1"] += 10
    pruner(model, images, TPVImportance(scores, groups), global_pruning=True).step()
    assert model.get_submodule("layer1.0.conv1").out_channels == 16
    ranked = torch.cat(list(scores.values())).sort(descending=True).values
    threshold = ranked[int(len(ranked) * 0.5)]
    for name, score in scores.items():
        assert model.get_submodule(name).out_channels == int((score > threshold).sum())


class Concatenated(nn.Module):
    """Two convolutions whose outputs are read together, and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(10, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        both = torch.cat([self.left(x), self.right(x)], 1).relu()
        return self.head(self.grouped(self.inner(both).relu()).relu().mean((2, 3)))


def test_importance_follows_the_indices_of_a_concatenation():
    torch.manual_seed(0)
    model, images = Concatenated(), torch.randn(2, 3, 8, 8)
    groups = find_groups(model, images)
    scores = drawn(groups)
    graph = tp.DependencyGraph().build_dependency(model, images)
    importance = TPVImportance(scores, groups)
    for idxs in ([0, 1, 2, 3, 4, 5], [5, 2, 3]):
        group = graph.get_pruning_group(model.right, tp.prune_conv_out_channels, idxs)
        assert torch.equal(importance(group), scores["right"][group[0].idxs].double())
    group = graph.get_pruning_group(model.inner, tp.prune_conv_in_channels, [9, 4, 0])
    summed = {0: scores["left"][0], 4: scores["right"][0], 9: scores["right"][5]}
    expected = torch.stack([summed[i] for i in group[0].idxs]).double()
    assert torch.equal(importance(group), expected)


def test_conv_groups_are_left_whole():
    torch.manual_seed(0)
    model, images = Concatenated(), torch.randn(2, 3, 8, 8)
    groups = find_groups(model, images)
    assert {g.unit for g in groups} == {"channel", "conv group"}
    importance = TPVImportance(drawn(groups), groups)
    tp.pruner.BasePruner(
        model, images, importance, pruning_ratio=0.5, ignored_layers=[model.head]
    ).step()
    assert (model.left.out_channels, model.right.out_channels) == (2, 3)
    assert (model.inner.out_channels, model.grouped.out_channels) == (8, 8)
    assert model(images).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_whole_heads_leave_on_request():
    model, images, groups = subject("vit_tiny_patch16_224", 64, img_size=64, depth=2)
    scores = {n: s for n, s in drawn(groups).items() if n.endswith("qkv")}
    dense = copy.deepcopy(model)
    options = {
        "num_heads": {block.attn.qkv: 3 for block in model.blocks},
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": 0.3,
        "pruning_ratio": 1e-9,  # at 0 torch-pruning prunes no heads either
    }
    pruner(model, images, TPVImportance(scores, groups), **options).step()
    assert all(block.attn.proj.in_features == 192 for block in model.blocks)
    options["num_heads"] = {block.attn.qkv: 3 for block in model.blocks}
    pruner(model, images, TPVImportance(scores, groups, heads=True), **options).step()
    for i, block in enumerate(model.blocks):
        kept = best(scores[f"blocks.{i}.attn.qkv"], 0.3)
        columns = (kept[:, None] * 64 + torch.arange(64)).flatten()
        assert torch.equal(block.attn.proj.weight, dense.blocks[i].attn.proj.weight[:, columns])


def test_a_model_pruned_since_is_refused():
    model, images, groups = subject("cifar_resnet20")
    scores = {n: s for n, s in drawn(groups).items() if n.endswith(".conv1")}
    stepwise = pruner(model, images, TPVImportance(scores, groups), iterative_steps=2)
    stepwise.step()
    with pytest.raises(ValueError, match=r"was pruned since, score it again"):
        stepwise.step()
    again = find_groups(model, images, verify=False)
    fresh = {n: s for n, s in drawn(again).items() if n.endswith(".conv1")}
    stepwise.current_step = 1
    stepwise.importance = TPVImportance(fresh, again)
    stepwise.step()
    assert model.layer1[0].conv1.out_channels == 8
    assert model(images).shape == (2, 10)


def test_another_model_is_refused():
    _, images, groups = subject("cifar_resnet20")
    wrapped = nn.Sequential(timm.create_model("cifar_resnet20", num_classes=10).eval())
    with pytest.raises(ValueError, match="score the very module that the pruner gets"):
        tp.pruner.BasePruner(wrapped, images, TPVImportance(drawn(groups), groups)).step()


def test_scores_of_another_length_are_refused():
    _, _, groups = subject("cifar_resnet20")
    with pytest.raises(ValueError, match=r"expected 16 scores, found shape \(3,\)"):
        TPVImportance({"layer1.0.conv1": torch.ones(3)}, groups)
