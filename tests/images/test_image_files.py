"""Lists of files and NumPy arrays are read as the folder of the same images is."""

import numpy as np
import pytest
import timm
import torch
from image_cases import write_images
from PIL import Image

from tpvprune.cli.entry import main
from tpvprune.images.loading import choose_images
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import array_images, listed_images, open_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    write_images(root / "images", 6)
    return root / "images"


def inputs(source, num=None):
    preprocessing = resolve_preprocessing(
        timm.create_model("test_resnet"), input_size=(3, 24, 24), crop_pct=1.0
    )
    return torch.cat(list(choose_images(source, preprocessing, num_images=num, seed=3)))


def test_a_list_gives_the_images_of_the_folder(folder, tmp_path):
    files = sorted(folder.iterdir())
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(map(str, files)) + "\n\n", encoding="utf-8")
    relative = folder / "list.txt"
    expected = inputs(open_images(folder))
    assert torch.equal(inputs(listed_images(listing)), expected)
    listing.write_text("\r\n".join(path.name for path in files), encoding="utf-8")
    assert torch.equal(inputs(listed_images(listing, root=folder)), expected)
    relative.write_text("\n".join(path.name for path in reversed(files)), encoding="utf-8")
    try:
        assert torch.equal(inputs(listed_images(relative)), expected.flip(0))
    finally:
        relative.unlink()


@pytest.mark.parametrize("grey", [False, True])
def test_an_array_gives_the_images_of_the_folder(folder, grey, tmp_path):
    mode = "L" if grey else "RGB"
    arrays = [np.asarray(Image.open(path).convert(mode)) for path in sorted(folder.iterdir())]
    size = np.array([a.shape for a in arrays]).min(0)
    arrays = np.stack([a[: size[0], : size[1]] for a in arrays])
    np.save(tmp_path / "x.npy", arrays)
    np.save(tmp_path / "channel.npy", arrays[..., None] if grey else arrays)
    (tmp_path / "cut").mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "cut" / f"{i}.png")
    expected = inputs(open_images(tmp_path / "cut"))
    assert torch.equal(inputs(array_images(tmp_path / "x.npy")), expected)
    assert torch.equal(inputs(array_images(tmp_path / "channel.npy")), expected)
    chosen = inputs(array_images(tmp_path / "x.npy"), 3)
    assert torch.equal(chosen, inputs(open_images(tmp_path / "cut"), 3))


def refuse_to_run():
    raise AssertionError("a pickle was read")


class Evil:
    def __reduce__(self):
        return refuse_to_run, ()


def test_bad_arrays_are_refused_in_one_line(tmp_path):
    for name, array, message in (
        ("float", np.zeros((2, 4, 4, 3)), r"found float64 \[2, 4, 4, 3\]"),
        ("flat", np.zeros((2, 4), np.uint8), "found uint8"),
        ("five", np.zeros((2, 4, 4, 5), np.uint8), "found uint8"),
        ("none", np.zeros((0, 4, 4, 3), np.uint8), "found uint8"),
        ("evil", np.array([Evil()], dtype=object), "damage"),
    ):
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match=message) as caught:
            array_images(tmp_path / f"{name}.npy")
        assert "\n" not in str(caught.value)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="damage"):
        array_images(tmp_path / "cut.npy")


def test_bad_lists_are_refused_in_one_line(folder, tmp_path):
    listing = tmp_path / "list.txt"
    with pytest.raises(ValueError, match="no such list"):
        listed_images(listing)
    for content, message in (
        (b"\n \n", "found none"),
        (b"\xff\xfe\x00", "one a line"),
        (b"nothing.png\n", "relative paths start from the folder of the list"),
    ):
        listing.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            listed_images(listing)


def test_commands_take_both_and_say_that_they_hold_no_labels(folder, tmp_path, capsys):
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(path.name for path in sorted(folder.iterdir())), encoding="utf-8")
    np.save(tmp_path / "x.npy", np.zeros((4, 20, 20, 3), np.uint8))
    model = ["--model", "test_resnet", "--num-classes", "3", "--img-size", "24"]
    listed = ["--data-list", str(listing), "--data-dir", str(folder)]
    for i, data in enumerate((listed, ["--data-dir", str(tmp_path / "x.npy")])):
        scores = ["score", *model, *data, "--criterion", "magnitude"]
        assert main([*scores, "--output", str(tmp_path / f"{i}.json")]) == 0, capsys.readouterr()
        labelled = ["score", *model, *data, "--criterion", "taylor"]
        assert main([*labelled, "--output", str(tmp_path / "taylor.json")]) == 2
        assert "holds no labels" in capsys.readouterr().err
