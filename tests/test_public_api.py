"""The public names, and that calling them leaves everything as it was."""

import ast
import functools
import inspect
import re
import subprocess
import sys
import textwrap
import warnings
from functools import partial

import pytest
import torch
from cases import Residual, batches, build, images
from torch import nn

import tpvprune
import tpvprune.diagnostics
from tpvprune.passes.evaluation import output_variance
from tpvprune.scores.criteria import NEEDS_LABELS, SCORERS


@pytest.mark.parametrize("name", tpvprune.__all__)
def test_public_names_exist_and_are_documented(name):
    value = getattr(tpvprune, name)
    if name != "__version__":
        assert value.__doc__


FUNCTIONS = {
    name: value
    for module in (tpvprune, tpvprune.diagnostics)
    for name in module.__all__
    if inspect.isfunction(value := getattr(module, name))
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_document_their_arguments(name):
    words = inspect.getdoc(FUNCTIONS[name])
    signature = inspect.signature(FUNCTIONS[name])
    for argument in signature.parameters:
        assert re.search(rf"^    \**{argument}: ", words, re.M), argument
    assert ("\nReturns:\n" in words) == (signature.return_annotation not in {"None", None})
    code = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(FUNCTIONS[name]))))
    if any(isinstance(node, ast.Raise) for node in ast.walk(code)):
        assert "\nRaises:\n" in words


def test_public_names_are_listed_once():
    assert len(set(tpvprune.__all__)) == len(tpvprune.__all__)
    assert set(dir(tpvprune)) >= set(tpvprune.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tpvprune.nothing  # noqa: B018


def test_options_are_keywords():
    for name in tpvprune.__all__:
        value = getattr(tpvprune, name)
        if inspect.isfunction(value):
            kinds = [p.kind for p in inspect.signature(value).parameters.values()]
            assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 3, name


def test_import_loads_neither_torch_nor_timm():
    code = "import sys, tpvprune; print({'torch', 'timm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ---- purity ---------------------------------------------------------------------------------


class Moody(Residual):
    """Fails in its n-th forward, or in a backward through it, once told to."""

    def __init__(self):
        super().__init__()
        self.fail_after = None
        self.fail_backward = False

    def forward(self, x):
        if self.fail_after is not None:
            # Counted in the class: the copies that functions make count together.
            Moody.forwards += 1
            if Moody.forwards > self.fail_after:
                raise ArithmeticError("moody")
        if self.fail_backward:
            return Trap.apply(super().forward(x))
        return super().forward(x)


class Trap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("moody")


def lived_in():
    """Return a model in mixed modes, partly frozen, with gradients and hooks."""
    model = build(Moody)
    with torch.no_grad():
        model.fc.weight.mul_(100)  # confident predictions
    model(images(2)).sum().backward()
    model.train()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    model.conv2.weight.grad = None
    model.conv2.register_forward_hook(lambda *_: None)
    model.bn2.register_forward_pre_hook(lambda *_: None)
    return model


@functools.cache
def found_once():
    """Return what functions are given beside a model: it holds no tensor of the model itself."""
    model, example = lived_in(), images(2)
    groups = tpvprune.find_groups(model, example)
    normed = tpvprune.find_groups(model, example, ignore=["conv3"])
    kept = {g.name: torch.arange(g.num_channels) > 0 for g in groups}
    small = tpvprune.remove_channels(model, groups, kept)
    return groups, normed, kept, small, tpvprune.variance_curves(model, groups, batches(24, 8))


def calls(model):
    """Return every public function as (its name, a call of it on the model)."""
    example, data = images(2), batches(24, 8)
    labelled = [(x, torch.arange(len(x)) % 3) for x in data]
    groups, normed, kept, small, curves = found_once()
    found = {
        "find_groups": lambda: tpvprune.find_groups(model, example),
        "tpv_scores": lambda: tpvprune.tpv_scores(model, groups, data),
        "tpv_scores plain": lambda: tpvprune.tpv_scores(model, groups, data, compensated=False),
        "variance_curves": lambda: tpvprune.variance_curves(model, groups, data),
        "allocate": lambda: tpvprune.allocate(groups, curves, keep=0.5),
        "select_channels": lambda: tpvprune.select_channels(
            groups, {n: c.order.argsort() for n, c in curves.items()}, keep=0.5
        ),
        "remove_channels": lambda: tpvprune.remove_channels(model, groups, kept),
        "compensate_weights": lambda: tpvprune.compensate_weights(
            small, model, data, groups=groups, kept=kept
        ),
        "recalibrate_batchnorm": lambda: tpvprune.recalibrate_batchnorm(model, data),
        "distill": lambda: tpvprune.distill(model, model, data, epochs=1, ema_decay=0.5),
        "evaluate": lambda: tpvprune.evaluate(model, labelled, dense=model),
        "agreement": lambda: tpvprune.agreement(model, model, data),
        "output_variance": lambda: output_variance(model, model, data),
        "count_macs": lambda: tpvprune.count_macs(model, example),
        "measure_latency": lambda: tpvprune.measure_latency(model, example, repeats=2, warmup=0),
        "prune": lambda: tpvprune.prune(model, data, keep=0.6, repair="auto"),
        "prune_within": lambda: tpvprune.prune_within(model, data, max_loss=50, num_sizes=2),
        "sizes": lambda: [tpvprune.Sizes(model, data).prune(keep) for keep in (0.8, 0.6)],
        "prune in steps": lambda: tpvprune.prune(model, data, steps=2, allocation="rank"),
    }
    for name, scorer in SCORERS.items():
        source = labelled if name in NEEDS_LABELS else data
        mine = normed if name == "bn_scale" else groups
        found[f"scorer {name}"] = partial(scorer, model, mine, source)
    return found


NAMES = list(calls(lived_in()))
DATA_FREE = {
    "allocate", "select_channels", "remove_channels", "scorer magnitude", "scorer magnitude_l1",
    "scorer bn_scale", "scorer fpgm", "scorer random", "scorer lamp", "scorer whc",
}  # fmt: skip
BACKWARD = [
    "tpv_scores", "tpv_scores plain", "variance_curves", "scorer jbr", "scorer taylor",
    "scorer taylor_torch_pruning", "prune", "distill",
]  # fmt: skip


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_functions_leave_model_and_globals_alone(name, grad, untouched):
    model = lived_in()
    call = calls(model)[name]
    with torch.set_grad_enabled(grad), untouched(model):
        call()


@pytest.mark.parametrize(
    ("name", "after"),
    [(n, k) for n in NAMES if n not in DATA_FREE for k in (0, 1) if (n, k) != ("count_macs", 1)],
)
def test_functions_clean_up_after_a_model_that_raises(name, after, untouched):
    model = lived_in()
    call = calls(model)[name]
    model.fail_after, Moody.forwards = after, 0
    with untouched(model), pytest.raises(Exception, match="moody") as caught:
        call()
    assert caught.type in {ArithmeticError, ValueError}


@pytest.mark.parametrize("name", BACKWARD)
def test_functions_clean_up_after_a_backward_that_raises(name, untouched):
    model = lived_in()
    call = calls(model)[name]
    model.fail_backward = True
    with untouched(model), pytest.raises(ArithmeticError, match="moody"):
        call()


def test_inputs_are_not_written_to():
    model = build(Residual)
    data = batches(24, 8)
    before = [x.clone() for x in data]
    tpvprune.prune(model, data, keep=0.5, repair="auto")
    assert all(torch.equal(x, y) for x, y in zip(before, data, strict=True))


def test_pruned_models_share_no_memory_with_the_dense_one():
    model = build(Residual)
    pruned = tpvprune.prune(model, batches(24, 8), keep=0.9).model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for tensor in [*pruned.parameters(), *pruned.buffers()]:
            tensor.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert isinstance(pruned, nn.Module)


def test_the_api_reference_finds_every_name():
    doc = pytest.importorskip("pdoc.doc", reason="needs pdoc: pip install 'tpvprune[dev]'")
    for name in tpvprune.__all__:
        getattr(tpvprune, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(doc.Module(tpvprune).members) == set(tpvprune.__all__)
