"""Joint weight removal: greedy choices against exhaustive ones, variances against Jacobians."""

import pytest
import torch
from cases import batches, build, images
from torch.func import functional_call, jacrev

from tpvprune.weights import elimination
from tpvprune.weights.choice import _joint_variances, _sensitivities, joint_weight_masks
from tpvprune.weights.elimination import elimination_path
from tpvprune.weights.masks import density
from tpvprune.weights.repair import _by_columns, masked_fit
from tpvprune.weights.scores import prunable_weights

RIDGE = 1e-2


def layer(outputs=3, channels=4, kernel=(2, 1), groups=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    unknowns = channels * kernel[0] * kernel[1]
    x = torch.randn(groups, 60, unknowns, generator=generator).double()
    x[..., 1] += 2 * x[..., 0]  # weights that can stand in for each other
    weight = torch.randn(groups * outputs, channels, *kernel, generator=generator)
    sensitivity = torch.rand(groups * outputs, generator=generator).double() + 0.1
    return weight, x.mT @ x / 60, sensitivity


def curvature_of(gram):
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return gram + RIDGE * mean * torch.eye(gram.shape[1], dtype=gram.dtype)


def damage(weight, gram, sensitivity, mask):
    start = weight.reshape(len(gram), -1, gram.shape[1]).double()
    apart = masked_fit(start, curvature_of(gram), mask) - start
    rows = ((apart @ curvature_of(gram)) * apart).sum(2).reshape(-1)
    return float((rows * sensitivity).sum())


@pytest.mark.parametrize("groups", [1, 2])
def test_each_round_takes_the_weight_that_costs_least(groups):
    weight, gram, sensitivity = layer(groups=groups)
    path = elimination_path(weight, gram, sensitivity, num_steps=weight.numel())
    assert len(path.masks) == weight.numel()
    for before, after in zip(path.masks[:9], path.masks[1:10], strict=True):
        (gone,) = (before & ~after).flatten().nonzero()
        assert not (after & ~before).any()
        found = {}
        for i in before.flatten().nonzero().flatten().tolist():
            mask = before.flatten().clone()
            mask[i] = False
            found[i] = damage(weight, gram, sensitivity, mask.reshape(weight.shape))
        assert found[int(gone)] <= min(found.values()) * (1 + 1e-3)


def test_changes_are_those_of_the_exact_refit():
    weight, gram, sensitivity = layer()
    path = elimination_path(weight, gram, sensitivity, num_steps=6)
    assert path.changes[0].abs().max() < 1e-5
    assert torch.allclose(path.densities(), torch.arange(6, 0, -1).double() / 6, atol=0.05)
    start = weight.reshape(1, -1, gram.shape[1]).double()
    for mask, change in zip(path.masks, path.changes, strict=True):
        exact = masked_fit(start, curvature_of(gram), mask) - start
        assert torch.allclose(change.double().reshape(exact.shape), exact, atol=1e-4)


@pytest.mark.parametrize("way", ["rounds", "sweeps"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_patterns_are_met_by_every_set_of_neighbours(pattern, way, monkeypatch):
    if way == "sweeps":
        monkeypatch.setattr(elimination, "_EXACT", 0)
    n, m = pattern
    weight, gram, sensitivity = layer(channels=8, outputs=4)
    path = elimination_path(weight, gram, sensitivity, pattern=pattern)
    kept = path.masks[-1].movedim(1, -1).reshape(-1, m)
    assert (kept.sum(1) == n).all()
    chosen = damage(weight, gram, sensitivity, path.masks[-1])
    others = [damage(weight, gram, sensitivity, any_mask(weight, n, m, s)) for s in range(20)]
    assert chosen < sorted(others)[2]


def any_mask(weight, n, m, seed):
    shape = weight.movedim(1, -1).shape
    order = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).reshape(-1, m)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order.topk(n, 1).indices, True)
    return mask.reshape(shape).movedim(-1, 1)


def test_sweep_refits_as_columns_do_and_meets_densities(monkeypatch):
    monkeypatch.setattr(elimination, "_EXACT", 0)
    monkeypatch.setattr(elimination, "_BLOCK", 5)
    weight, gram, sensitivity = layer(channels=12, kernel=(1, 1), outputs=6)
    path = elimination_path(weight, gram, sensitivity, num_steps=4)
    assert torch.allclose(path.densities(), torch.tensor([1, 0.75, 0.5, 0.25]).double(), atol=0.05)
    start = weight.reshape(6, 12).double()
    for mask, change in zip(path.masks[1:], path.changes[1:], strict=True):
        exact = _by_columns(start, curvature_of(gram)[0], mask.reshape(6, 12))
        assert torch.allclose(change.reshape(6, 12).double() + start, exact, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_variances_are_those_of_the_dense_jacobian():
    model, x = build("chain"), images(6)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    jac = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    signs = torch.randint(0, 2, (6, 2, 3), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    paths = {
        name: elimination.Path(torch.ones(3, *w.shape, dtype=torch.bool), torch.randn(3, *w.shape))
        for name, w in prunable_weights(model).items()
    }
    for path in paths.values():
        path.changes.data = path.changes.double()
    found = _joint_variances(model, [x[:4], x[4:]], paths, 2, 3)
    for name, path in paths.items():
        along = torch.einsum("bvk,bk...->bv...", signs.double(), jac[name]).flatten(2)
        exact = (along @ path.changes.flatten(1).T).square().mean((0, 1))
        assert torch.allclose(found[name], exact, rtol=1e-9), name


def test_sensitivity_is_the_squared_gradient_of_the_layer_output():
    model, x = build("chain"), images(5)
    weights = {name: model.get_parameter(name) for name in ("conv2.weight", "fc.weight")}
    found = _sensitivities(model, [x], weights, 1, 0)
    signs = torch.randint(0, 2, (5, 1, 3), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    # The gradient of the last layer's output is the direction itself.
    assert torch.allclose(found["fc.weight"], torch.ones(3).double())
    held = []
    hook = model.conv2.register_forward_hook(lambda _m, _a, out: held.append(out))
    total = (model(x) * signs[:, 0].double()).sum()
    hook.remove()
    (grad,) = torch.autograd.grad(total, held)
    assert torch.allclose(found["conv2.weight"], grad.square().sum((0, 2, 3)) / 5)


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.3])
def test_budget_is_kept_and_nearly_used(keep, untouched):
    model, x = build("residual"), batches(24)
    with untouched(model):
        masks, scores = joint_weight_masks(model, x, keep=keep)
    assert keep - 0.06 < density(masks) <= keep
    assert set(scores) == set(masks) == set(prunable_weights(model))
    for name, mask in masks.items():
        kept, gone = scores[name][mask], scores[name][~mask]
        assert not len(gone) or not len(kept) or kept.min() > gone.max()


def test_a_layer_that_does_not_matter_gives_most():
    model, x = build("chain"), batches(24)
    with torch.no_grad():
        model.fc.weight[:, :3] = 0  # half of conv2's outputs are not read
    masks, _ = joint_weight_masks(model, x, keep=0.5)
    kept = masks["conv2.weight"].flatten(1).double().mean(1)
    assert kept[:3].max() == 0 < kept[3:].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 0}, "keep: expected a fraction"), ({"pattern": "2:2"}, "pattern: expected n:m")],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        joint_weight_masks(build("chain"), batches(8), **options)
