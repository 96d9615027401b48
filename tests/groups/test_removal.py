"""Removal against plain indexing, masks and a second count of the costs."""

import copy

import pytest
import torch
from cases import CASES, InPlace, batches, build, images

from tpvprune import count_macs, count_params, find_groups, remove_channels
from tpvprune.groups.masking import MaskedChannels
from tpvprune.groups.removal import attribute_changes, restore_empty, shrink_to

ALL = [*CASES, InPlace]


def random_kept(groups, fraction=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = {g.name: torch.rand(g.num_channels, generator=generator) < fraction for g in groups}
    for mask in kept.values():
        mask[-1:] |= not mask.any()
    return restore_empty(groups, kept)


def pruned(case, seed=0):
    """Return (dense, smaller, groups, kept)."""
    dense = build(case)
    groups = find_groups(dense, images(2))
    kept = random_kept(groups, seed=seed)
    return dense, remove_channels(dense, groups, kept), groups, kept


def kept_of(tensor, groups, kept, name):
    """Return what is left of a parameter or buffer: its slices' kept positions, by the records."""
    for dim in range(tensor.ndim):
        stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
        for group in groups:
            for part in group.slices:
                if part.param == name and part.dim == dim:
                    stays[part.index] = kept[group.name][part.channel]
        tensor = tensor.index_select(dim, stays.nonzero().squeeze(1))
    return tensor


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_parameters_are_the_dense_ones_at_the_kept_indices(case, seed):
    dense, small, groups, kept = pruned(case, seed)
    assert dense.state_dict().keys() == small.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(small.state_dict()[name], kept_of(tensor, groups, kept, name)), name


@pytest.mark.parametrize("case", [c for c in ALL if c != "attention"])
def test_removal_equals_masking(case):
    dense, small, groups, kept = pruned(case)
    with MaskedChannels(groups, kept), torch.no_grad():
        masked = dense(images())
    torch.testing.assert_close(small(images()), masked, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ALL)
def test_keeping_everything_is_the_identity(case):
    dense = build(case)
    groups = find_groups(dense, images(2))
    whole = {g.name: torch.ones(g.num_channels, dtype=torch.bool) for g in groups}
    for kept in ({}, whole):
        same = remove_channels(dense, groups, kept)
        assert same is not dense
        assert torch.equal(same(images()), dense(images()))
        for name, tensor in dense.state_dict().items():
            assert torch.equal(same.state_dict()[name], tensor)
        assert attribute_changes(dense, same) == {}


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_predicted_costs_are_those_of_the_pruned_model(case, seed):
    dense, small, groups, kept = pruned(case, seed)
    assert groups.macs() == count_macs(dense, images(2))
    assert groups.macs(kept) == pytest.approx(count_macs(small, images(2)), rel=1e-9)
    assert groups.params() == count_params(dense)
    assert groups.params(kept) == count_params(small)


@pytest.mark.parametrize("case", ALL)
def test_pruned_models_can_be_copied_and_loaded(case):
    _, small, _, _ = pruned(case)
    expected = small(images())
    assert torch.equal(copy.deepcopy(small)(images()), expected)
    other = copy.deepcopy(small)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(images()), expected)


@pytest.mark.parametrize("case", ["residual", "depthwise", "grouped", "flatten", "attention"])
def test_pruned_models_can_be_exported(case):
    _, small, _, _ = pruned(case)
    program = torch.export.export(small, (images(),))
    torch.testing.assert_close(program.module()(images()), small(images()))


@pytest.mark.parametrize("case", CASES)
def test_pruned_models_can_be_trained(case):
    _, small, _, _ = pruned(case)
    small.train()
    small(images()).square().sum().backward()
    for name, p in small.named_parameters():
        assert p.is_leaf
        assert p.grad is not None and p.grad.shape == p.shape, name


@pytest.mark.parametrize("case", ALL)
def test_attribute_changes_rebuild_the_pruned_model(case):
    dense, small, _, _ = pruned(case)
    skeleton = build(case, seed=7)
    shapes = {name: tuple(t.shape) for name, t in small.state_dict().items()}
    shrink_to(skeleton, shapes, attribute_changes(dense, small))
    skeleton.load_state_dict(small.state_dict())
    assert torch.equal(skeleton(images()), small(images()))
    assert repr(skeleton) == repr(small)


def test_two_steps_equal_one():
    dense = build("residual")
    groups = find_groups(dense, images(2))
    first = {"stem": torch.tensor([True, True, False, True, True])}
    second = {"stem": torch.tensor([True, False, True, True])}  # of those left
    half = remove_channels(dense, groups, first)
    twice = remove_channels(half, find_groups(half, images(2)), second)
    once = remove_channels(dense, groups, {"stem": torch.tensor([True, False, False, True, True])})
    assert torch.equal(twice(images()), once(images()))


def test_modes_and_gradients_flags_are_inherited(untouched):
    dense = build("residual").train()
    dense.bn1.eval()
    dense.conv1.requires_grad_(False)
    groups = find_groups(dense, images(2))
    with untouched(dense):
        small = remove_channels(dense, groups, random_kept(groups))
    assert [m.training for m in small.modules()] == [m.training for m in dense.modules()]
    assert [p.requires_grad for p in small.parameters()] == [
        p.requires_grad for p in dense.parameters()
    ]


def test_emptied_branches_get_a_channel_back():
    dense = build("concat_residual")
    groups = find_groups(dense, images(2))
    name = groups.groups[0].name
    kept = {name: torch.tensor([True, True, True, False, False])}
    with pytest.raises(ValueError, match="restore_empty"):
        remove_channels(dense, groups, kept)
    restored = restore_empty(groups, kept)
    assert restored[name].tolist() == [True, True, True, True, False]
    assert kept[name].tolist() == [True, True, True, False, False]
    remove_channels(dense, groups, restored)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"nobody": torch.ones(5, dtype=torch.bool)}, "'nobody'"),
        ({"conv1": torch.ones(4, dtype=torch.bool)}, r"shape \(5,\)"),
        ({"conv1": torch.ones(5)}, "bool"),
        ({"conv1": torch.zeros(5, dtype=torch.bool)}, "at least one must stay"),
    ],
)
def test_selections_that_do_not_fit_are_rejected(kept, message):
    dense = build("chain")
    groups = find_groups(dense, batches()[0])
    with pytest.raises(ValueError, match=message):
        remove_channels(dense, groups, kept)
