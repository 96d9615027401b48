import itertools
import json

import pytest
import timm
import torch
from cases import CASES, Tabled, batches, build, images
from image_cases import write_images
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from tpvprune.cli.entry import main
from tpvprune.passes.evaluation import output_variance
from tpvprune.saved.checkpoint import load_pruned, save_pruned
from tpvprune.weights.masks import (
    density,
    load_masks,
    save_masks,
    select_n_of_m,
    select_weights,
)
from tpvprune.weights.pruning import prune_weights
from tpvprune.weights.repair import _by_columns, apply_masks, compensate_masked, masked_fit
from tpvprune.weights.scores import (
    input_grams,
    prunable_weights,
    tpv_weight_scores,
    wanda_weight_scores,
)


def patches(module, a):
    """Return what every output position reads, [groups, rows, unknowns], by another way."""
    if isinstance(module, nn.Linear):
        return a.reshape(1, -1, a.shape[-1])
    unfolded = F.unfold(
        a, module.kernel_size, module.dilation, module.padding, module.stride
    ).transpose(1, 2)
    return unfolded.reshape(-1, module.groups, module.weight[0].numel()).transpose(0, 1)


def read_by(model, x):
    """Return the patches of every layer, by name."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def look(module, args, name=name):
                found[f"{name}.weight"] = patches(module, args[0])

            hooks.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


# ---- scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["chain", "depthwise", "grouped", "attention"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_plain_scores_are_those_of_the_dense_jacobian(case, untouched):
    model, x = build(case), images(6)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    jac = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    signs = torch.randint(0, 2, (6, 2, 3), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    with untouched(model):
        found = tpv_weight_scores(model, [x[:4], x[4:]], compensated=False, num_probes=2, seed=5)
    assert set(found) == set(prunable_weights(model))
    for name, score in found.items():
        along = torch.einsum("bvk,bk...->bv...", signs.double(), jac[name])
        exact = weights[name].square() * along.square().mean((0, 1))
        assert torch.allclose(score, exact, rtol=1e-9), name


def test_compensated_scores_use_what_the_rest_of_the_row_cannot_predict():
    model, x = build("chain"), images(6)
    name, ridge = "conv2.weight", 1e-2
    signs = torch.randint(0, 2, (6, 1, 3), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    weights = {n: p.detach() for n, p in model.named_parameters()}
    jac = jacrev(lambda w: functional_call(model, w, (x,)))(weights)[name]
    gradient = torch.einsum("bk,bk...->b...", signs[:, 0].double(), jac).flatten(2)
    rows = read_by(model, x)[name][0]
    gram = rows.T @ rows / len(rows)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
    found = tpv_weight_scores(model, [x], ridge=ridge)[name].flatten(1)
    for j in (0, 7, 30):
        others = torch.arange(len(gram)) != j
        # Ridge regression of input j on the others leaves x_j - others @ b.
        b = torch.linalg.solve(gram[others][:, others], gram[others, j])
        left = torch.zeros(len(gram), dtype=torch.float64)
        left[j], left[others] = 1, -b
        exact = weights[name].flatten(1)[:, j].square() * (gradient @ left).square().mean(0)
        assert torch.allclose(found[:, j], exact, rtol=1e-8)


@pytest.mark.parametrize("case", ["chain", "grouped", "attention"])
def test_wanda_scores_are_magnitude_times_input_norm(case):
    model, x = build(case), images(8)
    found = wanda_weight_scores(model, [x[:5], x[5:]])
    for name, rows in read_by(model, x).items():
        w = prunable_weights(model)[name]
        norms = rows.square().mean(1).sqrt()  # [groups, unknowns]
        each = norms.repeat_interleave(len(w) // len(norms), 0).reshape(w.shape)
        assert torch.allclose(found[name], w.abs() * each, rtol=1e-9), name


def test_grams_read_all_positions_of_small_maps_and_some_of_large_ones():
    model, x = build("chain"), images(8)
    rows = read_by(model, x)["conv2.weight"]
    whole = input_grams(model, [x[:3], x[3:]], {"conv2.weight"})["conv2.weight"]
    assert torch.allclose(whole, rows.mT @ rows / rows.shape[1])
    some = input_grams(model, batches(64), {"conv1.weight"}, max_positions=16)["conv1.weight"]
    all_rows = read_by(model, images(64))["conv1.weight"]
    powers = all_rows.square().mean(1)
    assert torch.allclose(some.diagonal(dim1=1, dim2=2), powers, rtol=0.2)


# ---- masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_masks_keep_the_highest_scores_and_meet_the_budget(scope):
    scores = {"a": torch.rand(4, 6, 3), "b": torch.rand(10, 8) / 10}
    masks = select_weights(scores, keep=0.25, scope=scope)
    assert density(masks) == pytest.approx(0.25, abs=0.05)
    for name, mask in masks.items():
        kept, gone = scores[name][mask], scores[name][~mask]
        if scope != "row":
            assert kept.min() >= gone.max()
        else:
            assert (mask.flatten(1).sum(1) == round(0.25 * mask[0].numel())).all()
    if scope == "global":
        both = torch.cat([s.flatten() for s in scores.values()])
        assert sum(int(m.sum()) for m in masks.values()) == round(0.25 * len(both))
        assert masks["a"].sum() > masks["b"].sum()
    same = select_weights({"a": torch.zeros(5, 8)}, keep=0.5, scope=scope)
    assert density(same) == 0.5


def test_no_layer_is_left_empty():
    masks = select_weights({"a": torch.rand(10, 10) + 1, "b": torch.rand(2, 2)}, keep=0.1)
    assert masks["b"].sum() == 1


def test_two_of_four_is_best_of_all_choices():
    scores = {"conv": torch.rand(3, 8, 2, 2), "stem": torch.rand(4, 3, 3, 3)}
    masks = select_n_of_m(scores)
    assert masks["stem"].all()
    blocks = scores["conv"].movedim(1, -1).reshape(-1, 4)
    kept = masks["conv"].movedim(1, -1).reshape(-1, 4)
    assert (kept.sum(1) == 2).all()
    best = torch.stack([blocks[:, list(c)].sum(1) for c in itertools.combinations(range(4), 2)])
    assert torch.allclose((blocks * kept).sum(1), best.max(0).values)
    assert (select_n_of_m(scores, pattern="1:8")["conv"].sum(1) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: select_weights(s, keep=0), "keep: expected a fraction"),
        (lambda s: select_weights(s, keep=0.5, scope="all"), "scope: expected 'global'"),
        (lambda s: select_weights({}, keep=0.5), "found none"),
        (lambda s: select_n_of_m(s, pattern="4:2"), "expected n:m with 0 < n < m"),
        (lambda s: select_n_of_m(s, pattern="2-4"), "expected n:m with 0 < n < m"),
    ],
)
def test_bad_selections_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call({"a": torch.rand(4, 4)})


def test_masks_come_back_from_their_file(tmp_path):
    shapes = {"a.weight": (3, 5, 7), "b": (16,), "c": (0,)}
    masks = {name: torch.rand(shape) > 0.5 for name, shape in shapes.items()}
    save_masks(masks, tmp_path / "masks.safetensors")
    loaded = load_masks(tmp_path)
    assert set(loaded) == set(masks)
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("tensor", "shapes"),
    [
        (torch.zeros(1, dtype=torch.uint8), '{"a": [2, 9]}'),
        (torch.zeros(1, dtype=torch.uint8), '{"a": [-1, -8]}'),
        (torch.zeros(1, dtype=torch.uint8), '{"a": [true]}'),
        (torch.zeros(1, dtype=torch.uint8), '{"b": [8]}'),
        (torch.zeros(1, dtype=torch.uint8), '{"a": [99999999999999999999]}'),
        (torch.zeros(1), '{"a": [8]}'),
        (torch.zeros(1, dtype=torch.uint8), "[["),
        (torch.zeros(1, dtype=torch.uint8), "[1]"),
    ],
)
def test_damaged_mask_files_are_refused(tmp_path, tensor, shapes):
    save_file({"a": tensor}, tmp_path / "m", metadata={"shapes": shapes})
    with pytest.raises(ValueError, match="expected masks that tpvprune saved"):
        load_masks(tmp_path / "m")


@pytest.mark.parametrize("content", [b"", b"\x80\x04no safetensors", None])
def test_files_that_are_no_masks_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match="expected masks that tpvprune saved"):
        load_masks(tmp_path / "m")


# ---- repair ---------------------------------------------------------------------------------


def problem(outputs=5, unknowns=7, groups=2):
    x = torch.randn(groups, 50, unknowns).double()
    curvature = x.mT @ x / 50
    return torch.randn(groups, outputs, unknowns).double(), curvature


def test_masked_fit_is_the_constrained_least_squares_solution():
    weights, curvature = problem()
    mask = torch.rand(weights.shape) > 0.5
    fitted = masked_fit(weights, curvature, mask)
    assert (fitted[~mask] == 0).all()
    for g, o in itertools.product(range(2), range(5)):
        root = torch.linalg.cholesky(curvature[g]).T  # |root (w - w*)| is the distance
        k = mask[g, o]
        exact = torch.linalg.lstsq(root[:, k], (root @ weights[g, o])[:, None]).solution[:, 0]
        assert torch.allclose(fitted[g, o, k], exact, rtol=1e-9)


def test_columns_update_as_optimal_brain_surgeon_does():
    weights, curvature = problem(groups=1)
    w, h = weights[0], curvature[0]
    mask = torch.ones_like(w, dtype=torch.bool)
    mask[:, 0] = False
    # One weight, the first, leaves: both ways are the formula of Hassibi & Stork.
    inverse = torch.linalg.inv(h)
    exact = w - w[:, :1] * inverse[0] / inverse[0, 0]
    exact[:, 0] = 0
    assert torch.allclose(_by_columns(w, h, mask), exact)
    assert torch.allclose(masked_fit(weights, curvature, mask)[0], exact)
    # Of many, the later columns alone stand in: never better than the exact solution.
    mask = torch.rand(w.shape) > 0.5

    def distance(v):
        return ((v - w) @ h * (v - w)).sum()

    exact, by_columns = masked_fit(weights, curvature, mask)[0], _by_columns(w, h, mask)
    assert distance(exact) <= distance(by_columns) < distance(w * mask)


@pytest.mark.parametrize("case", [c for c in CASES if c not in {"linear_behind", "concat"}])
def test_repair_keeps_zeros_and_the_caller_model(case, untouched):
    model, x = build(case), batches(24)
    masks = select_weights(tpv_weight_scores(model, x), keep=0.5)
    with untouched(model):
        repaired = compensate_masked(model, x, masks)
    for name, mask in masks.items():
        assert (repaired.get_parameter(name)[~mask] == 0).all(), name
    cut = apply_masks(model, masks)
    assert output_variance(repaired, model, x) < output_variance(cut, model, x)


def test_repair_of_one_layer_is_its_least_squares_fit():
    model, x = build("chain"), batches(24)
    torch.manual_seed(1)
    masks = {"fc.weight": torch.rand(3, 6) > 0.5}
    repaired = compensate_masked(model, x, masks, ridge=1e-9)
    rows = torch.cat([read_by(model, b)["fc.weight"][0] for b in x])
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    target = rows @ torch.cat([model.fc.weight, model.fc.bias[:, None]], 1).detach().T
    for o in range(3):
        free = torch.cat([masks["fc.weight"][o], torch.ones(1, dtype=torch.bool)])
        exact = torch.linalg.lstsq(rows[:, free], target[:, o : o + 1]).solution[:, 0]
        found = torch.cat([repaired.fc.weight[o], repaired.fc.bias[o : o + 1]])[free]
        # Errors, not weights: a dead input leaves its weight free.
        best, error = (
            (rows[:, free] @ w - target[:, o]).square().sum() for w in (exact, found.detach())
        )
        assert error <= best * (1 + 1e-6) + 1e-12


def test_everything_kept_changes_nothing():
    model, x = build("residual"), batches(24)
    result = prune_weights(model, x, keep=1.0)
    assert result.report["output_variance"]["compensate"] < 1e-20
    assert result.report["pruned"]["weights"] == result.report["dense"]["weights"]


# ---- the whole ------------------------------------------------------------------------------


def test_rows_that_are_rounded_meet_a_budget_and_rows_that_keep_one_weight_do_not():
    x = batches(24)
    odd = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(4)).double()
    odd(x[0])  # 13.5 of 27 weights a row: 14 stay
    result = prune_weights(odd, x, keep=0.5, criterion="wanda", ignore=["2"])
    assert result.report["pruned"]["weights"] == 8 * 14
    assert result.report["reached"]
    fewer = prune_weights(odd, x, keep=0.01, criterion="wanda", ignore=["2"])
    assert fewer.report["pruned"]["weights"] == 8
    assert not fewer.report["reached"]


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("criterion", ["tpv", "magnitude", "wanda"])
def test_prune_weights_meets_the_budget(criterion, pattern, untouched):
    model, x = build("attention"), batches(24)
    with untouched(model):
        result = prune_weights(model, x, keep=0.5, pattern=pattern, criterion=criterion)
    zeros = sum(int((result.model.get_parameter(n) == 0).sum()) for n in result.masks)
    weights = result.report["dense"]["weights"]
    assert result.report["reached"]
    assert result.report["pruned"]["weights"] == weights - zeros
    if pattern is None:
        assert zeros == pytest.approx(weights / 2, rel=0.06)
    else:
        divided = {n: w.shape[1] % 4 == 0 for n, w in prunable_weights(model).items()}
        blocked = [b["name"] for b in result.report["blocked"]]
        assert blocked == [n for n in divided if not divided[n]]
        assert zeros == sum(m.numel() for n, m in result.masks.items() if divided[n]) / 2
    json.dumps(result.report, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "taylor"}, "criterion: expected one of tpv, magnitude, wanda"),
        ({"repair": "bn"}, "repair: expected 'none' or 'compensate'"),
        ({"pattern": "4:4"}, "pattern: expected n:m"),
        ({"num_probes": 0}, "num_probes: expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prune_weights(build("chain"), batches(8), **options)


def test_masks_are_saved_beside_the_model(tmp_path):
    model = timm.create_model("test_resnet", num_classes=4).eval()
    x = torch.randn(24, 3, 32, 32).split(8)
    result = prune_weights(model, x, pattern="2:4", criterion="magnitude", repair="none")
    save_pruned(result.model, tmp_path / "out", masks=result.masks)
    loaded, masks = load_pruned(tmp_path / "out"), load_masks(tmp_path / "out")
    for name, mask in masks.items():
        assert torch.equal(mask, result.masks[name])
        assert (loaded.get_parameter(name)[~mask] == 0).all()
    save_pruned(result.model, tmp_path / "out", masks=result.masks, overwrite=True)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 24)

    def run(*argv, model="test_resnet"):
        given = ["prune", "--model", model, "--num-classes", "6", "--data-dir", "photos"]
        fast = ["--img-size", "32", "-b", "8", "-j", "1", "--num-images", "16"]
        code = main([*given, *fast, "--latency-repeats", "0", "--output", "out", *argv])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_command_removes_single_weights(run, tmp_path, granularity):
    code, out, err = run(
        "--granularity", granularity, "--criterion", "wanda", "--repair", "none", "--json"
    )
    document = json.loads(out)
    assert code == 0
    assert document["granularity"] == granularity
    left = document["pruned"]["weights"] / document["dense"]["weights"]
    assert left == pytest.approx(0.5, abs=0.02)
    assert set(load_masks(tmp_path / "out")) == set(prunable_weights(load_pruned(tmp_path / "out")))
    assert "no label was used" in err


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_page_shows_where_weights_went_and_what_changed(run, tmp_path, granularity):
    for number in range(6):
        write_images(tmp_path / "labelled" / str(number), 3)
    flags = ("--granularity", granularity, "--criterion", "magnitude", "--repair", "none")
    code, out, _ = run(*flags, "--eval-dir", "labelled", "--json")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    masks = load_masks(tmp_path / "out")
    assert code == 0
    assert json.loads(out)["layers"] == report["layers"]
    assert {x["name"] + ".weight": (x["num_weights"], x["kept"]) for x in report["layers"]} == {
        name: (mask.numel(), int(mask.sum())) for name, mask in masks.items()
    }
    share = next(mask for mask in masks.values() if not mask.all()).float().mean()
    assert "Weights that stay" in page
    assert f'<span class="num">{100 * share:.1f}\u202f%</span>' in page
    assert report["disagreement"]["num_images"] == 18
    assert report["class_names"] == [str(number) for number in range(6)]
    assert ("Images that changed" in page) == (report["disagreement"]["num_changed"] > 0)
    classes = report["disagreement"]["classes"]
    assert ("Agreement by class" in page) == (sum(x["num_images"] >= 5 for x in classes) > 1)
    assert "channels" not in page


def test_zeroed_weights_are_counted_and_called_alike_everywhere(run, tmp_path, capsys):
    cheap = ("--criterion", "magnitude", "--repair", "none")
    code, out, err = run("--granularity", "2:4", *cheap, "--json")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    pruned = json.loads(out)["pruned"]
    saved = load_pruned(tmp_path / "out")
    zeros = sum(int((~mask).sum()) for mask in load_masks(tmp_path / "out").values())
    params = sum(p.numel() for p in saved.parameters())
    expected = {"params": params, "nonzero_params": params - zeros}
    evaluate = ["evaluate", "out", "--data-dir", "photos", "--latency-repeats", "0", "--json"]
    assert (code, main(evaluate)) == (0, 0)
    found, said = capsys.readouterr()
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for counts in (pruned, report["pruned"], json.loads(found)):
        assert {name: counts[name] for name in expected} == expected
    assert "non-zero parameters" in err
    assert "non-zero parameters" in said
    assert "Non-zero parameters" in page
    run(*cheap, "--overwrite")
    assert "on-zero" not in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_dry_run_says_what_the_run_then_does(run, tmp_path, granularity):
    flags = ("--granularity", granularity, "--criterion", "magnitude", "--repair", "none", "--json")
    code, out, err = run(*flags, "--dry-run")
    planned = json.loads(out)
    assert code == 0
    assert "stay, all others are set to zero" in " ".join(err.split())
    assert not (tmp_path / "out").exists()
    done = json.loads(run(*flags)[1])
    assert planned["dense"]["weights"] == done["dense"]["weights"]
    assert planned["pruned"]["weights"] == pytest.approx(done["pruned"]["weights"], abs=1)
    assert [b["name"] for b in planned["blocked"]] == [b["name"] for b in done["blocked"]]


def test_command_prunes_heads_alone(run):
    code, out, _ = run(
        "--granularity", "head", "--keep", "0.9", "--criterion", "magnitude", "--repair", "none",
        "--json", model="test_vit",
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    assert {group["unit"] for group in document["groups"]} == {"head"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--granularity", "row"], "channel,branch, weight or 2:4, found 'row'"),
        (["--granularity", "4:2"], "expected n:m with 0 < n < m"),
        (["--granularity", "2:4", "--keep", "0.3"], "2 of 4 weights stay"),
        (["--granularity", "weight", "--round-to", "8"], "--round-to: does not apply"),
        (["--granularity", "weight", "--criterion", "taylor"], "expected one of tpv, magnitude"),
        (["--granularity", "head"], "test_resnet has no attention heads"),
    ],
)
def test_command_refuses_what_does_not_go_together(run, flags, message):
    code, _, err = run(*flags)
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize("criterion", ["tpv", "magnitude", "wanda"])
def test_layers_that_see_no_image_stay_whole_and_say_so(criterion):
    model = Tabled().double().eval()
    result = prune_weights(model, images(24).split(8), keep=0.5, criterion=criterion)
    assert {b["name"]: b["reason"] for b in result.report["blocked"]} == {
        "table.0.weight": "sees no image", "table.2.weight": "sees no image",
    }  # fmt: skip
    assert all(map(torch.equal, result.model.table.parameters(), model.table.parameters()))
    assert (result.model.conv1.weight == 0).any()
