"""Whatever a network returns: what is verified, what is scored, and what is said."""

import copy
from dataclasses import dataclass

import pytest
import torch
from cases import batches
from torch import nn

from tpvprune import distill, find_groups, prune, tpv_scores, with_labels
from tpvprune.diagnostics.ablation import ablation_scores
from tpvprune.diagnostics.jacobian_norms import jacobian_norms
from tpvprune.diagnostics.tpv import perturbed_variance
from tpvprune.diagnostics.trajectory import input_lipschitz
from tpvprune.diagnostics.volume import local_volume
from tpvprune.passes.evaluation import difference, evaluate, model_outputs, output_variance
from tpvprune.passes.running import first_output
from tpvprune.scores.criteria import SCORERS
from tpvprune.scores.criterion_names import NEEDS_LABELS, READS_OUTPUTS
from tpvprune.weights.choice import joint_weight_masks
from tpvprune.weights.pruning import prune_weights
from tpvprune.weights.scores import tpv_weight_scores


@dataclass
class Record:
    classes: torch.Tensor
    logits: torch.Tensor


class Net(nn.Module):
    def __init__(self, wrap, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 5)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.f(self.b(self.a(x).relu()).relu().mean((2, 3))))


WRAPS = {
    "anchors beside": lambda y: (y, torch.zeros(7, 4)),
    "stacked": lambda y: (y, torch.stack([y, y, y])),
    "classes first": lambda y: {"classes": y.argmax(1), "logits": y},
    "record": lambda y: Record(y.argmax(1), y),
    "deep": lambda y: [[], ({"boxes": [y]}, None)],
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_outputs_of_any_kind_are_pruned(wrap):
    result = prune(Net(wrap).eval().double(), batches(24), keep=0.6)
    assert result.report["reached"]
    assert result.report["variance_share"]["compensate"] < result.report["variance_share"]["none"]
    assert {g.name for g in result.groups} == {"a", "b"}


@pytest.mark.parametrize("name", ["classes first", "record", "deep"])
def test_scores_are_those_of_the_first_real_output(name):
    x = batches(12)
    plain, other = (Net(w).eval().double() for w in (lambda y: y, WRAPS[name]))
    scores = [tpv_scores(m, find_groups(m, x[0]), x) for m in (plain, other)]
    for group in ("a", "b"):
        assert torch.equal(scores[0][group], scores[1][group])


def test_places_of_what_is_true_are_not_followed_but_do_not_break():
    model = Net(lambda y: y * (1 + torch.where(y > 0)[0].double().mean())).eval().double()
    groups = find_groups(model, batches(4)[0])
    assert {g.name for g in groups} == {"a", "b"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: [{"scores": row} for row in y],
        lambda y: y.reshape(-1, 1),
        lambda y: y.sum(),
        lambda y: y[:, 0],
    ],
)
def test_outputs_that_are_not_one_for_each_image_are_said(wrap):
    model = Net(wrap).eval().double()
    said = "expected outputs with one entry per image along dimension 0, found shape .*: wrap the"
    with pytest.raises(ValueError, match=said):
        prune(model, batches(16), keep=0.6)
    groups = find_groups(model, batches(4)[0])
    with pytest.raises(ValueError, match=said):
        tpv_scores(model, groups, batches(16))


@pytest.mark.parametrize("outputs", [torch.arange(3), [], None, {"a": "b"}, [[torch.arange(2)]]])
def test_nothing_to_score_is_said(outputs):
    with pytest.raises(ValueError, match="expected a model that returns a tensor of real numbers"):
        first_output(outputs)


class Beside(nn.Module):
    """A second output, a million times smaller, to which a cut would do something else."""

    def __init__(self):
        super().__init__()
        self.a, self.f, self.g = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        h = self.a(x).relu().mean((2, 3))
        # Whether the first channel is there is not seen where its value is zero.
        return self.f(h), 1e-12 * self.g(h) * (1 + h.shape[1])


def test_a_small_output_does_not_hide_beside_a_large_one():
    groups = find_groups(Beside().eval().double(), batches(4)[0])
    assert not len(groups)
    (why,) = [g.blocked for g in groups.blocked if g.name == "a"]
    assert "differ by" in why


class TwoHeads(nn.Module):
    """Each head has layers of its own."""

    def __init__(self, act=torch.relu):
        super().__init__()
        torch.manual_seed(0)
        self.act = act
        self.trunk = nn.Conv2d(3, 16, 3)
        self.a, self.b = nn.Conv2d(16, 32, 3), nn.Conv2d(16, 32, 3)
        self.classes, self.map = nn.Linear(32, 10), nn.Conv2d(32, 2, 1)

    def forward(self, x):
        h = self.act(self.trunk(x))
        return self.classes(self.act(self.a(h)).mean((2, 3))), self.map(self.act(self.b(h)))


@pytest.mark.parametrize("criterion", ["tpv", "magnitude", "activation_variance"])
def test_every_output_counts(criterion):
    model = TwoHeads().eval().double()
    result = prune(model, batches(24), keep=0.8, criterion=criterion)
    assert {g.name for g in result.groups} == {"trunk", "a", "b"}
    assert any("returns 2 outputs that count, '0', '1'" in w for w in result.report["warnings"])
    assert result.report["reached"]
    shares = result.report["held_back"]["variance_share_by_output"]
    assert shares.keys() == {"0", "1"}
    assert criterion != "tpv" or all(share < 1 for share in shares.values())


@pytest.mark.parametrize("name", ["0", "1"])
def test_what_serves_none_of_the_chosen_outputs_stays(name):
    model = TwoHeads().eval().double()
    result = prune(model, batches(24), keep=0.8, outputs=[name])
    alone, other = ("a", "b") if name == "0" else ("b", "a")
    assert {g.name for g in result.groups} == {"trunk", alone}
    reasons = {g.name: g.blocked for g in result.groups.blocked}
    assert reasons[other] == f"reaches none of the outputs that count: {name}"


@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 0.5)])
@torch.no_grad()
def test_scores_of_two_heads_are_those_of_brute_force(weights):
    """Of a linear network, where the first order is all there is."""
    model = TwoHeads(act=nn.Identity()).eval().double()
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    groups = find_groups(model, x)
    chosen = {"0": weights[0], "1": weights[1]}
    scores = tpv_scores(model, groups, [x], compensated=False, num_probes=400, outputs=chosen)
    a, b = (o.flatten(1) for o in model(x))
    scales = [(w / o.square().sum(1).mean()) ** 0.5 for o, w in zip((a, b), weights, strict=True)]
    for group in groups:
        for channel in (0, 3):
            changed = copy.deepcopy(model)
            for reader in group.readers:
                layer = changed.get_submodule(reader.module)
                layer.weight[:, reader.index[reader.channel == channel]] = 0
            moved = zip(changed(x), (a, b), scales, strict=True)
            exact = sum(((o.flatten(1) - d) * s).square().sum(1).mean() for o, d, s in moved)
            assert float(scores[group.name][channel]) == pytest.approx(float(exact), rel=0.08)


def test_a_repair_is_judged_on_all_outputs():
    model = TwoHeads().eval().double()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.map.weight.neg_()
    found = difference(broken, model, batches(24))
    assert found.by_output["0"] == 0
    assert found.by_output["1"] > 1
    assert found.agreement == 1
    assert found.is_broken
    assert found.output_variance == pytest.approx(output_variance(broken, model, batches(24)))


def test_distillation_teaches_every_output():
    model = TwoHeads().eval()
    student = copy.deepcopy(model)
    with torch.no_grad():
        for head in (student.classes, student.map):
            head.weight.add_(0.05 * torch.randn(head.weight.shape))
    data = [x.float() for x in batches(64)]
    before = difference(student, model, data)
    taught = distill(student, model, data, epochs=4)
    after = difference(taught, model, data)
    assert all(after.by_output[n] < before.by_output[n] for n in ("0", "1"))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["2"], "outputs: expected some of 0, 1, found 2"),
        ([], "outputs: expected some of 0, 1, found none"),
        ({"0": 0.0}, "outputs: expected weights above 0"),
    ],
)
def test_outputs_that_are_not_there_are_refused(chosen, said):
    with pytest.raises(ValueError, match=said):
        prune(TwoHeads().eval().double(), batches(24), keep=0.8, outputs=chosen)


def test_what_is_left_out_is_said():
    model = Net(WRAPS["anchors beside"]).eval().double()
    result = prune(model, batches(24), keep=0.8)
    assert any(w.startswith("output '1' has no entry per image") for w in result.warnings)
    model = Net(WRAPS["classes first"]).eval().double()
    result = prune(model, batches(24), keep=0.8)
    assert any(w.startswith("output 'classes' holds no real numbers") for w in result.warnings)


def test_one_output_needs_no_word():
    result = prune(Net(lambda y: y).eval().double(), batches(24), keep=0.8)
    assert not any("output" in w for w in result.report["warnings"])


# ---- criteria, single weights and diagnostics: one law for each kind ------------------------


class First(nn.Module):
    """The first output alone."""

    def __init__(self, both):
        super().__init__()
        self.both = both

    def forward(self, x):
        return self.both(x)[0]


def renamed(found):
    return {name.removeprefix("both."): value for name, value in found.items()}


def labelled(x):
    return [(t, torch.arange(len(t)) % 10) for t in x]


FIRST_ALONE = {
    "tpv": lambda m, g, x, **o: dict(tpv_scores(m, g, x, **o)),
    **{
        name: lambda m, g, x, name=name, **o: dict(
            SCORERS[name](m, g, labelled(x) if name in NEEDS_LABELS else x, **o)
        )
        for name in sorted(READS_OUTPUTS - {"tpv", "jbr"})
    },
    "jbr": lambda m, g, x, **o: dict(SCORERS["jbr"](m, g, x, confidence=0.0, **o)),
    "ablation": lambda m, g, x, **o: dict(ablation_scores(m, g, x, **o)),
    "weights": lambda m, g, x, **o: tpv_weight_scores(m, x, **o),
    "joint weights": lambda m, g, x, **o: joint_weight_masks(m, x, num_steps=4, **o)[0],
    "Jacobian norms": lambda m, g, x, **o: {
        n: torch.tensor(e) for n, e in jacobian_norms(m, x, **o).by_parameter().items()
    },
    "noise": lambda m, g, x, **o: {
        "value": torch.tensor(
            perturbed_variance(m, x, lambda n, p, _: 0.1 * p, num_draws=2, **o).value
        )
    },
    "Lipschitz": lambda m, g, x, **o: {"value": torch.tensor(input_lipschitz(m, x, **o).value)},
}


@pytest.mark.parametrize("measure", FIRST_ALONE.values(), ids=FIRST_ALONE)
def test_the_first_output_chosen_is_a_model_that_returns_it_alone(measure):
    both = TwoHeads().double().eval()
    x = batches(8)
    alone = First(both)
    groups = find_groups(both, x[0])
    found = measure(both, groups, x, outputs={"0": 1.0})
    wanted = renamed(measure(alone, find_groups(alone, x[0]), x))
    assert wanted
    for name, value in wanted.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=1e-9, atol=0), name


def scaled_rows(model, x):
    """Both outputs as one row for each image, each in units of its own second moment."""
    a, b = (o.flatten(1) for o in model(x))
    return torch.cat([o / o.square().sum(1).mean().sqrt() for o in (a, b)], 1)


def scales_of(model, x):
    return [1 / o.flatten(1).square().sum(1).mean().sqrt() for o in model(x)]


def test_ablation_is_brute_force_on_both_heads():
    model, x = TwoHeads().double().eval(), torch.cat(batches(8))
    groups = find_groups(model, x)
    found = ablation_scores(model, groups, [x])
    with torch.no_grad():
        scales, dense = scales_of(model, x), model(x)
        for group in groups:
            for channel in (0, 5):
                changed = copy.deepcopy(model)
                for reader in group.readers:
                    layer = changed.get_submodule(reader.module)
                    layer.weight[:, reader.index[reader.channel == channel]] = 0
                moved = zip(changed(x), dense, scales, strict=True)
                exact = sum(((o - d).flatten(1) * s).square().sum(1).mean() for o, d, s in moved)
                assert float(found[group.name][channel]) == pytest.approx(float(exact), rel=1e-9)


def jacobian_rows(model, x, name):
    """The Jacobian of both scaled outputs of one image by a parameter, [K, ...]."""
    scales = scales_of(model, x)
    parameter = model.get_parameter(name)

    def rows(p, one):
        returned = torch.func.functional_call(model, {name: p}, (one[None],))
        return torch.cat([o.flatten() * s for o, s in zip(returned, scales, strict=True)])

    return [torch.func.jacrev(rows)(parameter.detach(), one) for one in x]


@pytest.mark.parametrize("name", ["trunk.bias", "classes.bias", "map.bias"])
def test_jacobian_norms_and_weights_are_those_of_both_heads(name):
    model, x = TwoHeads().double().eval(), torch.cat(batches(4))
    exact = sum(float(j.square().sum()) for j in jacobian_rows(model, x, name)) / len(x)
    found = jacobian_norms(model, [x], num_probes=100).by_parameter()[name].value
    assert found == pytest.approx(exact, rel=0.15)
    weight = name.replace("bias", "weight")
    squares = sum(j.square().sum(0) for j in jacobian_rows(model, x, weight)) / len(x)
    exact_scores = model.get_parameter(weight).detach().square() * squares
    scores = tpv_weight_scores(model, [x], compensated=False, num_probes=100)[weight]
    assert float(scores.sum()) == pytest.approx(float(exact_scores.sum()), rel=0.15)


def test_lfh_looks_at_both_heads():
    model, x = TwoHeads().double().eval(), torch.cat(batches(4))
    groups = find_groups(model, x)
    found = SCORERS["lfh"](model, groups, [x], num_probes=100)["b"][3]
    filters = model.b.weight[3].detach()
    trace = sum(float(j[:, 3].square().sum()) for j in jacobian_rows(model, x, "b.weight")) / len(x)
    exact = float(filters.square().sum()) * trace / filters.numel()
    assert float(found) == pytest.approx(exact, rel=0.15)


def test_noise_and_volume_move_both_heads():
    model, x = TwoHeads().double().eval(), torch.cat(batches(8))
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        noisy.map.weight.mul_(1.1)
        dense, scales = model(x), scales_of(model, x)
        exact = sum(
            ((o - d).flatten(1) * s).square().sum(1).mean()
            for o, d, s in zip(noisy(x), dense, scales, strict=True)
        )
    found = perturbed_variance(
        model, [x], lambda name, p, _: 0.1 * p * (name == "map.weight"), num_draws=1
    )
    assert found.value == pytest.approx(float(exact), rel=1e-6)
    rows = scaled_rows(model, x).detach()
    spread = float((rows - rows.mean(0)).square().sum(1).mean())
    volume = local_volume(model, [x], share=0.1, num_directions=2)
    assert volume.threshold == pytest.approx(0.1 * spread, rel=1e-9)


@torch.no_grad()
def test_lipschitz_is_the_largest_singular_value_of_both_jacobians():
    model, x = TwoHeads().double().eval(), torch.cat(batches(4))
    scales = scales_of(model, x)

    def rows(one):
        return torch.cat([o.flatten() * s for o, s in zip(model(one[None]), scales, strict=True)])

    exact = sum(
        float(torch.linalg.matrix_norm(torch.func.jacrev(rows)(one).flatten(1), 2)) for one in x
    ) / len(x)
    found = input_lipschitz(model, [x], num_iterations=200).value
    assert found == pytest.approx(exact, rel=1e-3)


def test_single_weights_count_every_output_and_say_so():
    model = TwoHeads().eval()
    x = [t.float() for t in batches(24)]
    both = prune_weights(model, x, keep=0.5, repair="none")
    assert any("returns 2 outputs that count" in w for w in both.report["warnings"])
    masks = prune_weights(model, x, keep=0.5, repair="none", outputs=["0"]).masks
    # What serves the other head alone costs nothing then, and leaves first.
    assert float(masks["b.weight"].double().mean()) < float(both.masks["b.weight"].double().mean())


def test_evaluation_counts_every_output_and_classes_of_the_first():
    model = TwoHeads().eval().double()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.map.weight.neg_()
    x = batches(24)
    found = evaluate(broken, labelled(x), dense=model)
    assert found == evaluate(broken, labelled(x), dense=model_outputs(model, x))
    assert found.agreement == 1
    assert found.output_variance == pytest.approx(output_variance(broken, model, x))
    assert found.output_variance > 0
    assert evaluate(broken, labelled(x), dense=model, outputs=["0"]).output_variance == 0
    assert found.top1 == evaluate(First(broken), labelled(x)).top1


def test_what_is_defined_for_classes_says_which_output_it_reads():
    model = TwoHeads().eval().double()
    x = batches(24)
    taylor = with_labels("taylor", labelled(x))
    result = prune(model, x, keep=0.8, criterion=taylor, repair="none")
    assert any("it reads output '0' alone" in w for w in result.warnings)
    with pytest.raises(ValueError, match=r"class scores \[N, K\], found"):
        prune(model, x, keep=0.8, criterion=taylor, repair="none", outputs=["1"])


def test_mirrored_distillation_refuses_several_outputs():
    with pytest.raises(ValueError, match=r"mirrored: expected .*several: distil without it"):
        model = TwoHeads().eval()
        distill(model, model, [t.float() for t in batches(8)], epochs=1, mirrored=True)
