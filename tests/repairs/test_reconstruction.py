"""Block reconstruction against explicit Jacobians and explicit least squares."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, jacrev

from tpvprune import compensate_weights, find_groups, remove_channels
from tpvprune.groups.removal import restore_empty
from tpvprune.passes.evaluation import output_variance
from tpvprune.repairs import reconstruction
from tpvprune.repairs.blocks import BlockCall, find_blocks
from tpvprune.repairs.gauss_newton import GaussNewton, Linearised, loss_of
from tpvprune.repairs.preconditioner import KroneckerFactors, layers_in
from tpvprune.repairs.reconstruction import reconstruct_blocks
from tpvprune.repairs.views import views_of

MODELS = {  # input channels and size, blocks, stages of several blocks
    "resnet10t": (3, 64, 5, 0),
    "vit_tiny_patch16_224": (3, 32, 2, 1),
    "convnext_atto": (3, 32, 12, 4),
    "regnetx_002": (3, 32, 13, 2),
    "swin_tiny_patch4_window7_224": (3, 64, 4, 0),
}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)}


def make(name, **kwargs):
    torch.manual_seed(0)
    kwargs |= VIT if name.startswith("vit") else {}
    kwargs |= {"dims": (8, 16, 24, 32), "ls_init_value": 1.0} if name.startswith("convn") else {}
    kwargs |= {"channels": (16, 24, 32, 48)} if name.startswith("resnet") else {}
    kwargs |= SWIN if name.startswith("swin") else {}
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for module in model.modules():  # branches that start at zero would have nothing to fit
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


def pictures(num, shape, seed=0):
    return torch.randn(num, shape[0], shape[1], shape[1], generator=seeded(seed))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def halved(model, x):
    groups = find_groups(model, x[:2])
    kept = {
        g.name: torch.rand(g.num_channels, generator=seeded(i)) < 0.6 for i, g in enumerate(groups)
    }
    for mask in kept.values():
        mask[:1] |= not mask.any()
    kept = restore_empty(groups, kept)
    return remove_channels(model, groups, kept), groups, kept


class Branch(nn.Module):
    """conv-BN-ReLU-conv beside a shortcut: a block in float64."""

    def __init__(self, inner=3, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 1)

    def forward(self, x):
        return torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))) + x)


def branch(**kwargs):
    torch.manual_seed(1)
    block = Branch(**kwargs).double().eval()
    block.bn1.running_mean.normal_()
    block.bn1.running_var.uniform_(0.5, 2)
    return block


def a_call(block, num=6, size=4):
    x = torch.randn(num, 4, size, size, dtype=torch.float64, generator=seeded(2))
    target = block(x).detach() + torch.randn(x.shape, dtype=torch.float64, generator=seeded(3))
    return BlockCall((x,), {}, target)


def solver(num_inputs, **options):
    usual = {"rounds": 1, "damping": 1e-3, "max_positions": 10**9, "max_bytes": 1 << 30, "seed": 0}
    return GaussNewton(num_inputs, **{**usual, **options})


def block_output(model, block, x):
    outs = []
    handle = model.get_submodule(block.name).register_forward_hook(
        lambda _m, _a, out: outs.append(out)
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return outs[0]


def parameters_of(block, call):
    layers = layers_in(block, call)
    return layers, {n: block.get_parameter(n).detach() for lay in layers for n in lay.names}


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_of_timm_models_are_found_and_their_outputs_matched(name):
    x = pictures(2, MODELS[name])
    model = make(name)
    pruned, groups, kept = halved(model, x)
    blocks, stages = find_blocks(model, pruned, x, groups, kept)
    names = [b.name for b in blocks]
    assert len(names) == MODELS[name][2]
    assert not any(a.startswith(b + ".") for a in names for b in names)
    assert len(stages) == MODELS[name][3]
    for stage in stages:
        inside = [n for n in names if n.startswith(stage.name + ".")]
        assert stage.depth == len(inside) > 1
    for block in [*blocks, *stages]:
        wanted = block.kept_of(block_output(model, block, x))
        assert wanted.shape == block_output(pruned, block, x).shape


def test_the_kept_channels_of_an_output_are_those_that_stay():
    """With only a stream pruned, and nothing lost downstream, kept outputs are the dense ones."""
    x = pictures(2, MODELS["resnet10t"])
    model = make("resnet10t")
    groups = find_groups(model, x)
    stream = groups.output_axes["layer4.0"][1].members[0][0]
    kept = {stream: torch.arange(groups[stream].num_channels) % 3 > 0}
    pruned = remove_channels(model, groups, kept)
    block = {b.name: b for b in find_blocks(model, pruned, x, groups, kept)[0]}["layer4.0"]
    wanted = block.kept_of(block_output(model, block, x))
    torch.testing.assert_close(wanted, block_output(pruned, block, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_bytes", [0, 1 << 30])
def test_products_with_the_jacobian_are_those_of_the_explicit_one(max_bytes):
    block = branch()
    call = a_call(block)
    layers, params = parameters_of(block, call)
    assert {n for lay in layers for n in lay.names} == {
        "conv1.weight", "bn1.bias", "conv2.weight", "conv2.bias",
    }  # fmt: skip
    parts = [call.part(0, 0.5), call.part(0.5, 1)]
    linearised = Linearised(block, params, parts, max_bytes)
    explicit = jacrev(lambda p: functional_call(block, p, call.args))(params)
    rows = torch.cat([explicit[n].flatten(4).flatten(0, 3) for n in params], 1)
    v = {n: torch.randn(p.shape, dtype=p.dtype, generator=seeded(4)) for n, p in params.items()}
    flat = torch.cat([v[n].flatten() for n in params])
    error = (call.out - block(*call.args).detach()).flatten()
    for found, wanted in (
        (linearised.gauss_newton(v), rows.T @ (rows @ flat)),
        (linearised.pull_back(), rows.T @ error),
    ):
        torch.testing.assert_close(torch.cat([found[n].flatten() for n in params]), wanted)


def test_products_of_some_parts_stand_for_all_and_the_gradient_is_of_all():
    block = branch()
    call = a_call(block, num=6)
    _, params = parameters_of(block, call)
    v = {n: torch.randn(p.shape, dtype=p.dtype, generator=seeded(4)) for n, p in params.items()}
    parts = [call.part(a / 6, (a + 2) / 6) for a in (0, 2, 4)]
    for max_bytes in (0, 1 << 30):
        some = Linearised(block, params, parts, max_bytes, few=[0, 2])
        both = Linearised(block, params, [parts[0], parts[2]], max_bytes)
        every = Linearised(block, params, parts, max_bytes)
        product, wanted = some.gauss_newton(v), both.gauss_newton(v)
        for n in params:
            torch.testing.assert_close(product[n], 1.5 * wanted[n])
            torch.testing.assert_close(some.pull_back()[n], every.pull_back()[n])


def test_an_iteration_looks_at_as_many_inputs_as_it_is_told(monkeypatch):
    seen = []
    product = Linearised.gauss_newton
    monkeypatch.setattr(
        Linearised, "gauss_newton", lambda self, v: seen.append(self._few) or product(self, v)
    )
    block = branch()
    call = a_call(block, num=20)
    solver(20, iterations=2, num_in_products=6).fit(block, call)
    assert {len(few) for few in seen} == {2}  # of nine parts, two inputs in each
    assert all(set(few) == {0, 3} or set(few) == {0, 4} for few in seen)


def test_conjugate_gradients_solve_the_damped_normal_equations():
    block = branch()
    call = a_call(block, num=12)
    layers, params = parameters_of(block, call)
    factors = KroneckerFactors.measure(block, layers, [call], 1e-2, 0)
    *_, step = solver(12, iterations=200).steps(block, params, [call], factors)
    explicit = jacrev(lambda p: functional_call(block, p, call.args))(params)
    rows = torch.cat([explicit[n].flatten(4).flatten(0, 3) for n in params], 1)
    ridge = torch.cat([torch.full((p.numel(),), factors.ridge[n]) for n, p in params.items()])
    error = (call.out - block(*call.args).detach()).flatten()
    wanted = torch.linalg.solve(rows.T @ rows + torch.diag(ridge.double()), rows.T @ error)
    torch.testing.assert_close(
        torch.cat([step[n].flatten() for n in params]), wanted, rtol=1e-6, atol=1e-8
    )


def test_the_preconditioner_is_exact_for_a_linear_layer():
    """There E[g g^T] is the identity, so the factors are the Gauss-Newton matrix itself."""
    layer = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(128, 5, dtype=torch.float64, generator=seeded(0))
    call = BlockCall((x,), {}, layer(x).detach())
    layers, params = parameters_of(layer, call)
    factors = KroneckerFactors.measure(layer, layers, [call], 1e-12, 0)
    factors._factors[0].outputs = torch.eye(4).double()[None]  # what 128 random signs estimate
    v = {n: torch.randn(p.shape, dtype=p.dtype, generator=seeded(4)) for n, p in params.items()}
    back = factors.solve(Linearised(layer, params, [call]).gauss_newton(v))
    for n, wanted in v.items():
        torch.testing.assert_close(back[n], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_fitting_lowers_the_error_of_a_block(share):
    dense, block = branch(inner=6), branch(inner=3)
    x = torch.randn(32, 4, 6, 6, dtype=torch.float64, generator=seeded(5))
    target = dense(x).detach()
    before = (block(x) - target).square().sum()
    fit = solver(32, rounds=3, iterations=8, max_positions=int(share * 32 * 36)).fit
    fit(block, BlockCall((x,), {}, target))
    assert (block(x) - target).square().sum() < 0.7 * before


def test_the_best_point_on_the_way_is_taken():
    """Few samples with noisy targets: to go all the way would be to learn the noise."""
    block = branch()
    call = a_call(block, num=20)
    fit = solver(20, iterations=12, damping=1e-6)
    data, held = fit.parts(call)[:-1], fit.parts(call)[-1:]
    assert len(data) == 9
    layers, params = parameters_of(block, call)
    factors = KroneckerFactors.measure(block, layers, data, fit.damping, fit.seed)
    steps = [*fit.steps(block, params, data, factors)]
    steps += [{n: share * d for n, d in steps[-1].items()} for share in (0.5, 0.25)]
    met = [loss_of(block, {n: params[n] + d[n] for n in params}, held) for d in steps]
    assert min(met) < met[11]
    fit.fit(block, call)
    assert loss_of(block, {}, held) == pytest.approx(min(met))


def test_samples_that_were_not_fitted_never_get_worse():
    block = branch()
    x = torch.randn(10, 4, 4, 4, dtype=torch.float64, generator=seeded(2))
    call = BlockCall((x,), {}, block(x).detach())
    call.out[:9] += 1  # only what takes part in the fit asks for a change
    before = copy.deepcopy(block.state_dict())
    solver(10, rounds=3, iterations=4).fit(block, call)
    assert all(map(torch.equal, before.values(), block.state_dict().values()))


def test_blocks_of_a_stage_move_together():
    x = nn.functional.interpolate(pictures(160, (3, 4)), size=32, mode="bilinear")
    model = make("vit_tiny_patch16_224")
    pruned, groups, kept = halved(model, x)
    given = {"groups": groups, "kept": kept, "num_views": 1, "rounds": 1}
    _, (stage,) = find_blocks(model, pruned, x[:2], groups, kept)
    counts = []
    alone = reconstruct_blocks(pruned, model, [x[:128]], stage_iterations=0, **given)
    joint = reconstruct_blocks(
        pruned, model, [x[:128]], **given, progress=lambda *a: counts.append(a[1:])
    )
    assert counts == [(1, 3), (2, 3), (3, 3)]
    for images in (x[:128], x[128:]):
        wanted = stage.kept_of(block_output(model, stage, images))
        before, after = ((block_output(m, stage, images) - wanted).norm() for m in (alone, joint))
        assert after < before
    # The head, which no stage holds, follows: it is right for what the stage gives now.
    stale = copy.deepcopy(joint)
    stale.head.load_state_dict(alone.head.state_dict())
    assert output_variance(joint, model, [x]) < output_variance(stale, model, [x])


def test_a_model_that_is_already_equal_is_left_alone():
    x = pictures(8, MODELS["resnet10t"])
    model = make("resnet10t")
    groups = find_groups(model, x[:2])
    same = reconstruct_blocks(model, model, [x], groups=groups, kept={})
    for a, b in zip(same.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stage_iterations"),
    [("resnet10t", 12), ("vit_tiny_patch16_224", 12), ("convnext_atto", 0)],
)
def test_it_improves_on_compensation_and_touches_no_argument(name, stage_iterations):
    x = nn.functional.interpolate(pictures(160, (3, 4)), size=32, mode="bilinear")
    model = make(name)
    pruned, groups, kept = halved(model, x)
    data = [x[:50], x[50:128]]
    start = compensate_weights(pruned, model, data, groups=groups, kept=kept)
    states = [copy.deepcopy(m.state_dict()) for m in (model, start)]
    random = torch.get_rng_state()
    done = []
    repaired = reconstruct_blocks(
        start,
        model,
        data,
        groups=groups,
        kept=kept,
        rounds=1,
        num_views=1,
        stage_iterations=stage_iterations,
        progress=lambda *a: done.append(a),
    )
    for source, state in zip((model, start), states, strict=True):
        assert not source.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in source.modules())
        for key, value in source.state_dict().items():
            assert torch.equal(value, state[key]), key
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in repaired.modules())
    assert [p.requires_grad for p in repaired.parameters()] == [
        p.requires_grad for p in start.parameters()
    ]
    assert [d for _, d, _ in done] == list(range(1, done[0][2] + 1))
    last = find_blocks(model, start, x[:2], groups, kept)[0][-1]

    def error(m, images):
        wanted = last.kept_of(block_output(model, last, images))
        return (block_output(m, last, images) - wanted).norm()

    # Ridges are chosen and steps are taken by what holds on images that took no part in a fit.
    assert error(repaired, x[:128]) < 1.05 * error(start, x[:128])
    assert error(repaired, x[128:]) < 1.02 * error(start, x[128:])


@pytest.mark.long
def test_it_is_deterministic_and_mirror_images_count():
    x = pictures(12, (3, 32))
    model = make("resnet10t")
    pruned, groups, kept = halved(model, x)
    given = {"groups": groups, "kept": kept, "rounds": 1, "iterations": 2}
    once, again = (reconstruct_blocks(pruned, model, [x[:8], x[8:]], **given) for _ in range(2))
    assert all(map(torch.equal, once.parameters(), again.parameters()))
    plain = reconstruct_blocks(pruned, model, [x[:8], x[8:]], num_views=1, **given)
    last = find_blocks(model, pruned, x[:2], groups, kept)[0][-1]
    wanted = last.kept_of(block_output(model, last, x.flip(3)))
    seen, unseen = ((block_output(m, last, x.flip(3)) - wanted).norm() for m in (once, plain))
    assert seen < unseen


def test_every_image_serves_and_it_is_said_how_many_each_step_used():
    x = pictures(24, (3, 32))
    model = make("resnet10t")
    pruned, groups, kept = halved(model, x)
    given = {"groups": groups, "kept": kept, "rounds": 1, "iterations": 1}
    found = find_blocks(model, pruned, x[:2], groups, kept)[0]
    few, many = {}, {}
    # An iteration looks at an image and its mirror image of the first, the gradient is of eight.
    limit = 2 * found[0].positions
    reconstruct_blocks(pruned, model, [x], used=few, max_positions=limit, **given)
    reconstruct_blocks(pruned, model, [x], used=many, **given)
    assert few["layers"] == many["layers"] == 24
    assert few[found[0].name] == 8
    assert few[found[-1].name] == min(24, 8 * found[0].positions // found[-1].positions)
    assert all(num == 24 for num in many.values())


def test_several_fits_are_the_mean_of_those_to_parts_of_the_images():
    parts = list(pictures(24, (3, 32)).split(5))
    model = make("resnet10t")
    pruned, groups, kept = halved(model, parts[0])
    given = {"groups": groups, "kept": kept, "rounds": 1, "iterations": 1}
    used, told = {}, []
    several = reconstruct_blocks(
        pruned, model, parts, **given, num_fits=2, seed=3, used=used,
        progress=lambda *args: told.append(args),
    )  # fmt: skip
    alone = [
        reconstruct_blocks(pruned, model, parts[i::2], **given, seed=3 + i).state_dict()
        for i in range(2)
    ]
    for name, found in several.state_dict().items():
        if found.is_floating_point():
            mean = (alone[0][name].double() + alone[1][name].double()) / 2
            assert torch.equal(found, mean.to(found.dtype))
        else:
            assert torch.equal(found, alone[0][name])
    assert set(used.values()) == {24}
    total = told[-1][2]
    assert told == [("reconstruction", i + 1, total) for i in range(total)]


@pytest.mark.parametrize("num_fits", [0, 3])
def test_each_fit_has_a_batch(num_fits):
    x = pictures(4, (3, 32))
    model = make("resnet10t")
    pruned, groups, kept = halved(model, x)
    with pytest.raises(ValueError, match=f"num_fits: expected 1 to 2, .*, found {num_fits}"):
        reconstruct_blocks(pruned, model, x.split(2), groups=groups, kept=kept, num_fits=num_fits)


def test_large_blocks_look_at_fewer_images(monkeypatch):
    monkeypatch.setattr(reconstruction, "_FEWEST", 1)
    x = pictures(24, (3, 32))
    model = make("resnet10t")
    pruned, groups, kept = halved(model, x)
    given = {"groups": groups, "kept": kept, "rounds": 1, "iterations": 1}
    blocks, stages = find_blocks(model, pruned, x[:2], groups, kept)
    assert sum(b.macs for b in blocks) < groups.macs()
    assert all(
        s.macs >= sum(b.macs for b in blocks if b.name.startswith(f"{s.name}.")) for s in stages
    )
    used, few = {}, 2
    most = few * max(b.macs for b in blocks)
    reconstruct_blocks(pruned, model, [x], used=used, max_macs=most, num_views=1, **given)
    assert used == {
        "layers": 24, **{b.name: min(24, 8 * int(most / b.macs)) for b in blocks},
        **{s.name: used[s.name] for s in stages},
    }  # fmt: skip
    assert all(8 <= num <= 24 for num in used.values())
    assert min(used.values()) < 24


@pytest.mark.parametrize(
    ("num_views", "max_macs", "expected"), [(None, 1e10, 2), (None, 0, 1), (3, 0, 3)]
)
def test_mirror_images_are_shown_where_there_is_room(monkeypatch, num_views, max_macs, expected):
    monkeypatch.setattr(reconstruction, "_FEWEST", 1)
    seen = []
    monkeypatch.setattr(
        reconstruction, "views_of", lambda *a: seen.append(views_of(*a)) or seen[-1]
    )
    x = pictures(16, (3, 32))
    model = make("resnet10t")
    pruned, groups, kept = halved(model, x)
    given = {"groups": groups, "kept": kept, "rounds": 1, "iterations": 1}
    reconstruct_blocks(pruned, model, [x], max_macs=max_macs, num_views=num_views, **given)
    assert seen[0].num_views == expected


@pytest.mark.long
def test_less_memory_gives_the_same():
    x = pictures(20, (3, 32))
    model = make("resnet10t")
    pruned, groups, kept = halved(model, x)
    given = {"groups": groups, "kept": kept, "rounds": 1, "iterations": 1}
    # The least holds nothing between two fits, inputs of blocks included.
    roomy, tight, none = (
        list(reconstruct_blocks(pruned, model, [x], max_bytes=room, **given).parameters())
        for room in (4 << 30, 4 << 20, 0)
    )
    for a, b, c in zip(roomy, tight, none, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-4)


def test_arguments_common_to_all_samples_are_not_split():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, table):
            return self.b(torch.relu(self.a(x + table)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Biased(), Biased()])
            self.table = nn.Parameter(torch.randn(6, 4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            for block in self.blocks:
                x = block(x, self.table)
            return self.head(x.mean(1))

    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(6, 6, 4)  # as many samples as rows of the table
    groups = find_groups(model, x)
    pruned, groups, kept = halved(model, x)
    assert len(find_blocks(model, pruned, x, groups, kept)[0]) == 2
    repaired = reconstruct_blocks(pruned, model, [x], groups=groups, kept=kept)
    assert output_variance(repaired, model, [x]) < output_variance(pruned, model, [x])


# ---- sequence-first networks --------------------------------------------------------------------


class TokenBlock(nn.Module):
    """A branch that mixes tokens and channels, ``tokens`` being the dimension of the former."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.norm, self.up = nn.LayerNorm(12), nn.Linear(12, 24)
        self.mix, self.down = nn.Linear(24, 24), nn.Linear(24, 12)

    def forward(self, x):
        h = torch.relu(self.up(self.norm(x)))
        return x + self.down(torch.relu(self.mix(h - h.mean(self.tokens, keepdim=True))) * h)


class Tokens(nn.Module):
    """The same network with its activations as [B, T, C], or as [T, B, C]."""

    def __init__(self, *, first):
        super().__init__()
        self.tokens = 0 if first else 1
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 5)
        self.blocks = nn.ModuleList(TokenBlock(self.tokens) for _ in range(2))

    def forward(self, x):
        x = self.stem(x if self.tokens else x.transpose(0, 1))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(self.tokens))


def test_a_block_is_fitted_alike_in_both_layouts():
    torch.manual_seed(0)
    usual = TokenBlock(1).double().eval()
    first = TokenBlock(0).double().eval()
    first.load_state_dict(usual.state_dict())
    x = torch.randn(30, 7, 12, generator=seeded(1), dtype=torch.float64)
    other = copy.deepcopy(usual)
    with torch.no_grad():
        for parameter in other.parameters():  # near by: further off no step helps
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(2)))
        target = other(x)
    solver = GaussNewton(30, 2, 5, 1e-3, 1 << 18, 1 << 30, 0)
    before = usual.up.weight.detach().clone()
    solver.fit(usual, BlockCall((x,), {}, target))
    solver.fit(first, BlockCall((x.transpose(0, 1),), {}, target.transpose(0, 1)).along(1))
    assert not torch.equal(usual.up.weight, before)
    for one, two in zip(first.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)  # differences are taken of J v


def test_the_blocks_of_a_sequence_first_network_are_those_of_the_batch_first_one():
    torch.manual_seed(0)
    usual, first = Tokens(first=False).double().eval(), Tokens(first=True).double().eval()
    first.load_state_dict(usual.state_dict())
    x = torch.randn(60, 7, 6, generator=seeded(1), dtype=torch.float64)
    fresh = torch.randn(40, 7, 6, generator=seeded(2), dtype=torch.float64)
    used, blocks, variances, refitted = [{}, {}], [], [], []
    for model, note in zip((usual, first), used, strict=True):
        pruned, groups, kept = halved(model, x)
        blocks += [find_blocks(model, pruned, x[:4], groups, kept)[0]]
        given = {"groups": groups, "kept": kept}
        compensated = compensate_weights(pruned, model, x.split(20), **given)
        refitted.append(compensated.state_dict())
        repaired = reconstruct_blocks(pruned, model, x.split(20), used=note, **given)
        variances.append(output_variance(repaired, model, [fresh]))
        assert variances[-1] < output_variance(compensated, model, [fresh])
    assert [[b.batch_dim for b in found] for found in blocks] == [[0, 0], [1, 1]]
    assert [[b.name for b in found] for found in blocks] == [["blocks.0", "blocks.1"]] * 2
    assert used[0] == used[1]
    for name, value in refitted[0].items():
        torch.testing.assert_close(refitted[1][name], value, rtol=1e-8, atol=1e-10)
    assert variances[0] == pytest.approx(variances[1], rel=1e-3)  # differences are taken of J v
