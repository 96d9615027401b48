"""Int8 files: what is in them, which images decided what, and what is said of them."""

import dataclasses
import importlib.util
import json
from functools import partial

import numpy as np
import pytest
import torch
from cases import Residual, build
from cases import images as doubles
from image_cases import write_images
from torch import nn

import tpvprune
from tpvprune.cli.entry import main
from tpvprune.saved import int8, quantization
from tpvprune.saved.export import export_model
from tpvprune.saved.int8 import export_int8
from tpvprune.saved.quantization import RANGES, Tried

needed = ("onnx", "onnxscript", "onnxruntime")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in needed),
    reason="onnx, onnxscript or onnxruntime is missing: pip install 'tpvprune[onnx]'",
)


def images(num):
    return doubles(num).float()


def model_of(kind=Residual):
    return build(kind).float().eval()


def outputs(file, inputs):
    """Run a file of batch size 1 as another program would."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[None]})[0] for x in inputs.numpy()])


class Poison:
    """A label that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError(f"a label was read: {name}")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, its images, its two files, and what was found."""
    folder = tmp_path_factory.mktemp("int8")
    model, shown = model_of(), images(48)
    batches = [(x, Poison()) for x in shown.split(16)]
    found = export_int8(model, batches, folder / "int8.onnx", latency_repeats=2)
    export_model(model, shown[:1], folder / "float.onnx")
    return model, shown, folder, found


def test_weights_are_rounded_with_a_scale_for_each_channel(written):
    import onnx
    from onnx import numpy_helper

    _, _, folder, _ = written
    whole, small = (onnx.load(folder / name).graph for name in ("float.onnx", "int8.onnx"))
    kinds = {node.op_type for node in small.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert "BatchNormalization" not in kinds
    values = {t.name: numpy_helper.to_array(t) for t in [*whole.initializer, *small.initializer]}
    weights = [n.input[1] for n in whole.node if n.op_type == "Conv"]
    assert weights
    for name in weights:
        weight, rounded = values[name], values[f"{name}_quantized"]
        scale = values[f"{name}_scale"]
        assert rounded.dtype == np.int8
        assert scale.shape == weight.shape[:1]
        scale = scale[:, None, None, None]
        assert (np.abs(rounded * scale - weight) <= 0.501 * scale).all()


def test_what_is_said_of_the_file_is_so(written):
    model, shown, folder, found = written
    calibration, choosing, measuring = (torch.cat(p) for p in int8._parts([shown], None, 1, 0))
    counts = (found.num_calibration, found.num_choosing, found.num_measured)
    assert counts == (len(calibration), len(choosing), len(measuring)) == (16, 16, 16)
    assert len({x.numpy().tobytes() for x in shown}) == len(
        {x.numpy().tobytes() for x in torch.cat([calibration, choosing, measuring])}
    )
    with torch.no_grad():
        expected = model(measuring).numpy()
    rounded = outputs(folder / "int8.onnx", measuring)
    assert not np.allclose(rounded, expected, atol=1e-5)
    same = float((rounded.argmax(1) == expected.argmax(1)).mean())
    assert found.difference.agreement == found.runs["int8"].agreement == same
    assert found.runs["float32"].agreement == 1
    assert found.runs["int8"].num_bytes == (folder / "int8.onnx").stat().st_size
    assert list(found.tried) == list(RANGES)
    assert found.tried[found.ranges].agreement == max(t.agreement for t in found.tried.values())
    for run in found.runs.values():
        low, high = run.latency_range_ms
        assert 0 < low <= run.latency_ms <= high


@pytest.mark.parametrize("size", [1, 3])
def test_images_given_to_measure_on_are_those_that_measure(size):
    for num in range(3 * size, 40):
        inputs = torch.arange(num)[:, None].float()
        plain = [torch.cat(part) for part in int8._parts([inputs], None, size, 0)]
        measured = int8.num_measuring(num, size)
        assert len(plain[2]) == measured
        rest, others = inputs[:-measured], inputs[-measured:]
        parts = [torch.cat(part) for part in int8._parts([rest], [others], size, 0)]
        assert [len(part) for part in parts] == [len(part) for part in plain]
        assert torch.equal(parts[2], others)
        assert len(torch.cat(parts).unique()) == sum(map(len, plain))
    few = [(inputs[: 2 * size - 1], inputs), (inputs, inputs[: size - 1])]
    for rest, others in few[:size]:
        with pytest.raises(ValueError, match=f"found {len(rest)} and {len(others)} others"):
            int8._parts([rest], [others], size, 0)


@pytest.mark.long
def test_images_to_measure_on_decide_nothing(tmp_path):
    model, shown = model_of(), images(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    run = partial(export_int8, model, ranges=["min-max"], latency_repeats=0, overwrite=True)

    def file_with(changed):
        inputs = shown.clone()
        inputs[changed] *= 100
        run([inputs], tmp_path / "x.onnx")
        return (tmp_path / "x.onnx").read_bytes()

    plain = file_with([])
    assert file_with(order[6:]) == plain  # three of nine calibrate, three choose
    assert file_with(order[:1]) != plain


@pytest.mark.parametrize(("agreements", "expected"), [((0.5, 0.9, 0.7), 1), ((0.9, 0.9, 0.7), 1)])
def test_ranges_are_those_that_agree_best_of_equals_the_closest(agreements, expected):
    share = {0: 0.2, 1: 0.1, 2: 0.05}
    tried = {
        name: int8.Difference(9, agreement, 0.1, 1.0, share[i])
        for i, (name, agreement) in enumerate(zip(RANGES, agreements, strict=True))
    }
    assert Tried(None, tried, {}).best_ranges == RANGES[expected]
    features = {n: dataclasses.replace(found, has_classes=False) for n, found in tried.items()}
    assert Tried(None, features, {}).best_ranges == RANGES[2]


def positive():
    """Return a model whose products are large and of one sign: sums of two pass 16 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8),
    )  # fmt: skip
    with torch.no_grad():
        for conv in (model[0], model[2]):
            conv.weight.uniform_(0.5, 1.0).div_(conv.weight[0].numel())
    return model.eval()


def exported_bits(folder, bits):
    shown = torch.rand(60, 3, 12, 12)
    given = {} if bits is None else {"weight_bits": bits}
    found = export_int8(
        positive(), [shown], folder / "x.onnx", ranges=["min-max"], latency_repeats=0, **given
    )
    import onnx

    stored = onnx.load(folder / "x.onnx").graph.initializer
    weights = [onnx.numpy_helper.to_array(w) for w in stored if w.name.endswith("weight_quantized")]
    assert len(weights) == 3
    return found, max(int(np.abs(w.astype(int)).max()) for w in weights)


@pytest.mark.parametrize("bits", [[8], [7], None])
def test_weights_have_as_many_bits_as_said(bits, tmp_path):
    found, largest = exported_bits(tmp_path, bits)
    tried, asked = found.tried_weights, bits or [8, 7]
    near = min(entry.share for way, entry in tried.items() if way.bits == asked[0]) <= 0.01
    assert {(way.bits, way.biases_corrected) for way in tried} == {
        (b, corrected) for b in (asked[:1] if near else asked) for corrected in (False, True)
    }
    assert tried[found.weights].share == min(entry.share for entry in tried.values())
    assert largest == {8: 127, 7: 64}[found.weights.bits]


def test_other_bits_are_tried_where_the_first_are_not_close(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "_CLOSE", 0.0)
    found, _ = exported_bits(tmp_path, None)
    ways = {(way.bits, way.biases_corrected) for way in found.tried_weights}
    assert ways == {(8, False), (8, True), (7, False), (7, True)}


def test_the_bits_chosen_are_close_on_any_processor(tmp_path):
    """Without VNNI products of 8 bits saturate, and the file is none of the model's."""
    found, _ = exported_bits(tmp_path, None)
    assert found.difference.share < 0.5


def test_dense_and_pruned_are_compared_with_dense_and_batches_may_be_free(tmp_path, untouched):
    dense, shown = model_of(), images(24)
    pruned = tpvprune.prune(dense, [shown], keep=0.7).model
    file, seen = tmp_path / "x.onnx", []
    with untouched(pruned), untouched(dense):
        found = export_int8(
            pruned, [shown], file, dense=dense, dynamic_batch=True, ranges=["min-max"],
            latency_repeats=0, progress=lambda *told: seen.append(told),
        )  # fmt: skip
    assert [*dict.fromkeys(stage for stage, *_ in seen)] == [
        "dense export", "dense int8 files", "export", "int8 files", "measurement"
    ]  # fmt: skip
    assert seen.count(("int8 files", 0, 4)) == 1
    tries = [done for stage, done, _ in seen if stage == "int8 files"]
    assert tries == sorted(tries)
    assert tries[-1] <= 4
    assert list(found.runs) == ["dense float32", "dense int8", "float32", "int8"]
    measuring = torch.cat(int8._parts([shown], None, 1, 0)[2])
    assert found.runs["dense float32"].agreement == 1
    assert found.runs["float32"].agreement == tpvprune.agreement(pruned, dense, [measuring])
    assert found.runs["int8"].latency_ms is None
    assert found.runs["int8"].num_bytes < found.runs["dense int8"].num_bytes
    assert found.input_shape[0] is None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    assert len(session.run(None, {"images": shown[:7].numpy()})[0]) == 7


def test_a_fixed_batch_size_is_that_of_calls_and_of_images_used(tmp_path):
    found = export_int8(
        model_of(), [images(14)], tmp_path / "x.onnx", batch_size=4, ranges=["min-max"],
        latency_repeats=2,
    )  # fmt: skip
    assert found.input_shape[0] == found.batch_size == 4
    assert (found.num_calibration, found.num_choosing, found.num_measured) == (4, 4, 4)


class Outlier(nn.Module):
    """One channel that nothing reads is a million times as large as those that matter."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 9, 1), nn.Linear(9, 8)
        with torch.no_grad():
            self.conv.weight[0] *= 1e6
            self.fc.weight[:, 0] = 0

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def test_a_file_that_is_broken_is_called_so(tmp_path, written):
    torch.manual_seed(0)
    found = export_int8(
        Outlier().eval(), [images(60)], tmp_path / "x.onnx", ranges=["min-max"], latency_repeats=0
    )
    assert found.difference.is_broken
    assert "int8 is broken" in found.warning
    assert written[-1].warning is None


@pytest.mark.parametrize(
    ("dense", "pruned", "expected"),
    [
        ((4.0, 4.2), (4.9, 5.1), "int8 takes longer"),
        ((4.0, 4.2), (4.1, 5.1), None),
        (None, None, None),
    ],
)
def test_a_pruned_file_that_is_slower_is_said_to_be(dense, pruned, expected, written):
    found = written[-1]
    dense_run, run = (
        int8.Run(1.0, 9, None if times is None else sum(times) / 2, times)
        for times in (dense, pruned)
    )
    plain = int8.Run(1.0, 9, 9.0, (8.0, 10.0))
    runs = {"dense float32": plain, "dense int8": dense_run, "float32": plain, "int8": run}
    slower = dataclasses.replace(found, runs=runs).slower
    assert slower is None if expected is None else slower.startswith(expected)
    assert found.slower is None  # there is no dense model to compare with


def test_bad_input_is_refused_and_nothing_is_written(tmp_path):
    run = partial(export_int8, model_of(), [images(2)], tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"at least 3 images .* found 2: pass more"):
        run()
    with pytest.raises(ValueError, match="at least 12 images"):
        run(batch_size=4)
    with pytest.raises(ValueError, match="expected some of min-max, percentile, entropy, found kl"):
        run(ranges=["kl"])
    with pytest.raises(ValueError, match="weight_bits: expected 8, 7 or both, found 8, 6"):
        run(weight_bits=[8, 6])
    with pytest.raises(ValueError, match="latency_repeats: expected 0 or at least 2, found 1"):
        run(ranges=["min-max"], latency_repeats=1)
    assert list(tmp_path.iterdir()) == []


# ---- command line ---------------------------------------------------------------------------


@pytest.mark.long
def test_command_writes_an_int8_file_and_a_table(tmp_path, capsys):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    result = tpvprune.prune(model, [torch.randn(8, 3, 32, 32)], keep=0.7, criterion="magnitude")
    folder = tpvprune.save_pruned(result, tmp_path / "pruned")
    shown = write_images(tmp_path / "images", 9)
    options = ["--data-dir", shown, "--img-size", "32", "--latency-repeats", "2", "--json"]
    options += ["--dense", tmp_path / "dense.pt", "--ranges", "min-max", "percentile"]
    argv = ["export", folder, "--int8", *options]
    assert main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    counts = [document[f"num_{name}"] for name in ("calibration", "choosing", "images")]
    assert counts == [3, 3, 3]
    assert list(document["tried"]) == ["min-max", "percentile"]
    assert document["output"] == str(folder / "model-int8.onnx")
    assert document["bytes"] == (folder / "model-int8.onnx").stat().st_size
    for name in document["runs"]:
        assert any(line.startswith(name) for line in err.splitlines())
    assert "agreement with dense float32" in err
    import onnx

    stored = {entry.key for entry in onnx.load(document["output"]).metadata_props}
    assert {"model", "preprocessing"} <= stored


@pytest.mark.long
def test_of_features_no_agreement_is_told(tmp_path, capsys):
    torch.manual_seed(0)
    argv = ["export", "--model", "test_resnet", "--num-classes", "0", "--int8", "--img-size", "32"]
    argv += ["--data-dir", write_images(tmp_path / "images", 12), "--latency-repeats", "0"]
    argv += ["--ranges", "min-max", "percentile", "--output", tmp_path / "x.onnx", "--json"]
    assert main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["agreement"] is None
    assert set(document["tried"].values()) == {None}
    assert {run["agreement"] for run in document["runs"].values()} == {None}
    assert document["variance_share"] == document["runs"]["int8"]["variance_share"] > 0
    assert not {"agreement", "agrees"} & {*err.split()}
    assert f"by {document['variance_share']:.2g} of the outputs' variance" in " ".join(err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--int8"], "--int8: expected images to calibrate with: pass --data-dir D"),
        (["--int8", "--format", "pt2"], "--int8: expected --format onnx, found pt2"),
        (["--ranges", "entropy"], "--ranges: expected only with --int8"),
        (["--dense", "pretrained"], "--dense: expected only with --int8"),
        (["--weight-bits", "7"], "--weight-bits: expected only with --int8"),
        (["--int8", "--data-dir", ".", "--weight-bits", "9"], "expected 8, 7 or both, found 9"),
        (["--int8", "--data-dir", ".", "--ranges", "kl"], "min-max, percentile, entropy, found kl"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, tmp_path, capsys):
    argv = ["export", "--model", "test_resnet", "--output", str(tmp_path / "x"), *flags]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
