"""A saved model comes back bit for bit; a damaged or hostile folder is refused in one line."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tpvprune.disk.atomic
import tpvprune.disk.tensors
from tpvprune.groups import find_groups
from tpvprune.groups.removal import remove_channels
from tpvprune.pipeline import prune
from tpvprune.saved.checkpoint import load_pruned, read_config, save_pruned, saved_masks
from tpvprune.saved.skeleton import build

FILES = {"config.json", "model.safetensors"}


def narrow(model, width):
    """Cut the inside of the first block of a CIFAR ResNet by hand."""
    block = model.layer1[0]
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach()[:width].clone())
    block.conv1.out_channels = width
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(block.bn1, name).detach()[:width].clone()
        is_parameter = name in ("weight", "bias")
        setattr(block.bn1, name, nn.Parameter(value) if is_parameter else value)
    block.bn1.num_features = width
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach()[:, :width].clone())
    block.conv2.in_channels = width
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    model = narrow(build("cifar_resnet20", {"num_classes": 7}, max_elements=10**7), 5).eval()
    return model, save_pruned(model, tmp_path_factory.mktemp("original") / "out")


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original[1], tmp_path / "out")


@pytest.fixture
def pruned(original):
    return copy.deepcopy(original[0])


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_loaded_model_gives_equal_outputs_bit_for_bit(pruned, saved):
    loaded = load_pruned(saved)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), pruned(x))
    assert not loaded.training
    assert loaded.layer1[0].bn1.num_features == 5
    assert {entry.name for entry in saved.iterdir()} == FILES


def test_config_says_how_the_model_was_made(pruned, tmp_path):
    mask = torch.tensor([True, False, True])
    result = SimpleNamespace(model=pruned, kept={"layer1.0.conv1": mask}, scores=None, report={})
    save_pruned(result, tmp_path / "out", provenance={"command": ["a", "b"], "seed": 3})
    config = read_config(tmp_path / "out")
    assert config["format_version"] == 1
    assert (config["model"], config["model_kwargs"]) == ("cifar_resnet20", {"num_classes": 7})
    assert config["kept"] == {"layer1.0.conv1": [0, 2]}
    assert config["attributes"]["layer1.0.conv1"] == {"out_channels": 5}
    assert config["shapes"]["layer1.0.conv1.weight"] == [5, 16, 3, 3]
    assert config["provenance"]["seed"] == 3
    assert {"date", "versions", "command"} <= config["provenance"].keys()
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_of_weights_survive(pruned, tmp_path, dtype):
    save_pruned(pruned.to(dtype), tmp_path / "out")
    loaded = load_pruned(tmp_path / "out")
    before, after = pruned.state_dict(), loaded.state_dict()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_channels_of_a_second_cut_are_counted_in_the_dense_model(tmp_path):
    dense = build("test_resnet", {"num_classes": 4}, max_elements=10**7).eval()
    inputs = [torch.randn(8, 3, 32, 32)]
    how = {"criterion": "magnitude", "repair": "none"}
    first = prune(dense, inputs, keep=0.7, **how)
    save_pruned(first, tmp_path / "first", provenance={"weights": "pretrained"})
    second = prune(load_pruned(tmp_path / "first"), inputs, keep=0.6, **how)
    save_pruned(second, tmp_path / "second", origin=tmp_path / "first")
    config = read_config(tmp_path / "second")
    assert config["provenance"]["origin"]["weights"] == "pretrained"
    groups = find_groups(dense, inputs[0])
    kept = {g.name: torch.zeros(g.num_channels, dtype=torch.bool) for g in groups}
    for name, indices in config["kept"].items():
        kept[name][indices] = True
    at_once = remove_channels(dense, groups, kept).state_dict()
    loaded = load_pruned(tmp_path / "second").state_dict()
    assert all(torch.equal(value, at_once[name]) for name, value in loaded.items())
    cut = {name: mask for name, mask in first.kept.items() if not mask.all()}
    other = SimpleNamespace(model=second.model, kept=cut, scores=None, report={})
    with pytest.raises(ValueError, match="the folder is not the one"):
        save_pruned(other, tmp_path / "other", origin=tmp_path / "first")


def test_masks_go_along_with_new_weights(pruned, tmp_path):
    mask = torch.rand(pruned.linear.weight.shape) < 0.5
    with torch.no_grad():
        pruned.linear.weight.mul_(mask)
    save_pruned(pruned, tmp_path / "first", masks={"linear.weight": mask})
    save_pruned(pruned, tmp_path / "second", origin=tmp_path / "first")
    assert torch.equal(saved_masks(tmp_path / "second")["linear.weight"], mask)
    save_pruned(pruned, tmp_path / "third")
    assert saved_masks(tmp_path / "third") is None


def test_preprocessing_of_the_saved_record_is_used(pruned, tmp_path):
    record = {"mean": (0.1, 0.2, 0.3), "input_size": (3, 48, 48), "file": "x", "fn": print}
    save_pruned(pruned, tmp_path / "out", pretrained_cfg=record)
    config = load_pruned(tmp_path / "out").pretrained_cfg
    assert (config["mean"], config["input_size"]) == ((0.1, 0.2, 0.3), (3, 48, 48))
    assert config.get("file") != "x"


def test_random_state_and_model_are_untouched(pruned, tmp_path):
    pruned.train()
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    before = torch.get_rng_state()
    save_pruned(pruned, tmp_path / "out")
    load_pruned(tmp_path / "out")
    assert torch.equal(before, torch.get_rng_state())
    assert pruned.training
    assert all(torch.equal(state[name], tensor) for name, tensor in pruned.state_dict().items())


class Own(nn.Module):
    def __init__(self, hidden=6):
        super().__init__()
        self.first, self.second = nn.Linear(4, hidden), nn.Linear(hidden, 3)
        self.second_again = self.second
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.second_again(self.first(x).relu()) * self.scale


def test_model_that_timm_does_not_build_needs_its_dense_model(tmp_path):
    dense, pruned = Own(), Own(4)
    with pytest.raises(ValueError, match="pass model_name"):
        save_pruned(pruned, tmp_path / "out")
    save_pruned(pruned, tmp_path / "out", dense=dense)
    with pytest.raises(ValueError, match="model=the dense model"):
        load_pruned(tmp_path / "out")
    loaded = load_pruned(tmp_path / "out", model=dense)
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), pruned.eval()(x))
    assert loaded.second_again.weight is loaded.second.weight
    assert dense.first.out_features == 6


class Tables(nn.Module):
    """Buffers that are not in the state dict: one a cut narrows, one the first forward fills."""

    def __init__(self, width=6, bias=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)
        self.register_buffer("bias", torch.full((width,), bias), persistent=False)
        self.register_buffer("table", None, persistent=False)
        self.register_buffer("filled", torch.zeros(1, 1), persistent=False)

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(3.0)
        if self.filled.shape[1] != x.shape[1]:
            self.filled = torch.ones(1, x.shape[1])
        return self.second((self.first(x * self.filled) + self.bias).relu()) + self.table


@pytest.mark.parametrize("has_run", [False, True])
def test_buffers_that_the_state_dict_leaves_out_load_back(has_run, tmp_path):
    dense, pruned, x = Tables().eval(), Tables(4, bias=0.5).eval(), torch.randn(5, 4)
    if has_run:
        pruned(x)
    save_pruned(pruned, tmp_path / "out", dense=dense)
    loaded = load_pruned(tmp_path / "out", model=dense)
    for name, buffer in pruned.named_buffers():
        assert torch.equal(buffer, dict(loaded.named_buffers())[name])
    assert torch.equal(loaded(x), pruned(x))
    assert "bias" not in load_file(tmp_path / "out" / "model.safetensors")
    assert dense.table is None and dense.bias.shape == (6,)
    # Saved once more from there, and without them where there is nothing to save.
    save_pruned(loaded, tmp_path / "again", dense=dense)
    assert torch.equal(load_pruned(tmp_path / "again", model=dense)(x), pruned(x))
    save_pruned(Tables(), tmp_path / "none", dense=dense)
    assert not (tmp_path / "none" / "buffers.safetensors").exists()


def test_buffers_of_another_save_or_model_are_refused(tmp_path):
    dense, pruned = Tables(), Tables(4, bias=0.5)
    save_pruned(pruned, tmp_path / "out", dense=dense)
    file = tmp_path / "out" / "buffers.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-3])
    with pytest.raises(ValueError, match="found none or damage"):
        load_pruned(tmp_path / "out", model=dense)
    save_file({"other": torch.ones(4)}, file)
    with pytest.raises(ValueError, match="not from one save"):
        load_pruned(tmp_path / "out", model=dense)
    save_file({"bias": torch.ones(4, 1)}, file)
    with pytest.raises(ValueError, match=r"expected 1 dimensions of torch\.float32 for bias"):
        load_pruned(tmp_path / "out", model=dense)
    file.unlink()
    with pytest.raises(ValueError, match="found none or damage"):
        load_pruned(tmp_path / "out", model=dense)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for names, message in ((["first.weight"], "expected some of the model"), (3, "names in")):
        save_file({"first.weight": torch.ones(4, 4)}, file)
        (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "buffers": names}))
        with pytest.raises(ValueError, match=message):
            load_pruned(tmp_path / "out", model=dense)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("convit_tiny", 224, {}),
        (
            "beit_base_patch16_224",
            64,
            {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 64},
        ),
        ("resnetblur50", 64, {"layers": (1, 1, 1, 1)}),
    ],
)
def test_timm_models_with_such_buffers_are_saved(name, size, kwargs, tmp_path):
    torch.manual_seed(0)
    model, x = (
        timm.create_model(name, num_classes=5, **kwargs).eval(),
        torch.randn(2, 3, size, size),
    )
    groups = tpvprune.find_groups(model, x[:1])
    kept = {g.name: torch.arange(g.num_channels) < -(-g.num_channels // 2) for g in groups}
    small = tpvprune.remove_channels(model, groups, kept)
    with torch.no_grad():
        expected = small(x)
        save_pruned(
            small, tmp_path / "out", model_name=name, model_kwargs={"num_classes": 5, **kwargs}
        )
        assert torch.equal(load_pruned(tmp_path / "out")(x), expected)


def test_model_that_would_not_load_back_is_not_saved(tmp_path):
    pruned = Own(4)
    pruned.register_buffer("shift", torch.ones(1), persistent=False)  # the dense model has none
    with pytest.raises(ValueError, match="expected some of the model, found 'shift'"):
        save_pruned(pruned, tmp_path / "out", dense=Own())
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_not_plain_are_refused(pruned, tmp_path):
    with pytest.raises(ValueError, match="plain JSON"):
        save_pruned(pruned, tmp_path / "a", model_kwargs={"norm_layer": nn.BatchNorm2d})
    with pytest.raises(ValueError, match="plain JSON"):
        save_pruned(pruned, tmp_path / "b", provenance={"loss": float("nan")})


def test_folder_in_use_is_kept(pruned, saved, tmp_path):
    with pytest.raises(ValueError, match="overwrite=True"):
        save_pruned(pruned, saved)
    strange = tmp_path / "thesis"
    strange.mkdir()
    (strange / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ValueError, match="saved pruned model to overwrite"):
        save_pruned(pruned, strange, overwrite=True)
    assert (strange / "thesis.tex").read_text() == "ten years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, found a file"):
        save_pruned(pruned, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwriting_leaves_the_new_model_alone(saved, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(tpvprune.disk.atomic, "_exchange", lambda *_: False)
    other = narrow(build("cifar_resnet20", {}, max_elements=10**7), 3)
    save_pruned(other, saved, overwrite=True)
    assert load_pruned(saved).layer1[0].conv1.out_channels == 3
    assert [entry.name for entry in saved.parent.iterdir()] == ["out"]


FAILURES = {
    "weights": (tpvprune.disk.tensors, "save_file"),
    "flush": (tpvprune.disk.atomic, "_flush"),
    "replace": (tpvprune.disk.atomic, "_replace"),
}


@pytest.mark.parametrize("step", FAILURES)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_the_old_model(pruned, saved, monkeypatch, step, error):
    def fail(*_, **__):
        raise error

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(*FAILURES[step], fail)
    expected = ValueError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_pruned(narrow(pruned, 2), saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["out"]


def test_failed_second_rename_puts_the_old_model_back(pruned, saved, monkeypatch):
    monkeypatch.setattr(tpvprune.disk.atomic, "_exchange", lambda *_: False)
    rename = type(saved).rename

    def fail(path, target):
        if path.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(type(saved), "rename", fail)
    with pytest.raises(ValueError, match="Input/output error"):
        save_pruned(pruned, saved, overwrite=True)
    monkeypatch.undo()
    assert load_pruned(saved).layer1[0].conv1.out_channels == 5


HUGE = 10**12
BAD_CONFIGS = {
    "version": ({"format_version": 2}, "format_version 1"),
    "version type": ({"format_version": True}, "format_version 1"),
    "model type": ({"model": 3}, "'model' to be str"),
    "unknown model": ({"model": "no_such_net"}, "name of a timm model"),
    "model path": ({"model": "../../etc/passwd"}, "name of a timm model"),
    "hub model": ({"model": "hf-hub:someone/model"}, "name of a timm model"),
    "local model": ({"model": "local-dir:/tmp"}, "name of a timm model"),
    "checkpoint": ({"model_kwargs": {"checkpoint_path": "/tmp/x.pth"}}, "architecture options"),
    "download": ({"model_kwargs": {"pretrained": True}}, "architecture options"),
    "overlay": ({"model_kwargs": {"pretrained_cfg": {"file": "x"}}}, "architecture options"),
    "odd kwargs": ({"model_kwargs": {"no_such_option": 1}}, "cannot build"),
    "huge model": ({"model_kwargs": {"num_classes": HUGE}}, "far more memory"),
    "huge number": ({"model_kwargs": {"num_classes": 10**30}}, "plain JSON"),
    "huge depth": ({"model": "test_vit", "model_kwargs": {"depth": HUGE}}, "far more memory"),
    "many layers": ({"model": "test_vit", "model_kwargs": {"depth": 10**6}}, "far more memory"),
    "huge input": ({"pretrained_cfg": {"input_size": [3, 10**5, 10**5]}}, "input_size of three"),
    "odd input": ({"pretrained_cfg": {"input_size": [3, -1, 24]}}, "input_size of three"),
    "infinite crop": ({"pretrained_cfg": {"crop_pct": 1e-300}}, "crop_pct from 0.05"),
    "no spread": ({"pretrained_cfg": {"std": [0, 0, 0]}}, "std of numbers"),
    "mean of words": ({"pretrained_cfg": {"mean": "bright"}}, "mean of numbers"),
    "interpolation": ({"pretrained_cfg": {"interpolation": "__import__"}}, "interpolation of"),
    "long name": ({"attributes": {"x" * 10**5: {"stride": 1}}}, "module paths"),
    "other head": ({"model_kwargs": {"num_classes": 3}}, "shape within"),
    "no shapes": ({"shapes": {}}, "not from one save"),
    "negative kept": ({"kept": {"layer1.0.conv1": [-1]}}, "channel indices"),
    "kept type": ({"kept": {"layer1.0.conv1": "all"}}, "channel indices"),
    "attribute of nothing": ({"attributes": {"layer9": {"stride": 1}}}, "module paths"),
    "attribute kind": ({"attributes": {"layer1": 3}}, "module paths"),
    "new attribute": ({"attributes": {"conv1": {"evil": 1}}}, "conv1.evil"),
    "method": ({"attributes": {"conv1": {"forward": 1}}}, "conv1.forward"),
    "private": ({"attributes": {"conv1": {"_parameters": 1}}}, "conv1._parameters"),
    "flag": ({"attributes": {"conv1": {"training": 1}}}, "conv1.training"),
    "large attribute": ({"attributes": {"conv1": {"in_channels": HUGE}}}, "not above"),
    "negative attribute": ({"attributes": {"conv1": {"in_channels": -1}}}, "not above"),
    "attribute type": ({"attributes": {"conv1": {"in_channels": 1.5}}}, "not above"),
    "bool attribute": ({"attributes": {"conv1": {"in_channels": True}}}, "not above"),
    "tuple attribute": ({"attributes": {"conv1": {"stride": [1]}}}, "not above"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_hostile_config_is_refused(saved, name):
    changes, message = BAD_CONFIGS[name]
    edit(saved, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_pruned(saved)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"format_version": NaN}', "[" * 100_000, '{"format_version": 1}', "\x00"],
)
def test_damaged_config_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_pruned(saved)


@pytest.mark.parametrize("length", [0, 4, 100, -1000])
def test_truncated_weights_are_refused(saved, length):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="damage"):
        load_pruned(saved)


@pytest.mark.parametrize("missing", sorted(FILES))
def test_missing_file_is_named(saved, missing):
    (saved / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        load_pruned(saved)


def test_pickle_under_the_name_of_weights_is_not_run(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path),))

    torch.save({"x": Bomb()}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        load_pruned(saved)
    assert saved.is_dir()


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    edit(folder, shapes={name: list(tensor.shape) for name, tensor in state.items()})


BAD_WEIGHTS = {
    "larger": (lambda s: s.update({"conv1.weight": torch.zeros(17, 3, 3, 3)}), "shape within"),
    "rank": (lambda s: s.update({"conv1.weight": torch.zeros(16, 3)}), "shape within"),
    "empty": (lambda s: s.update({"conv1.weight": torch.zeros(0, 3, 3, 3)}), "shape within"),
    "lacking": (lambda s: s.pop("conv1.weight"), "lacks 'conv1.weight'"),
    "surplus": (lambda s: s.update({"extra": torch.zeros(1)}), "lacks 'extra'"),
    "type": (lambda s: s.update({"conv1.weight": s["conv1.weight"].long()}), "type like"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(saved, name):
    change, message = BAD_WEIGHTS[name]
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        load_pruned(saved)


def test_a_list_of_widths_is_saved_as_a_list(tmp_path):
    """timm's MixedConv2d keeps how many channels each kernel gets in a list."""
    torch.manual_seed(0)
    mixed = timm.layers.MixedConv2d(12, 16, [3, 5], depthwise=False)
    dense = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), mixed, nn.Flatten(), nn.Linear(1024, 4))
    groups = find_groups(dense.eval(), torch.randn(2, 3, 8, 8))
    kept = {g.name: torch.arange(g.num_channels) % 2 == 0 for g in groups}
    kept["0"] = torch.arange(12) != 1
    pruned = remove_channels(dense, groups, kept)
    assert isinstance(pruned[2].splits, list) and sum(pruned[2].splits) == 11
    loaded = load_pruned(save_pruned(pruned, tmp_path / "out", dense=dense), model=dense)
    assert loaded[2].splits == pruned[2].splits
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), pruned(x))


class Versioned(nn.Sequential):
    """Refuses a state dict that does not say its version (as torchvision's MNASNet does)."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2, found {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_a_model_whose_state_has_a_version_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = Versioned(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)).eval()
    x = torch.randn(16, 6)
    result = prune(model, x.split(4), keep=0.5)
    save_pruned(result, tmp_path / "small", dense=model)
    assert torch.equal(load_pruned(tmp_path / "small", model=model)(x), result.model(x))
