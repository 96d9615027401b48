import contextlib
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from image_cases import as_tar, spoil, write_classes, write_images

from tpvprune.cli import commands, pruning, session_images
from tpvprune.cli.entry import main
from tpvprune.images.loading import choose_images, permutation
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.passes.drawing import drawn_indices
from tpvprune.saved.checkpoint import load_pruned
from tpvprune.widths.speed import Speed

CLASSES = 6
SMALL = ["--img-size", "32", "--crop-pct", "1", "-b", "8", "-j", "2", "--num-images", "24"]
CHEAP = ["--criterion", "magnitude", "--repair", "none"]
FAST = [*SMALL, "--steps", "1", "--latency-repeats", "0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint, a flat folder, class folders and a tar; nothing is written into it."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    torch.save(model.state_dict(), root / "weights.pt")
    write_images(root / "flat", 40)
    write_classes(root / "classes", [f"class{i}" for i in range(CLASSES)])
    as_tar(root / "classes", root / "classes.tar")
    write_classes(root / "two", ["a", "b"])
    (root / "empty").mkdir()
    write_images(root / "spoilt", 9)
    for i in range(5):
        spoil(root / "spoilt" / f"{i:04d}.png")
    return root


def flags(output, *extra, data="flat"):
    model = ["--model", "test_resnet", "--checkpoint", "weights.pt"]
    return ["prune", *model, "--data-dir", data, *FAST, *extra, "--output", output]


@pytest.fixture(scope="module")
def prune_once(root, tmp_path_factory):
    """Return a function that prunes into a new folder: the folder, exit code, stdout, stderr."""

    def prune_once(*extra):
        folder = tmp_path_factory.mktemp("pruned") / "out"
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setenv("COLUMNS", "80")
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([str(arg) for arg in flags(folder, *extra)])
        return folder, code, out.getvalue(), err.getvalue()

    return prune_once


@pytest.fixture(scope="module")
def plain(prune_once):
    """What pruning leaves and says, no labels at hand; nothing is written into it."""
    return prune_once()


@pytest.fixture(scope="module")
def measured(prune_once):
    """The same with all that is measured on request."""
    return prune_once("--eval-dir", "classes", "--latency-repeats", "2", "--json")


class TestPrune:
    def test_json_holds_the_documented_keys(self, root, measured):
        _, code, out, err = measured
        document = json.loads(out)
        assert code == 0
        assert set(document) >= {
            *("model", "dense", "pruned", "blocked", "criterion", "used_labels"),
            *("keep", "of", "seed", "versions", "reached", "output"),
        }
        for which in ("dense", "pruned"):
            assert set(document[which]) >= {
                *("macs", "params", "latency_ms", "top1", "top5", "agreement")
            }
        assert document["used_labels"] is False
        assert document["dense"]["agreement"] == 1
        assert document["dense"]["latency_ms"] > 0
        for which in ("dense", "pruned"):
            low, high = document[which]["latency_range_ms"]
            assert f"{low:.2f} to {high:.2f} ms {which}" in " ".join(err.split())
        assert 0 <= document["pruned"]["top1"] <= 1
        assert document["pruned"]["macs"] <= 0.5 * document["dense"]["macs"]
        fitted = document["images"].pop("fitted")
        assert document["images"] == {
            "source": "flat",
            "num_images": 24,
            "agreement_on": "24 labelled images",
        }
        held = [permutation(40, 0)[i] for i in drawn_indices(24, seed=0)[1]]
        digest = open_images(root / "flat").digest
        assert fitted == [
            {"source": "flat", "digest": digest, "count": 40, "seed": 0, "num": 24, "apart": held}
        ]
        assert max(map(len, err.splitlines())) <= 80

    def test_text_says_what_it_cost_and_that_no_label_was_used(self, plain):
        _, code, out, err = plain
        assert (code, out) == (0, "")
        for word in (
            "dense",
            "pruned",
            "ratio",
            "MACs",
            "parameters",
            "agreement",
            "no label was used",
            "left whole: fc",
        ):
            assert word in err
        assert "top-1" not in err

    @pytest.mark.parametrize(("num", "unseen"), [(40, 4), (30, 3 + 10)])
    def test_agreement_is_that_of_images_the_repair_has_not_seen(
        self, run, root, tmp_path, num, unseen
    ):
        # The fit gets 36 or 27 of the first in the seed's order; the other images are beyond them.
        argv = flags(tmp_path / "out", "--num-images", str(num), "--keep", "0.2", "--json")
        _, out, err = run(*argv)
        document = json.loads(out)
        dense = timm.create_model("test_resnet", num_classes=CLASSES).eval()
        dense.load_state_dict(torch.load(root / "weights.pt"))
        preprocessing = resolve_preprocessing(dense, input_size=(3, 32, 32), crop_pct=1.0)
        chosen = choose_images(open_images(root / "flat"), preprocessing, num_images=40, seed=0)
        images, pruned = torch.cat(list(chosen)), load_pruned(tmp_path / "out")
        with torch.no_grad():
            same = pruned(images).argmax(1) == dense(images).argmax(1)
        same = same[drawn_indices(num)[1] + list(range(num, 40))]
        assert len(same) == unseen
        assert document["images"]["agreement_on"] == f"{unseen} held-back images"
        assert document["pruned"]["agreement"] == pytest.approx(float(same.double().mean()))
        assert f"on {unseen} held-back images" in " ".join(err.split())
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert f"of {unseen} held-back images" in page

    def test_saved_model_loads_and_is_the_measured_one(self, measured):
        folder, _, out, _ = measured
        pruned = load_pruned(folder)
        assert sum(p.numel() for p in pruned.parameters()) == json.loads(out)["pruned"]["params"]
        for name in ("config.json", "model.safetensors", "report.json", "report.html"):
            assert (folder / name).is_file()

    def test_same_seed_gives_the_same_bytes_whatever_is_measured(self, plain, measured):
        a, b = ((folder / "model.safetensors").read_bytes() for folder, *_ in (plain, measured))
        assert a == b

    @pytest.mark.parametrize("data", ["classes", "classes.tar"])
    def test_class_folders_and_tars_serve_as_unlabeled_images(self, run, tmp_path, data):
        code, out, _ = run(*flags(tmp_path / "out", *CHEAP, "--json", data=data))
        assert code == 0
        assert json.loads(out)["used_labels"] is False

    def test_garbage_labels_change_nothing(self, run, root, tmp_path):
        # The order of the images stays, their labels become nonsense.
        garbage = tmp_path / "garbage"
        images = sorted((root / "classes").rglob("*.png"))
        for i, image in enumerate(images):
            folder = garbage / ("x" if i < 7 else "y")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder / f"{i:04d}.png")
        for name, data in (("true", "classes"), ("false", garbage)):
            assert run(*flags(tmp_path / name, data=data))[0] == 0
        a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("true", "false"))
        assert a == b

    def test_labelled_criterion_says_that_it_used_labels(self, run, tmp_path):
        code, out, err = run(
            *flags(tmp_path / "out", "--criterion", "taylor", "--json", data="classes")
        )
        assert code == 0
        assert json.loads(out)["used_labels"] is True
        assert "LABELS WERE USED" in err

    def test_budget_out_of_reach_is_saved_and_said(self, run, tmp_path):
        code, out, err = run(
            *flags(tmp_path / "out", *CHEAP, "--keep", "0.01", "--max-removed", "0.2", "--json")
        )
        assert code == 3
        assert json.loads(out)["reached"] is False
        assert "budget not reached" in err
        load_pruned(tmp_path / "out")

    def test_overwrite_replaces_an_earlier_result(self, run, tmp_path):
        for keep in ("0.9", "0.5"):
            code, out, _ = run(
                *flags(tmp_path / "out", "--keep", keep, *CHEAP, "--overwrite", "--json")
            )
            assert code == 0
        params = sum(p.numel() for p in load_pruned(tmp_path / "out").parameters())
        assert params == json.loads(out)["pruned"]["params"]

    def test_few_undecodable_images_are_skipped_and_said(self, run, tmp_path):
        folder = write_images(tmp_path / "images", 110, size=8)
        spoil(folder / "0004.png")
        code, _, err = run(*flags(tmp_path / "out", *CHEAP, "--num-images", "110", data=folder))
        assert code == 0
        assert "1 of 110 images could not be decoded" in err


BAD_INPUT = {
    "unknown model": (["--model", "test_resnett"], "unknown model.*did you mean test_resnet"),
    "missing checkpoint": (["--checkpoint", "none.pt"], "none.pt: no such checkpoint file"),
    "mismatching checkpoint": (
        ["--num-classes", "9"],
        r"has shape fc\.weight \(6, \d+\) instead of \(9, \d+\)",
    ),
    "other model's checkpoint": (["--model", "test_efficientnet"], "lacks conv_stem.weight"),
    "damaged checkpoint": (["--checkpoint", "flat/0000.png"], "found another kind of file"),
    "two sources of weights": (["--pretrained"], "not allowed with argument"),
    "unknown model argument": (["--model-kwargs", "foo=1"], "cannot be built.*foo"),
    "model argument without value": (["--model-kwargs", "foo"], "expected NAME=VALUE"),
    "image count in words": (["--num-images", "x"], "--num-images: expected a whole number"),
    "missing data": (["--data-dir", "none"], "none: no such folder or file"),
    "empty data": (["--data-dir", "empty"], "empty: expected images"),
    "no tar": (["--data-dir", "weights.pt"], "expected a folder or an uncompressed .tar"),
    "spoilt images": (["--data-dir", "spoilt"], r"5 of 9 images cannot be decoded.*first: 000"),
    "unknown dataset": (["--dataset", "torch/nonsense"], "torch/nonsense in flat: cannot be"),
    "keep 0": (["--keep", "0"], "--keep: expected a fraction above 0 and up to 1, found '0'"),
    "keep above 1": (["--keep", "1.5"], "--keep: expected a fraction"),
    "keep not a number": (["--keep", "nan"], "--keep: expected a fraction"),
    "keep in words": (["--keep", "half"], "--keep: expected a fraction"),
    "keep of what": (["--of", "joy"], "--of: invalid choice"),
    "unknown criterion": (["--criterion", "tpw"], "unknown criterion 'tpw': did you mean tpv"),
    "nonsense criterion": (["--criterion", "%%"], "unknown criterion '%%': known: tpv"),
    "labels that are not there": (["--criterion", "taylor"], "one subfolder per class"),
    "evaluation without labels": (["--eval-dir", "flat"], "one subfolder per class"),
    "evaluation elsewhere": (["--eval-dir", "none"], "none: no such folder"),
    "other classes": (["--eval-dir", "two"], "expected the model's 6 classes, found 2"),
    "unknown device": (["--device", "abacus"], "--device abacus: cannot be used"),
    "mean of the wrong length": (["--mean", "1", "2"], "mean: expected 1 or 3 values"),
    "unknown interpolation": (["--interpolation", "magic"], "interpolation: expected one of"),
    "no probes": (["--num-probes", "0"], "--num-probes: expected a whole number of at least 1"),
    "no such output": (["--outputs", "seg"], "outputs: expected some of output, found seg"),
    "no weight": (["--outputs", "output=0"], "--outputs: expected a number above 0"),
    "no forward": (["--forward", "math:pi"], "forward: expected package.module:function"),
    "no such forward": (["--forward", "math:no"], "forward math:no: cannot be imported"),
    "no such output of weights": (
        ["--outputs", "seg", "--granularity", "weight"],
        "outputs: expected some of output, found seg",
    ),
    "unknown flag": (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    "unknown layer": (["--ignore", "layer1.0.conv"], "has no such layer: did you mean layer1"),
}


class TestBadInput:
    @pytest.mark.parametrize(("extra", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
    def test_one_line_and_exit_2(self, run, tmp_path, extra, message):
        code, out, err = run(*flags(tmp_path / "out", *extra))
        assert_one_line(code, out, err, message)
        assert not (tmp_path / "out").exists()

    def test_output_is_checked_before_any_work(self, run, tmp_path, monkeypatch):
        def work(*_, **__):
            raise AssertionError("work has started")

        monkeypatch.setattr(pruning, "open_subject", work)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "note.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        for output, extra, message in [
            ("full", [], "expected no folder or an empty one"),
            ("full", ["--overwrite"], "found other files"),
            ("file", [], "expected a folder, found a file"),
            ("file/out", [], "file/out"),
        ]:
            code, out, err = run(*flags(tmp_path / output, *extra))
            assert_one_line(code, out, err, message)
        assert (tmp_path / "full" / "note.txt").read_text() == "mine"
        assert (tmp_path / "file").read_text() == "mine"

    def test_output_that_cannot_be_written_is_found_by_trying(self, run, tmp_path, monkeypatch):
        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        code, out, err = run(*flags(tmp_path / "out"))
        assert_one_line(code, out, err, "cannot be written .Permission denied.")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "required: COMMAND"),
            (["frobnicate"], "invalid choice: 'frobnicate'"),
            (["prune"], "required: --output"),
            (["prune", "--model", "test_resnet", "--output", "never"], "no images given"),
            (["score", "--model", "test_resnet", "--output", "flat"], "found a folder"),
            (
                ["score", "--model", "m", "--output", "s", "--criterion", "fpgm", "--outputs", "0"],
                "--outputs: expected a criterion that looks at outputs, found fpgm",
            ),
            (["score", "--model", "test_resnet", "--output", "weights.pt"], "exists already"),
            (["evaluate", "--data-dir", "flat"], "either the folder of a pruned model or"),
            (["evaluate", "flat", "--data-dir", "flat"], "expected config.json"),
            (
                ["groups", "--model", "test_vit", "--input-size", "3", "1", "1"],
                "cannot be|does not",
            ),
        ],
    )
    def test_other_commands(self, run, argv, message):
        assert_one_line(*run(*argv), message)

    def test_out_of_memory_gives_advice(self, run, monkeypatch):
        def exhaust(_):
            raise torch.OutOfMemoryError("CUDA out of memory. A long story.")

        monkeypatch.setattr(commands, "run_groups", exhaust)
        assert_one_line(*run("groups", "--model", "test_resnet"), "lower -b")

    @pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
    def test_bugs_are_told_from_bad_input(self, run, monkeypatch, error):
        def stumble(_):
            raise error("a bug")

        monkeypatch.setattr(commands, "run_groups", stumble)
        code, out, err = run("groups", "--model", "test_resnet")
        assert (code, out) == (1, "")
        assert "Traceback" in err

    def test_interruption_is_quiet(self, run, monkeypatch):
        def interrupt(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(commands, "run_groups", interrupt)
        code, _, err = run("groups", "--model", "test_resnet")
        assert (code, err) == (130, "tpvprune: error: interrupted\n")


class TestOtherCommands:
    def test_groups_says_what_and_why_not(self, run):
        code, out, err = run(
            "groups", "--model", "test_resnet", "--img-size", "32", "--ignore", "layer1.0.conv1",
            "--json",
        )  # fmt: skip
        document = json.loads(out)
        assert code == 0
        assert document["groups"]
        assert {"name": "fc", "num_channels": 1000}.items() <= document["blocked"][-1].items()
        assert "layer1.0.conv1" not in [group["name"] for group in document["groups"]]
        assert 0 < document["smallest"]["macs"] < document["dense"]["macs"]
        assert all(0 < group["macs_share"] < 1 for group in document["groups"])
        assert {"name", "macs", "params"} == set(document["branches"][0])
        assert sum(b["macs"] for b in document["branches"]) < document["dense"]["macs"]
        assert all(0 < b["params"] < document["dense"]["params"] for b in document["branches"])
        for branch in document["branches"]:
            assert re.search(rf"^{re.escape(branch['name'])} +\d", err, re.MULTILINE)
        assert "smallest reachable" in " ".join(err.split())
        assert max(map(len, err.splitlines())) <= 80

    def test_score_writes_scores_with_errors(self, run, tmp_path):
        path = tmp_path / "new" / "scores.json"
        code, out, _ = run(
            "score", "--model", "test_resnet", "--checkpoint", "weights.pt", "--data-dir", "flat",
            *SMALL, "--num-probes", "2", "--output", path,
        )  # fmt: skip
        document = json.loads(path.read_text())
        assert (code, out) == (0, "")
        assert document["num_images"] == 24
        assert document["used_labels"] is False
        assert document["versions"]["torch"] == torch.__version__
        for group in document["groups"].values():
            assert len(group["scores"]) == len(group["stderr"]) == group["num_channels"]

    def test_score_stops_when_enough_is_known(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(session_images, "_KNOWN", 0.5)
        argv = ["score", "--model", "test_resnet", "--checkpoint", "weights.pt", *SMALL]
        argv += ["--data-dir", tmp_path / "many", "--num-images", "auto", "--amp"]
        write_images(tmp_path / "many", 120)
        code, _, err = run(*argv, "--output", tmp_path / "scores.json")
        document = json.loads((tmp_path / "scores.json").read_text())
        assert code == 0
        assert 64 <= document["num_images"] < 120
        assert f"{document['num_images']} images scored" in err
        ratios = [
            e / s
            for g in document["groups"].values()
            for s, e in zip(g["scores"], g["stderr"], strict=True)
            if s
        ]
        assert statistics.median(ratios) <= 0.5

    def test_prune_takes_as_many_images_as_the_scores_need(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(pruning, "_FEWEST", 30)
        code, out, _ = run(*flags(tmp_path / "out", "--num-images", "auto", "--amp", "--json"))
        assert code == 0
        assert json.loads(out)["images"]["num_images"] == 40  # all there are, still too few

    @pytest.mark.parametrize(
        "extra", [["--criterion", "magnitude"], ["--granularity", "2:4", "--repair", "none"]]
    )
    def test_auto_needs_standard_errors(self, run, tmp_path, extra):
        code, _, err = run(*flags(tmp_path / "out", "--num-images", "auto", *extra))
        assert code == 2
        assert "have no standard errors: pass a number" in " ".join(err.split())

    def test_evaluate_measures_a_model_on_labels(self, run):
        code, out, err = run(
            "evaluate", "--model", "test_resnet", "--checkpoint", "weights.pt",
            "--data-dir", "classes", *SMALL, "--latency-repeats", "2", "--json",
        )  # fmt: skip
        document = json.loads(out)
        assert code == 0
        assert 0 <= document["top1"] <= document["top5"] <= 1
        low, high = document["latency_range_ms"]
        assert 0 < low <= document["latency_ms"] <= high
        assert "top-1" in err
        assert re.search(rf"latency, 1 image +{document['latency_ms']:.2f} ms", err)
        assert f"quartiles {low:.2f} to {high:.2f} ms" in " ".join(err.split())

    def test_evaluate_agrees_with_prune(self, run, measured):
        folder, _, out, _ = measured
        pruned = json.loads(out)["pruned"]
        code, out, _ = run(
            "evaluate", folder, "--data-dir", "classes", "--dense", "weights.pt",
            "--latency-repeats", "0", "--json",
        )  # fmt: skip
        document = json.loads(out)
        assert code == 0
        for key in ("macs", "params", "top1", "top5"):
            assert document[key] == pruned[key]
        assert document["latency_ms"] is None
        assert 0 <= document["agreement"] <= 1

    def test_evaluate_times_as_it_is_told(self, run, plain):
        argv = ["evaluate", plain[0], "--data-dir", "flat", "--dense", "weights.pt", "--json"]
        how = ["--latency-batch-size", "3", "--latency-threads", "1", "--latency-repeats", "4"]
        _, out, err = run(*argv, *how)
        document = json.loads(out)
        assert document["latency_batch_size"] == document["dense"]["latency_batch_size"] == 3
        assert document["latency_device"].endswith(", 1 thread")
        assert re.search(rf"latency, 3 images .* {document['latency_ratio']:.3f}\n", err)

    def test_evaluate_without_labels_gives_agreement_or_only_costs(self, run, root, plain):
        argv = ["evaluate", plain[0], "--data-dir", "flat", "--latency-repeats", "0"]
        _, out, _ = run(*argv, "--dense", "weights.pt", "--json")
        wanted = json.loads(out)["agreement"]
        assert wanted is not None
        _, out, err = run(*argv, "--json")
        assert json.loads(out)["agreement"] == wanted
        assert "dense weights: weights.pt, the file that" in err
        (root / "weights.pt").rename(root / "moved.pt")
        try:
            _, out, err = run(*argv, "--json")
        finally:
            (root / "moved.pt").rename(root / "weights.pt")
        assert json.loads(out)["agreement"] is None
        assert "only costs were measured" in err

    @pytest.mark.parametrize(("dense_ms", "said"), [(3.0, ""), (2.0, "no faster on this device")])
    def test_evaluate_says_if_nothing_became_faster(self, run, plain, monkeypatch, dense_ms, said):
        def timed(args, subject, models):
            assert len(models) == 2
            return vars(
                Speed(dense_ms, 2.5, 2.5 / dense_ms, 0.5, 1.5, 1, 50, dense_ms - 0.2,
                      dense_ms + 0.2, 2.3, 2.7, "eager", "here")
            )  # fmt: skip

        monkeypatch.setattr("tpvprune.cli.session_results._timed", timed)
        argv = ["evaluate", plain[0], "--data-dir", "flat", "--dense", "weights.pt", "--json"]
        _, out, err = run(*argv)
        warnings = json.loads(out)["warnings"]
        assert len(warnings) == bool(said)
        assert all(said in line for line in warnings)
        assert (f"warning: {said}" in err) == bool(said)

    @pytest.mark.parametrize(
        ("data", "num"),
        [
            ("flat", 22),
            ("flat --num-images 6", 6),
            ("flat --num-images 6 --seed 1", 4),
            ("classes", 0),
        ],
    )
    def test_evaluate_says_how_many_images_took_part(self, run, root, plain, data, num):
        """Of 40 images 24 were drawn, two of which were held back."""
        argv = ["evaluate", plain[0], "--data-dir", *data.split(), "--latency-repeats", "0"]
        _, _, err = run(*argv, "--dense", "weights.pt")
        assert ("took part in the cut" in err) == (num > 0)
        assert not num or f"note: {num} of them took part in the cut" in " ".join(err.split())

    def test_subfolders_that_are_no_classes_are_not_taken_for_labels(self, run):
        code, out, err = run(
            "evaluate", "--model", "test_resnet", "--checkpoint", "weights.pt",
            "--data-dir", "two", *SMALL, "--latency-repeats", "0", "--json",
        )  # fmt: skip
        assert code == 0
        assert json.loads(out)["top1"] is None
        assert "top-1 is not measured" in " ".join(err.split())


class TestStart:
    def test_help_needs_neither_timm_nor_time(self):
        code = "import sys, tpvprune.cli.entry; sys.exit('timm' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_what_flags_and_paths_tell_waits_for_no_heavy_import(self, root):
        new = ["--output", "new"]
        model = ["--model", "test_resnet", "--data-dir", "flat"]
        lines = {
            "required: --output": ["prune"],
            "unrecognized arguments: --bogus": ["prune", *model, *new, "--bogus"],
            "expected a whole number from 0 to 4294967295, found '-1'": [
                *("prune", *model, *new, "--seed", "-1"),
            ],
            "invalid choice: 'joy'": ["prune", *model, *new, "--of", "joy"],
            "expected channel, head": ["prune", *model, *new, "--granularity", "joy"],
            "did you mean tpv": ["prune", *model, *new, "--criterion", "tpw"],
            "no images given": ["prune", *model[:2], *new],
            "no such folder": ["prune", *model[:2], "--data-dir", "none", *new],
            "no such checkpoint": ["prune", *model, "--checkpoint", "none", *new],
            "none.csv: no such list": ["prune", *model, "--data-list", "none.csv", *new],
            "nowhere: no such": ["prune", *model, "--eval-dir", "nowhere", *new],
            "found 9 entries": ["prune", *model, "--output", "spoilt"],
            "place than that of flat": ["prune", *model, "--output", "flat", "--overwrite"],
            "exists already": ["score", *model, "--output", "weights.pt"],
            "either the folder of": ["evaluate", "--data-dir", "flat"],
            "expected config.json": ["distill", "flat", "--data-dir", "flat", *new],
            "far: no such": ["audit", *model, "--held-out-dir", "far"],
            "at least two folders, found 1": ["compare", "flat"],
            "expected report.json": ["compare", "flat", "two"],
        }
        code = f"""
            import sys
            from tpvprune.cli.entry import main
            codes = [main(argv) for argv in {list(lines.values())!r}]
            heavy = {{"torch", "timm", "numpy", "PIL"}} & set(sys.modules)
            sys.exit(f"{{codes}} {{heavy}}" if set(codes) != {{2}} or heavy else 0)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for message, line in zip(lines, done.stderr.splitlines(), strict=True):
            assert message in line

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages of Linux")
    @pytest.mark.parametrize(
        ("argv", "expected"),
        [
            (["prune", "--output", "new"], True),
            (["prune", "--output", "new", "--of", "latency"], False),
            (["prune", "--output", "new", "--of", "params", "--dry-run"], True),
            (["score", "--output", "new"], True),
            (["benchmark", "--output", "new"], True),
            (["distill", "small", "--output", "new"], True),
            (["evaluate"], False),
            (["export"], False),
        ],
    )
    def test_freed_memory_is_kept_where_no_milliseconds_are_the_result(
        self, root, run, monkeypatch, argv, expected
    ):
        kept = []
        monkeypatch.setattr("tpvprune.passes.memory.keep_freed_memory", lambda: kept.append(1))
        monkeypatch.setattr("tpvprune.cli.entry._within_memory", lambda run, args: (0, {}))
        monkeypatch.setattr("tpvprune.cli.entry.check_first", lambda args: None)
        model = [] if argv[0] == "distill" else ["--model", "test_resnet"]
        assert run(*argv, *model, "--data-dir", "flat")[0] == 0
        assert bool(kept) == expected

    @pytest.mark.parametrize("command", ["prune", "score", "groups", "evaluate", "demo"])
    def test_help_fits_the_terminal(self, command, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80

    def test_nothing_but_json_reaches_stdout(self, run, monkeypatch):
        def chatty(_):
            print("a library says hello")
            return 0, {"finite": 1.0, "infinite": float("inf")}

        monkeypatch.setattr(commands, "run_groups", chatty)
        code, out, err = run("groups", "--model", "test_resnet", "--json")
        assert (code, json.loads(out)) == (0, {"finite": 1.0, "infinite": None})
        assert "hello" in err


def assert_one_line(code, out, err, message):
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("tpvprune: error: ")
    assert re.search(message, lines[0]), lines[0]
