"""When memory runs out, batches are halved, it is said, and the result is the same."""

import json

import pytest
import timm
import torch
from image_cases import write_classes, write_images

import tpvprune
from tpvprune.cli.entry import main
from tpvprune.passes.memory import is_lack_of_memory
from tpvprune.saved.checkpoint import load_pruned

SIZE = ["--img-size", "24", "-j", "1", "--num-images", "8"]
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                        "allocate memory: you tried to allocate 8 bytes."),
    "python": MemoryError(),
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "weights.pt")
    write_images(tmp_path / "flat", 10, size=24)
    write_classes(tmp_path / "classes", ["a", "b", "c"], 4)
    return tmp_path


@pytest.fixture
def memory(monkeypatch):
    """Let the models of timm fail above so many images; return how many they have seen at most."""
    plain = timm.models.ResNet.forward
    state = {"most": 10**9, "error": ERRORS["cuda"], "seen": 0}

    def forward(self, x):
        if len(x) > state["most"]:
            raise state["error"]
        state["seen"] = max(state["seen"], len(x))
        return plain(self, x)

    monkeypatch.setattr(timm.models.ResNet, "forward", forward)
    return state


def prune(output, *extra):
    model = ["--model", "test_resnet", "--checkpoint", "weights.pt", "--data-dir", "flat"]
    return ["prune", *model, *SIZE, "--latency-repeats", "0", "--output", output, *extra]


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.long
def test_pruning_goes_on_with_smaller_batches_to_the_same_model(place, memory, name, capsys):
    cheap = ["-b", "8", "--criterion", "activation_variance", "--repair", "none"]
    assert main(prune("whole", *cheap)) == 0
    assert "out of memory" not in capsys.readouterr().err
    memory |= {"most": 2, "error": ERRORS[name]}
    code, err = main(prune("small", *cheap)), capsys.readouterr().err
    assert code == 0, err
    assert "note: out of memory: going on with 4 images per batch" in err
    assert "note: out of memory: going on with 2 images per batch" in err
    whole, small = (load_pruned(place / n).state_dict() for n in ("whole", "small"))
    for key, value in whole.items():
        assert value.shape == small[key].shape
        assert torch.allclose(value, small[key], rtol=1e-3, atol=1e-4)  # float32 sums, other order


def test_weights_are_refitted_with_fewer_inputs_at_a_time(place, memory, untouched):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    batches = list(torch.randn(7, 3, 24, 24).split(2))
    groups = tpvprune.find_groups(model, batches[0])
    kept = {g.name: torch.arange(g.num_channels) > 1 for g in groups}
    small = tpvprune.remove_channels(model, groups, kept)
    given = {"groups": groups, "kept": kept, "ridge": 0.1}
    expected = tpvprune.compensate_weights(small, model, batches, **given)
    memory |= {"most": 5, "seen": 0}  # all seven at once do not fit
    with untouched(model), pytest.warns(UserWarning, match="with 3 inputs at a time instead of 7"):
        repaired = tpvprune.compensate_weights(small, model, batches, **given)
    assert memory["seen"] <= 5
    for (key, value), wanted in zip(
        repaired.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.allclose(value, wanted, rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("most", [0, 2])
def test_what_does_not_fit_at_all_is_one_line(place, memory, capsys, monkeypatch, most):
    def fail(*_, **__):
        raise ERRORS["cpu"]

    monkeypatch.setattr("tpvprune.pipeline.run.remove_channels", fail)
    memory["most"] = most  # 0: not even a first look at the model
    assert main(prune("out", "-b", "8", "--criterion", "magnitude", "--repair", "none")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tpvprune: error: ")
    assert "out of memory" in last
    assert not (place / "out").exists()


@pytest.mark.long
def test_other_commands_go_on_too_and_the_flag_that_was_given_is_the_first_try(
    place, memory, capsys
):
    assert main(prune("out", "-b", "8", "--criterion", "magnitude", "--repair", "none")) == 0
    score = ["score", *prune("x")[1:-4], "--criterion", "jacobian", "-b", "8"]
    score[score.index("flat")] = "classes"
    evaluate = ["evaluate", "out", "--data-dir", "classes", *SIZE, "--latency-repeats", "0"]
    model = ["--model", "test_resnet", "--checkpoint", "weights.pt", "--data-dir", "flat", *SIZE]
    rows = ["--criteria", "magnitude", "--ranking", "plain", "--keep", "0.5", "--seeds", "1"]
    training = ["--data-dir", "flat", *SIZE, "--dense", "weights.pt", "--latency-repeats", "0"]
    for argv, word in (
        ([*evaluate, "-b", "8"], "going on with 4 images"),
        ([*score, "--output", "s.json"], "going on with 4 images"),
        (
            ["benchmark", *model, "-b", "8", "--eval-dir", "classes", *rows, "--repair", "bn",
             "--output", "rows"],
            "going on with 4 images",
        ),
        (
            ["distill", "out", *training, "-b", "8", "--epochs", "1", "--output", "trained"],
            "going on with 4 images per batch (which trains differently)",
        ),
    ):  # fmt: skip
        memory |= {"most": 5, "seen": 0}
        capsys.readouterr()
        assert main(argv) == 0, (argv, capsys.readouterr().err)
        assert word in " ".join(capsys.readouterr().err.split()), argv
        assert 2 <= memory["seen"] <= 5
    report = json.loads((place / "trained" / "report.json").read_text())
    assert report["training"]["batch_size"] == 4


def test_other_errors_are_no_lack_of_memory():
    assert not is_lack_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lack_of_memory(ValueError("out of memory"))
