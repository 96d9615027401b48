"""Exported files do what the model does, or are not written at all."""

import importlib.util
import json
from functools import partial

import pytest
import torch
from cases import Residual, build
from cases import images as doubles
from image_cases import write_images
from torch import nn

from tpvprune.cli.entry import main
from tpvprune.pipeline import prune
from tpvprune.saved import export
from tpvprune.saved.checkpoint import load_pruned, save_pruned
from tpvprune.saved.export import export_model

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is missing: pip install 'tpvprune[onnx]'",
)
FORMATS = [pytest.param("onnx", marks=needs_onnx), "pt2"]


def run_file(file, inputs):
    """Run an exported file as another program would."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return torch.from_numpy(found[0])


def images(num):
    return doubles(num).float()


def model_of(kind=Residual):
    return build(kind).float().eval()


class Branching(nn.Module):
    """Cannot be exported: which way it goes depends on the values."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = self.fc(x.mean((2, 3)))
        return x if x.sum() > 0 else x * 2


@pytest.mark.parametrize("format", FORMATS)
def test_file_with_a_free_batch_size_runs_as_the_model(format, tmp_path, untouched):
    model = model_of()
    pruned = prune(model, [images(8)], keep=0.6).model
    file = tmp_path / f"model.{format}"
    with untouched(pruned):
        found = export_model(
            pruned, images(1), file, format=format, dynamic_batch=True, batches=[images(4)]
        )
    assert (found.file, found.format, found.input_shape[0]) == (file, format, None)
    assert (found.num_random, found.num_given) == (1 + 2 + 5, 4)
    inputs = torch.randn(7, *images(1).shape[1:])
    with torch.no_grad():
        expected = pruned(inputs)
    assert torch.allclose(run_file(file, inputs), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("format", FORMATS)
def test_file_with_a_fixed_batch_size_takes_that_one_only(format, tmp_path):
    model = model_of()
    file = tmp_path / f"model.{format}"
    found = export_model(model, images(2), file, format=format, batches=[images(5)])
    assert (found.input_shape[0], found.num_given) == (2, 4)  # the fifth fills no batch
    assert run_file(file, images(2)).shape == model(images(2)).shape
    with pytest.raises(Exception):  # noqa: B017  (each engine has its own)
        run_file(file, images(3))


@needs_onnx
def test_onnx_file_names_its_batch_axis_and_carries_the_preprocessing(tmp_path):
    import onnx

    file = tmp_path / "model.onnx"
    notes = {"preprocessing": {"mean": [0.5, 0.4, 0.3], "interpolation": "bicubic"}}
    export_model(model_of(), images(1), file, dynamic_batch=True, metadata=notes)
    read = onnx.load(file)
    onnx.checker.check_model(read)
    first = read.graph.input[0]
    assert first.name == "images"
    assert first.type.tensor_type.shape.dim[0].dim_param == "batch"
    stored = {entry.key: json.loads(entry.value) for entry in read.metadata_props}
    assert stored["preprocessing"] == notes["preprocessing"]


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_file_that_differs_is_not_written(change, tmp_path, monkeypatch):
    model, file = model_of(), tmp_path / "model.pt2"
    write = export._write_pt2

    def spoilt(*args, **kwargs):
        call = write(*args, **kwargs)
        return lambda inputs: [x + change * x.abs().max() for x in call(inputs)]

    monkeypatch.setattr(export, "_write_pt2", spoilt)
    with pytest.raises(ValueError, match=r"differs from the model by .*nothing was written"):
        export_model(model, images(1), file, format="pt2")
    assert list(tmp_path.iterdir()) == []


def test_real_inputs_are_compared_too(tmp_path, monkeypatch):
    # Right on the random inputs, wrong on one given image.
    model, given = model_of(), images(3)
    write = export._write_pt2

    def spoilt(*args, **kwargs):
        call = write(*args, **kwargs)
        return lambda x: [y + (x[0] - given[2]).abs().sum().lt(1e-6) for y in call(x)]

    monkeypatch.setattr(export, "_write_pt2", spoilt)
    run = partial(export_model, model, images(1), tmp_path / "model.pt2", format="pt2")
    run(batches=[given[:2]])
    with pytest.raises(ValueError, match="differs"):
        run(batches=[given], overwrite=True)


def test_a_failure_leaves_the_old_file(tmp_path):
    file = tmp_path / "model.pt2"
    file.write_bytes(b"old")
    run = partial(export_model, Branching(), images(1), file, format="pt2")
    with pytest.raises(ValueError, match="exists already"):
        run()
    with pytest.raises(ValueError, match="cannot be exported to pt2") as caught:
        run(overwrite=True)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "missing", lambda packages: ["onnxscript"])
    with pytest.raises(ValueError, match=r"found no onnxscript: pip install 'tpvprune\[onnx\]'"):
        export_model(model_of(), images(1), tmp_path / "model.onnx")


def test_formats_are_checked(tmp_path):
    with pytest.raises(ValueError, match="expected 'onnx' or 'pt2', found 'tf'"):
        export_model(model_of(), images(1), tmp_path / "x", format="tf")
    with pytest.raises(ValueError, match="found a folder"):
        export_model(model_of(), images(1), tmp_path, format="pt2")


# ---- command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved pruned folder; tests write beside it."""
    import timm

    model = timm.create_model("test_resnet", num_classes=4).eval()
    result = prune(model, [torch.randn(8, 3, 32, 32)], keep=0.7, criterion="magnitude")
    root = tmp_path_factory.mktemp("export")
    write_images(root / "images", 3)
    return save_pruned(result, root / "pruned")


def test_command_exports_a_saved_folder(saved, tmp_path, capsys):
    file = tmp_path / "small.pt2"
    data = ["--data-dir", str(saved.parent / "images"), "--img-size", "32"]
    code = main(["export", str(saved), "--format", "pt2", "--output", str(file), "--json", *data])
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (document["num_images"], document["input_shape"]) == (3, [1, 3, 32, 32])
    assert document["difference"] <= export.TOLERANCE
    assert document["bytes"] == file.stat().st_size
    inputs = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(run_file(file, inputs), load_pruned(saved)(inputs), atol=1e-5)


def test_command_fails_in_one_line_and_leaves_nothing(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "_write_pt2", lambda *_, **__: lambda x: [torch.zeros(len(x), 4)])
    before = sorted(path.name for path in saved.iterdir())
    code = main(["export", str(saved), "--format", "pt2", "--img-size", "32"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "differs from the model" in err
    assert sorted(path.name for path in saved.iterdir()) == before


def test_command_needs_a_name_for_other_models(capsys):
    assert main(["export", "--model", "test_resnet"]) == 2
    assert "--output F" in capsys.readouterr().err
