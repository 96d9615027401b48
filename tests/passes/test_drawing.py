"""The images that pruning sees are a random part of any loader, whatever its order and batches."""

import gc
import weakref

import pytest
import torch
from cases import Poison, build, images
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

import tpvprune
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.drawing import drawn_indices, hold_back
from tpvprune.processes import shares as distributed


def numbered(num):
    """Return images [num, 1, 2] that hold their own numbers."""
    return torch.arange(num, dtype=torch.float64)[:, None, None].expand(num, 1, 2).contiguous()


def numbers(batches):
    return [int(x) for batch in batches for x in batch[:, 0, 0]]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    num_images=st.none() | st.integers(2, 40),
    seed=st.integers(0, 5),
)
def test_the_draw_depends_on_the_seed_alone(sizes, num_images, seed):
    num = sum(sizes)
    if num < 2:
        return
    whole = numbered(num)
    fit, held = hold_back(whole.split(sizes), num_images=num_images, seed=seed)
    drawn = min(num, num_images or num)
    assert (numbers(fit), numbers(held)) == drawn_indices(num, num_images=num_images, seed=seed)
    assert len({*numbers(fit), *numbers(held)}) == drawn
    assert len(numbers(held)) == min(128, max(1, drawn // 10))
    assert {len(x) for x in fit[:-1]} <= {sizes[0]}
    assert len(fit[-1]) <= sizes[0]


def test_every_image_is_as_likely_as_another_to_be_drawn_and_to_be_held_back():
    drawn, back = torch.zeros(20), torch.zeros(20)
    for seed in range(600):
        fit, held = drawn_indices(20, num_images=10, seed=seed)
        drawn[fit + held] += 1
        back[held] += 1
    # Binomial: 300 and 30 expected; six standard deviations of sqrt(150) and sqrt(28).
    assert float((drawn - 300).abs().max()) < 6 * 12.3
    assert float((back - 30).abs().max()) < 6 * 5.4


def test_the_held_back_part_of_a_sorted_loader_has_all_classes():
    labels = torch.arange(10).repeat_interleave(100)
    _, held = hold_back(numbered(1000).split(50), num_images=1000)
    assert set(labels[numbers(held)].tolist()) == set(range(10))


# ---- memory, and what is loaded -------------------------------------------------------------


class Alive:
    """Batches that count how many of their images are alive at once."""

    def __init__(self, num, size):
        self.num, self.size, self.most = num, size, 0
        self.living = weakref.WeakSet()

    def __iter__(self):
        for start in range(0, self.num, self.size):
            batch = torch.full((self.size, 1, 2), float(start))
            self.living.add(batch.untyped_storage())
            yield batch, Poison()
            del batch
            if start % 100 == 0:  # slow, and what is in use needs none
                gc.collect()
            self.most = max(self.most, len(self.living))


def test_a_stream_is_never_held_whole():
    source = Alive(400, 4)
    fit, held = hold_back(source, num_images=20)
    assert len(numbers(fit) + numbers(held)) == 20
    assert source.most <= 3  # the batch, and the ones on their way; not the hundred


class Counting(Dataset):
    """A map-style dataset that counts what is read."""

    def __init__(self, num):
        self.num, self.read = num, []

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        self.read.append(i)
        return torch.full((1, 2), float(i)), i % 10


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(70):
            yield torch.full((1, 2), float(i))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("wrap", [lambda x: x, unlabeled, distributed.shard])
def test_of_a_large_dataset_only_what_is_drawn_is_loaded(wrap, shuffle):
    dataset = Counting(1_000_000)
    loader = wrap(DataLoader(dataset, batch_size=16, shuffle=shuffle))
    fit, held = hold_back(loader, num_images=50, seed=3)
    assert sorted(dataset.read) == sorted(numbers(fit) + numbers(held))
    assert len(set(dataset.read)) == 50
    assert [len(x) for x in fit] == [16, 16, 13]
    again, other = (numbers(hold_back(loader, num_images=50, seed=s)[0]) for s in (3, 4))
    assert numbers(fit) == again != other


def test_a_loader_that_leaves_images_out_is_obeyed():
    dataset, allowed = Counting(1000), list(range(100, 300))
    loader = DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(allowed))
    fit, held = hold_back(loader, num_images=40)
    assert set(numbers(fit + held)) <= set(allowed)
    assert len(dataset.read) == 40


def test_the_collate_function_of_the_loader_is_used():
    def collate(samples):
        return torch.stack([x for x, _ in samples]) + 0.5, [Poison() for _ in samples]

    loader = DataLoader(Counting(500), batch_size=8, collate_fn=collate)
    fit, _ = hold_back(loader, num_images=20)
    assert all(float(x[0, 0, 0]) % 1 == 0.5 for x in fit)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=7),
        DataLoader(TensorDataset(numbered(70)), batch_size=7),
        DataLoader(TensorDataset(numbered(70).reshape(10, 7, 1, 2)), batch_size=None),
        list(numbered(70).split(7)),
    ],
)
def test_every_kind_of_loader(loader):
    fit, held = hold_back(loader, num_images=30)
    assert len(set(numbers(fit + held))) == 30
    assert {len(x) for x in fit[:-1]} == {7}
    fit, held = hold_back(loader, num_images=70)
    assert sorted(numbers(fit + held)) == list(range(70))


def test_images_of_several_sizes_are_not_mixed():
    sizes = [torch.full((2, 3, 8 + i % 2, 8), float(i)) for i in range(10)]
    fit, held = hold_back(sizes)
    assert sum(map(len, fit + held)) == 20
    assert all(x.ndim == 4 for x in fit + held)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="num_images: expected at least 2, found 1"):
        tpvprune.prune(build("chain"), [images(8)], num_images=1)


# ---- through the whole flow -----------------------------------------------------------------


def by_class(num=120):
    """Return images in the order of their classes, which are far apart."""
    x = images(num)
    labels = torch.arange(num) * 4 // num
    return x + 2.0 * (labels[:, None, None, None] - 1.5), labels


def test_order_does_not_matter():
    model = build("residual")
    x, labels = by_class()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    sorted_one, shuffled = list(x.split(10)), list(x[order].split(10))
    # The true agreement is that over all images; on 12 held-back ones it is off by chance alone.
    for source in (sorted_one, shuffled):
        found = [tpvprune.prune(model, source, keep=0.3, seed=s) for s in range(4)]
        held = [hold_back(source, seed=s)[1] for s in range(4)]
        gaps = [
            tpvprune.agreement(r.model, model, h) - tpvprune.agreement(r.model, model, [x])
            for r, h in zip(found, held, strict=True)
        ]
        assert abs(sum(gaps)) / 4 <= 3 * 0.5 / (4 * 12) ** 0.5
        assert {r.report["num_images"] + r.report["num_held_back"] for r in found} == {120}
    _, held = hold_back(sorted_one)
    places = drawn_indices(120)[1]
    assert len(set(labels[places].tolist())) >= 3
    assert torch.equal(torch.cat(held), x[places])


def test_prune_sees_as_many_images_as_it_is_told():
    model = build("chain")
    result = tpvprune.prune(model, list(images(64).split(8)), keep=0.6, num_images=30)
    assert (result.report["num_images"], result.report["num_held_back"]) == (27, 3)
