"""Branches beside channels: the budget, the repair behind a gap, and what is saved."""

import json

import pytest
import timm
import torch
from image_cases import write_images
from torch import nn

from tpvprune import Sizes, compensate_weights, find_groups, load_pruned, prune, save_pruned
from tpvprune.cli.entry import main
from tpvprune.depth import Removal, find_branches, remove_branches
from tpvprune.groups.removal import remove_channels
from tpvprune.passes.evaluation import difference
from tpvprune.passes.unseen import with_unseen
from tpvprune.pipeline import depth, run
from tpvprune.repairs.branches import Plan
from tpvprune.repairs.targets import dense_targets
from tpvprune.widths.ranking import RankBy

NUM = 96


class Linear(nn.Module):
    """x + W x."""

    def __init__(self, width):
        super().__init__()
        self.expand = nn.Conv2d(width, width, 1)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.project(self.expand(x))


class Net(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.blocks = nn.Sequential(*(Linear(6) for _ in range(3)))
        self.conv = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = torch.relu(self.conv(self.blocks(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def images(num=NUM, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, size, size, generator=generator, dtype=torch.float64)


def without(model, gone, x):
    """Return the network without branches, and the dense one as its repair sees it."""
    removal = Removal.of(find_branches(model, x[:2]), gone)
    aligned = with_unseen(model, removal.blocks, (*removal.zeroed, *removal.passed))
    return remove_branches(model, removal), aligned


def shares(model, smaller, aligned):
    """Return what is lost without branches, and when the rest is refitted, on other images."""
    groups = find_groups(smaller, images(2))
    kept = {g.name: torch.ones(g.num_channels, dtype=torch.bool) for g in groups}
    repaired = compensate_weights(
        smaller, aligned, images().split(32), groups=groups, kept=kept, ridge=1e-10
    )
    return [difference(m, model, [images(seed=1)]).share for m in (smaller, repaired)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gone", [["blocks.0"], ["blocks.1"], ["blocks.0", "blocks.1", "blocks.2"]])
def test_linear_branches_leave_no_trace(norm, gone):
    """What is left takes over all that linear branches did, on other images, too."""
    torch.manual_seed(0)
    model = Net(norm).double().eval()
    before, after = shares(model, *without(model, gone, images()))
    assert after < 1e-6 * before


class Chain(nn.Module):
    """Layers of one width without a shortcut; the middle one of ``features`` is linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.features = nn.Sequential(
            nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3), nn.ReLU()
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.features(torch.relu(self.stem(x))).mean((2, 3)))


def test_a_linear_layer_of_a_chain_leaves_no_trace():
    torch.manual_seed(0)
    model = Chain().double().eval()
    smaller, aligned = without(model, ["features.2"], images())
    assert list(smaller.features._modules) == ["0", "1", "3", "4"]
    before, after = shares(model, smaller, aligned)
    assert after < 1e-6 * before


def test_a_chain_is_pruned_in_depth_saved_and_read_back(tmp_path):
    torch.manual_seed(0)
    model = Chain().eval()
    data = images().float().split(32)
    result = prune(
        model, data, keep=0.96, granularity=["branch"], max_depth_removed=1, num_images=None
    )
    assert result.removed.blocks == ("features.2",)
    assert result.reached
    folder = save_pruned(result, tmp_path / "pruned", dense=model)
    loaded = load_pruned(folder, model=model)
    x = images(4, seed=2).float()
    assert torch.equal(loaded(x), result.model(x))
    assert result.report["held_back"]["variance_share"] < 1e-3


def test_the_aligned_network_is_the_dense_one():
    model = Net().double().eval()
    _, aligned = without(model, ["blocks.1"], images())
    x = images(4)
    torch.testing.assert_close(aligned(x), model(x))
    assert next(aligned.parameters()) is next(model.parameters())


def test_the_layer_before_a_gap_aims_behind_it():
    model = Net().double().eval()
    x = images(4)
    _, aligned = without(model, ["blocks.1"], x)
    whole, aimed = (dense_targets(m, [x], Plan(4, 1, 1e9, 0)) for m in (model, aligned))
    assert aimed.before_unseen == 2  # stem, and the two layers of the first block
    # Calls: stem 0, first block 1 and 2, second block 3 and 4 (unseen), third 5 and 6.
    torch.testing.assert_close(aimed.sums[2], whole.sums[4])
    torch.testing.assert_close(aimed.sums[4], whole.sums[6])


@pytest.mark.parametrize(
    ("granularity", "of"),
    [
        (("branch",), "macs"),
        (("channel", "branch"), "params"),
        pytest.param(("branch",), "params", marks=pytest.mark.long),
        pytest.param(("channel", "branch"), "macs", marks=pytest.mark.long),
    ],
)
def test_the_budget_is_met_and_the_model_saved(granularity, of, tmp_path):
    model = timm.create_model("test_vit", num_classes=5).eval()
    x = torch.randn(24, 3, 160, 160)
    result = prune(
        model, x.split(8), keep=0.7, of=of, granularity=granularity, repair="compensate",
        max_depth_removed=0.75,
    )  # fmt: skip
    assert result.reached
    report = result.report
    gone = [b["name"] for b in report["branches"] if b["gone"]]
    assert len(gone) <= 0.75 * len(report["branches"])
    assert gone or granularity != ("branch",)
    assert report["dense"]["macs"] == find_groups(model, x[:1]).macs()
    assert report["pruned"]["params"] == sum(p.numel() for p in result.model.parameters())
    if granularity == ("branch",):
        assert all(bool(mask.all()) for mask in result.kept.values())
    save_pruned(result, tmp_path / "out")
    loaded = load_pruned(tmp_path / "out")
    torch.testing.assert_close(loaded(x[:2]), result.model(x[:2]), rtol=0, atol=0)
    # Trained on, saved again from where it came.
    save_pruned(loaded, tmp_path / "again", origin=tmp_path / "out")
    again = load_pruned(tmp_path / "again")
    torch.testing.assert_close(again(x[:2]), result.model(x[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("most", [0.25, 0.5, 1.0])
def test_a_limit_that_binds_is_told(most):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    x = torch.randn(16, 3, 160, 160)
    result = prune(
        model, [x], keep=0.3, granularity=("branch",), repair="none", max_depth_removed=most
    )
    branches = result.report["branches"]
    gone = sum(branch["gone"] for branch in branches)
    assert gone == int(most * len(branches)) or result.reached
    told = [line for line in result.warnings if line.startswith("max_depth_removed: ")]
    assert len(told) == (0 < gone == int(most * len(branches)) < len(branches))
    assert all(f" {gone} of {len(branches)} branches went" in line for line in told)


@pytest.mark.long
def test_pruned_again(tmp_path):
    model = timm.create_model("test_vit", num_classes=5).eval()
    x = torch.randn(16, 3, 160, 160)
    options = {"granularity": ("branch",), "repair": "none", "max_depth_removed": 0.9}
    save_pruned(prune(model, [x], keep=0.8, **options), tmp_path / "first")
    first = load_pruned(tmp_path / "first")
    result = prune(first, [x], keep=0.8, **options)
    assert result.removed
    save_pruned(result, tmp_path / "second", origin=tmp_path / "first")
    second = load_pruned(tmp_path / "second")
    torch.testing.assert_close(second(x[:2]), result.model(x[:2]), rtol=0, atol=0)


def test_a_network_without_branches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).double()
    with pytest.raises(ValueError, match="found none that can go whole: prune channels"):
        prune(model, [images(16)], granularity=["branch"])
    result = prune(model, [images(16)], granularity=["channel", "branch"], repair="none")
    assert result.reached
    assert any("no branch" in line for line in result.warnings)


def test_strange_granularity_is_refused():
    for wrong in ((), ("depth",), "", "depth", "channel;branch"):
        with pytest.raises(ValueError, match="granularity: expected some of"):
            prune(Net().double(), [images(8)], granularity=wrong)
    with pytest.raises(ValueError, match="max_depth_removed: expected"):
        prune(Net().double(), [images(8)], granularity=("branch",), max_depth_removed=1.5)
    with pytest.raises(ValueError, match="only where branches may go, found"):
        prune(Net().double(), [images(8)], max_depth_removed=0.5)
    with pytest.raises(ValueError, match="expected 'tpv' where only branches may go"):
        prune(Net().double(), [images(8)], granularity="branch", criterion="magnitude")


def test_where_only_branches_may_go_no_channel_is_ranked():
    torch.manual_seed(0)
    model, data = Net().double().eval(), [images(32)]
    stages = {"channel,branch": set(), "branch": set()}
    for granularity, seen in stages.items():
        result = prune(
            model, data, keep=0.7, repair="compensate", granularity=granularity,
            progress=lambda stage, *_, seen=seen: seen.add(stage),
        )  # fmt: skip
    ranking = {"curves", "repair factors", "fitted curves"}
    assert ranking & stages["channel,branch"]
    assert not ranking & stages["branch"]
    assert result.report["granularity"] == "branch"
    assert result.removed
    assert not result.scores
    assert not result.kept
    assert {b.blocked for b in result.groups.blocked} >= {"only branches may go"}
    # Several sizes share what there is to share.
    sizes = Sizes(model, data, repair="none", granularity="branch")
    for keep in (0.7, 0.5):
        again, alone = sizes.prune(keep), prune(
            model, data, keep=keep, repair="none", granularity="branch"
        )  # fmt: skip
        assert again.removed == alone.removed


def test_a_limit_of_no_branch_is_told():
    model = Net().double().eval()
    result = prune(
        model, [images(16)], keep=0.7, repair="none", granularity="branch", max_depth_removed=0.01
    )
    assert not result.reached
    assert any("branches are none: all stayed" in line for line in result.warnings)


@pytest.mark.parametrize("half", ["attn", "mlp"])
def test_a_stream_beside_half_a_block_can_be_cut(half):
    """The zeros in the place of a branch are as wide as the stream."""
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", num_classes=5).eval(), torch.randn(8, 3, 160, 160)
    branches = find_branches(model, x[:2])
    whole = find_groups(model, x[:2])
    smaller = remove_branches(model, Removal.of(branches, [f"blocks.5.{half}"]))
    groups = find_groups(smaller, x[:2])
    stream = next(g for g in whole if g.name == "patch_embed.proj")
    assert groups[stream.name].num_channels == stream.num_channels
    assert [b.name for b in groups.blocked] == [b.name for b in whole.blocked]
    kept = {stream.name: torch.arange(stream.num_channels) % 3 > 0}
    cut = remove_channels(smaller, groups, kept)
    assert cut.patch_embed.proj.out_channels == int(kept[stream.name].sum())
    # Cut and removed in the other order it is the same network.
    other = remove_branches(
        remove_channels(model, whole, kept), Removal.of(branches, [f"blocks.5.{half}"])
    )
    torch.testing.assert_close(cut(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize(("may", "num"), [(1.0, 3), (0.5, 1)])
def test_a_budget_that_branches_alone_do_not_meet(may, num):
    how = {"granularity": ("branch",), "repair": "none", "max_depth_removed": may}
    result = prune(Net().double().eval(), [images(32)], keep=0.2, **how)
    assert not result.reached
    assert [b["gone"] for b in result.report["branches"]].count(True) == num  # of three


def test_steps_go_on_from_the_shallower_network():
    result = prune(
        timm.create_model("test_convnext", num_classes=4).eval(),
        [torch.randn(16, 3, 64, 64)], keep=0.5, granularity=("channel", "branch"), steps=2,
        repair="bn",
    )  # fmt: skip
    assert result.reached


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_without_its_branches(tmp_path, monkeypatch):
    """Not tried or timed again: milliseconds would choose others."""
    torch.manual_seed(0)
    model, state = Net().double().eval(), tmp_path / "state"
    options = {"keep": 0.5, "granularity": ("channel", "branch"), "max_depth_removed": 1}
    unbroken = prune(model, [images(32)], **options)
    assert unbroken.removed

    def stop(*_, **__):
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(run, "compensate_weights", stop)
        prune(model, [images(32)], **options, state=state)
    for name in ("branch_savings", "branch_order", "best_depth"):
        monkeypatch.setattr(depth, name, stop)
    monkeypatch.setattr(RankBy, "ranked", stop)
    result = prune(model, [images(32)], **options, state=state)
    assert result.removed == unbroken.removed
    assert result.report["branches"] == unbroken.report["branches"]
    for one, other in zip(result.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(Stopped):  # another run
        prune(model, [images(32)], **{**options, "max_depth_removed": 0.9}, state=state)


def test_a_stopped_run_without_branches_goes_on(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).double()
    options = {"granularity": ("channel", "branch"), "state": tmp_path / "state"}
    first = prune(model, [images(16)], **options)
    monkeypatch.setattr(RankBy, "ranked", None)
    again = prune(model, [images(16)], **options)
    assert again.warnings == first.warnings
    assert all(torch.equal(again.kept[name], mask) for name, mask in first.kept.items())


@pytest.mark.long
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 24)
    flags = [
        *("--model", "test_vit", "--data-dir", "images", "--img-size", "160", "--keep", "0.7"),
        *("--granularity", "channel,branch", "--latency-repeats", "0", "--num-images", "24"),
    ]
    assert main(["prune", *flags, "--dry-run", "--output", "out"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "branches: 12, of which 12 may go" in err
    assert "besides trials of depth, reading images" in err
    assert main(["prune", *flags, "--keep", "0.05", "--dry-run", "--output", "out"]) == 0
    capsys.readouterr()
    alone = [*flags, "--keep", "0.5", "--dry-run", "--output", "out", "--granularity"]
    assert main(["prune", *alone, "branch"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "every width stays" in err
    assert "besides reading images" in err
    # Of heads alone more than that stays.
    assert main(["prune", *alone, "head"]) == 3
    err = " ".join(capsys.readouterr().err.split())
    assert "it cannot be reached" in err
    assert err.count("ignored on request") == 1
    convolutional = ["--model", "test_efficientnet", *alone[2:]]
    for granularity, reason in (
        ("branch", "found none that can go whole"),
        ("head", "has no atte"),
    ):
        assert main(["prune", *convolutional, granularity]) == 2
        assert reason in capsys.readouterr().err
    for dry in ([], ["--dry-run"]):
        nowhere = [*flags[:-6], *dry, "--max-depth-removed", "0.5", "--output", "none"]
        assert main(["prune", *nowhere]) == 2
        assert "max_depth_removed: expected only where branches" in capsys.readouterr().err
    half = ["--of", "latency", "--max-depth-removed", "0.5"]
    assert main(["prune", *flags[:-6], *half, "--dry-run", "--output", "out"]) == 0
    assert "branches: 12, of which 6 may go" in capsys.readouterr().err
    assert main(["prune", *flags, "--json", "--output", "out"]) == 0
    out, err = capsys.readouterr()
    branches = json.loads(out)["branches"]
    assert f"branches removed: {sum(b['gone'] for b in branches)} of 12" in err
    assert "Branches removed" in (tmp_path / "out" / "report.html").read_text()
    assert main(["evaluate", "out", "--data-dir", "images", "--latency-repeats", "0"]) in {0, 2}
