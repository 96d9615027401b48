"""Variance curves against the closed form by least squares, at every width."""

import pytest
import torch
from cases import NUM_CLASSES, Chain, batches, build, duplicate_channel, images, kill_channel
from oracles import output_changes, reader_rows, unpredictable
from torch import nn

from tpvprune import find_groups, tpv_scores, variance_curves, with_forward
from tpvprune.groups.budget import unit_costs

SINGLE = {"rtol": 2e-3, "atol": 1e-9}  # the matrices S are kept in float32
RIDGE = 1e-3


@torch.no_grad()
def pseudo_direction(model, x):
    p = model(x).softmax(1)
    return p - nn.functional.one_hot(p.argmax(1), NUM_CLASSES)


def joint_variance(model, group, x, channels):
    """Return E[u_R^2] when the channels leave together and the others stand in for them."""
    replace = unpredictable(model, group, x, channels, ridge=RIDGE)
    u = output_changes(model, group, x, replace)[:, :, channels].sum(2)
    return float((u.detach() * pseudo_direction(model, x)).sum(1).square().mean())


def curves_of(model, groups, data=None, **kwargs):
    """Return the curves, all of them by joint changes of the same rows."""
    data = batches(32, 12) if data is None else data
    joint = {"metric": "pseudo", "ridge": RIDGE, "rows_per_channel": 0, **kwargs}
    return variance_curves(model, groups, data, **joint)


@pytest.mark.parametrize(
    ("case", "unit"),
    [("chain", "channel"), ("residual", "channel"), ("concat", "channel"), ("gate", "channel"),
     ("flatten", "channel"), ("grouped", "conv group"), ("attention", "head")],
)  # fmt: skip
def test_curves_equal_the_closed_form_at_every_width(case, unit):
    model, x = build(case), images(32)
    groups = find_groups(model, x[:2])
    assert unit in {g.unit for g in groups}
    curves = curves_of(model, groups)
    for group in groups:
        curve, most = curves[group.name], 0.0
        for k in range(group.num_channels):
            # Never less than at a larger width: what was lost before can only look regained.
            most = max(most, joint_variance(model, group, x, curve.order[:k]) if k else 0.0)
            torch.testing.assert_close(float(curve.variance[k]), most, **SINGLE)


def test_what_leaves_next_loses_least_for_what_it_saves():
    model, x = build("concat_residual"), images(32)
    groups = find_groups(model, x[:2])
    curves, savings, told = curves_of(model, groups), unit_costs(groups, "macs"), 0
    for group in groups:
        order = curves[group.name].order.tolist()
        for k in range(group.num_channels - 1):
            now = joint_variance(model, group, x, order[:k]) if k else 0.0
            growth = {c: joint_variance(model, group, x, [*order[:k], c]) - now for c in order[k:]}
            per_cost = {c: growth[c] / float(savings[group.name][c]) for c in growth}
            assert order[k] == min(per_cost, key=per_cost.get)
            told += order[k] != min(growth, key=growth.get)
    assert told  # a criterion that does not look at what is saved orders them otherwise


@pytest.mark.parametrize("stand_in", ["mean", "zero"])
@pytest.mark.parametrize("case", ["residual", "concat", "flatten", "grouped", "attention"])
def test_uncompensated_curves_add_up_what_each_channel_leaves(case, stand_in):
    model, x = build(case), images(32)
    groups = find_groups(model, x[:2])
    curves = curves_of(model, groups, stand_in=stand_in)
    v = pseudo_direction(model, x)
    for group in groups:
        rows = reader_rows(model, group.readers, x)
        means = {name: seen.mean(0) for name, seen in rows.items()}
        if stand_in == "zero":
            means = {name: torch.zeros_like(mean) for name, mean in means.items()}
        changes = output_changes(model, group, x, lambda r, a, means=means: a - means[r.module])
        u = torch.einsum("bkc,bk->bc", changes.detach(), v)
        curve, most = curves[group.name], 0.0
        for k in range(group.num_channels):
            most = max(most, float(u[:, curve.order[:k]].sum(1).square().mean()))
            torch.testing.assert_close(float(curve.variance[k]), most, **SINGLE)


@pytest.mark.parametrize("case", ["residual", "depthwise", "flatten", "attention"])
def test_curves_are_monotone_permutations_from_zero(case):
    model = build(case)
    groups = find_groups(model, images(2))
    for group in groups:
        curve = variance_curves(model, groups, batches())[group.name]
        assert sorted(curve.order.tolist()) == list(range(group.num_channels))
        assert curve.variance[0] == 0
        assert (curve.variance.diff() >= 0).all()


def test_curves_in_little_memory_are_the_same():
    model = build("attention")
    groups = find_groups(model, images(2))
    passes = []

    def shown():
        passes.append(1)
        yield from batches()

    class Inputs:
        def __iter__(self):
            return shown()

    whole = variance_curves(model, groups, Inputs(), rows_per_channel=0)
    num = len(passes)
    parts = variance_curves(model, groups, Inputs(), rows_per_channel=0, max_bytes_held=1)
    assert (num, len(passes) - num) == (2, 1 + len(groups))
    assert list(whole) == list(parts)
    for name, curve in whole.items():
        assert torch.equal(curve.order, parts[name].order)
        assert torch.equal(curve.variance, parts[name].variance)


def test_first_to_leave_has_the_smallest_compensated_score():
    model = build("chain")
    groups = find_groups(model, images(2))
    curves = curves_of(model, groups)
    scores = tpv_scores(model, groups, batches(32, 12), metric="pseudo", ridge=RIDGE)
    for name, curve in curves.items():
        assert curve.order[0] == scores[name].argmin()
        torch.testing.assert_close(float(curve.variance[1]), float(scores[name].min()), **SINGLE)


def test_dead_and_duplicated_channels_leave_first_and_for_nothing():
    model = kill_channel(duplicate_channel(build("chain"), 0, 1), 2)
    groups = find_groups(model, images(2))
    curve = curves_of(model, groups, batches(), metric="logits", ridge=1e-6)["conv1"]
    assert curve.order[0] == 2
    assert int(curve.order[1]) in {0, 1}
    assert curve.variance[2] < 1e-4 * curve.variance[3]


def test_curves_do_not_depend_on_batch_split():
    model, x = build("residual"), images(32)
    groups = find_groups(model, x[:2])
    a, b = (
        variance_curves(model, groups, parts, num_probes=2) for parts in ([x], x.split([1, 20, 11]))
    )
    for name in a:
        assert torch.equal(a[name].order, b[name].order)
        torch.testing.assert_close(a[name].variance, b[name].variance, **SINGLE)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x):
        h = self.stem(x).relu()
        return {"a": self.a(h), "b": self.b(h)}


@pytest.mark.parametrize("stand_in", ["map", "mean", "zero"])
def test_what_reaches_no_output_that_counts_changes_nothing(stand_in, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kw: empty(*args, **kw).fill_(1e10))
    model, x = build(TwoHeads), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    alone = with_forward(model, lambda model, x: model.a(model.stem(x).relu()))
    one, both = (
        variance_curves(
            m, find_groups(m, x[:2]), [x], stand_in=stand_in, rows_per_channel=0, outputs=counted
        )["stem"]
        for m, counted in ((alone, None), (model, ["a"]))
    )
    assert torch.equal(both.order, one.order)
    torch.testing.assert_close(both.variance, one.variance, **SINGLE)
    torch.testing.assert_close(both.alone, one.alone, **SINGLE)


def test_wide_groups_leave_in_blocks():
    model = build(Chain, 200)
    groups = find_groups(model, images(2))
    curve = variance_curves(model, groups, batches())["conv1"]
    assert sorted(curve.order.tolist()) == list(range(200))
    assert len(curve.variance) == 200
    assert (curve.variance.diff() >= 0).all()
    assert curve.variance.isfinite().all()


def test_an_unknown_stand_in_is_refused():
    model = Chain().eval()
    groups = find_groups(model, images(1))
    with pytest.raises(ValueError, match="stand_in: expected one of map, mean, zero, found 'no'"):
        variance_curves(model, groups, batches(), stand_in="no")
