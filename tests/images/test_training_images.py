"""Augmentation against slow loops; images for training are decoded, chosen and labelled right."""

import itertools
import math

import pytest
import timm
import torch
from image_cases import spoil, write_classes, write_images
from PIL import Image

from tpvprune.images import training as module
from tpvprune.images.augmentation import HeldImages, crop_and_flip, mix
from tpvprune.images.loading import ImageBatches, choose_images
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.images.training import random_box, training_images
from tpvprune.passes.batches import private_randomness

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def pixels(num, size=5, channels=3):
    # From 1: what is 0 came in at the border.
    return torch.randint(1, 256, (num, channels, size, size), dtype=torch.uint8)


# ---- on tensors -----------------------------------------------------------------------------


def shifted(image, down, right, *, mirror):
    """Shift and mirror one image [C, H, W] pixel by pixel."""
    height, width = image.shape[1:]
    out = torch.zeros_like(image)
    for i, j in itertools.product(range(height), range(width)):
        y, x = i + down, (width - 1 - j if mirror else j) + right
        if 0 <= y < height and 0 <= x < width:
            out[:, i, j] = image[:, y, x]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_every_crop_is_a_shifted_and_perhaps_mirrored_image_and_all_occur(dtype):
    image = pixels(1, 4).to(dtype)
    possible = {
        tuple(shifted(image[0], down, right, mirror=mirror).flatten().tolist())
        for down, right in itertools.product((-1, 0, 1), repeat=2)
        for mirror in (False, True)
    }
    found = crop_and_flip(image.expand(600, -1, -1, -1), padding=1)
    assert found.dtype == dtype
    assert {tuple(x.flatten().tolist()) for x in found} == possible
    assert len(possible) == 18


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_mixtures_lie_between_two_images_and_of_pasted_ones_every_pixel_is_of_one(dtype):
    kinds = set()
    for seed in range(20):
        torch.manual_seed(seed)
        images = pixels(6).to(dtype)
        before, mixed = images.clone(), mix(images)
        assert torch.equal(images, before)
        assert mixed.dtype == dtype
        for image, result in zip(images, mixed, strict=True):
            others = [o for o in images if lies_between(result, image, o)]
            assert others
            pasted = any(bool(((result == image) | (result == o)).all()) for o in others)
            kinds.add("pasted" if pasted else "blended")
    assert kinds == {"pasted", "blended"}


def lies_between(x, a, b):
    return bool(((x >= torch.minimum(a, b)) & (x <= torch.maximum(a, b))).all())


def test_crops_keep_each_image_in_its_place():
    images = torch.arange(1, 7, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 9, 7)
    found = crop_and_flip(images)
    assert found.shape == images.shape
    assert found.flatten(1).max(1).values.tolist() == [1, 2, 3, 4, 5, 6]


def test_held_images_are_normalised_and_each_is_seen_once():
    images, labels = pixels(12), torch.arange(12)
    held = HeldImages(images, mean=MEAN, std=STD, batch_size=4, augment=None, labels=labels)
    seen = []
    for inputs, targets in held:
        for x, y in zip(inputs, targets, strict=True):
            expected = (images[y].double() / 255 - torch.tensor(MEAN)[:, None, None]) / (
                torch.tensor(STD)[:, None, None]
            )
            assert torch.allclose(x.double(), expected, atol=1e-6)
        seen += targets.tolist()
    assert sorted(seen) == list(range(12))
    assert seen != list(range(12))
    assert len(held) == 3


@pytest.mark.parametrize(
    ("num", "batch_size", "sizes"), [(11, 4, [4, 4]), (3, 8, [3]), (1, 1, [1])]
)
def test_a_last_batch_that_is_not_full_is_left_out(num, batch_size, sizes):
    held = HeldImages(pixels(num), mean=MEAN, std=STD, batch_size=batch_size)
    assert [len(x) for x in held] == sizes
    assert len(held) == len(sizes)


@pytest.mark.parametrize(
    ("images", "batch_size", "message"),
    [
        (torch.rand(2, 3, 4, 4), 1, "expected uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), 1, "expected uint8"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), 1, "expected uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 0, "batch_size: expected at least 1"),
    ],
)
def test_held_images_of_another_kind_are_refused(images, batch_size, message):
    with pytest.raises(ValueError, match=message):
        HeldImages(images, mean=MEAN, std=STD, batch_size=batch_size)


# ---- random parts ---------------------------------------------------------------------------


def test_random_parts_lie_within_and_have_the_promised_area_and_shape():
    numbers = torch.rand(400, 5, dtype=torch.float64).tolist()
    areas, shapes = [], []
    for drawn in numbers:
        left, top, right, bottom = random_box(60, 60, drawn)
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 60
        areas.append((right - left) * (bottom - top) / 3600)
        shapes.append((right - left) / (bottom - top))
    assert min(areas) == pytest.approx(0.35, abs=0.02)
    assert max(areas) > 0.9
    assert 0.75 <= min(shapes) < 0.8
    assert 1.25 < max(shapes) <= 4 / 3 + 1e-9


def test_a_narrow_image_still_has_a_part():
    left, top, right, bottom = random_box(4, 100, [1.0, 1.0, 0.5, 0.5])
    assert (left, right) == (0, 4)
    assert bottom - top == pytest.approx(math.sqrt(400 * 0.75))


# ---- from files -----------------------------------------------------------------------------


def preprocessing(size):
    model = timm.create_model("test_resnet", num_classes=2)
    return resolve_preprocessing(
        model, input_size=(3, size, size), crop_pct=1.0, mean=MEAN, std=STD
    )


def one_pass(batches, seed=0):
    return list(private_randomness(batches, seed=seed))


def test_small_images_are_held_as_the_evaluation_sees_them(tmp_path):
    source = open_images(write_images(tmp_path, 9, size=20))
    prepared = preprocessing(16)
    held, left = training_images(source, prepared, apart=[1, 4, 8], batch_size=2)
    assert left is None
    held.augment = None
    places = [0, 2, 3, 5, 6, 7]
    chosen = choose_images(source, prepared, num_images=None, places=places)
    expected = {tuple(x.flatten().tolist()) for x in torch.cat(list(chosen)).mul(1e3).round()}
    found = {tuple(x.flatten().tolist()) for x in torch.cat(one_pass(held)).mul(1e3).round()}
    assert len(found & expected) == 6  # the same but for rounding of bytes


def test_small_images_that_do_not_fit_are_decoded_on_every_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_BYTES", 1000)
    source = open_images(write_images(tmp_path, 9, size=20))
    batches, augment = training_images(source, preprocessing(16), batch_size=4)
    assert augment is crop_and_flip
    assert isinstance(batches, ImageBatches)
    first, again, other = (torch.cat(one_pass(batches, seed)) for seed in (0, 0, 1))
    assert len(batches) == 2
    assert first.shape == (8, 3, 16, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_large_images_are_cropped_alike_for_any_number_of_threads(tmp_path):
    source = open_images(write_images(tmp_path, 10, size=90))
    few, many = (
        training_images(source, preprocessing(80), batch_size=4, workers=workers)[0]
        for workers in (1, 8)
    )
    first, again, other = (
        torch.cat(one_pass(b, seed)) for b, seed in ((few, 0), (many, 0), (many, 1))
    )
    assert first.shape == (8, 3, 80, 80)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_part_of_a_large_image_is_that_part(tmp_path):
    # A ramp from left to right: its level tells where a pixel came from.
    ramp = Image.linear_gradient("L").rotate(90).resize((100, 70)).convert("P")
    for i in range(6):
        ramp.save(tmp_path / f"{i}.png")
    batches, _ = training_images(open_images(tmp_path), preprocessing(80), batch_size=6)
    [inputs] = one_pass(batches)
    levels = (inputs * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])[:, 0]
    steps = levels.diff(dim=2).mean((1, 2)) * 80
    # Between about half of the width and all of it, mirrored or not.
    assert all(0.4 < abs(step) < 1.05 for step in steps.tolist())
    assert {bool(step > 0) for step in steps.tolist()} == {True, False}
    assert steps.abs().min() < 0.85


def test_indexed_images_are_interpolated(tmp_path):
    # Stripes of one pixel become grey, where picking pixels would leave black and white.
    stripes = Image.new("L", (400, 400))
    stripes.putdata([255 * (x % 2) for _ in range(400) for x in range(400)])
    for i in range(3):
        stripes.convert("P").save(tmp_path / f"{i}.png")
    batches, _ = training_images(open_images(tmp_path), preprocessing(80), batch_size=3)
    [inputs] = one_pass(batches)
    levels = inputs[:, 0] * STD[0] + MEAN[0]
    assert ((levels - 0.5).abs() < 0.3).float().mean() > 0.9


@pytest.mark.parametrize("size", [16, 80])
def test_labels_stay_with_their_images(tmp_path, size):
    write_classes(tmp_path, ["a", "b"], 5)
    for i, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        Image.new("RGB", (90, 90), (25 * i, 0, 0)).save(path)
    source = open_images(tmp_path, labelled=True)
    batches, _ = training_images(source, preprocessing(size), batch_size=5, labelled=True)
    for inputs, labels in one_pass(batches):
        red = (inputs[:, 0] * STD[0] + MEAN[0]).amax((1, 2)) * 255
        assert ((red > 24.9 * 5).long() == labels).all()


def test_images_that_cannot_be_decoded_are_an_error(tmp_path):
    write_images(tmp_path, 6)
    spoil(tmp_path / "0003.png")
    spoil(tmp_path / "0005.png")
    with pytest.raises(ValueError, match=r"first: 000[35]\.png"):
        training_images(open_images(tmp_path), preprocessing(16))
