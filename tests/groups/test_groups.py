"""Groups of timm models: masking equals removal, and a wrong cut is caught."""

import copy
import dataclasses
import itertools
import random
import time

import pytest
import timm
import torch
from cases import Tabled, images
from torch import nn

from tpvprune.groups import ChannelGroups, find_groups, with_blocked
from tpvprune.groups.masking import MaskedChannels
from tpvprune.groups.removal import (
    attribute_changes,
    remove_channels,
    restore_empty,
    shrink_to,
)
from tpvprune.groups.verification import _failing_together, verify_groups
from tpvprune.passes.costs import count_macs, count_params
from tpvprune.pipeline import prune

# model, image size, keyword arguments, least number of groups, a unit that must be among them
MODELS = [
    ("test_resnet", 32, {}, 10, "channel"),
    ("test_efficientnet", 32, {}, 10, "channel"),
    ("test_byobnet", 32, {}, 10, "channel"),
    ("test_convnext", 32, {}, 10, "channel"),
    ("test_nfnet", 32, {}, 15, "channel"),
    ("test_mambaout", 32, {}, 10, "channel"),
    ("test_vit", 32, {"img_size": 32}, 10, "head"),
    ("test_vit_relpos", 32, {"img_size": 32}, 10, "head"),
    ("test_coatnet", 160, {}, 10, "head"),
    ("test_efficientnet_gn", 32, {}, 10, "channel"),
    ("xcit_nano_12_p16_224", 32, {}, 10, "head"),
    ("mobilevit_xxs", 32, {}, 30, "head"),
]


def build(name, kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def half(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for g in groups:
        kept[g.name] = torch.zeros(g.num_channels, dtype=torch.bool)
        stay = torch.randperm(g.num_channels, generator=generator)[: (g.num_channels + 1) // 2]
        kept[g.name][stay] = True
    return restore_empty(groups, kept)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, channels=(8, 12, 16, 24)).eval()
    return model, find_groups(model, torch.randn(1, 3, 32, 32), verify=False)


@pytest.fixture(scope="module", params=MODELS, ids=[m[0] for m in MODELS])
def case(request):
    name, size, kwargs, *expected = request.param
    model = build(name, kwargs)
    return model, find_groups(model, torch.randn(1, 3, size, size)), size, (name, kwargs), expected


# The attributes that timm caches (num_heads, head_dim, scale, bias tables) must fit both ways.
ATTENTIVE = [
    ("test_vit", 32, {"img_size": 32}),
    ("test_vit_relpos", 32, {"img_size": 32}),
    ("beit_base_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}),
    ("eva02_tiny_patch14_224", 28, {"img_size": 28, "depth": 1, "embed_dim": 48, "num_heads": 3}),
    ("deit3_small_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48}),
    ("swin_tiny_patch4_window7_224", 56, {"img_size": 56, "embed_dim": 24, "depths": (2, 1)}),
    ("cait_xxs24_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}),
    ("hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 24, "stages": (1, 1, 1, 1)}),
    ("mobilevit_xxs", 32, {}),
    ("pvt_v2_b0", 64, {}),
]


@pytest.mark.parametrize(("name", "size", "kwargs"), ATTENTIVE, ids=[m[0] for m in ATTENTIVE])
def test_fused_and_unfused_attention_agree_after_heads_are_removed(name, size, kwargs):
    model = build(name, kwargs)
    groups = find_groups(model, torch.randn(1, 3, size, size), verify=False)
    heads = {g.name for g in groups if g.unit == "head" and g.num_channels > 1}
    assert heads
    small = remove_channels(model, groups, {n: m for n, m in half(groups).items() if n in heads})
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    attentions = [m for m in small.double().modules() if hasattr(m, "fused_attn")]
    assert attentions
    found = []
    for fused in (True, False):
        for module in attentions:
            module.fused_attn = fused
        with torch.no_grad():
            found.append(small(x))
    assert torch.allclose(*found, rtol=1e-8, atol=1e-10)


def masked_and_removed(model, groups, kept, size):
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        with MaskedChannels(groups, kept):
            masked = model(x)
        return masked, remove_channels(model, groups, kept)(x), model(x)


def test_every_group_alone_masks_as_it_is_removed(case):
    model, groups, size, _, (least, unit) = case
    assert len(groups) >= least
    assert unit in {g.unit for g in groups}
    reasons = [b.blocked for b in groups.blocked if not b.blocked.endswith("sees no input")]
    assert reasons == ["is an output of the network"]
    everything = half(groups, seed=1)
    for name in [*list(everything)[:: max(len(everything) // 6, 1)], None]:
        kept = everything if name is None else restore_empty(groups, {name: everything[name]})
        masked, removed, dense = masked_and_removed(model, groups, kept, size)
        gap = (masked - removed).abs().max() / masked.abs().max()
        assert gap < 1e-10, name
    assert not torch.equal(masked, dense)  # of all groups together, which comes last


def test_costs_are_those_of_the_smaller_model(case):
    model, groups, size, _, _ = case
    kept = half(groups)
    small = remove_channels(model, groups, kept)
    x = torch.randn(1, 3, size, size)
    assert groups.params(kept) == count_params(small)
    assert groups.params() == count_params(model)
    assert groups.macs() == pytest.approx(count_macs(model, x), rel=0.01)
    assert groups.macs(kept) == pytest.approx(count_macs(small, x), rel=0.02)


def test_pruned_model_reloads_trains_and_copies(case):
    model, groups, size, (name, kwargs), _ = case
    small = remove_channels(model, groups, half(groups))
    x = torch.randn(2, 3, size, size)
    rebuilt = build(name, kwargs)
    tensors = [*small.named_parameters(), *small.named_buffers()]
    shrink_to(rebuilt, {n: tuple(t.shape) for n, t in tensors}, attribute_changes(model, small))
    rebuilt.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(x), copy.deepcopy(small)(x))
    small.train()(x).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())


def test_fused_and_unfused_attention_agree_after_pruning():
    model = build("test_vit", {"img_size": 32})
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    small = remove_channels(model, groups, half(groups))
    unfused = copy.deepcopy(small)
    changed = 0
    for module in unfused.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn, changed = False, changed + 1
    assert changed
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(unfused(x), small(x), rtol=1e-4, atol=1e-5)


# ---- a check that cannot fail proves nothing ------------------------------------------------


def corrupted(groups, name, param, dim):
    """Return groups in which two positions of one parameter are exchanged."""
    axes = dict(groups.param_axes)
    new = []
    for d, axis in axes[param]:
        if d == dim:
            [(owner, index, channel)] = [m for m in axis.members if m[0] == name]
            members = ((owner, index, channel.roll(1)),)
            axis = dataclasses.replace(axis, members=members)  # noqa: PLW2901
        new.append((d, axis))
    axes[param] = tuple(new)
    return dataclasses.replace(groups, param_axes=axes)


@pytest.mark.parametrize(
    ("param", "dim"),
    [("layer1.0.conv1.weight", 0), ("layer1.0.bn1.bias", 0), ("layer1.0.conv2.weight", 1)],
)
def test_a_misaligned_cut_is_caught(resnet, param, dim):
    model, groups = resnet
    bad = corrupted(groups, "layer1.0.conv1", param, dim)
    checked = verify_groups(model, bad, (torch.randn(1, 3, 32, 32),))
    assert [(b.name, b.blocked[:27]) for b in checked.blocked if b.name != "fc"] == [
        ("layer1.0.conv1", "masking and removal differ ")
    ]
    assert len(checked) == len(groups) - 1


def test_a_removal_that_breaks_the_forward_is_caught(resnet):
    model, groups = resnet
    axes = dict(groups.param_axes)
    axes["layer1.0.conv2.weight"] = tuple(a for a in axes["layer1.0.conv2.weight"] if a[0] != 1)
    bad = dataclasses.replace(groups, param_axes=axes)
    checked = verify_groups(model, bad, (torch.randn(1, 3, 32, 32),))
    reasons = {b.name: b.blocked for b in checked.blocked}
    assert reasons["layer1.0.conv1"].startswith("removal breaks the forward: RuntimeError")


def reasons_of(groups):
    return {b.name: b.blocked for b in groups.blocked}


def test_verification_is_bounded_in_trials(resnet):
    model, groups = resnet
    bad = corrupted(groups, "layer1.0.conv1", "layer1.0.conv1.weight", 0)
    x = torch.randn(1, 3, 32, 32)
    checked = verify_groups(model, bad, (x,), max_trials=0)
    assert not len(checked)
    assert all("limit of trials" in b.blocked for b in checked.blocked if b.name != "fc")
    # More trials free more groups, and what is free was verified.
    free = [{g.name for g in verify_groups(model, bad, (x,), max_trials=n)} for n in (4, 8, 128)]
    assert free[0] <= free[1] <= free[2] == {g.name for g in groups} - {"layer1.0.conv1"}


def test_what_is_blocked_does_not_depend_on_the_clock(resnet, monkeypatch):
    model, groups = resnet
    bad = corrupted(groups, "layer1.0.conv1", "layer1.0.conv1.weight", 0)
    x = torch.randn(1, 3, 32, 32)
    expected = reasons_of(verify_groups(model, bad, (x,)))
    hours = itertools.count(0.0, 3600.0)
    for clock in ("monotonic", "perf_counter", "time"):
        monkeypatch.setattr(time, clock, lambda: next(hours))
    assert reasons_of(verify_groups(model, bad, (x,))) == expected


def test_a_replaced_copy_leaves_the_original_alone(resnet):
    _, groups = resnet
    known = [g.name for g in groups]
    fewer = dataclasses.replace(groups, groups=groups.groups[:1])
    assert [name in fewer for name in known] == [True] + [False] * (len(known) - 1)
    assert all(groups[name].name == name for name in known)


class Conflicts:
    """Stands in for the checker: sets with both groups of a pair fail."""

    def __init__(self, pairs, savings):
        self.pairs, self.saving, self.error = pairs, savings.__getitem__, ""

    def compare(self, names):
        self.error = "" if not any(p <= set(names) for p in self.pairs) else "wrong"
        return not self.error


@pytest.mark.parametrize("seed", range(20))
def test_of_a_pair_that_fails_together_what_saves_more_stays(seed):
    generator = random.Random(seed)
    names = [f"g{i}" for i in range(generator.choice([3, 20, 50]))]
    order = generator.sample(names, len(names))
    pairs = [set(order[i : i + 2]) for i in range(0, 2 * generator.randint(1, len(names) // 2), 2)]
    savings = {name: generator.random() for name in names}
    reasons = _failing_together(names, Conflicts(pairs, savings))
    by_saving = [sorted(pair, key=savings.get) for pair in pairs]
    assert reasons == {least: f"together with {most}: wrong" for least, most in by_saving}


def test_three_that_fail_only_together_lose_one():
    trio = [{"a", "b", "c"}]
    reasons = _failing_together(["a", "b", "c", "d"], Conflicts(trio, dict.fromkeys("abcd", 1.0)))
    assert reasons == {"c": "together with other groups: wrong"}


def test_zero_initialised_branches_do_not_hide_a_wrong_cut(resnet):
    model, groups = resnet
    model = copy.deepcopy(model)
    nn.init.zeros_(model.layer1[0].bn2.weight)
    bad = corrupted(groups, "layer1.0.conv1", "layer1.0.conv1.weight", 0)
    checked = verify_groups(model, bad, (torch.randn(1, 3, 32, 32),))
    assert "layer1.0.conv1" in {b.name for b in checked.blocked}


# ---- against torch-pruning's walk over the autograd graph -----------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
def test_groups_agree_with_torch_pruning(name):
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    groups = find_groups(model, x, verify=False)
    graph = tp.DependencyGraph().build_dependency(model, x)
    names = {m: n for n, m in model.named_modules()}
    theirs = {
        frozenset(
            names[dep.target.module]
            for dep, _ in group
            if isinstance(dep.target.module, nn.Conv2d)
            and dep.handler.__name__ == "prune_out_channels"
        )
        for group in graph.get_all_groups(root_module_types=[nn.Conv2d])
    }
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    ours = {
        frozenset(
            module
            for s in g.slices
            if (module := s.param.rpartition(".")[0]) in convs
            and s.param.endswith("weight")
            and s.dim == 0
        )
        for g in groups
    }
    assert ours == theirs


# ---- interfaces -----------------------------------------------------------------------------


def test_caller_sees_no_change(untouched):
    model = timm.create_model("test_vit", num_classes=5, img_size=32).train()
    model.blocks[0].eval().requires_grad_(False)
    x, wrong = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 32, 32)
    with untouched(model):
        groups = find_groups(model, x)
        remove_channels(model, groups, half(groups))
        with pytest.raises(ValueError, match="does not run"):
            find_groups(model, wrong)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert type(model.blocks[0].attn.num_heads) is int


def test_ignored_modules_are_left_whole(resnet):
    model, _ = resnet
    groups = find_groups(model, torch.randn(1, 3, 32, 32), ignore=["layer1"], verify=False)
    assert "layer1.0.conv1" not in groups
    assert {b.blocked for b in groups.blocked} == {
        "layer1 is ignored on request",
        "is an output of the network",
    }
    with pytest.raises(ValueError, match="expected the name of a module, found 'nowhere'"):
        find_groups(model, torch.randn(1, 3, 32, 32), ignore=["nowhere"])


def test_ignored_modules_may_come_one_by_one(resnet):
    model, _ = resnet
    groups = find_groups(model, torch.randn(1, 3, 32, 32), ignore=iter(["layer1"]), verify=False)
    assert "layer1 is ignored on request" in {b.blocked for b in groups.blocked}


def test_blocked_groups_disappear_from_every_record(resnet):
    model, groups = resnet
    fewer = with_blocked(groups, {"layer1.0.conv1": "for a test"})
    assert isinstance(fewer, ChannelGroups)
    assert fewer.macs() == groups.macs()
    named = {m[0] for axes in fewer.param_axes.values() for _, a in axes for m in a.members}
    assert named == {g.name for g in fewer}
    with pytest.raises(ValueError, match="prunable groups"):
        remove_channels(model, fewer, {"layer1.0.conv1": torch.ones(8, dtype=torch.bool)})


@pytest.mark.parametrize("inside", ["", "2"])
def test_compiled_models_are_refused_with_what_to_do(inside):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"behind torch.compile: pass the module itself"):
        find_groups(torch.compile(model), x)
    model.get_submodule(inside).compile()
    with pytest.raises(ValueError, match=rf"found '{inside or 'it'}' after .compile"):
        find_groups(model, x)


def test_selection_that_empties_something_is_refused_and_repaired():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.a, self.b, self.fc = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 4, 1), nn.Linear(6, 5)

        def forward(self, x):
            x = self.stem(x)
            x = x + torch.cat([self.a(x), self.b(x)], 1)
            return self.fc(x.mean((2, 3)))

    model = Branches()
    groups = find_groups(model, torch.randn(1, 3, 8, 8))
    kept = {"stem": torch.tensor([False, False, True, True, True, True])}
    with pytest.raises(ValueError, match="restore_empty"):
        remove_channels(model, groups, kept)
    scores = {"stem": torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0])}
    repaired = restore_empty(groups, kept, scores)
    assert repaired["stem"].tolist() == [False, True, True, True, True, True]
    assert kept["stem"].tolist()[:2] == [False, False]
    remove_channels(model, groups, repaired)(torch.randn(1, 3, 8, 8))


def test_shared_parameters_are_cut_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
            self.b.weight = self.a.weight
            self.first = nn.Linear(4, 6)

        def forward(self, x):
            return self.fc(self.b(self.a(self.first(x)).relu()).relu())

    model = Tied()
    groups = find_groups(model, torch.randn(2, 4))
    [group] = groups
    small = remove_channels(model, groups, {group.name: torch.arange(6) < 4})
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (4, 4)


def test_several_inputs_and_a_dict_output():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x, y):
            h = self.a(x).relu() + self.b(y).relu()
            return {"logits": self.out(h), "mean": h.mean(-1)}

    groups = find_groups(Two(), (torch.randn(2, 4), torch.randn(2, 6)))
    assert {g.name: g.num_channels for g in groups} == {"a": 8}


def test_channels_of_a_table_that_sees_no_image_stay_whole():
    model = Tabled().double().eval()
    for verify in (True, False):
        groups = find_groups(model, images(2), verify=verify)
        assert [g.name for g in groups if g.name.startswith("table")] == []
        (blocked,) = [g for g in groups.blocked if g.name == "table.0"]
        assert blocked.blocked == "is read by table.2, which sees no input"
    result = prune(model, images(24).split(8), keep=0.7)
    variance = result.report["output_variance"]
    assert variance["compensate"] < variance["none"]
