"""`tpvprune distill`, `finetune` and `prune --repair distill`: round trips, resuming, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from image_cases import write_classes, write_images
from PIL import Image
from safetensors.torch import load_file

from tpvprune.cli import exporting, session_images
from tpvprune.cli import training as training_commands
from tpvprune.cli.entry import main
from tpvprune.images import training as image_training
from tpvprune.passes import difference, drawing
from tpvprune.passes.evaluation import Difference
from tpvprune.pipeline import setup
from tpvprune.repairs import duration, interpolation, training
from tpvprune.saved.checkpoint import load_pruned, read_config
from tpvprune.weights.masks import load_masks

CLASSES = 4
SMALL = ["-b", "8", "-j", "2", "--latency-repeats", "0"]
PRUNE = [
    *("prune", "--model", "test_resnet", "--checkpoint", "weights.pt", "--img-size", "32"),
    *("--crop-pct", "1", "--num-images", "24", *SMALL),
]
PRUNE_FEATURES = ["features.pt" if arg == "weights.pt" else arg for arg in PRUNE]
PRUNE_FEATURES += ["--num-classes", "0"]
CHEAP = ["--criterion", "magnitude", "--repair", "none"]
TRAIN = [*SMALL, "--epochs", "2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Weights, images, and pruned `small` and `features`; nothing is written into these."""
    root = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    with torch.no_grad():
        model.fc.weight.mul_(100)  # classes that depend on the image
    torch.save(model.state_dict(), root / "weights.pt")
    model.reset_classifier(0)
    torch.save(model.state_dict(), root / "features.pt")
    write_images(root / "flat", 40)
    write_images(root / "others", 40)
    write_images(root / "two", 2)
    write_classes(root / "classes", "abcd", 8)
    write_classes(root / "other", "ab", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        data = ["--data-dir", "flat", "--keep", "0.8", "--output"]
        assert main([*PRUNE, *CHEAP, *data, "small"]) == 0
        assert main([*PRUNE_FEATURES, *CHEAP, *data, "features"]) == 0
    return root


def distil(output, *extra, data="flat", source="small"):
    return ["distill", source, "--data-dir", data, *TRAIN, *extra, "--output", output]


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_what_is_closest_on_held_back_images_is_saved(run, root, tmp_path, monkeypatch, fraction):
    point = Difference(4, 0.9, 0.2, 1.0, 0.1)
    ended = point if fraction == 1 else Difference(4, 0.8, 0.2, 2.0, 0.2)
    ends = {}

    def nearest(start, end, *_, **__):
        ends[0.0], ends[1.0] = start.state_dict(), end.state_dict()
        model = end if fraction == 1 else interpolation._point(start, end, fraction)
        return interpolation.Between(model, fraction, point, ended)

    monkeypatch.setattr(training_commands, "nearest_between", nearest)
    code, out, err = run(*distil(tmp_path / "out", "--json"))
    document, said = json.loads(out), " ".join(err.split())
    assert code == 0
    training = document["training"]
    assert training["saved"] == ("trained" if fraction else "start")
    assert training["fraction"] == fraction
    # Of the start that is saved, what training would have made of it is told.
    assert training["after"]["agreement"] == (point if fraction else ended).agreement
    assert document["pruned"]["agreement"] == point.agreement
    assert document["held_back"]["output_variance"] == point.output_variance
    assert ("weights it began with are saved" in said) == (fraction == 0)
    assert ("0.5 of the way" in said) == (fraction == 0.5)
    assert (weights_of(tmp_path / "out") == weights_of(root / "small")) == (fraction == 0)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, t in saved.items():
        if t.is_floating_point():
            wanted = torch.lerp(ends[0.0][name], ends[1.0][name], fraction)
            torch.testing.assert_close(t, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num", [20, 38, 40])
def test_training_is_measured_on_images_that_no_earlier_fit_has_seen(
    run, tmp_path, monkeypatch, num
):
    """Of a folder that the cut saw whole, too, whatever the seeds, and of what was trained.

    A training on other images in between changes nothing.
    """
    fits, held, trained = [], [], []

    def images_of(batches):
        return {x.numpy().tobytes() for batch in batches for x in batch}

    def hold_back(*args, **kwargs):
        fit, kept = drawing.hold_back(*args, **kwargs)
        fits.append(images_of(fit))
        return fit, kept

    def choose(*args, **kwargs):
        batches = session_images.choose(*args, **kwargs)
        held.append(images_of(batches))
        return batches

    def training_images(*args, apart, **kwargs):
        trained.append((args[0].count, sorted(apart)))
        return image_training.training_images(*args, apart=apart, **kwargs)

    monkeypatch.setattr(setup, "hold_back", hold_back)
    monkeypatch.setattr(training_commands, "choose", choose)
    monkeypatch.setattr(training_commands, "training_images", training_images)
    cut = [*PRUNE, "--data-dir", "flat", "--keep", "0.6", "--num-images", str(num), *CHEAP]
    cut += ["--output", str(tmp_path / "0"), "--seed", "5"]
    assert run(*cut)[0] == 0
    for seed, data in [(1, "flat"), (2, "classes"), (3, "flat")]:
        again = ["--data-dir", data, "--output", str(tmp_path / str(seed)), "--seed", str(seed)]
        assert run("distill", str(tmp_path / str(seed - 1)), *again, *TRAIN)[0] == 0
    assert len(fits) == 1
    assert held[0] == held[2] != held[1]
    assert len(held[0]) == 4
    assert not held[0] & fits[0]
    assert trained[0] == trained[2]
    assert len(set(trained[0][1])) == 4


def test_int8_is_measured_on_images_that_no_fit_has_seen(run, tmp_path, monkeypatch):
    """After a cut that left 20 of 40 out, and after a training that left out 4 of these."""
    given = []

    def export_int8(_, batches, file, *, eval_images, **__):
        given.append(
            [{x.numpy().tobytes() for b in part for x in b} for part in (batches, eval_images)]
        )
        raise ValueError("enough is known")

    held = []

    def choose(*args, **kwargs):
        batches = session_images.choose(*args, **kwargs)
        held.append({x.numpy().tobytes() for batch in batches for x in batch})
        return batches

    monkeypatch.setattr(exporting, "export_int8", export_int8)
    monkeypatch.setattr(training_commands, "choose", choose)
    cut, trained = str(tmp_path / "cut"), str(tmp_path / "trained")
    argv = [*PRUNE, "--data-dir", "flat", "--keep", "0.6", *CHEAP, "--seed", "5", "--output", cut]
    assert run(*argv, "--num-images", "20")[0] == 0
    assert run("distill", cut, "--data-dir", "flat", *TRAIN, "--output", trained)[0] == 0
    for folder, num in ((cut, 0), (trained, 10)):
        argv = ["export", folder, "--int8", "--data-dir", "flat", "--seed", "3", "--json"]
        _, _, err = run(*argv, "--output", str(tmp_path / "x.onnx"))
        assert (f"{num} of the 14 that measure int8 took part" in " ".join(err.split())) == (
            num > 0
        )
    for batches, measuring in given:
        assert (len(batches), len(measuring)) == (26, 14)
        assert not batches & measuring
        assert held[0] <= measuring


def test_a_mirrored_teacher_is_what_training_is_measured_by(run, tmp_path):
    code, out, _ = run(*distil(tmp_path / "out", "--mirrored", "--epochs", "1", "--json"))
    document = json.loads(out)
    assert code == 0
    assert document["training"]["mirrored"] is True
    by_teacher = document["training"]["after"]["output_variance"]
    assert document["pruned"]["output_variance"] not in {by_teacher, None}


def test_distilled_folder_loads_says_how_it_was_made_and_can_be_distilled_again(run, tmp_path):
    code, out, err = run(*distil(tmp_path / "out", "--json"))
    document = json.loads(out)
    assert code == 0
    assert set(document) >= {
        *("model", "dense", "pruned", "blocked", "criterion", "used_labels", "keep", "of"),
        *("seed", "versions", "training", "output"),
    }
    training = document["training"]
    assert (training["epochs"], training["lr"], training["num_images"]) == (2, 0.001, 36)
    assert training["num_held_back"] == 4
    assert training["seconds"] > 0
    for side in ("before", "after"):
        assert training[side]["output_variance"] > 0
        assert 0 <= training[side]["agreement"] <= 1
    assert document["pruned"]["agreement"] == training["after"]["agreement"]
    assert document["used_labels"] is training["used_labels"] is False
    assert document["pruned"]["macs"] < document["dense"]["macs"]
    assert "no label was used" in err
    assert max(map(len, err.splitlines())) <= 80
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["training"] == training
    assert "held back from training" in (tmp_path / "out" / "report.html").read_text()
    pruned = json.loads(Path("small/report.json").read_text())
    for key in ("granularity", "round_to", "groups"):
        assert report[key] == pruned[key]

    small, trained = load_pruned("small"), load_pruned(tmp_path / "out")
    assert trained.fc.in_features == small.fc.in_features
    assert not torch.equal(trained.fc.weight, small.fc.weight)
    before, after = read_config("small"), read_config(tmp_path / "out")
    for key in ("model", "model_kwargs", "pretrained_cfg", "kept", "attributes", "shapes"):
        assert after[key] == before[key]
    assert after["provenance"]["origin"] == before["provenance"]
    assert "distill" in after["provenance"]["command"]

    code, _, _ = run(
        "distill", tmp_path / "out", "--data-dir", "flat", *TRAIN, "--output", tmp_path / "again"
    )
    assert code == 0
    origin = read_config(tmp_path / "again")["provenance"]["origin"]
    assert origin["origin"] == before["provenance"]


def test_killed_command_goes_on_to_the_bytes_of_the_unbroken_one(run, tmp_path, monkeypatch):
    argv = ["--model-ema-decay", "0.9", "--amp", "--epochs", "3"]
    assert run(*distil(tmp_path / "whole", *argv))[0] == 0

    update, done = training._Run.update, []

    def stopped(self, *args):
        done.append(1)
        if len(done) == 11:  # in the third epoch of four updates
            raise KeyboardInterrupt
        update(self, *args)

    monkeypatch.setattr(training._Run, "update", stopped)
    code, _, err = run(*distil(tmp_path / "out", *argv))
    assert code == 130
    assert "the same command goes on" in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [
        "out.unfinished.safetensors"
    ]
    # Other settings, other images, the same ones in another manner or in other batches.
    for other in (["--lr", "0.5"], ["--data-dir", "others"], ["--no-mix"], ["-b", "10"]):
        code, _, err = run(*distil(tmp_path / "out", *argv, *other))
        assert_one_line(code, err, "expected the state of this run")
    code, out, _ = run(*distil(tmp_path / "out", *argv, "--json"))
    assert code == 0
    assert len(done) == 11 + 4
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert json.loads(out)["training"]["seconds"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_measuring_before_and_after_is_inside_of_the_minutes(run, tmp_path, monkeypatch):
    now, seen, updates = [0.0], [], []
    for module in (training_commands, duration):
        monkeypatch.setattr(module, "monotonic", lambda: now[0])
    measure, update = difference.Reference.difference, training._Run.update

    def measured(self, model):
        seen.append(now[0])
        now[0] += 6.0
        return measure(self, model)

    def slow(self, *args):
        update(self, *args)
        updates.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(difference.Reference, "difference", measured)
    monkeypatch.setattr(training._Run, "update", slow)
    argv = ["distill", "small", "--data-dir", "flat", *SMALL, "--minutes", "1", "--json"]
    code, out, _ = run(*argv, "--output", tmp_path / "out")
    assert code == 0
    document = json.loads(out)["training"]
    # Before; then the end, and three points between.
    assert (len(updates), seen[:5]) == (30, [0.0, 36.0, 42.0, 48.0, 54.0])
    assert (document["epochs"], document["minutes"], document["seconds"]) == (None, 1.0, 60.0)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<th>Minutes</th><td>1</td>" in report and "<th>Epochs</th>" not in report


def test_a_state_of_other_settings_is_refused_before_anything_is_read(run, tmp_path, monkeypatch):
    update, done = training._Run.update, []

    def stopped(self, *args):
        done.append(1)
        if len(done) > 6:  # in the second epoch of four updates
            raise KeyboardInterrupt
        update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "update", stopped)
        assert run(*distil(tmp_path / "out"))[0] == 130
    for others in ([], ["--lr", "0.5"], ["--loss", "divergence"], ["--mirrored"], ["--seed", "3"]):
        with monkeypatch.context() as patch:
            patch.setattr(training_commands, "choose", lambda *_, **__: pytest.exit("read"))
            patch.setattr(training_commands, "training_images", None)
            if not others:
                patch.setattr(training_commands, "choose", _interrupt)
                assert "going on with the run" in run(*distil(tmp_path / "out"))[2]
                continue
            code, _, err = run(*distil(tmp_path / "out", *others))
        assert_one_line(code, err, "expected the state of this run")
        assert "going on" not in err


@pytest.mark.parametrize("updates", [0, 3, 4, 7])
def test_what_is_said_of_an_interruption_is_what_is_there(run, tmp_path, monkeypatch, updates):
    done, update = [], training._Run.update

    def stopped(self, *args):
        if len(done) == updates:
            raise KeyboardInterrupt
        done.append(1)
        update(self, *args)

    monkeypatch.setattr(training._Run, "update", stopped)
    code, _, err = run(*distil(tmp_path / "out"))
    assert code == 130
    (line,) = (line for line in err.splitlines() if "interrupted" in line or "goes on" in line)
    assert ("goes on after the last finished epoch" in line) == (updates >= 4)
    assert ("nothing was written" in line) == (not list(tmp_path.iterdir())) == (updates < 4)


def _interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["distill", "finetune", "prune", "export"])
def test_what_is_read_is_never_written_over(run, root, tmp_path, command):
    folder = Path(shutil.copytree(root / "small", tmp_path / "small"))
    (tmp_path / "link").symlink_to(folder)
    inside = Path(shutil.copytree(root / "small", folder / "inside"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    data = [] if command == "export" else ["--data-dir", "classes"]
    places = [(folder, folder), (folder, tmp_path / "link"), (inside, folder)]
    if command == "export":
        places = [(folder, tmp_path / "link" / "model.safetensors")]
    for given, output in places:
        argv = [command, given, *data, "--output", output, "--overwrite"]
        code, _, err = run(*argv)
        assert_one_line(code, err, "expected another place than that of")
    assert {path: path.read_bytes() for path in before} == before
    argv = ["export", "--model", "test_resnet", "--checkpoint", folder / "model.safetensors"]
    code, _, err = run(*argv, "--output", folder / "model.safetensors", "--overwrite")
    assert_one_line(code, err, "expected another place than that of")


def test_features_are_compared_and_not_taken_for_classes(run, root, tmp_path):
    code, out, err = run(*distil(tmp_path / "out", "--json", source="features"))
    document = json.loads(out)
    assert code == 0
    assert (document["training"]["loss"], document["training"]["temperature"]) == ("logits", None)
    told = [document["dense"], document["pruned"], document["held_back"]]
    told += [document["training"]["before"], document["training"]["after"]]
    told.append(json.loads((root / "features" / "report.json").read_text())["held_back"])
    assert [facts["agreement"] for facts in told] == [None] * 6
    argv = ["evaluate", tmp_path / "out", "--dense", "features.pt", "--data-dir", "flat", *SMALL]
    seen = [err, run(*argv)[2], *((f / "report.html").read_text() for f in (root / "features",
            tmp_path / "out"))]  # fmt: skip
    for text in seen:
        assert "output variance" in text.lower()
        assert "agreement" not in text.lower()
        assert "their class" not in text and "same class" not in text


def test_top_1_before_training_is_told(run, tmp_path):
    score = ["--data-dir", "classes", *SMALL, "--json"]
    before = json.loads(run("evaluate", "small", *score)[1])["top1"]
    commands = {"distill": [], "finetune": ["--lr", "0.001"]}
    for command, flags in commands.items():
        argv = [command, "small", "--data-dir", "classes", "--eval-dir", "classes", *TRAIN, *flags]
        code, out, err = run(*argv, "--output", tmp_path / command, "--json")
        document = json.loads(out)
        assert code == 0
        told = document["training"]
        assert told["before"]["top1"] == before
        if told["saved"] == "trained":
            assert told["after"]["top1"] == document["pruned"]["top1"]
            words = f"top-1 by --eval-dir {100 * before:.2f} % before"
            assert words in " ".join(err.split())
            assert "Top-1 of labelled images" in (tmp_path / command / "report.html").read_text()


def test_class_folders_serve_as_unlabeled_images(run, root, tmp_path):
    # The order of the images stays, their labels become nonsense.
    garbage = tmp_path / "garbage"
    for i, image in enumerate(sorted((root / "classes").rglob("*.png"))):
        folder = garbage / ("x" if i < 7 else "y")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"{i:04d}.png")
    for name, data in (("true", "classes"), ("false", garbage)):
        assert run(*distil(tmp_path / name, data=data))[0] == 0
    assert weights_of(tmp_path / "true") == weights_of(tmp_path / "false")


def test_finetuning_says_that_it_used_labels(run, tmp_path):
    code, out, err = run(
        *("finetune", "small", "--data-dir", "classes", "--eval-dir", "classes", *TRAIN),
        *("--output", tmp_path / "out", "--json"),
    )
    document = json.loads(out)
    assert code == 0
    assert document["used_labels"] is document["training"]["used_labels"] is True
    assert 0 <= document["pruned"]["top1"] <= 1
    assert "LABELS WERE USED to train" in err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "trained with labels" in page
    assert "No label was used" not in page


def test_pruning_repairs_by_distillation(run, tmp_path):
    code, out, err = run(
        *PRUNE, *("--data-dir", "flat", "--criterion", "magnitude", "--repair", "distill"),
        *("--epochs", "2", "--output", tmp_path / "out", "--json"),
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    assert document["repair"] == "distill"
    assert document["images"]["num_images"] == 24
    assert document["training"]["num_images"] == 36
    assert document["training"]["batch_size"] == 8
    assert document["pruned"]["agreement"] == document["training"]["after"]["agreement"]
    assert document["used_labels"] is False
    assert "repair distill" in err
    load_pruned(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_pruned_and_trained_is_pruned_and_trained_again(run, tmp_path):
    assert run(*distil(tmp_path / "a"))[0] == 0
    cut = ["--data-dir", "flat", *SMALL, *CHEAP]
    argv = ["prune", tmp_path / "a", *cut, "--keep", "0.8", "--output", tmp_path / "b"]
    plan = json.loads(run(*argv, "--dry-run", "--json")[1])
    code, out, err = run(*argv, "--json")
    first, document = read_config("small"), json.loads(out)
    assert code == 0
    assert "a is pruned further: --keep and" in " ".join(err.split())
    assert document["dense"]["macs"] == plan["dense"]["macs"]
    before = json.loads(Path("small/report.json").read_text())
    assert document["dense"]["macs"] == before["pruned"]["macs"]
    assert document["pruned"]["macs"] <= 0.8 * document["dense"]["macs"]
    config = read_config(tmp_path / "b")
    for key in ("weights", "weights_sha256"):
        assert config["provenance"][key] == first["provenance"][key]
    assert "distill" in config["provenance"]["origin"]["command"]
    assert {n: set(k) <= set(first["kept"][n]) for n, k in config["kept"].items()} == dict.fromkeys(
        first["kept"], True
    )
    # Taught by the dense model that all of it came from.
    train = ["--data-dir", "flat", *TRAIN, "--output", tmp_path / "c", "--json"]
    code, out, _ = run("distill", tmp_path / "b", *train)
    whole = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=4).parameters())
    assert (code, json.loads(out)["dense"]["params"]) == (0, whole)


def test_single_weights_that_are_zero_stay_so_in_training_and_are_not_cut_into(run, tmp_path):
    zero = ["--granularity", "2:4", *CHEAP, "--output", tmp_path / "zeros"]
    assert run(*PRUNE, "--data-dir", "flat", *zero)[0] == 0
    train = ["--data-dir", "flat", *TRAIN, "--lr", "0.01", "--output", tmp_path / "out"]
    assert run("distill", tmp_path / "zeros", *train)[0] == 0
    masks, trained = load_masks(tmp_path / "out"), load_pruned(tmp_path / "out")
    before = load_pruned(tmp_path / "zeros")
    assert all(torch.equal(m, masks[n]) for n, m in load_masks(tmp_path / "zeros").items())
    for name, mask in masks.items():
        assert not trained.get_parameter(name)[~mask].count_nonzero()
        assert not torch.equal(trained.get_parameter(name), before.get_parameter(name))
    again = ["--data-dir", "flat", *SMALL, "--output", tmp_path / "again"]
    code, _, err = run("prune", tmp_path / "out", *again)
    assert_one_line(code, err, "remove channels first, single weights last")
    assert not (tmp_path / "again").exists()


BAD_INPUT = {
    "no folder": (["distill", "none"], "none: expected config.json"),
    "no images": (["distill", "small", "--data-dir", "none"], "none: no such folder"),
    "too few images": (["distill", "small", "--data-dir", "two"], "expected at least 3 images"),
    "no dense weights": (["distill", "small", "--dense", "none.pt"], "none.pt: no such checkpoint"),
    "weights twice": (
        ["prune", "small", "--checkpoint", "weights.pt"],
        "--checkpoint: expected with --model, found with the folder small",
    ),
    "classes twice": (["prune", "small", "--num-classes", "0"], "--num-classes: expected with --m"),
    "models twice": (["prune", "small", "--model", "test_resnet"], "leave out --model test_resnet"),
    "no model": (["prune"], "expected either the folder of a pruned model or --model M"),
    "no epochs": (["distill", "small", "--epochs", "0"], "--epochs: expected a whole number"),
    "no rate": (["distill", "small", "--lr", "0"], "--lr: expected a number above 0"),
    "cold": (["distill", "small", "--temperature", "0"], "--temperature: expected a number above"),
    "unknown optimizer": (["distill", "small", "--opt", "sdg"], "--opt: expected a name of timm"),
    "unknown schedule": (["distill", "small", "--sched", "x"], "--sched: expected one of cosine"),
    "long warm-up": (["distill", "small", "--warmup-epochs", "2"], "--warmup-epochs: expected 0"),
    "negative decay": (["distill", "small", "--weight-decay", "-1"], "--weight-decay: expected"),
    "average without end": (["distill", "small", "--model-ema-decay", "1"], "--model-ema-decay:"),
    "float16 on the CPU": (
        ["distill", "small", "--amp", "--amp-dtype", "float16"],
        "--amp-dtype: expected bfloat16 on cpu, found float16",
    ),
    "float16 planned on the CPU": (
        ["finetune", "small", "--data-dir", "classes", "--amp", "--amp-dtype", "float16",
         "--dry-run"],
        "--amp-dtype: expected bfloat16 on cpu, found float16",
    ),
    "divergence without classes": (
        ["distill", "features", "--loss", "divergence"], "--loss: expected logits for a model with",
    ),
    "divergence without classes planned": (
        ["distill", "features", "--loss", "divergence", "--dry-run"], "--loss: expected logits",
    ),
    "prune and divergence without classes": (
        [*PRUNE_FEATURES, "--repair", "distill", "--loss", "divergence"], "--loss: expected logits",
    ),
    "labels without classes": (
        ["finetune", "features", "--data-dir", "classes"], "expected a model that chooses among",
    ),
    "top-1 without classes": (
        ["distill", "features", "--eval-dir", "classes"], "expected a model that chooses among",
    ),
    "one value for BatchNorm": (
        ["distill", "small", "--num-images", "1"], "one input on a map of one pixel: use larger",
    ),
    "epochs and minutes": (["distill", "small", "--minutes", "1"], "not allowed with argument"),
    "no time": (["finetune", "small", "--minutes", "0"], "--minutes: expected"),
    "temperature without teacher": (["finetune", "small", "--temperature", "1"], "unrecognized"),
    "no labels": (["finetune", "small"], "one subfolder per class"),
    "other classes": (["finetune", "small", "--data-dir", "other"], "the model's 4 classes"),
    "prune without a rate": ([*PRUNE, "--repair", "distill", "--lr", "x"], "--lr: expected"),
    "prune with a long warm-up": (
        [*PRUNE, "--repair", "distill", "--warmup-epochs", "99"],
        "--warmup-epochs: expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, argv, message):
    train = TRAIN if argv[0] != "prune" else []
    command, *rest = argv
    folder = rest[:1] if train else []
    options = rest[len(folder) :]
    code, _, err = run(
        command, *folder, "--data-dir", "flat", *train, *options, "--output", tmp_path / "out"
    )
    assert_one_line(code, err, message)
    assert list(tmp_path.iterdir()) == []


def test_dense_weights_that_are_gone_are_asked_for(run, root, tmp_path):
    folder = shutil.copytree(root / "small", tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    config["provenance"]["weights"] = "gone.pt"
    (folder / "config.json").write_text(json.dumps(config))
    argv = ["distill", folder, "--data-dir", "flat", *TRAIN, "--output", tmp_path / "out"]
    code, _, err = run(*argv)
    assert_one_line(code, err, "expected the weights that it was pruned from, found 'gone.pt'")
    assert run(*argv, "--dense", "weights.pt")[0] == 0


def test_a_folder_cannot_have_other_files_read_than_it_was_pruned_from(run, root, tmp_path):
    folder = shutil.copytree(root / "small", tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    argv = ["distill", folder, "--data-dir", "flat", *TRAIN, "--output", tmp_path / "out"]
    before = config["provenance"]["weights_sha256"]
    other = timm.create_model("test_resnet", num_classes=4)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    for weights, digest, message in (
        (tmp_path / "other.pt", before, "with another SHA-256: pass --dense"),
        (tmp_path / "other.pt", None, "without its SHA-256: pass --dense"),
        ("/etc/passwd", "0" * 64, "with another SHA-256: pass --dense"),
    ):
        config["provenance"] |= {"weights": str(weights), "weights_sha256": digest}
        (folder / "config.json").write_text(json.dumps(config))
        for plan in ([], ["--dry-run"]):
            code, _, err = run(*argv, *plan)
            assert_one_line(code, err, message)
    assert run(*argv, "--dense", tmp_path / "other.pt")[0] == 0
    code, _, err = run(*distil(tmp_path / "mine"))
    assert code == 0
    assert "dense weights: weights.pt, the file that small was pruned from" in err
    trained = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert trained["provenance"]["weights_sha256"] == before


def assert_one_line(code, err, message):
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("tpvprune: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


def test_every_fit_of_a_chain_counts(run, tmp_path):
    """A cut, a training on all but 4, and a further cut with few images: all three count."""
    data = ["--data-dir", "flat"]
    cut, trained, further = (str(tmp_path / name) for name in ("cut", "trained", "further"))
    argv = [*PRUNE, *data, "--keep", "0.8", *CHEAP, "--seed", "5", "--output", cut]
    assert run(*argv, "--num-images", "20")[0] == 0
    assert run("distill", cut, *data, *TRAIN, "--output", trained)[0] == 0
    again = ["prune", trained, *data, *SMALL, "--keep", "0.7", *CHEAP]
    assert run(*again, "--num-images", "8", "--output", further)[0] == 0
    seen = {}
    for folder in (cut, trained, further):
        argv = ["evaluate", folder, "--dense", "weights.pt", *data, *SMALL]
        said = " ".join(run(*argv)[2].split())
        seen[folder] = int(said.partition("note: ")[2].partition(" of them took part")[0])
    assert (seen[cut], seen[trained]) == (18, 36)
    assert seen[further] >= 36


def test_images_that_may_be_fitted_to_are_told_where_labels_measure(run, tmp_path):
    argv = [*PRUNE, *CHEAP, "--keep", "0.8", "--eval-dir", "classes", "--output"]
    told = "32 of the 32 images of --eval-dir are among those of classes"
    for data in ("flat", "classes"):
        code, _, err = run(*argv, str(tmp_path / data), "--data-dir", data)
        assert code == 0
        assert (f"note: {told}" in " ".join(err.split())) == (data == "classes")
    limit = [arg for arg in argv if arg not in {"--keep", "0.8"}] + [str(tmp_path / "new")]
    code, _, err = run(*limit, "--data-dir", "classes", "--max-loss", "5", *SMALL)
    assert code == 2
    assert f"--max-loss: expected images that take no part in the cut, but {told}" in " ".join(
        err.split()
    )
    assert not (tmp_path / "new").exists()


def test_a_dry_run_says_which_images_measure(run):
    argv = [*PRUNE, *CHEAP[:2], "--repair", "distill", "--keep", "0.8", "--output", "new"]
    _, _, err = run(*argv, "--data-dir", "flat", "--dry-run")
    assert "24 images of flat, 4 others held back to measure" in " ".join(err.split())
    argv = [*PRUNE, *CHEAP, "--keep", "0.8", "--output", "new", "--dry-run"]
    code, _, err = run(*argv, "--data-dir", "flat/0000.png")
    assert code == 2
    write_images(Path("one"), 1)
    code, _, err = run(*argv, "--data-dir", "one")
    assert code == 2
    assert "one: expected at least 2 images, found 1" in " ".join(err.split())


class Stream(torch.utils.data.IterableDataset):
    """60 images of one colour each, which tells their places."""

    def __iter__(self):
        for place in range(60):
            yield Image.new("RGB", (32, 32), (4 * place, 255 - 4 * place, 9 * place % 256)), 0


def test_a_stream_is_judged_by_what_no_fit_has_seen(run, tmp_path, monkeypatch):
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Stream())
    monkeypatch.setattr(training_commands, "_MOST_HELD_BACK", 6)
    fits, held = [], []

    def places_of(batches):
        return {round((x[0].mean().item() * 0.5 + 0.5) * 255 / 4) for b in batches for x in b}

    def hold_back(*args, **kwargs):
        fit, kept = drawing.hold_back(*args, **kwargs)
        fits.append(places_of(fit))
        return fit, kept

    def choose(*args, **kwargs):
        held.append(places_of(session_images.choose(*args, **kwargs)))
        return session_images.choose(*args, **kwargs)

    monkeypatch.setattr(setup, "hold_back", hold_back)
    monkeypatch.setattr(training_commands, "choose", choose)
    model = [*PRUNE, "--mean", "0.5", "--std", "0.5", "--dataset", "wds/many"]
    cut, again = str(tmp_path / "cut"), str(tmp_path / "again")
    assert run(*model, *CHEAP, "--keep", "0.8", "--output", cut)[0] == 0
    assert len(fits[0]) == 22
    for source, output in ((cut, again), (again, str(tmp_path / "third"))):
        argv = ["distill", source, "--dataset", "wds/many", *TRAIN, "--output", output]
        assert run(*argv, "--num-images", "20")[0] == 0
    assert len(held[0]) == len(held[1]) == 6
    assert not held[0] & fits[0]
    assert held[0] == held[1]
    argv = ["evaluate", again, "--dense", "weights.pt", "--dataset", "wds/many", *SMALL]
    said = " ".join(run(*argv, "--split", "train", "--num-images", "100")[2].split())
    assert "measured on 60 images of wds/many" in said
    assert "note: 22 of them took part" in said  # the training saw 20 of the same
