"""Refitted layers against least squares on concatenated data."""

import copy

import pytest
import torch
from cases import (
    CASES,
    NUM_CLASSES,
    Chain,
    Residual,
    Tabled,
    batches,
    build,
    duplicate_channel,
    images,
)
from oracles import im2col, refit
from torch import nn
from torch.nn import functional as F

from tpvprune import compensate_weights, find_groups, remove_channels
from tpvprune.groups.removal import restore_empty
from tpvprune.passes.evaluation import output_variance
from tpvprune.repairs.branches import Plan
from tpvprune.repairs.targets import dense_targets, plan_for

EXACT = {"rtol": 1e-5, "atol": 1e-7}  # a ridge of 1e-12 on Gram matrices
NUM = 48


def cut(model, kept):
    """Return (pruned, groups, kept) with the last channels of some groups left."""
    groups = find_groups(model, images(2))
    sizes = {name: groups[name].num_channels for name in kept}
    masks = {n: torch.arange(sizes[n]) >= sizes[n] - num for n, num in kept.items()}
    return remove_channels(model, groups, masks), groups, masks


def cut_everywhere(model, seed=0):
    groups = find_groups(model, images(2))
    generator = torch.Generator().manual_seed(seed)
    kept = {g.name: torch.rand(g.num_channels, generator=generator) < 0.6 for g in groups}
    for mask in kept.values():
        mask[:1] |= not mask.any()
    kept = restore_empty(groups, kept)
    return remove_channels(model, groups, kept), groups, kept


def repair(dense, pruned, groups, kept, *, ridge=1e-12, data=None, nonlinear=False):
    data = batches(NUM, 20) if data is None else data
    return compensate_weights(
        pruned, dense, data,
        groups=groups, kept=kept, ridge=ridge, min_rows=1 << 20, nonlinear=nonlinear,
    )  # fmt: skip


def seen(model, x):
    """Return, by layer, its input and its output."""
    calls, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):

            def look(_, args, out, name=name):
                calls[name] = (args[0].clone(), out.clone())

            hooks.append(module.register_forward_hook(look))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return calls


def rows_of(groups, kept, name):
    """Return which outputs of a layer stay."""
    for dim, axis in groups.param_axes.get(f"{name}.weight", ()):
        if dim == 0:
            return axis.kept(kept)
    return slice(None)


def channels_last(out, layer):
    return out if isinstance(layer, nn.Linear) else out.movedim(1, -1)


class Consumer(nn.Module):
    """A pruned layer, one that mixes its error in, and the consumer to be looked at."""

    def __init__(self, consumer, width=6):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, width, 1)
        self.consumer = consumer
        self.fc = nn.Linear(consumer.weight.shape[0], NUM_CLASSES)

    def forward(self, x):
        x = F.leaky_relu(self.mix(F.relu(self.conv1(x))))
        if isinstance(self.consumer, nn.Linear):
            return self.fc(F.relu(self.consumer(x.movedim(1, -1))).mean((1, 2)))
        if isinstance(self.consumer, nn.Conv1d):
            return self.fc(F.relu(self.consumer(x.flatten(2))).mean(2))
        return self.fc(F.relu(self.consumer(x)).mean((2, 3)))


CONSUMERS = {
    "plain": lambda: nn.Conv2d(6, 4, 3),
    "strided": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(6, 4, (3, 1), padding=(2, 0), dilation=2, stride=(1, 3)),
    "grouped": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, stride=2, groups=6),
    "multiplied depthwise": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "linear": lambda: nn.Linear(6, 4),
}


# ---- least squares --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONSUMERS)
def test_consumers_equal_least_squares(kind):
    dense = build(Consumer, CONSUMERS[kind]())
    # Only conv1 is cut, so that the consumer keeps its outputs.
    pruned, groups, kept = cut(dense, {"conv1": 3})
    repaired = repair(dense, pruned, groups, kept)
    x, target = seen(repaired, images(NUM))["consumer"][0], seen(dense, images(NUM))["consumer"][1]
    weight, bias = refit(x, dense.consumer, target)
    torch.testing.assert_close(repaired.consumer.weight, weight, **EXACT)
    torch.testing.assert_close(repaired.consumer.bias, bias, **EXACT)
    assert not torch.allclose(weight, dense.consumer.weight, rtol=1e-3)


@pytest.mark.parametrize(
    "case", ["chain", "concat", "depthwise", "gate", "grouped", "flatten", "no_norm"]
)
def test_every_layer_equals_least_squares_on_what_it_sees(case):
    dense = build(case)
    pruned, groups, kept = cut_everywhere(dense)
    repaired = repair(dense, pruned, groups, kept)
    inputs, targets = seen(repaired, images(NUM)), seen(dense, images(NUM))
    for name, (x, out) in inputs.items():
        layer = repaired.get_submodule(name)
        target = channels_last(targets[name][1], layer)[..., rows_of(groups, kept, name)]
        best = copy.deepcopy(layer)
        target = target if isinstance(layer, nn.Linear) else target.movedim(-1, 1)
        best.weight.data, bias = refit(x, layer, target)
        best.bias = nn.Parameter(bias)
        got = out
        if layer.bias is None:
            got = out + taken_by_norm(dense, repaired, rows_of(groups, kept, name), name)
        # Predictions, since weights of inputs that are always zero are not determined.
        torch.testing.assert_close(got, best(x), **EXACT)


def taken_by_norm(dense, repaired, rows, name):
    """Return the intercept that the BatchNorm behind a layer took up."""
    norm = name.replace("conv", "bn").replace("expand", "bn1")
    norm = norm.replace("depthwise", "bn2").replace("project", "bn3")
    before = dense.get_submodule(norm).running_mean[rows]
    return (before - repaired.get_submodule(norm).running_mean).reshape(-1, 1, 1)


@pytest.mark.parametrize(
    "consumer",
    [
        lambda: nn.Conv1d(6, 4, 5, stride=3, padding=2),
        lambda: nn.Conv2d(6, 4, 5, padding="same"),
        lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
    ],
    ids=["conv1d", "same", "circular"],
)
def test_unusual_windows_are_stationary_points(consumer):
    dense = build(Consumer, consumer())
    pruned, groups, kept = cut(dense, {"conv1": 3})
    repaired = repair(dense, pruned, groups, kept)
    x, target = seen(repaired, images(NUM))["consumer"][0], seen(dense, images(NUM))["consumer"][1]
    layer = repaired.consumer.requires_grad_(True)
    ((layer(x) - target).square().sum(1).mean() / 2).backward()
    assert layer.weight.grad.abs().max() < 1e-8
    assert layer.bias.grad.abs().max() < 1e-8


def test_perturbing_the_solution_never_lowers_the_error():
    ridge = 0.03
    dense = build("chain")
    pruned, groups, kept = cut(dense, {"conv1": 2})
    repaired = repair(dense, pruned, groups, kept, ridge=ridge)
    x, y = seen(repaired, images(NUM))["conv2"][0], seen(dense, images(NUM))["conv2"][1]
    rows, target = im2col(x, dense.conv2)[0], y.movedim(1, -1).reshape(-1, 6)
    start = pruned.conv2.weight.flatten(1)
    penalty = ridge * (rows - rows.mean(0)).square().mean()

    def error(weight, intercept):
        fit = (rows @ weight.T + intercept - target).square().sum(1).mean()
        return fit + penalty * (weight - start).square().sum()

    weight = repaired.conv2.weight.flatten(1)
    intercept = dense.bn2.running_mean - repaired.bn2.running_mean
    least = error(weight, intercept)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        scale = 10.0 ** -(seed % 5)
        moved = weight + scale * torch.randn(weight.shape, generator=generator)
        shifted = intercept + scale * torch.randn(6, generator=generator) * (seed % 2)
        assert error(moved, shifted) > least


# ---- laws -----------------------------------------------------------------------------------


def test_duplicated_channel_is_restored_exactly():
    dense = duplicate_channel(build("chain"), 0, 1)
    groups = find_groups(dense, images(2))
    kept = {"conv1": torch.tensor([True, False, True, True, True])}
    pruned = remove_channels(dense, groups, kept)
    repaired = repair(dense, pruned, groups, kept)
    fresh = images(16, seed=9)
    assert not torch.allclose(pruned(fresh), dense(fresh), rtol=1e-2)
    torch.testing.assert_close(repaired(fresh), dense(fresh), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-12, 1e-3])
@pytest.mark.parametrize("case", CASES)
def test_nothing_removed_changes_nothing(case, ridge):
    dense = build(case)
    groups = find_groups(dense, images(2))
    repaired = repair(dense, copy.deepcopy(dense), groups, {}, ridge=ridge)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(repaired.state_dict()[name], tensor, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_repair_lowers_the_output_variance(case):
    dense = build(case)
    pruned, groups, kept = cut_everywhere(dense)
    repaired = repair(dense, pruned, groups, kept, ridge=1e-3)
    held = [images(64, seed=5)]
    assert output_variance(repaired, dense, held) < output_variance(pruned, dense, held)


def test_repair_does_not_depend_on_batch_split():
    dense = build("residual")
    pruned, groups, kept = cut_everywhere(dense)
    a, b = (
        repair(dense, pruned, groups, kept, ridge=1e-3, data=data)
        for data in ([images(24)], images(24).split([1, 20, 3]))
    )
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], tensor)


def test_norm_takes_up_the_intercept():
    dense = build("chain")
    pruned, groups, kept = cut(dense, {"conv1": 2})
    repaired = repair(dense, pruned, groups, kept)
    gone = images(NUM)
    # With its own intercept each pre-activation has the dense mean.
    moved = (dense.bn2.running_mean - repaired.bn2.running_mean).reshape(-1, 1, 1)
    new, old = seen(repaired, gone)["conv2"][1] + moved, seen(dense, gone)["conv2"][1]
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(new.mean((0, 2, 3)), old.mean((0, 2, 3)))
    for name in ("weight", "bias", "running_var"):
        assert torch.equal(getattr(repaired.bn2, name), getattr(dense.bn2, name))


# ---- sums -----------------------------------------------------------------------------------


def sums(model, x):
    """Return the two sums of branch and shortcut of Residual, and its last shortcut."""
    with torch.no_grad():
        x = F.relu(model.bn(model.stem(x)))
        first = model.bn2(model.conv2(F.relu(model.bn1(model.conv1(x))))) + x
        x = F.relu(first)
        return first, model.conv4(F.relu(model.conv3(x))) + x, x


def test_branches_make_up_for_errors_of_the_shortcut():
    dense = build(Residual)
    pruned, groups, kept = cut(dense, {"conv1": 1})  # the first block errs, the second is whole
    repaired = repair(dense, pruned, groups, kept)
    (_, target, _), (_, got, shortcut) = sums(dense, images(NUM)), sums(repaired, images(NUM))
    x = seen(repaired, images(NUM))["conv4"][0]
    best = copy.deepcopy(repaired.conv4)
    best.weight.data, best.bias.data = refit(x, best, target - shortcut)
    torch.testing.assert_close(got, best(x) + shortcut, **EXACT)


class Twins(nn.Module):
    """Two layers meet in a sum; what the first loses the second can still see."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 4, 1)
        self.second = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        first = self.first(F.relu(self.left(x)))
        return self.fc(F.relu(first + self.second(F.relu(self.right(x)))).mean((2, 3)))


def test_sums_are_restored_exactly_where_the_branch_sees_what_the_shortcut_lost():
    dense = build(Twins)
    dense.right.load_state_dict(dense.left.state_dict())
    pruned, groups, kept = cut(dense, {"left": 1})
    repaired = repair(dense, pruned, groups, kept)
    fresh = images(16, seed=9)
    torch.testing.assert_close(repaired(fresh), dense(fresh), rtol=1e-6, atol=1e-8)


def test_branches_that_end_in_a_norm_meet_the_dense_sum():
    dense = build(Residual)
    pruned, groups, kept = cut(dense, {"conv1": 2})
    repaired = repair(dense, pruned, groups, kept)
    (target, _, _), (got, _, _) = sums(dense, images(NUM)), sums(repaired, images(NUM))
    x = seen(repaired, images(NUM))["conv2"][0]
    scale = (dense.bn2.weight / (dense.bn2.running_var + dense.bn2.eps).sqrt()).reshape(-1, 1, 1)
    weight, bias = refit(x, repaired.conv2, seen(dense, images(NUM))["conv2"][1])
    best = F.conv2d(x, weight, bias, padding=1) - seen(dense, images(NUM))["conv2"][1]
    # The shortcut is whole here, so the best sum errs by the scaled error of the best branch.
    torch.testing.assert_close(got - target, scale * best, rtol=1e-4, atol=1e-7)


class Scaled(nn.Module):
    """A shortcut that is itself a layer's output, overwritten, and a branch behind a scale."""

    def __init__(self, inplace):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 6, 1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.fc = nn.Linear(6, NUM_CLASSES)
        self.inplace = inplace

    def forward(self, x):
        x = self.bn(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(x, inplace=self.inplace)
        x = x + self.conv3(x) * self.scale
        return self.fc(x.mean((2, 3)))


def test_overwritten_shortcuts_are_not_taken_for_branches():
    repaired = []
    for inplace in (True, False):
        dense = build(Scaled, inplace)
        pruned, groups, kept = cut(dense, {"conv1": 3})
        repaired.append(repair(dense, pruned, groups, kept, ridge=1e-3))
    for name, tensor in repaired[0].state_dict().items():
        torch.testing.assert_close(repaired[1].state_dict()[name], tensor)


class Shared(nn.Module):
    """A pre-activation network: a norm and a shortcut read the same convolution."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = self.conv2(F.relu(self.conv1(x)))
        return self.fc((self.conv3(F.relu(self.bn(x))) + x).mean((2, 3)))


def test_norms_that_share_their_input_take_up_nothing():
    dense = build(Shared)
    pruned, groups, kept = cut(dense, {"conv1": 3})
    repaired = repair(dense, pruned, groups, kept)
    assert torch.equal(repaired.bn.running_mean, dense.bn.running_mean)
    assert not torch.allclose(repaired.conv2.weight, pruned.conv2.weight, rtol=1e-3)


# ---- manners --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_targets_take_the_memory_that_was_planned(case):
    dense = build(case)

    def taken(plan):
        targets = dense_targets(dense, batches(NUM, 20), plan)
        values = [*targets.outputs.values(), *targets.sums.values()]
        return sum(4 * v.numel() for v in values)

    plan = Plan(NUM, rows_per_input=24, min_rows=1000, seed=0)
    whole = taken(plan)
    assert taken(plan_for(plan, dense, images(1), whole)) == whole
    assert taken(plan_for(plan, dense, images(1), whole - 1)) < whole
    third = plan_for(plan, dense, images(1), whole // 3)
    assert whole // 10 < taken(third) <= whole // 3
    one_each = taken(Plan(NUM, rows_per_input=0, min_rows=0, seed=0))
    assert taken(plan_for(plan, dense, images(1), 1)) == one_each


def test_a_last_batch_of_one_image_has_no_targets_of_its_own():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.place = nn.Parameter(torch.randn(1, 4, 6, 6))

        def forward(self, x):
            return self.conv(x) + self.place

    x, plan = images(5), Plan(5, rows_per_input=24, min_rows=1000, seed=0)
    split = dense_targets(Embedded(), x.split(2), plan)
    assert not split.sums
    assert list(split.outputs) == [0]


@pytest.mark.parametrize("num", [4, 20, 25])
def test_layers_that_see_no_image_stay_as_they_are(num):  # 25 images, 25 rows
    torch.manual_seed(3)
    dense, x = Tabled().double().eval(), images(num)
    groups = find_groups(dense, x[:1])
    inner = next(g for g in groups if g.num_channels == 8)
    kept = {inner.name: torch.arange(8) < 5}
    pruned = remove_channels(dense, groups, kept)
    repaired = compensate_weights(pruned, dense, x.split(4), groups=groups, kept=kept)
    assert all(map(torch.equal, repaired.table.parameters(), dense.table.parameters()))
    assert output_variance(repaired, dense, [x]) < output_variance(pruned, dense, [x])


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_bias_that_is_made_elsewhere_is_not_learned_again(by_keyword):
    """Swin V2 puts the biases of query and value together in its forward."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.joint = nn.Linear(6, 4, bias=False)
            self.parts = nn.Parameter(torch.tensor([30.0, -20.0]))
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            x = self.conv(x).relu().mean((2, 3))
            bias = torch.cat([self.parts, torch.zeros_like(self.parts)])
            if by_keyword:
                x = F.linear(x, weight=self.joint.weight, bias=bias)
            else:
                x = F.linear(x, self.joint.weight, bias)
            return self.fc(x)

    torch.manual_seed(3)
    dense, x = Made().double().eval(), images(24)
    groups = find_groups(dense, x[:1])
    same = compensate_weights(dense, dense, [x], groups=groups, kept={})
    for found, wanted in zip(same.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_models_are_not_touched(untouched):
    dense = build(Chain)
    pruned, groups, kept = cut_everywhere(dense)
    dense.train()
    dense.bn1.eval()
    pruned.conv1.requires_grad_(False)
    with untouched(dense, pruned):
        repaired = repair(dense, pruned, groups, kept)
    assert repaired.conv1.weight.requires_grad is False
    assert repaired.conv2.weight.requires_grad is True
    assert repaired.training == pruned.training


def test_labels_are_dropped_unread():
    dense = build(Chain)
    pruned, groups, kept = cut_everywhere(dense)
    plain = repair(dense, pruned, groups, kept)
    labelled = repair(dense, pruned, groups, kept, data=[(x, None) for x in batches(NUM, 20)])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(labelled.state_dict()[name], tensor)


class Film(nn.Module):
    """Frames one by one, and their mean; ``folded``: of a film [B, 4, C, H, W], in one batch."""

    def __init__(self, *, folded):
        super().__init__()
        self.folded = folded
        self.convs = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 9, 3, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(9, 4)

    def forward(self, x):
        out = self.fc(self.convs(x.flatten(0, 1) if self.folded else x).mean((2, 3)))
        return out.unflatten(0, (len(x), -1)).mean(1) if self.folded else out


def test_frames_in_the_batch_are_fitted_like_frames_by_themselves():
    torch.manual_seed(0)
    films, others = torch.randn(2, 48, 4, 3, 8, 8, dtype=torch.float64)
    film, frame = (Film(folded=folded).double().eval() for folded in (True, False))
    frame.load_state_dict(film.state_dict())
    left = []
    for model, data in ((film, films), (frame, films.flatten(0, 1))):
        groups = find_groups(model, data[:2])
        kept = {g.name: torch.arange(g.num_channels) % 3 > 0 for g in groups}
        pruned = remove_channels(model, groups, kept)
        repaired = repair(model, pruned, groups, kept, ridge=None, data=[data])
        frame_by_frame = copy.deepcopy(repaired)
        frame_by_frame.folded = True
        left.append(float(output_variance(frame_by_frame, film, [others])))
    assert left[0] < 1.05 * left[1]


def views_fitted(data, *, num_views, ridge, nonlinear=False):
    dense = build("residual")
    pruned, groups, kept = cut_everywhere(dense)
    return compensate_weights(
        pruned, dense, data, groups=groups, kept=kept, ridge=ridge, min_rows=1 << 20,
        nonlinear=nonlinear, num_views=num_views,
    )  # fmt: skip


def test_mirror_images_are_fitted_to_as_images_of_their_own():
    data = batches(NUM, 20)
    mirrored = [torch.stack([x, x.flip(3)], 1).flatten(0, 1) for x in data]
    found = views_fitted(data, num_views=2, ridge=1e-12).state_dict()
    torch.testing.assert_close(
        found, views_fitted(mirrored, num_views=1, ridge=1e-12).state_dict(), **EXACT
    )
    alone = views_fitted(data, num_views=1, ridge=1e-12).state_dict()
    assert any(not torch.allclose(found[name], alone[name], rtol=1e-3) for name in alone)


def test_an_image_and_its_mirror_image_are_held_back_together():
    def fitted(data, num_views):
        given = {"num_views": num_views, "ridge": None, "nonlinear": True}
        return views_fitted(data, **given).state_dict()

    # Of symmetric images a view tells nothing new, and what is chosen on held-back inputs stays.
    data = [x + x.flip(3) for x in batches(NUM, 20)]
    once, copies = fitted(data, 1), fitted([x.repeat_interleave(2, 0) for x in data], 1)
    torch.testing.assert_close(fitted(data, 2), once, rtol=1e-6, atol=1e-8)
    assert any(not torch.allclose(copies[name], once[name], rtol=1e-4) for name in once)
