"""Residual branches: what is found, that removing is masking, and what the scores say."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

from tpvprune.depth import Removal, branch_scores, find_branches, remove_branches
from tpvprune.depth.additions import without_branches

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    """x + F(x), in one of several ways of writing it."""

    def __init__(self, way, width=6):
        super().__init__()
        self.way = way
        self.conv1 = nn.Conv2d(width, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, width, 1)

    def forward(self, x):
        y = self.conv2(torch.relu(self.norm(self.conv1(x))))
        if self.way == "in place":
            y += x
            return torch.relu_(y)
        if self.way == "method":
            y.add_(x)
            return y
        if self.way == "twice":
            return (x + y) + self.conv2(torch.relu(self.norm(self.conv1(x))))
        if self.way == "behind":
            return torch.sigmoid(x + y)
        return x + y


class Net(nn.Module):
    def __init__(self, way="sum", num=3, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(way, width) for _ in range(num)])
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def built(*args, **kwargs):
    torch.manual_seed(0)
    return Net(*args, **kwargs).double().eval()


@pytest.mark.parametrize("way", ["sum", "in place", "method"])
def test_blocks_that_leave_nothing_behind(way):
    model = built(way)
    branches = find_branches(model, X)
    assert [b.name for b in branches] == ["blocks.0", "blocks.1", "blocks.2"]
    removal = Removal.of(branches, ["blocks.1"])
    assert removal == Removal(blocks=("blocks.1",))
    smaller = remove_branches(model, removal)
    assert list(smaller.blocks._modules) == ["0", "2"]
    with without_branches(model, [branches[1]]):
        masked = model(X)
    torch.testing.assert_close(smaller(X), masked)
    assert len(model.blocks) == 3  # untouched


def test_what_does_more_than_its_branch_stays():
    """Behind the sum comes a sigmoid: the modules of the branch go, the block does not."""
    branches = find_branches(built("behind"), X)
    assert [b.name for b in branches] == [f"blocks.{i}.conv2" for i in range(3)]
    removal = Removal.of(branches, [branches[0].name])
    assert removal.zeroed == ("blocks.0.conv2",)
    assert set(removal.passed) == {"blocks.0.conv1", "blocks.0.norm"}


def test_what_the_first_forward_keeps_does_not_count():
    class Keeping(Net):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.zeros(6, 1, 1).double() + torch.ones(6, 1, 1).double()
            return super().forward(x) * self.table.mean()

    torch.manual_seed(0)
    assert len(find_branches(Keeping().double().eval(), X)) == 3


def test_a_module_that_runs_twice_is_no_branch():
    assert find_branches(built("twice"), X) == ()


@pytest.mark.parametrize(
    ("name", "num", "num_blocks"),
    [("test_resnet", 2, 1), ("resnet10t", 1, 1), ("test_vit", 12, 12), ("test_convnext", 9, 9)],
)
def test_timm_models(name, num, num_blocks):
    model = timm.create_model(name, num_classes=5).eval()
    size = model.pretrained_cfg["input_size"][-1]
    branches = find_branches(model, torch.randn(2, 3, size, size))
    found = len(branches), sum(b.block is not None for b in branches)
    assert found == (num, num_blocks)
    for branch in branches:
        smaller = remove_branches(model, Removal.of(branches, [branch.name]))
        x = torch.randn(2, 3, size, size)
        with torch.no_grad(), without_branches(model, [branch]):
            masked = model(x)
        torch.testing.assert_close(smaller(x), masked, rtol=1e-3, atol=1e-4)


def test_a_transformer_block_without_both_halves_is_gone():
    model = timm.create_model("test_vit", num_classes=5).eval()
    branches = find_branches(model, torch.randn(2, 3, 160, 160))
    gone = [b.name for b in branches if b.block == "blocks.2"]
    assert len(gone) == 2
    assert Removal.of(branches, gone) == Removal(blocks=("blocks.2",))
    smaller = remove_branches(model, Removal.of(branches, gone[:1]))
    names = {name for name, _ in smaller.named_parameters()}
    assert not any(name.startswith("blocks.2.norm1") for name in names)  # no dead parameters
    assert any(name.startswith("blocks.2.norm2") for name in names)


# ---- layers of chains -----------------------------------------------------------------------


class Chain(nn.Module):
    """A stem, three layers of one width, a pooling, one more layer, a classifier."""

    def __init__(self, way="plain"):
        super().__init__()
        self.way, groups = way, 2 if way == "grouped" else 1

        def layer():
            return nn.Conv2d(6, 6, 3, padding=1, groups=groups), nn.BatchNorm2d(6), nn.ReLU()

        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.features = nn.Sequential(*layer(), *layer(), *layer(), nn.MaxPool2d(2))
        self.last = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.features(x)
        if self.way == "read twice":
            y = y + x[:, :, ::2, ::2]
        if self.way == "beside":  # a second path, on which no layer lies
            y = torch.cat([self.features(x)[:, :3], x[:, 3:, ::2, ::2]], 1)
        y = self.last(y)
        return self.head(torch.tanh(y).mean((2, 3)))


def chain(way="plain"):
    torch.manual_seed(0)
    model = Chain(way).double().train()
    with torch.no_grad():
        model(torch.randn(32, 3, 8, 8, dtype=torch.float64))  # norms with statistics
    return model.eval()


def test_layers_of_a_chain_go_with_their_norm_and_activation():
    model = chain()
    branches = find_branches(model, X)
    names = [["features.0", "features.1", "features.2"], ["features.3", "features.4", "features.5"],
             ["features.6", "features.7", "features.8"], ["last"]]  # fmt: skip
    assert [list(b.modules) for b in branches] == names
    assert [len(b.members) for b in branches] == [3, 3, 3, 0]
    assert all(b.addition is None for b in branches)
    for gone in ([1], [0, 1], [3], [0, 1, 2, 3]):
        going = [branches[i] for i in gone]
        removal = Removal.of(branches, [b.name for b in going])
        smaller = remove_branches(model, removal)
        with torch.no_grad(), without_branches(model, going):
            masked = model(X)
        torch.testing.assert_close(smaller(X), masked)
        left = {name for name, _ in smaller.named_parameters()}
        assert not any(name.startswith(f"{m}.") for name in left for b in going for m in b.modules)
    assert not torch.allclose(masked, model(X))
    assert not model.features[0]._forward_hooks and not model.features[0]._forward_pre_hooks
    removal = Removal.of(branches, [branches[1].name, "last"])
    assert removal == Removal(tuple(names[1]), (), ("last",))


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("grouped", ["last"]),
        ("read twice", ["last"]),
        ("beside", ["last"]),
    ],
)
def test_what_is_no_layer_of_a_chain(way, expected):
    """Layers of several groups, and those beside which another path runs."""
    assert [b.name for b in find_branches(chain(way), X)] == expected


def test_scores_of_layers_equal_the_variance_where_all_behind_is_linear():
    model = chain()
    model.forward = lambda x: model.head(model.last(model.features(model.stem(x))).mean((2, 3)))
    model.head = nn.Linear(6, 1).double()
    branches = find_branches(model, X)
    assert branches[-1].name == "last"
    scores = branch_scores(model, branches, [X[:2], X[2:]], compensated=False, num_probes=1)
    with torch.no_grad(), without_branches(model, [branches[-1]]):
        changed = model(X)
    truth = (changed - model(X)).square().sum(1).mean()
    assert scores["last"] == pytest.approx(float(truth), rel=1e-6)


def test_a_layer_that_is_a_linear_map_costs_nothing_where_others_can_take_over():
    model = chain()
    branches = find_branches(model, X)
    inputs = [torch.randn(64, 3, 8, 8, dtype=torch.float64)]
    plain, stood_in = (
        branch_scores(model, branches, inputs, compensated=c, num_probes=2) for c in (False, True)
    )
    assert stood_in["last"] < 1e-6 * plain["last"]
    assert stood_in["features.3"] > 1e-3 * plain["features.3"]


def test_layers_that_are_gone_are_gone_in_the_scores_of_others():
    model = chain()
    branches = find_branches(model, X)
    gone, left = branches[1], [b for b in branches if b is not branches[1]]
    smaller = remove_branches(model, Removal.of(branches, [gone.name]))
    options = {"compensated": True, "num_probes": 2}
    ours = branch_scores(model, left, [X], gone=[gone], **options)
    theirs = branch_scores(smaller, find_branches(smaller, X), [X], **options)
    assert ours.keys() == theirs.keys()
    for name, score in ours.items():
        assert score == pytest.approx(theirs[name], rel=1e-6)


# ---- scores ---------------------------------------------------------------------------------


def test_scores_of_a_network_that_is_linear_in_its_branches():
    """The change is linear in what the last block adds: the score is the variance itself."""
    model = built()
    model.head = nn.Linear(6, 1).double()  # one output: every direction tells all
    branches = find_branches(model, X)
    scores = branch_scores(model, branches, [X[:2], X[2:]], compensated=False, num_probes=1)
    with torch.no_grad(), without_branches(model, [branches[-1]]):
        changed = model(X)
    truth = (changed - model(X)).square().sum(1).mean()
    torch.testing.assert_close(scores["blocks.2"], float(truth.detach()))


def test_first_order_by_autograd():
    model = built(num=2)
    branches = find_branches(model, X)
    scores = branch_scores(model, branches, [X], compensated=False, num_probes=3000)

    def outputs(scale):
        x = torch.relu(model.stem(X))
        added = model.blocks[0](x) - x
        return model.head(model.blocks[1](x + scale * added).mean((2, 3)))

    change = torch.autograd.functional.jacobian(outputs, torch.ones((), dtype=torch.float64))
    truth = float(change.square().sum(1).mean())
    assert scores["blocks.0"] == pytest.approx(truth, rel=0.1)


def test_what_a_linear_map_stands_in_for_is_free():
    model = built(num=2)
    model.blocks[0].norm = nn.Identity()
    model.blocks[0].conv1 = nn.Conv2d(6, 4, 1).double()

    class Linear(Block):
        def forward(self, x):
            return x + self.conv2(self.conv1(x))

    model.blocks[0].__class__ = Linear
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    branches = find_branches(model, x[:2])
    plain, compensated = (
        branch_scores(model, branches, x.split(16), compensated=c) for c in (False, True)
    )
    assert compensated["blocks.0"] < 1e-4 * plain["blocks.0"]
    assert all(compensated[name] <= plain[name] * (1 + 1e-9) for name in plain)


def test_scores_depend_neither_on_batches_nor_on_others():
    model = built()
    branches = find_branches(model, X)
    whole = branch_scores(model, branches, [X], compensated=False)
    parts = branch_scores(model, branches, X.split(1), compensated=False)
    assert parts == pytest.approx(whole)
    alone = branch_scores(model, branches[1:2], [X], compensated=False)
    assert alone["blocks.1"] == pytest.approx(whole["blocks.1"])


def test_the_first_scores_of_a_model_are_those_of_the_second_call():
    """Whether it takes channels-last images is asked once, by a forward that scores nothing."""
    model = built()
    branches = find_branches(model, X)
    first = branch_scores(model, branches, [X])
    assert branch_scores(model, branches, [X]) == first


class Tokens(Net):
    """Each position by itself through a branch, which sees them as ``arranged`` says."""

    def __init__(self, arranged=lambda x: x, back=lambda x, _: x):
        super().__init__(num=1)
        self.arranged, self.back = arranged, back
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        x = self.blocks(torch.relu(self.stem(x))).flatten(2).transpose(1, 2)
        seen = self.arranged(x)
        seen = seen + self.down(torch.relu(self.up(seen)))
        return self.head(self.back(seen, x.shape).mean(1))


@pytest.mark.parametrize(
    ("arranged", "compensated"),
    [
        ((lambda x: x.reshape(len(x) * 4, -1, 6), lambda x, shape: x.reshape(shape)), False),
        ((lambda x: x.transpose(0, 1), lambda x, _: x.transpose(0, 1)), False),
        ((lambda x: x.transpose(0, 1), lambda x, _: x.transpose(0, 1)), True),
    ],
    ids=["patches", "positions first", "positions first, with maps"],
)
def test_scores_are_by_image_however_a_branch_sees_them(arranged, compensated):
    models = [Tokens().double().eval(), Tokens(*arranged).double().eval()]
    models[1].load_state_dict(models[0].state_dict())
    images = torch.cat([X, X.flip(0) * 2])
    usual, other = (
        branch_scores(model, find_branches(model, X), [images], compensated=compensated)
        for model in models
    )
    assert len(usual) == 2
    assert other == pytest.approx(usual)


def test_an_embedding_added_to_a_batch_of_one_changes_no_score():
    model = timm.create_model("test_vit", num_classes=5).eval()
    x = torch.randn(3, 3, 160, 160)
    branches = find_branches(model, x)
    assert find_branches(model, x[:1]) == branches
    whole, parts = (
        branch_scores(model, branches, batches, compensated=False) for batches in ([x], x.split(1))
    )
    for name, score in whole.items():
        assert parts[name] == pytest.approx(score, rel=1e-3)


def test_two_removals_one_after_the_other():
    first = Removal(("blocks.1",), ("blocks.0.attn",), ("blocks.0.norm1",))
    second = Removal(("blocks.0",), ("blocks.2.mlp",), ("blocks.2.norm2",))
    assert second.behind(first) == Removal(
        ("blocks.1", "blocks.0"), ("blocks.2.mlp",), ("blocks.2.norm2",)
    )
    assert first.behind(Removal()) == first


def test_removal_of_what_is_not_there_is_refused():
    model = built()
    for removal in (
        Removal(blocks=("blocks.7",)),
        Removal(blocks=("stem",)),
        Removal(blocks=("",)),
        Removal(blocks=("blocks.0",), zeroed=("blocks.0.conv2",)),
    ):
        with pytest.raises(ValueError, match="removed: expected"):
            remove_branches(model, removal)
    assert dataclasses.asdict(Removal()) == {"blocks": (), "zeroed": (), "passed": ()}
