"""On another device than the CPU everything gives the same, and the host seldom waits for it.

No GPU is needed for that, see `simulated_device`.
"""

import copy

import pytest
import torch
from cases import Concat, Flatten, Residual, images
from simulated_device import DEVICE, simulated_device
from torch import nn

import tpvprune
from tpvprune import find_groups, remove_channels, tpv_scores
from tpvprune.passes.crossing import fetched, random_signs, signs_of
from tpvprune.passes.evaluation import difference, evaluate
from tpvprune.repairs.batchnorm import rebase_batchnorm
from tpvprune.scores.baselines.jacobian import jbr_scores
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS
from tpvprune.scores.curves import variance_curves
from tpvprune.weights.choice import joint_weight_masks
from tpvprune.weights.scores import WEIGHT_SCORERS


@pytest.fixture
def waits():
    with simulated_device() as found:
        yield found


def single(model):
    return model.float().eval()


def batches(num=3, size=8):
    return list(images(num * size).float().split(size))


def half(groups):
    return {g.name: torch.arange(g.num_channels) % 2 == 0 for g in groups}


def assert_same_there(model, compute):
    """Compare ``compute(model, groups)``, a mapping of tensors, on both devices, bit for bit."""
    groups = find_groups(model, images(2).float())
    here = compute(model, groups)
    there = compute(copy.deepcopy(model).to(DEVICE), groups)
    assert here.keys() == there.keys()
    assert here
    for name, value in here.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(there[name]).cpu()), name


# ---- the device itself ----------------------------------------------------------------------


def test_the_device_is_as_strict_as_a_gpu(waits):
    far = torch.arange(4.0).to(DEVICE)
    assert far.device == DEVICE
    for mixed in (lambda: far + torch.ones(4), lambda: torch.stack([far, torch.ones(4)])):
        with pytest.raises(RuntimeError, match="found one on the CPU"):
            mixed()
    with pytest.raises(RuntimeError, match="found one on the CPU"):
        far.index_add_(0, torch.tensor([0]), torch.ones(1).to(DEVICE))
    assert not +waits
    assert (far * torch.tensor(2.0))[torch.tensor([1])].sum().cpu() == 2
    for number, ask in enumerate((float, bool, lambda t: t[t >= 0], lambda t: t.tolist()), 2):
        ask(far[0] if ask in (float, bool) else far)
        assert waits.total() == number


def test_gradients_on_the_device_are_those_of_the_cpu(waits):
    model, x = single(Residual()), images(2).float()
    far = copy.deepcopy(model).to(DEVICE)
    here = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    there = torch.autograd.grad(far(x.to(DEVICE)).sum(), list(far.parameters()))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


# ---- the same results -----------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["logits", "pseudo", "fisher"])
def test_scores(waits, metric):
    def compute(model, groups):
        return tpv_scores(model, groups, batches(), metric=metric, num_probes=2, until=0.01)

    assert_same_there(single(Residual()), compute)


@pytest.mark.parametrize("criterion", sorted(SCORERS.keys() - {"bn_scale", "tpv", "jbr"}))
def test_criteria(waits, criterion):
    labels = torch.arange(8) % 3
    given = [(x, labels) for x in batches()] if criterion in NEEDS_LABELS else batches()
    assert_same_there(single(Residual()), lambda m, g: SCORERS[criterion](m, g, given))


def test_jbr(waits):
    assert_same_there(single(Residual()), lambda m, g: jbr_scores(m, g, batches(), confidence=0.0))


@pytest.mark.parametrize("stand_in", ["map", "mean", "zero"])
@pytest.mark.parametrize("rows_per_channel", [0.1, 1e9])
def test_curves(waits, stand_in, rows_per_channel):
    def compute(model, groups):
        curves = variance_curves(
            model, groups, batches(), stand_in=stand_in, rows_per_channel=rows_per_channel
        )
        assert all(c.variance.device.type == "cpu" for c in curves.values())
        return {(n, k): v for n, c in curves.items() for k, v in vars(c).items() if v is not None}

    assert_same_there(single(Concat()), compute)


@pytest.mark.parametrize("repair", ["compensate_weights", "reconstruct_blocks"])
def test_repairs(waits, repair):
    def compute(model, groups):
        small = remove_channels(model, groups, half(groups))
        limits = {"reconstruct_blocks": {"rounds": 1, "iterations": 2, "stage_iterations": 1}}
        repaired = getattr(tpvprune, repair)(
            small, model, batches(1), groups=groups, kept=half(groups), **limits.get(repair, {})
        )
        return repaired.state_dict()

    class Blocks(Residual):
        def __init__(self):
            super().__init__()
            body = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
            self.body = nn.Sequential(nn.Sequential(*body), nn.Sequential(*copy.deepcopy(body)))

        def forward(self, x):
            return super().forward(self.body(x))

    assert_same_there(single(Blocks()), compute)


def test_batchnorm_and_measurements(waits):
    def compute(model, groups):
        other = tpvprune.recalibrate_batchnorm(model, batches())
        rebase_batchnorm(other, batches())
        labelled = [(x, torch.arange(8) % 3) for x in batches()]
        numbers = vars(difference(other, model, batches())) | vars(
            evaluate(other, labelled, dense=model)
        )
        kinds = (int, float)
        return other.state_dict() | {k: v for k, v in numbers.items() if isinstance(v, kinds)}

    assert_same_there(single(Residual()), compute)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_single_weights(waits, pattern):
    assert_same_there(
        single(Flatten()),
        lambda m, _: joint_weight_masks(m, batches(), pattern=pattern, num_steps=4)[0],
    )


@pytest.mark.parametrize("criterion", sorted(WEIGHT_SCORERS))
def test_scores_of_single_weights(waits, criterion):
    assert_same_there(single(Residual()), lambda m, _: WEIGHT_SCORERS[criterion](m, batches()))


def test_the_whole_of_prune(waits):
    def compute(model, _):
        pruned = tpvprune.prune(model, batches(6), keep=0.6).model
        assert next(pruned.parameters()).device == next(model.parameters()).device
        return pruned.state_dict()

    assert_same_there(single(Residual()), compute)


# ---- who waits ------------------------------------------------------------------------------


def deep(depth):
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(4, 4, 1), nn.ReLU()]
    return single(nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 3)))


def waits_per_batch(waits, depth, compute):
    """Return how much more often the host waits with six batches than with three: of one batch."""
    model = deep(depth)
    groups = find_groups(model, images(2).float())
    far, found = model.to(DEVICE), []
    for num in (3, 6):
        waits.clear()
        compute(far, groups, batches(num))
        found.append(waits.total())
    return (found[1] - found[0]) / 3


@pytest.mark.parametrize(
    ("compute", "most"),
    [
        (tpv_scores, 1),  # whether the outputs are finite
        (lambda m, g, x: variance_curves(m, g, x, rows_per_channel=0.1, max_rows=8), 1),
        (lambda m, g, x: variance_curves(m, g, x, stand_in="mean", rows_per_channel=1e9), 2),
        (lambda m, g, x: joint_weight_masks(m, x, num_steps=4), 0),
        (lambda m, g, x: SCORERS["jacobian"](m, g, [(b, torch.arange(8) % 3) for b in x]), 0),
        (lambda m, g, x: tpvprune.recalibrate_batchnorm(m, x), 0),
        (lambda m, g, x: difference(m, m, x), 2),
    ],
    ids=["scores", "curves", "wide", "weights", "jacobian", "batchnorm", "difference"],
)
def test_waits_do_not_grow_with_the_groups(waits, compute, most):
    for depth in (1, 4):
        assert waits_per_batch(waits, depth, compute) <= most


def test_one_wait_fetches_all(waits):
    parts = [torch.arange(3.0), torch.zeros(()), torch.ones(2, 2)]
    found = fetched(*(p.to(DEVICE) for p in parts))
    assert waits.total() == 1
    assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))
    assert fetched() == ()


# ---- random signs ---------------------------------------------------------------------------


def test_signs_drawn_on_a_device_depend_on_nothing_but_their_seeds():
    whole = signs_of([3, 1, 4], (5, 70), torch.device("cpu"))
    parts = [signs_of([3], (5, 70), torch.device("cpu")), signs_of([1, 4], (5, 70), whole.device)]
    assert torch.equal(whole, torch.cat(parts))
    assert set(whole.unique().tolist()) == {-1, 1}
    assert not torch.equal(whole[0], whole[1])
    assert abs(float(whole.double().mean())) < 4 / whole.numel() ** 0.5


def test_signs_are_moved_where_few_and_drawn_there_where_many(waits, monkeypatch):
    monkeypatch.setattr("tpvprune.passes.crossing._MANY", 8)
    drawn_there = []

    def note(seeds, shape, device):
        drawn_there.append(len(seeds))
        return signs_of(seeds, shape, torch.device("cpu")).to(device)

    monkeypatch.setattr("tpvprune.passes.crossing.signs_of", note)
    far = torch.zeros(1).to(DEVICE)
    for width, there in ((7, 0), (8, 1)):
        generators = [torch.Generator().manual_seed(1) for _ in range(3)]
        here = random_signs((4, width), generators[0], torch.zeros(1))
        found = random_signs((4, width), generators[1], far)
        parts = [random_signs((n, width), generators[2], far) for n in (1, 3)]
        assert torch.equal(found.cpu(), torch.cat(parts).cpu())
        assert torch.equal(found.cpu(), here) == (not there)
        assert len(drawn_there) == 3 * there
        assert set(found.cpu().unique().tolist()) == {-1, 1}
