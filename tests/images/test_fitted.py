"""What is known of the images that a model was fitted to, against the images themselves."""

import itertools
import json
import random
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from image_cases import as_tar, write_classes, write_images

from tpvprune.images.fitted import Fit, Fits, fitted_facts, said_of_seen
from tpvprune.images.loading import choose_images, chosen_items, permutation
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import ImageSource, array_images, listed_images, open_images
from tpvprune.images.training import training_images
from tpvprune.passes.batches import private_randomness
from tpvprune.passes.drawing import drawn_indices, hold_back


@pytest.fixture(scope="module")
def prepared():
    model = timm.create_model("test_resnet", num_classes=10)
    return resolve_preprocessing(model, input_size=(3, 16, 16), crop_pct=1.0)


def stream(num=10**6):
    """Images that are their own places, in one order."""
    return ImageSource("wds/many", None, lambda: iter(range(num)), None, str, None, label="many")


def rows(x):
    return {row.numpy().tobytes() for row in x}


def test_what_no_fit_has_seen_is_neither_drawn_nor_trained_on(tmp_path, prepared):
    source = open_images(write_images(tmp_path, 30, size=16))
    for num, seed in itertools.product((12, 27, 30), range(3)):
        drawn = list(choose_images(source, prepared, num_images=num, seed=seed))
        fit, held = hold_back(drawn, seed=seed)
        order = permutation(30, seed)
        apart = [order[i] for i in drawn_indices(num, seed=seed)[1]]
        fits = Fits(source, [Fit.to(source, seed=seed, num=num, apart=apart)])
        places = fits.unseen(30, seed=seed)
        left = torch.cat(list(choose_images(source, prepared, num_images=None, places=places)))
        assert len(left) == 30 - num + len(torch.cat(held))
        assert not rows(left) & rows(torch.cat(fit))
        assert fits.unseen(2, seed=seed) == places[-2:]
        batches, _ = training_images(source, prepared, apart=places, batch_size=1, seed=seed + 1)
        batches.augment = None
        trained = torch.cat(list(private_randomness(batches, seed=0)))
        assert len(trained) == 30 - len(places)
        near = torch.cdist(trained.flatten(1), left.flatten(1))
        assert near.min() > 0.1  # rounding to bytes moves an image by less


@pytest.mark.parametrize("num", [None, 1, 9, 24])
@pytest.mark.parametrize("kind", ["set", "stream"])
def test_a_training_has_seen_what_is_chosen_beside_its_images_held_back(tmp_path, num, kind):
    source = open_images(write_images(tmp_path, 30)) if kind == "set" else stream(30)
    for seed in range(3):
        held = random.Random(seed).sample(range(30), 6)
        fit = Fit.beside(source, held, seed=seed, num=num)
        wanted = 24 if num is None else num
        chosen = list(chosen_items(source, num_images=wanted, seed=seed, apart=held)[0]())
        assert fit.seen(range(30)) == set(chosen)
        assert len(chosen) == wanted


def test_fits_side_by_side_against_a_count_of_every_image(tmp_path):
    source = open_images(write_images(tmp_path, 20))
    for seed in range(20):
        draw = random.Random(seed)
        report, seen = {}, []
        for number in range(draw.randint(1, 3)):
            held = draw.sample(range(20), draw.choice([0, 2, 5]))
            num = draw.choice([3, 12, 20])
            fit = Fit.to(source, seed=number, num=num, apart=held)
            seen.append({p for p in permutation(20, number)[:num] if p not in held})
            report = json.loads(json.dumps({"images": {"fitted": fitted_facts([fit], report)}}))
        fits = Fits.of_report(report, source)
        assert len(fits.fits) == len(seen)
        times = {place: sum(place in part for part in seen) for place in range(20)}
        some = draw.sample(range(20), 7)
        assert fits.num_seen(some) == sum(times[place] > 0 for place in some)
        unseen = {place for place in range(20) if not times[place]}
        assert set(fits.unseen(20, seed=9)) == unseen
        least = fits.least_seen(4, seed=9)
        if unseen:
            assert least == fits.unseen(4, seed=9)
            assert len(least) == min(4, len(unseen))
        else:
            assert sorted(times[p] for p in least) == sorted(times.values())[:4]
        assert not set(fits.unseen(3, seed=9)) - unseen


def test_of_a_stream_the_next_images_are_unseen():
    source = stream()
    assert Fits(source, []).unseen(4, seed=0) == [3, 2, 1, 0]
    cut = Fit.to(source, seed=0, num=12, apart=[0, 1, 7])
    assert sorted(Fits(source, [cut]).unseen(5, seed=0)) == [0, 1, 7, 12, 13]
    assert Fits(source, [cut]).num_seen(range(20)) == 9
    held = Fits(source, [cut]).unseen(5, seed=0)
    trained = Fit.beside(source, held, seed=0, num=30)
    both = Fits(source, [cut, trained])
    assert sorted(both.unseen(6, seed=0)) == [0, 1, 7, 12, 13, 35]
    whole = Fits(source, [cut, Fit.beside(source, [7, 15], seed=0, num=None)])
    assert sorted(whole.unseen(9, seed=0)) == [7, 15]
    nothing = Fits(source, [cut, Fit.beside(source, [], seed=0, num=None)])
    assert nothing.unseen(9, seed=0) == []
    assert len(nothing.least_seen(4, seed=0)) == 4
    found = Fits.of_report({"images": {"fitted": fitted_facts(both.fits, {})}}, source)
    assert list(found.fits) == list(both.fits)


def test_items_of_a_stream_by_their_places(prepared):
    few = stream(20)
    items = choose_images(few, prepared, num_images=None, places=[11, 3, 19]).items()
    assert list(items) == [3, 11, 19]
    rest, _ = chosen_items(few, num_images=5, apart=[0, 3])
    assert list(rest()) == [1, 2, 4, 5, 6]
    beyond = choose_images(few, prepared, num_images=None, places=[25, 24])
    with pytest.raises(ValueError, match=r"beyond the first 24.* found 20 in all: pass other"):
        list(beyond.items())


# ---- which set it is ----------------------------------------------------------------------------


def test_a_set_is_the_same_wherever_it_lies_and_however_it_is_named(tmp_path, monkeypatch):
    for place in ("a", "b"):
        write_images(tmp_path / place / "photos", 9)
    one, other = (open_images(tmp_path / place / "photos") for place in ("a", "b"))
    assert one.digest == other.digest
    monkeypatch.chdir(tmp_path / "a" / "photos")
    assert open_images(".").digest == one.digest
    files = sorted(f.name for f in (tmp_path / "a" / "photos").iterdir())
    for name in ("first.txt", "second.txt"):
        (tmp_path / name).write_text("\n".join(files))
    first, second = (
        listed_images(tmp_path / name, root=tmp_path / place / "photos")
        for name, place in (("first.txt", "a"), ("second.txt", "b"))
    )
    assert first.digest == second.digest != one.digest


def test_sets_that_call_their_images_alike_are_told_apart(tmp_path):
    for name in ("train", "val"):
        write_classes(tmp_path / name, ["cat", "dog"], 5)
    sets = [open_images(tmp_path / name) for name in ("train", "val")]
    sets += [open_images(tmp_path, split="train")]
    assert sets[0].digest == sets[2].digest != sets[1].digest
    (tmp_path / "val" / "cat" / "0000.png").rename(tmp_path / "val" / "cat" / "0009.png")
    assert open_images(tmp_path / "val").digest != sets[1].digest
    for name in ("one", "two"):
        np.save(tmp_path / f"{name}.npy", np.zeros((4, 8, 8, 3), np.uint8))
    assert len({array_images(tmp_path / f"{name}.npy").digest for name in ("one", "two")}) == 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_splits_of_a_dataset_by_name_are_two_sets(tmp_path, monkeypatch, split):
    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 5

    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Dataset())
    found = open_images(tmp_path, dataset="torch/mnist", split=split)
    assert (found.digest == open_images(tmp_path, dataset="torch/mnist").digest) == (
        split == "train"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"num": None}, {"num": "9"}, {"num": 31}, {"num": -1}, {"count": 29}, {"count": "30"},
        {"count": None}, {"seed": True}, {"seed": -1}, {"seed": 2**64}, {"source": None},
        {"digest": "other"}, {"digest": None}, {"apart": None}, {"apart": ["1"]}, {"apart": [True]},
    ],
)  # fmt: skip
def test_of_another_set_nothing_is_known(tmp_path, wrong):
    source = open_images(write_images(tmp_path / "images", 30, size=16))
    fit = Fit.to(source, seed=1, num=9, apart=[3])
    entry = json.loads(json.dumps(fitted_facts([fit], {})[0]))
    assert set(entry) == set(asdict(fit))
    report = {"images": {"fitted": [{**entry, **wrong}, entry]}}
    assert list(Fits.of_report(report, source).fits) == [fit]
    report["images"]["fitted"].pop()
    assert not Fits.of_report(report, source).fits


@pytest.mark.parametrize("report", [{}, {"images": None}, {"images": {"fitted": {"num": 9}}}])
def test_a_report_may_say_nothing_of_sets(tmp_path, report):
    source = open_images(write_images(tmp_path / "images", 30, size=16))
    assert not Fits.of_report(report, source).fits
    assert fitted_facts([], report) == []
    assert said_of_seen(report, source, range(30), "of them") == ""


def test_sets_of_earlier_fits_are_remembered_each_once(tmp_path):
    first, second = (
        open_images(write_images(tmp_path / name, num, size=16))
        for name, num in {"first": 30, "second": 12}.items()
    )
    report = {}
    for source, num in [(first, 9), (second, 5), (first, 20), (first, 9)]:
        fits = [Fit.to(source, seed=1, num=num)]
        report = {"images": {"fitted": fitted_facts(fits, report)}}
    assert len(report["images"]["fitted"]) == 3
    assert Fits.of_report(report, first).num_seen(range(30)) == 20
    assert len(Fits.of_report(report, second).unseen(12, seed=1)) == 7
    assert fitted_facts([], report) == report["images"]["fitted"]


def test_of_a_set_that_may_be_the_same_that_is_said(tmp_path):
    source = open_images(write_images(tmp_path / "photos", 9))
    report = {"images": {"source": "some/photos", "num_images": 5, "fitted": []}}
    assert "pruned with 5 images of a set of that name" in said_of_seen(report, source, [0], "")
    (tmp_path / "list.txt").write_text("0000.png\n")
    listed = listed_images(tmp_path / "list.txt", root=tmp_path / "photos")
    assert said_of_seen(report, listed, [0], "")
    report["images"]["source"] = "others"
    assert not said_of_seen(report, source, [0], "")


# ---- images that are there twice ----------------------------------------------------------------


def test_files_are_the_same_by_whatever_way(tmp_path):
    photos = write_classes(tmp_path / "photos", ["a", "b"], 3)
    (tmp_path / "link").symlink_to(photos)
    whole = open_images(photos)
    assert len(whole.files()) == 6
    assert open_images(tmp_path / "link").files() == whole.files()
    assert len(open_images(photos / "b").files() & whole.files()) == 3
    (tmp_path / "list.txt").write_text("photos/a/0001.png\nlink/b/0002.png\n")
    assert len(listed_images(tmp_path / "list.txt").files() & whole.files()) == 2
    assert not write_and_open(tmp_path / "other").files() & whole.files()
    tar = as_tar(photos, tmp_path / "photos.tar")
    (tmp_path / "same.tar").symlink_to(tar)
    assert len(open_images(tar).files() & open_images(tmp_path / "same.tar").files()) == 6
    assert not stream().files()


def write_and_open(folder):
    return open_images(write_images(folder, 3))


def test_a_list_reads_every_image_once(tmp_path):
    write_images(tmp_path / "photos", 3)
    (tmp_path / "again").symlink_to(tmp_path / "photos")
    names = ["photos/0001.png", "photos/0000.png", "photos/../photos/0001.png", "again/0000.png"]
    path = tmp_path / "list.txt"
    path.write_text("\ufeff" + "\n".join([*names, "photos/0002.png"]), encoding="utf-8")
    source = listed_images(path)
    assert source.count == 3
    assert [source.where(i) for i in range(3)] == [
        str(tmp_path / "photos" / f"000{i}.png") for i in (1, 0, 2)
    ]
    assert "names 2 images again" in source.note
    path.write_text("photos/0001.png")
    assert listed_images(path).note == ""
