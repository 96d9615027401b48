"""When arguments are read for the last time, against overwriting them one contraction earlier."""

import gc

import pytest
import torch
from cases import NUM_CLASSES, batches, images
from torch import nn
from torch.nn import functional as F

from tpvprune import compensate_weights, find_groups, remove_channels
from tpvprune.passes.operations import CONTRACTIONS, function_name
from tpvprune.repairs import compensation, refits
from tpvprune.repairs.last_reads import last_reads

STEM = 7  # channels that no other activation has


def block(width=5, inner=4):
    return nn.Sequential(nn.Conv2d(width, inner, 1), nn.ReLU(), nn.Conv2d(inner, width, 1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = block()

    def forward(self, x):
        return x + self.inner(x)


class Chain(nn.Module):
    """A wide stem, whose output nothing reads behind the first layer of the body."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(STEM, 5, 1), *(Residual() for _ in range(3)))
        self.head = nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = self.body(x)
        return self.head(x.mean((2, 3)))


class ReadLate(Chain):
    """The head reads the output of the stem again."""

    def forward(self, x):
        y = self.stem(x)
        return self.head(self.body(y).mean((2, 3))) + y.mean()


class Aliased(Chain):
    """Half of the stem's output is read late, through another tensor of the same memory."""

    def forward(self, x):
        y = self.stem(x)
        late = y[:, :2]
        return self.head(self.body(y).mean((2, 3))) + late.mean()


class Returned(Chain):
    """The stem's output is an output of the network."""

    def forward(self, x):
        y = self.stem(x)
        return self.head(self.body(y).mean((2, 3))), y


class Kept(Chain):
    """The stem's output outlives the forward."""

    def forward(self, x):
        self.seen = self.stem(x)
        return self.head(self.body(self.seen).mean((2, 3)))


class Twice(Chain):
    def forward(self, x):
        y = self.stem(x)
        return self.head((self.body(y) + self.body(2 * y)).mean((2, 3)))


class Spoil(torch.overrides.TorchFunctionMode):
    """Overwrites what a module was called with when contraction ``when`` is about to run."""

    def __init__(self, when):
        super().__init__()
        self.call, self.when, self.argument = -1, when, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.call += function_name(func) in CONTRACTIONS
        if self.call == self.when and self.argument is not None:
            self.argument.fill_(torch.nan)
            self.argument = None
        return func(*args, **(kwargs or {}))


def spoiled(model, name, x, when):
    mode = Spoil(when)

    def note(module, args):
        mode.argument = args[0]

    handle = model.get_submodule(name).register_forward_pre_hook(note)
    with torch.no_grad(), mode:
        out = model(x.clone())
    handle.remove()
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("cls", [Chain, ReadLate, Aliased])
def test_the_last_read_is_the_last(cls):
    """Overwritten behind it nothing changes, and before it something does."""
    torch.manual_seed(0)
    model, x = cls().double().eval(), images(2)
    names = [n for n, m in model.named_modules() if list(m.children())]
    found = last_reads(model, names, x)
    assert set(found) == set(names)
    whole = model(x)
    for name, last in found.items():
        assert torch.equal(spoiled(model, name, x, last + 1), whole)
        assert spoiled(model, name, x, last).isnan().any()


@pytest.mark.parametrize("cls", [Returned, Kept, Twice])
def test_what_outlives_the_forward_or_runs_twice_is_left_out(cls):
    torch.manual_seed(0)
    found = last_reads(cls().double().eval(), ["", "body"], images(2))
    assert set(found) == {""}


def test_an_unseen_read_leaves_all_out():
    """What reads behind the back of every function shows in the second run."""

    class Hidden(Chain):
        def forward(self, x):
            y = self.stem(x)
            unseen = y.detach().numpy()
            return self.head(self.body(y).mean((2, 3))) + float(unseen.mean())

    torch.manual_seed(0)
    assert last_reads(Hidden().double().eval(), ["", "body"], images(2)) == {}


@pytest.mark.parametrize(("cls", "held"), [(Chain, 0), (ReadLate, 1)])
def test_a_waiting_network_holds_what_is_read_again_only(cls, held, monkeypatch):
    torch.manual_seed(0)
    model, data = cls().double().eval(), batches(4, 2)
    groups = find_groups(model, data[0])
    kept = {g.name: torch.arange(g.num_channels) > 0 for g in groups}
    pruned = remove_channels(model, groups, kept)
    stems = pruned.stem.out_channels
    counts = []
    solve = refits.Refits.solve

    def alive():
        return [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]

    others = alive()  # of other tests; held, so that nothing else gets their places
    known = set(map(id, others))

    def counted(self, call):
        size = (stems, *data[0].shape[2:])
        counts.append(
            sum(
                id(o) not in known and o.shape[1:] == size and o.untyped_storage().nbytes() > 0
                for o in alive()
            )
        )
        solve(self, call)

    monkeypatch.setattr(refits.Refits, "solve", counted)
    monkeypatch.setattr(compensation, "chunk_size", lambda *_: 2)
    compensate_weights(pruned, model, data, groups=groups, kept=kept, max_bytes=1 << 30)
    assert counts[0] >= len(data) and counts[-2] == held * len(data)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(STEM, 5, 1)
        self.table = nn.Parameter(torch.randn(8, 8))
        self.blocks = nn.ModuleList([block()])

    def forward(self, x):
        y = self.first(x)
        return self.blocks[0](y + F.linear(self.table, self.table).expand(y.shape))


class ReadAtTheSum(Chain):
    """A layer that waits for a sum is run again there, behind the last read of its input."""

    def __init__(self):
        super().__init__()
        self.body = Sum()


def test_what_is_run_again_at_a_sum_is_not_forgotten():
    torch.manual_seed(0)
    model, data = ReadAtTheSum().double().eval(), batches(8, 2)
    groups = find_groups(model, data[0])
    kept = {g.name: torch.arange(g.num_channels) > 0 for g in groups}
    pruned = remove_channels(model, groups, kept)
    options = {"groups": groups, "kept": kept}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensation, "chunk_size", lambda *_: 2)
        some = compensate_weights(pruned, model, data, **options, max_bytes=1 << 30)
    whole = compensate_weights(pruned, model, data, **options, max_bytes=1 << 30)
    for a, b in zip(some.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


class FromNumpy(Chain):
    """What the body is called with is memory of numpy's, which torch cannot free."""

    def forward(self, x):
        y = torch.from_numpy(self.stem(x).detach().numpy().copy())
        return self.head(self.body(y).mean((2, 3)))


def test_memory_of_others_is_left_to_them():
    torch.manual_seed(0)
    model, data = FromNumpy().double().eval(), batches(8, 2)
    given = {"ridge": 1e-2, "rows_per_input": 2, "min_rows": 8, "seed": 0}
    assert "body" in last_reads(model, ["body"], data[0])
    compensation.refitted(model, model, data, groups=None, kept={}, **given)


class Sparse(Chain):
    """A sparse matrix is multiplied with, and handed to a module."""

    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([block()])

        def forward(self, x, matrix):
            mixed = torch.sparse.mm(matrix, x.transpose(0, 1).flatten(1)).reshape(5, -1, 8, 8)
            return self.blocks[0](mixed.transpose(0, 1))

    def __init__(self):
        super().__init__()
        self.body = self.Times()
        self.register_buffer("matrix", torch.randn(5, STEM).to_sparse())

    def forward(self, x):
        return self.head(self.body(self.stem(x), self.matrix).mean((2, 3)))


def test_a_network_with_a_sparse_matrix_is_refitted():
    torch.manual_seed(0)
    model, data = Sparse().double().eval(), batches(8, 2)
    given = {"ridge": 1e-2, "rows_per_input": 2, "min_rows": 8, "seed": 0}
    fitted = compensation.refitted(model, model, data, groups=None, kept={}, **given)
    with torch.no_grad():
        torch.testing.assert_close(fitted(data[0]), model(data[0]))


class InList(Chain):
    """A block that is run again takes a list, of what its caller was called with."""

    class Body(nn.Module):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.small = nn.Sequential(nn.Conv2d(STEM, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
                self.large = nn.Conv2d(4, 5, 1)

            def forward(self, xs):
                return self.large(F.interpolate(self.small(xs[0]), scale_factor=4))

        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(self.Block())

        def forward(self, x):
            return self.blocks([x])

    def __init__(self):
        super().__init__()
        self.body = self.Body()


@pytest.mark.parametrize("room", [1, 1 << 14, 1 << 30])  # a large layer is run again, or not
def test_what_a_block_is_run_again_from_stays_in_lists_too(room):
    torch.manual_seed(0)
    model, data = InList().double().eval(), batches(8, 2)
    given = {"ridge": 1e-2, "rows_per_input": 2, "min_rows": 8, "seed": 0}
    fitted = compensation.refitted(
        model, model, data, groups=None, kept={}, max_bytes=room * 8, **given
    )
    with torch.no_grad():
        torch.testing.assert_close(fitted(data[0]), model(data[0]))
