"""Images as they come: each kind is read right, or passed over in a line that names it."""

import io
import re
import warnings
import zlib

import numpy as np
import pytest
import timm
import torch
from image_cases import spoil, write_images
from PIL import Image

from tpvprune.cli.entry import main
from tpvprune.images.loading import choose_images
from tpvprune.images.preprocessing import in_colours, resolve_preprocessing
from tpvprune.images.sources import open_images

SIZE = 16


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_resnet", num_classes=3)


@pytest.fixture(scope="module")
def same(model):
    """Pixels as they are, in [0, 1]."""
    return resolve_preprocessing(
        model, input_size=(3, SIZE, SIZE), mean=[0], std=[1], crop_pct=1.0, interpolation="nearest"
    )


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def read(folder, preprocessing, *, num=None, notices=None):
    batches = choose_images(
        open_images(folder),
        preprocessing,
        num_images=num,
        notice=None if notices is None else notices.append,
    )
    return (torch.cat(list(batches)) * 255).round().to(torch.uint8)


def as_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def grey_of_16_bits():
    return np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 257


GREY = np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE)


class TestKindsThatAreRead:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "PNG", "tiff"])
    def test_lossless_files_have_the_pixels_that_were_written(self, tmp_path, same, pixels, suffix):
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
        assert torch.equal(read(tmp_path, same)[0], as_tensor(pixels))

    @pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp"])
    def test_lossy_files_are_close(self, tmp_path, same, suffix):
        smooth = np.stack([GREY, GREY[::-1], GREY.T], -1)
        Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", quality=95)
        found = read(tmp_path, same)[0].int()
        assert (found - as_tensor(smooth).int()).abs().float().mean() < 12

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_grey_becomes_three_equal_channels(self, tmp_path, same, suffix):
        Image.fromarray(GREY).save(tmp_path / f"a.{suffix}")
        assert torch.equal(read(tmp_path, same)[0], as_tensor(np.stack([GREY] * 3, -1)))

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_16_bits_keep_their_shades(self, tmp_path, same, suffix):
        # PIL's own conversion makes everything above 255 of 65535 white.
        Image.fromarray(grey_of_16_bits()).save(tmp_path / f"a.{suffix}")
        assert torch.equal(read(tmp_path, same)[0], as_tensor(np.stack([GREY] * 3, -1)))

    def test_cmyk_has_its_colours(self, tmp_path, same):
        flat = np.full((SIZE, SIZE, 4), (0, 255, 255, 0), np.uint8)  # magenta and yellow: red
        Image.fromarray(flat, "CMYK").save(tmp_path / "a.jpg", quality=100)
        red, green, blue = read(tmp_path, same)[0].flatten(1).float().mean(1).tolist()
        assert red > 230
        assert max(green, blue) < 60

    def test_palettes_with_transparency_have_their_colours_and_no_warning(
        self, tmp_path, same, pixels
    ):
        indexed = Image.fromarray(pixels).quantize(16)
        indexed.save(tmp_path / "a.png", transparency=bytes([0, 128, *[255] * 14]))
        assert isinstance(Image.open(tmp_path / "a.png").info["transparency"], bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read(tmp_path, same)[0]
        assert torch.equal(found, as_tensor(indexed.convert("RGB")))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "1", "P"])
    def test_other_modes_are_as_pil_converts_them(self, tmp_path, same, pixels, mode):
        image = Image.fromarray(pixels).convert(mode)
        image.save(tmp_path / "a.png")
        assert torch.equal(read(tmp_path, same)[0], as_tensor(image.convert("RGB")))

    def test_a_grey_model_reads_them_all(self, pixels):
        for image in (Image.fromarray(pixels), Image.fromarray(grey_of_16_bits())):
            assert in_colours(image, "L").mode == "L"

    def test_duplicates_count_as_often_as_they_are_there(self, tmp_path, same):
        folder = write_images(tmp_path / "flat", 3, size=SIZE)
        (folder / "copy.png").write_bytes((folder / "0001.png").read_bytes())
        (folder / "link.png").symlink_to(folder / "0001.png")
        found = read(folder, same)
        assert len(found) == 5
        assert len(found.flatten(1).unique(dim=0)) == 3
        note = open_images(folder).note
        assert f"links in {folder} to images that are there again: 1 (first: " in note
        (folder / "link.png").unlink()
        assert open_images(folder).note == ""

    def test_a_folder_that_links_lead_to_twice_is_refused(self, tmp_path):
        folder = write_images(tmp_path / "flat", 3, size=SIZE)
        (folder / "loop").symlink_to(folder)
        with pytest.raises(ValueError, match=r"every folder once, found \S+/flat/loop, "):
            open_images(str(folder))


def png():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def tiff(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return file.getvalue()


def bomb():
    """A PNG of a few bytes that says that it has 2.5 billion pixels."""
    content = bytearray(png())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


TROUBLE = {
    "empty": (b"", "bad"),
    "text": (b"no image", "bad"),
    "cut": (png()[:60], "bad"),
    "without its end": (png()[:-40], "bad"),
    "flipped": (png()[:45] + b"\0" * 8 + png()[53:], "bad"),
    "bomb": (bomb(), "bad.*(?:bomb|pixels)"),
    "floats": (tiff(np.zeros((4, 4), np.float32)), "bad.*floating-point"),
    "32 bits": (tiff(np.full((4, 4), 2**20, np.int32)), "bad.*found 32"),
    "line": (b"P5 60000 1 255\n" + b"\0" * 60_000, "bad.*found 60000x1"),
}


class TestTrouble:
    @pytest.mark.parametrize("name", TROUBLE)
    def test_one_in_a_hundred_is_skipped_named_and_counted(self, tmp_path, same, name):
        content, message = TROUBLE[name]
        write_images(tmp_path, 100, size=4)
        (tmp_path / "bad.tif").write_bytes(content)
        notices = []
        assert len(read(tmp_path, same, notices=notices)) == 100
        (notice,) = notices
        assert notice.startswith("note: 1 of 101 images could not be decoded and were skipped")
        assert re.search(message, notice), notice
        assert "\n" not in notice

    @pytest.mark.parametrize("num_good", [1, 12, 99])
    def test_a_single_one_among_few_is_skipped_and_named_too(self, tmp_path, same, num_good):
        write_images(tmp_path, num_good, size=4)
        (tmp_path / "bad.tif").write_bytes(b"no image")
        notices = []
        assert len(read(tmp_path, same, notices=notices)) == num_good
        assert re.match(f"note: 1 of {num_good + 1} images could not.*first: bad.tif", notices[0])
        (tmp_path / "worse.tif").write_bytes(b"no image")
        with pytest.raises(ValueError, match=f"2 of {num_good + 2} images cannot be decoded"):
            read(tmp_path, same)

    @pytest.mark.parametrize("name", TROUBLE)
    def test_alone_it_is_an_error_that_names_it(self, tmp_path, same, name):
        content, message = TROUBLE[name]
        (tmp_path / "bad.tif").write_bytes(content)
        expected = f"1 of 1 images cannot be decoded.*{message}"
        with pytest.raises(ValueError, match=expected) as caught:
            read(tmp_path, same)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), TypeError("odd")])
    def test_whatever_stops_the_reading_of_a_file_is_said(self, tmp_path, same, monkeypatch, error):
        write_images(tmp_path, 101, size=4)
        source = open_images(tmp_path)
        first_opened = Image.open

        def refuse(file):
            if file.getvalue() == (tmp_path / "0007.png").read_bytes():
                raise error
            return first_opened(file)

        monkeypatch.setattr(Image, "open", refuse)
        batches = choose_images(source, same, num_images=None)
        assert sum(map(len, batches)) == 100
        assert batches.first_skipped in {
            "0007.png: [Errno 13] Permission denied",
            "0007.png: odd",
        }

    def test_files_that_are_no_images_are_counted_and_one_is_named(self, tmp_path):
        write_images(tmp_path / "a", 2)
        assert open_images(tmp_path).note == ""
        (tmp_path / ".DS_Store").write_text("hidden")
        assert open_images(tmp_path).note == ""
        (tmp_path / "a" / "notes.txt").write_text("x")
        (tmp_path / "film.mp4").write_text("x")
        note = open_images(tmp_path).note
        assert note.startswith("note: 2 files")
        assert "notes.txt" in note


def test_every_command_that_reads_images_says_what_it_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    folder = write_images(tmp_path / "flat", 100, size=SIZE)
    (folder / "bad.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    model = ["--model", "test_resnet", "--num-classes", "3", "--img-size", "16"]
    images = ["--data-dir", str(folder), "--num-images", "101"]
    cheap = ["--criterion", "magnitude", "--repair", "none", "--latency-repeats", "0"]
    out = str(tmp_path / "out")
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "w.pt")
    for argv in (
        ["prune", *model, "--checkpoint", str(tmp_path / "w.pt"), *images, *cheap, "--output", out],
        ["score", *model, *images, *cheap[:2], "--output", str(tmp_path / "s.json")],
        ["evaluate", out, *images, "--img-size", "16", "--latency-repeats", "0"],
    ):
        assert main(argv) == 0
        err = capsys.readouterr().err
        assert "1 of 101 images could not be decoded and were skipped (first: bad.png" in err, argv
        assert "notes.txt" in err, argv


def test_labelled_images_left_out_of_the_accuracy_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    for name in "abc":
        write_images(tmp_path / name, 40, size=SIZE)
    spoil(tmp_path / "b" / "0005.png")
    argv = ["evaluate", "--model", "test_resnet", "--num-classes", "3", "--img-size", "16"]
    assert main([*argv, "--data-dir", str(tmp_path), "--latency-repeats", "0"]) == 0
    assert "1 of 120 images could not be decoded" in capsys.readouterr().err
