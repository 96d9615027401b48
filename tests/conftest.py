"""Fixtures shared by all tests: seed, threads, and a check that nothing was touched."""

import contextlib
import gc

import pytest
import torch

from tpvprune.cli.entry import main

torch.set_num_threads(min(2, torch.get_num_threads()))  # fewer where the caller asks for fewer


def pytest_collection_finish():
    """What was imported is no garbage: a collection, a list of objects and a fork pass it over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def untouched():
    """Return a context manager that fails if its body changed a model or a global setting."""
    return _untouched


@pytest.fixture
def run(root, capsys, monkeypatch):
    """Run one command in the module's folder `root`; return exit code, stdout and stderr."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv):
        capsys.readouterr()  # what `root` printed, or an earlier step of the test
        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run


@contextlib.contextmanager
def _untouched(*models):
    before = [_snapshot(model) for model in models]
    rng, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    try:
        yield
    finally:
        after = [_snapshot(model) for model in models]
    for old, new in zip(before, after, strict=True):
        for key in old:
            assert _equal(old[key], new[key]), f"{key} changed"
    assert torch.equal(rng, torch.get_rng_state()), "the global random state changed"
    assert grad_mode == torch.is_grad_enabled(), "the grad mode changed"


def _snapshot(model):
    hook_tables = [name for name in vars(model) if name.endswith("_hooks")]
    modules = list(model.modules())
    return {
        "state_dict": {k: v.clone() for k, v in model.state_dict().items()},
        "identity of the parameters": [id(p) for p in model.parameters()],
        "training flags": [m.training for m in modules],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        ".grad": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "hooks": [len(vars(m)[table]) for m in modules for table in hook_tables],
        "attributes": [
            {k: v for k, v in vars(m).items() if isinstance(v, int | float | str | tuple)}
            for m in modules
        ],
    }


def _equal(a, b):
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b
