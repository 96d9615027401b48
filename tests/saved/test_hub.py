"""Publishing and fetching, against a stand-in of the hub on this machine."""

import json
import socket

import hub_server
import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants

from tpvprune.cli.entry import main
from tpvprune.pipeline import prune
from tpvprune.saved import downloads
from tpvprune.saved.checkpoint import load_pruned, read_config, save_pruned, saved_masks
from tpvprune.saved.hub import model_card, push_to_hub


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    return prune(model, [torch.randn(8, 3, 32, 32)], keep=0.7, criterion="magnitude")


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    return save_pruned(
        result,
        tmp_path_factory.mktemp("hub") / "pruned",
        provenance={"command": "tpvprune prune --model test_resnet", "weights": "pretrained"},
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, with huggingface_hub pointed at it and an empty cache."""
    with hub_server.running() as (address, files, requests):
        point_at(monkeypatch, address, tmp_path / "cache")
        yield files, requests


def point_at(monkeypatch, address, cache):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")


def test_what_is_pushed_loads_bit_for_bit(saved, hub):
    files, _ = hub
    assert push_to_hub(saved, "org/small").endswith("/org/small")
    assert set(files["org/small"]) == {
        "README.md", "config.json", "model.safetensors", "report.json"
    }  # fmt: skip
    loaded, own = load_pruned("hf-hub:org/small"), load_pruned(saved)
    for name, value in own.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(inputs), own(inputs))


def test_a_result_is_pushed_without_a_folder(result, hub):
    files, _ = hub
    push_to_hub(result, "org/direct", include_report=True)
    assert set(files["org/direct"]) == {
        "README.md", "config.json", "model.safetensors", "report.json", "report.html"
    }  # fmt: skip
    expected = sum(p.numel() for p in result.model.parameters())
    assert sum(p.numel() for p in load_pruned("hf-hub:org/direct").parameters()) == expected


def test_masks_of_single_weights_go_along(saved, hub, tmp_path):
    model = load_pruned(saved)
    mask = torch.rand(model.fc.weight.shape) < 0.5
    save_pruned(model, tmp_path / "masked", masks={"fc.weight": mask})
    push_to_hub(tmp_path / "masked", "org/masked")
    assert torch.equal(saved_masks(downloads.local_folder("hf-hub:org/masked"))["fc.weight"], mask)


def test_only_what_loading_needs_is_fetched(saved, hub):
    files, requests = hub
    push_to_hub(saved, "org/small")
    files["org/small"]["evil.py"] = b"raise SystemExit"
    files["org/small"]["pytorch_model.bin"] = b"pickle"
    folder = downloads.local_folder("hf-hub:org/small")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert not [path for _, path in requests if path.endswith((".py", ".bin"))]


def test_the_cache_serves_without_the_hub(saved, hub, monkeypatch):
    push_to_hub(saved, "org/small")
    load_pruned("hf-hub:org/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_pruned("hf-hub:org/small")
    with pytest.raises(ValueError, match="cannot be reached, and the local cache does not hold"):
        load_pruned("hf-hub:org/other")


def test_commands_take_names_on_the_hub(saved, hub, tmp_path, capsys):
    push_to_hub(saved, "org/small")
    file = tmp_path / "small.pt2"
    argv = ["export", "hf-hub:org/small", "--format", "pt2", "--img-size", "32"]
    assert main([*argv, "--output", str(file)]) == 0
    assert file.is_file(), capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf-hub:org/none", "hf-hub:a/b/c"])
def test_wrong_names_are_said_in_one_line(name, hub):
    with pytest.raises(ValueError, match=r"no such model|expected hf-hub:org/name") as caught:
        load_pruned(name)
    assert "\n" not in str(caught.value)


def test_refusal_and_silence_of_the_hub_are_said(saved, monkeypatch, tmp_path):
    with hub_server.running(refuse=True) as (address, _, _):
        point_at(monkeypatch, address, tmp_path)
        with pytest.raises(ValueError, match="the hub refused"):
            push_to_hub(saved, "org/small")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_at(monkeypatch, closed, tmp_path)
    with pytest.raises(ValueError, match=r"cannot be reached.*push_to_hub\(folder"):
        push_to_hub(saved, "org/small")
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        load_pruned("hf-hub:org/small")
    with pytest.raises(ValueError, match="expected org/name, found 'a/b/c'"):
        push_to_hub(saved, "a/b/c")


def test_a_damaged_folder_is_not_sent(saved, hub, tmp_path):
    files, _ = hub
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((saved / "config.json").read_bytes())
    (damaged / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="damage"):
        push_to_hub(damaged, "org/small")
    assert files == {}


# ---- the card -------------------------------------------------------------------------------


def test_card_has_numbers_command_and_how_to_load(saved):
    report = json.loads((saved / "report.json").read_text("utf-8"))
    text = model_card(saved, "org/small")
    for expected in (
        "pruned to 70\u202f% of its MACs",
        "No label was used",
        f"{report['pruned']['macs']:,.0f}".replace(",", "\u202f"),
        "tpvprune prune --model test_resnet",
        'tpvprune.load_pruned("hf-hub:org/small")',
        f"timm {timm.__version__}",
    ):
        assert expected in text, expected
    read = ModelCard(text).data
    assert (read.library_name, "label-free" in read.tags) == ("tpvprune", True)


def test_licence_is_that_of_the_parent_where_it_is_known(saved, tmp_path):
    parent = timm.get_pretrained_cfg("test_resnet.r160_in1k").to_dict()
    config = json.loads((saved / "config.json").read_text("utf-8"))

    def data_of(weights, license=None, **cfg):
        config["provenance"]["weights"] = weights
        config["pretrained_cfg"] = cfg
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ModelCard(model_card(tmp_path, "org/small", license=license)).data

    known = data_of("pretrained", tag="r160_in1k")
    assert known.license == parent["license"]
    assert known.base_model == parent["hf_hub_id"]
    # Weights of the user's own: whose licence they have is not known.
    for weights in ("random", "weights.pt"):
        assert data_of(weights, tag="r160_in1k", license_=1).license is None
    assert "Not known" in model_card(tmp_path, "org/small")
    assert data_of("weights.pt", license="mit").license == "mit"


def test_the_quick_start_of_the_card_runs(saved, hub):
    from PIL import Image

    push_to_hub(saved, "org/small")
    text = hub[0]["org/small"]["README.md"].decode()
    code = text.split("```python\n")[1].split("```")[0]
    names = {"image": Image.new("RGB", (50, 40))}
    exec(compile(code, "card", "exec"), names)
    assert names["outputs"].shape == (1, read_config(saved)["model_kwargs"]["num_classes"])
