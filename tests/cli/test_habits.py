"""Small habits of the command line: versions, plans, completion, own models, saved folders."""

import importlib
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from image_cases import write_classes, write_images

from tpvprune.cli import benchmark, expected_time, planning, pruning
from tpvprune.cli import entry as cli
from tpvprune.cli.entry import main
from tpvprune.disk.digest import file_digest
from tpvprune.passes.drawing import hold_back
from tpvprune.pipeline import prune
from tpvprune.saved.checkpoint import load_pruned, save_pruned
from tpvprune.saved.models import load_model

SIZE = ["--img-size", "32", "--crop-pct", "1"]
FACTORY = """
from torch import nn

def small(width=6):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )

def trained():
    import torch

    torch.manual_seed(0)
    return small()

def of_timm():
    import timm, torch

    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)

def broken():
    raise RuntimeError("a long story\\nin two lines")

def number():
    return 3
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images, a dense checkpoint, a pruned folder of it, and a module of the user's own."""
    root = tmp_path_factory.mktemp("habits")
    write_images(root / "flat", 12)
    write_classes(root / "classes", ["a", "b", "c"])
    write_classes(root / "two", ["a", "b"])
    torch.manual_seed(0)
    dense = timm.create_model("test_resnet", num_classes=3).eval()
    torch.save(dense.state_dict(), root / "weights.pt")
    result = prune(dense, [torch.randn(8, 3, 32, 32)], keep=0.6, criterion="magnitude")
    weights = root / "weights.pt"
    origin = {"weights": str(weights), "weights_sha256": file_digest(weights)}
    save_pruned(result, root / "pruned", provenance=origin)
    (root / "mine_for_tests.py").write_text(FACTORY)
    return root


@pytest.fixture(autouse=True)
def _own_module_forgotten():
    yield
    sys.modules.pop("mine_for_tests", None)


def test_version_names_what_decides_a_result(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tpvprune", "torch", "timm", "torch-pruning"]
    assert all(line.split()[1][0].isdigit() for line in lines)


# ---- completion ------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_knows_the_flags(shell, capsys):
    pytest.importorskip("shtab", reason="needs shtab: pip install 'tpvprune[completion]'")
    with pytest.raises(SystemExit) as stop:
        main(["completion", shell])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "tpvprune" in out
    assert "dynamic-batch" in out


def test_completion_without_shtab_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = run("completion", "bash")
    assert (code, out) == (2, "")
    assert "pip install 'tpvprune[completion]'" in err


# ---- interruption and errors -----------------------------------------------------------------


def test_interruption_says_what_became_of_the_output(run, monkeypatch, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    for command, home, words in (
        ("prune", pruning, "interrupted: nothing was written\n"),
        ("prune", pruning, "output is untouched; the same command goes on"),
        ("benchmark", benchmark, "the same command"),
    ):
        monkeypatch.setattr(home, f"run_{command}", interrupt)
        model = ["--model", "test_resnet", "--data-dir", "flat", "--output", tmp_path / "out"]
        code, _, err = run(command, *model)
        assert code == 130
        assert words in err
        (tmp_path / "out.unfinished-pruning.safetensors").touch()


def test_errors_speak_of_flags_and_wrap_on_a_terminal_only(run, root, monkeypatch):
    argv = ["prune", "--model", "test_resnet", "--data-dir", "flat", "--output", "pruned"]
    code, _, err = run(*argv)
    assert code == 2
    assert "pass --overwrite" in err
    assert len(err.splitlines()) == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, _, wrapped = run(*argv)
    assert max(map(len, wrapped.splitlines())) <= max(80, *map(len, err.split()))
    assert wrapped.split() == err.split()


# ---- plans -----------------------------------------------------------------------------------


def test_dry_run_of_prune_plans_and_leaves_nothing(run, root):
    before = sorted(root.iterdir())
    model = ["--model", "test_resnet", "--checkpoint", "weights.pt", "--data-dir", "flat", *SIZE]
    code, out, err = run("prune", *model, "--output", "new", "--dry-run", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["dry_run"] is True
    assert document["num_images"] == 12
    assert document["seconds"] > 0
    assert 0 < document["smallest"]["macs"] < document["dense"]["macs"]
    assert {group["name"] for group in document["groups"]} >= {"conv1.0"}
    assert "dry run: nothing was written" in err
    held = sum(map(len, hold_back(torch.zeros(12, 1).split(5))[1]))
    assert f"12 images of flat, {held} of them held back" in " ".join(err.split())
    assert sorted(root.iterdir()) == before
    limits = ["--keep", "0.001", "--min-channels", "8"]
    code, _, err = run("prune", *model, "--output", "new", *limits, "--dry-run")
    assert code == 3
    assert "cannot be reached" in " ".join(err.split())


def test_a_dry_run_of_several_sizes_is_one_of_each(run, tmp_path, monkeypatch):
    tried = []

    def noted(_model, _batches, *, keep, ranking, **_):
        tried.append((keep, ranking))
        return SimpleNamespace(ranking="the first one's")

    monkeypatch.setattr(planning, "prune", noted)
    write_images(tmp_path / "many", 48)
    argv = ["prune", "--model", "test_resnet", "--data-dir", tmp_path / "many", *SIZE, "--json"]
    code, out, err = run(*argv, "--output", "new", "--dry-run", "--keep", "0.8", "0.5", "0.001")
    assert [keep for keep, _ in tried] == json.loads(out)["keep"] == [0.8, 0.5, 0.001]
    assert [ranking for _, ranking in tried] == [None, "the first one's", "the first one's"]
    text = " ".join(err.split())
    assert "budget: 80.00 %, 50.00 %, 0.10 % of macs" in text
    assert code == 3 and "0.10 % cannot be reached" in text


def test_estimates_come_from_a_trial_of_the_whole_run(run, tmp_path, monkeypatch):
    tried = []

    def slow(_, batches, **options):
        tried.append((sum(map(len, batches)), options["steps"], options["repair"]))
        time.sleep(0.3)
        return SimpleNamespace(ranking=None)

    monkeypatch.setattr(planning, "prune", slow)
    write_images(tmp_path / "many", 48)
    argv = ["prune", "--model", "test_resnet", "--data-dir", tmp_path / "many", *SIZE, "--json"]
    argv += ["--output", "new", "--dry-run"]
    _, out, err = run(*argv, "--steps", "2", "--repair", "reconstruct")
    assert tried == [(12, 2, "compensate")]
    assert json.loads(out)["seconds"] == pytest.approx(0.3 * 4**0.6, rel=0.2)
    text = " ".join(err.split())
    assert "12 images of noise took" in text
    assert "besides block reconstruction" in text
    run(*argv, "--granularity", "weight")
    monkeypatch.setattr(expected_time, "_PATIENCE", 0)
    _, out, err = run(*argv)
    assert len(tried) == 1
    assert "besides reading images, variance curves and least squares" in " ".join(err.split())


def test_dry_run_of_distill_and_benchmark(run, root):
    before = sorted(root.iterdir())
    code, out, err = run(
        "distill", "pruned", "--data-dir", "flat", *SIZE, "--epochs", "4", "--output", "new",
        "--dry-run", "--json",
    )  # fmt: skip
    assert "besides reading images and measuring" in " ".join(err.split())
    assert "least squares" not in err
    long = json.loads(out)
    assert (code, long["epochs"], long["num_images"]) == (0, 4, 11)
    code, out, _ = run(
        "benchmark", "--model", "test_resnet", "--num-classes", "3", "--data-dir", "classes",
        "--eval-dir", "classes", *SIZE, "--criteria", "tpv,magnitude", "--keep", "0.5,0.3",
        "--repair", "none", "--ranking", "plain", "--seeds", "2", "--output", "new", "--dry-run",
        "--json",
    )  # fmt: skip
    assert (code, json.loads(out)["num_rows"]) == (0, 2 * 2 * 2)
    assert sorted(root.iterdir()) == before


# ---- saved folders ---------------------------------------------------------------------------


def test_groups_takes_a_saved_folder(run):
    code, out, err = run("groups", "pruned", *SIZE, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["model"] == "test_resnet"
    assert "saves up to" in err
    dense = json.loads(run("groups", "--model", "test_resnet", *SIZE, "--json")[1])
    assert document["dense"]["macs"] < dense["dense"]["macs"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local-dir:pruned", "this is a saved pruned model: name the folder pruned"),
        ("local-dir:flat", "expected flat/config.json of timm, found none"),
        ("pruned", "it is a folder"),
    ],
)
def test_folders_as_models_are_explained(run, name, message):
    code, _, err = run("groups", "--model", name)
    assert code == 2
    assert message in err


def test_evaluate_shows_both_models_side_by_side(run):
    argv = ["evaluate", "pruned", "--data-dir", "classes", "--latency-repeats", "0", *SIZE]
    code, out, err = run(*argv, "--dense", "weights.pt", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["macs"] < document["dense"]["macs"]
    assert (document["dense"]["agreement"], document["dense"]["top1"] is None) == (1, False)
    assert {"dense", "pruned", "ratio"} <= set(err.split())
    assert f"measured on {document['images']['num_images']} images of classes" in err
    found = json.loads(run(*argv, "--json")[1])["dense"]  # the same file, by its SHA-256
    assert found == document["dense"]


def test_notes_of_evaluate_do_not_contradict_each_other(run):
    argv = ["evaluate", "pruned", "--data-dir", "two", "--latency-repeats", "0", *SIZE]
    _, _, err = run(*argv)
    text = " ".join(err.split())
    assert "two has 2 subfolders, the model 3 classes" in text
    assert "no labels found" not in text
    assert "top-5" not in text
    assert "agreement" in text


# ---- models of the user's own ----------------------------------------------------------------


def test_own_model_goes_all_the_way(run, tmp_path):
    own = ["--model", "mine_for_tests:small", "--model-kwargs", "width=9"]
    data = ["--data-dir", "flat", *SIZE, "--latency-repeats", "0"]
    code, out, _ = run("prune", *own, *data, "--output", tmp_path / "own", "--json")
    pruned = json.loads(out)["pruned"]
    assert code == 0
    code, out, _ = run("evaluate", tmp_path / "own", *own, *data, "--json")
    assert (code, json.loads(out)["macs"]) == (0, pruned["macs"])
    code, _, err = run("evaluate", tmp_path / "own", *data)
    assert code == 2
    assert "pass --model package.module:factory" in err
    assert "(it was 'mine_for_tests:small')" in err
    assert "mine_for_tests" not in (tmp_path / "own" / "model.safetensors").read_text("latin-1")


def test_own_model_is_shown_images_as_it_was_when_it_was_pruned(run, tmp_path):
    own = ["--model", "mine_for_tests:trained", "--latency-repeats", "0", "--json"]
    small = ["--img-size", "24", "--crop-pct", "1", "--mean", "0.2", "--eval-dir", "classes"]
    code, out, err = run("prune", *own, *small, "--data-dir", "flat", "--output", tmp_path / "own")
    assert code == 0 and "random weights" not in err  # the function has made them
    before = json.loads(out)
    code, out, _ = run("evaluate", tmp_path / "own", *own, "--data-dir", "classes")
    found = json.loads(out)
    assert found["preprocessing"] == before["preprocessing"]
    assert [found[key] for key in ("macs", "top1")] == [
        before["pruned"][key] for key in ("macs", "top1")
    ]
    again = ["distill", tmp_path / "own", *own, "--data-dir", "flat", "--epochs", "1"]
    code, out, _ = run(*again, "--output", tmp_path / "taught")
    assert code == 0
    assert json.loads(out)["dense"]["macs"] == before["dense"]["macs"]
    config = json.loads((tmp_path / "taught" / "config.json").read_text("utf-8"))
    assert config["pretrained_cfg"]["input_size"] == [3, 24, 24]
    assert config["provenance"]["weights"] == "factory"


def test_a_function_may_give_weights_to_a_model_of_timms(run, tmp_path):
    own = ["--model", "mine_for_tests:of_timm", "--data-dir", "flat", "--latency-repeats", "0"]
    code, _, err = run("prune", *own, *SIZE, "--output", tmp_path / "own")
    assert code == 0 and "random weights" not in err
    assert run("evaluate", tmp_path / "own", *own[2:])[0] == 0
    code, out, _ = run("evaluate", tmp_path / "own", *own, "--dense", "factory", "--json")
    assert code == 0 and json.loads(out)["agreement"] > 0
    train = ["distill", tmp_path / "own", "--epochs", "1", "--output", tmp_path / "taught"]
    code, _, err = run(*train, *own[2:])
    assert code == 2
    assert "expected --model package.module:factory, whose weights" in err
    assert "(it was 'mine_for_tests:of_timm')" in err
    assert run(*train, *own)[0] == 0


def test_other_weights_than_those_it_was_pruned_from_are_noted(run, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "b.pt")
    argv = ["evaluate", "pruned", "--data-dir", "classes", "--latency-repeats", "0", *SIZE]
    note = "is not the file that pruned was pruned from"
    assert note in " ".join(run(*argv, "--dense", tmp_path / "b.pt")[2].split())
    assert note not in " ".join(run(*argv, "--dense", "weights.pt")[2].split())


def test_own_model_is_distilled_and_pruned_again(run, tmp_path):
    own = ["--model", "mine_for_tests:small", "--model-kwargs", "width=9"]
    sys.path.insert(0, str(Path.cwd()))
    dense = importlib.import_module("mine_for_tests").small(width=9)
    torch.save(dense.state_dict(), tmp_path / "own.pt")
    data = ["--data-dir", "flat", *SIZE, "--latency-repeats", "0", "--json"]
    train = ["--epochs", "1", "--lr", "1e-4"]
    weights = ["--checkpoint", tmp_path / "own.pt"]
    for argv in (
        ["prune", *own, *weights, "--keep", "0.7", "--output", tmp_path / "a"],
        ["distill", tmp_path / "a", *own, *train, "--output", tmp_path / "b"],
        ["prune", tmp_path / "b", *own, "--keep", "0.7", "--output", tmp_path / "c"],
        ["distill", tmp_path / "c", *own, *train, "--output", tmp_path / "d"],
    ):
        code, out, err = run(*argv, *data)
        assert code == 0, err
    document = json.loads(out)
    assert document["dense"]["params"] == sum(p.numel() for p in dense.parameters())
    assert document["pruned"]["macs"] <= 0.49 * document["dense"]["macs"]
    loaded = load_pruned(tmp_path / "d", model=dense)
    assert sum(p.numel() for p in loaded.parameters()) == document["pruned"]["params"]


def test_the_size_of_inputs_of_an_own_model_is_said_unless_it_is_given(run):
    note = "for a model of your own: --img-size N sets another side"
    _, _, err = run("groups", "--model", "mine_for_tests:small")
    assert note in " ".join(err.split())
    _, _, err = run("groups", "--model", "mine_for_tests:small", "--img-size", 24)
    assert note not in " ".join(err.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_for_tests:broken", r"cannot be built (a long story)"),
        ("mine_for_tests:number", "returns int"),
        ("mine_for_tests:nothing", "no function or module class 'nothing'"),
        ("no_such_module:x", "cannot be imported"),
    ],
)
def test_own_models_that_do_not_work_are_one_line(run, name, message):
    code, _, err = run("groups", "--model", name)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_names_from_files_are_never_imported(run, root, tmp_path):
    with pytest.raises(ValueError, match="unknown model 'mine_for_tests:small'"):
        load_model("mine_for_tests:small")
    config = json.loads((root / "pruned" / "config.json").read_text("utf-8"))
    config["model"] = "mine_for_tests:small"
    for name in ("model.safetensors", "report.json"):
        (tmp_path / name).write_bytes((root / "pruned" / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    for argv in (
        ["evaluate", tmp_path, "--data-dir", "flat", "--dense", "weights.pt"],
        ["groups", tmp_path],
        ["export", tmp_path, "--format", "pt2"],
        ["groups", "--model", f"local-dir:{tmp_path}"],
    ):
        assert run(*argv)[0] == 2
        assert "mine_for_tests" not in sys.modules


@pytest.mark.parametrize("flag", [("--epochs", 3), ("--lr", 0.5), ("--no-mix",)])
def test_flags_of_training_are_refused_where_nothing_is_trained(run, flag, tmp_path):
    model = ["--model", "test_resnet", "--data-dir", "flat", "--output", tmp_path / "out"]
    code, _, err = run("prune", *model, *flag)
    assert code == 2
    assert f"{flag[0]}: expected only with --repair distill, found --repair compensate" in err
    code, _, err = run("prune", *model, "-j", -1)
    assert code == 2
    assert "-j/--workers" in err


def test_widths_that_are_not_rounded_are_named(run, tmp_path):
    model = ["--model", "test_resnet", "--data-dir", "flat", "--num-images", 8, "--img-size", 24]
    code, _, err = run("prune", *model, "--round-to", 64, "--output", tmp_path / "out")
    assert code in {0, 3}
    assert "note: --round-to 64 leaves" in err
    code, _, err = run("prune", *model, "--round-to", 10**5, "--output", tmp_path / "new")
    assert code == 2
    assert "round_to: expected at most" in err
    assert not (tmp_path / "new").exists()
    code, _, err = run("prune", *model, "--round-to", "auto", "--output", tmp_path / "new")
    assert code == 0
    assert "--round-to" not in err
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["provenance"]["recipe"]["round_to"] == "auto"
    shapes = {shape[0] for name, shape in config["shapes"].items() if name.endswith("conv1.weight")}
    assert all(n % 2 == 0 for n in shapes)
    assert "or auto, found 'x'" in run("prune", *model, "--round-to", "x", "--output", "o")[2]


# ---- wrong flags, and what the exit code means -------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message", "where"),
    [
        (["prune", "--modle", "x"], "--modle: did you mean --model?", "prune"),
        (["prune", "--modle=x"], "--modle: did you mean --model?", "prune"),
        (["benchmark", "--model", "x", "--latency-repeats", "0"], "--latency-repeats", "benchmark"),
        (["demo", "what", "--output", "o"], "what", "demo"),
    ],
)
def test_unknown_flags_are_named_and_point_to_the_help_of_the_command(argv, message, where, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "unrecognized arguments: " + message in err
    assert err.endswith(f"(see tpvprune {where} --help)\n")


def test_beginnings_of_flags_stand_for_them(tmp_path, capsys):
    assert main(["compare", str(tmp_path), "--overw"]) == 2
    assert "expected at least two folders" in capsys.readouterr().err


def test_unknown_devices_are_answered_in_whole_words(tmp_path, capsys):
    write_images(tmp_path, 1)
    argv = ["score", "--model", "test_resnet", "--data-dir", tmp_path, "--output", tmp_path / "o"]
    assert main([*map(str, argv), "--device", "foo"]) == 2
    err = capsys.readouterr().err
    assert "--device foo: cannot be used here: expected cpu, cuda or cuda:1 (" in err
    assert err.endswith(" ...)\n")


def test_exit_codes_are_the_same_everywhere(capsys):
    known = {cli.DONE, cli.BUG, cli.BAD_INPUT, cli.NOT_REACHED, cli.LOST, cli.INTERRUPTED}
    with pytest.raises(SystemExit):
        main(["--help"])
    page = (Path(__file__).parents[2] / "docs" / "guide.md").read_text("utf-8")
    for text in (capsys.readouterr().out, page):
        (listed,) = re.findall(r"exit codes: (.*?130 \w+)\.", " ".join(text.split()), re.I)
        assert {int(number) for number in re.findall(r"\b(\d+) ", listed)} == known
