"""What the command line says of a result: broken first, then warnings, then what was held back."""

import dataclasses
import json
import re
import time
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from image_cases import write_classes, write_images
from torch import nn

from tpvprune.cli import console, outcome, session_images, session_results
from tpvprune.cli.benchmark import broken_rows
from tpvprune.cli.console import Stages, show_pruned, show_trained, stages
from tpvprune.cli.session_images import calibration, num_eval_images, num_images, others
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.passes.costs import count_macs
from tpvprune.passes.evaluation import Difference
from tpvprune.passes.loss import Loss
from tpvprune.repairs import guard

GOOD = Difference(92, 0.93, 0.004, 0.5, 0.031)
BROKEN = Difference(92, 0.31, 0.004, 40.0, 1.7)


def document(found, wanted="compensate", best="compensate", **more):
    measured = {best: found, wanted: Difference(92, 0.2, 0.0, 99.0, 2.5)} | {best: found}
    side = {"macs": 2e9, "params": 3e6, "nonzero_params": 3e6, "top1": None, "agreement": 0.9}
    return {
        "model": "resnet18", "keep": 0.5, "of": "macs", "criterion": "tpv", "repair": wanted,
        "repair_chosen": best, "dense": side, "pruned": side, "blocked": [], "used_labels": False,
        "images": {"num_images": 1024, "agreement_on": "512 other images"}, "reached": True,
        "warnings": guard.warnings_of(measured, wanted, best), "held_back": guard.facts(found),
        "images_used": {"selection": 922, "repair": 921}, "output": "out", **more,
    }  # fmt: skip


def said(capsys, show, *args):
    show(*args)
    err = capsys.readouterr().err
    assert max(map(len, err.splitlines())) <= 80
    return err.splitlines(), " ".join(err.split())


@pytest.mark.parametrize("show", [show_pruned, show_trained])
def test_a_broken_result_is_said_before_anything_else(capsys, show):
    after = {"output_variance": 1.0, "variance_share": 0.1, "agreement": 0.9}
    facts = {
        "epochs": 2, "lr": 0.1, "num_images": 9, "num_held_back": 2, "used_labels": False,
        "before": after, "after": after, "saved": "trained", "fraction": 1.0,
    }  # fmt: skip
    lines, text = said(capsys, show, document(BROKEN, training=facts))
    assert lines[0].startswith("BROKEN: of 92 images held back only 31.0 %")
    assert "try a larger keep, more images, or repair reconstruct" in text
    assert text.count("BROKEN") == 1
    assert text.index("try a larger keep") < text.index("resnet18") < text.index("dense pruned")
    lines, text = said(capsys, show, document(GOOD, training=facts))
    assert "BROKEN" not in text
    assert lines[0].startswith("resnet18")


def test_other_warnings_follow_the_head_of_the_table(capsys):
    note = "step 1: widths by variance curves left 2 of the dense model's variance"
    found = document(BROKEN, "reconstruct", "compensate")
    found["warnings"].append(note)
    lines, text = said(capsys, show_pruned, found)
    assert lines[0].startswith("BROKEN")
    heads = [line for line in lines if line.startswith("warning: ")]
    assert [line[9:13] for line in heads] == ["repa", "step"]
    assert text.index("keep 0.5 of macs") < text.index("warning: repair compensate was taken")
    assert text.index(note) < text.index("dense pruned ratio")


def test_what_was_measured_out_of_sample_is_told_whatever_came_of_it(capsys):
    text = said(capsys, show_pruned, document(GOOD))[1]
    told = (
        "on 92 images held back: agreement 93.00 % (95% interval 86 to 97, by chance 0.40 %), "
        "output variance 0.031 of"
    )
    assert told in text
    nothing = document(Difference(3, 0.0, 1.0, float("nan"), float("inf")))
    assert "output variance inf of the dense model's own" in said(capsys, show_pruned, nothing)[1]


def test_of_one_image_no_variance_is_told(capsys):
    one = document(Difference(1, 0.0, 0.0, 3.0, float("inf")))
    text = said(capsys, show_pruned, one)[1]
    assert "on 1 image held back: agreement 0.00 %" in text
    assert "output variance of one image: none" in text and "inf" not in text


@pytest.mark.parametrize(
    ("promised", "measured", "said"),
    [
        (2.0, 2.5, "lost: kept\n"),
        (2.0, 5.0, "kept on the images that decided, not on those that judge"),
        (4.0, 5.0, "NOT KEPT"),
    ],
)
def test_a_limit_is_kept_by_those_images_that_keep_it(promised, measured, said):
    facts = {
        "max_loss": 3.0, "of": "agreement", "met": promised <= 3,
        "promised": dataclasses.asdict(Loss(promised, 0.0, 9.0, 75)),
        "measured": dataclasses.asdict(Loss(measured, 0.0, 9.0, 75)),
    }  # fmt: skip
    assert said in outcome.quality({"quality": facts})[0] + "\n"


def test_how_many_images_each_step_used_is_one_line(capsys):
    text = said(capsys, show_pruned, document(GOOD))[1]
    assert "images used: selection 922, repair 921" in text
    used = {"selection": 922, "repair": 922, "layers": 922, "layer1.0": 55, "layer4": 922}
    text = said(capsys, show_pruned, document(GOOD, images_used=used))[1]
    assert "images used: selection 922, repair 922, each block 55 to 922" in text
    assert outcome.images_used({"images_used": None}) is None
    assert outcome.held_back({}) is outcome.broken({}) is None
    assert outcome.warnings({}) == []


@pytest.mark.parametrize("best", ["none", "bn", "compensate", "reconstruct", "distill", "weights"])
def test_what_to_try_is_not_what_was_done(best):
    advice = guard.warnings_of({best: BROKEN}, best, best)[0].rpartition("try ")[2]
    assert best not in advice
    assert len(advice.split(", ")) == 3
    other = guard.warnings_of({best: BROKEN}, best, best, keep="a wider pattern")[0]
    first = "a lower rate" if best == "distill" else "a wider pattern"
    assert f"try {first}, more images" in other
    assert "a wider pattern" in other


def test_features_have_no_agreement_whatever_is_shown(capsys):
    features = dataclasses.replace(BROKEN, has_classes=False)
    side = {**document(features)["dense"], "agreement": None}
    text = said(capsys, show_pruned, document(features, dense=side, pruned=side))[1]
    assert text.startswith("BROKEN: on 92 images held back output variance 1.7 of the dense")
    assert "agreement" not in text and "class" not in text


@pytest.mark.parametrize(
    ("epochs", "minutes", "text"),
    [(1, None, "1 epoch"), (2, None, "2 epochs"), (None, 1.0, "1 minute"), (None, 5, "5 minutes")],
)  # fmt: skip
def test_one_of_a_thing_is_no_plural(epochs, minutes, text):
    assert console.length_of(epochs, minutes) == text


def test_broken_rows_of_a_benchmark_are_named():
    agreements = ["93.00", "49.99", "50.00", "nan", ""]
    rows = [
        {"keep": str(0.1 * i), "criterion": f"c{i}", "repair": "bn", "agreement": text}
        for i, text in enumerate(agreements)
    ]
    line = broken_rows(rows)
    assert line.startswith("BROKEN: 2 of 5 rows")
    assert "c3 with repair bn (agreement nan %)" in line
    assert broken_rows([rows[0], rows[2], rows[4]]) is None


# ---- from images to the document ----------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint whose classes depend on the image, and images."""
    root = tmp_path_factory.mktemp("outcome")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    with torch.no_grad():
        model.fc.weight.mul_(100)
    torch.save(model.state_dict(), root / "weights.pt")
    write_images(root / "flat", 100)
    write_classes(root / "classes", list("abcd"))
    return root


PRUNE = [
    *("prune", "--model", "test_resnet", "--checkpoint", "weights.pt", "--img-size", "32"),
    *("--crop-pct", "1", "-b", "8", "-j", "2", "--data-dir", "flat", "--criterion", "magnitude"),
]


def test_broken_is_said_exactly_where_the_report_says_so(run, tmp_path):
    for number, how in enumerate((["--keep", "0.1", "--repair", "none"], ["--keep", "0.99"])):
        out = tmp_path / str(number)
        code, text, err = run(
            *PRUNE, *how, "--num-images", "24", "--latency-repeats", "0", "--json", "--output", out
        )
        found = json.loads(text)
        assert code == 0
        assert found["held_back"]["broken"] == (number == 0)
        assert err.startswith("BROKEN: ") == (number == 0)
        assert "images held back: agreement" in " ".join(err.split())
        assert f"selection {found['images_used']['selection']}" in " ".join(err.split())
        page = (out / "report.html").read_text("utf-8")
        assert ('class="warn">BROKEN' in page) == (number == 0)


def test_weights_and_training_are_guarded_too(run, tmp_path):
    cheap = ["--num-images", "24", "--latency-repeats", "0", "--json"]
    weights = ["--granularity", "weight", "--keep", "0.02", "--repair", "none"]
    code, text, err = run(*PRUNE, *weights, *cheap, "--output", tmp_path / "weights")
    assert code == 0
    assert json.loads(text)["held_back"]["broken"]
    assert err.startswith("BROKEN: ")
    taught = ["--repair", "distill", "--epochs", "1", "--keep", "0.1", "--lr", "1e-9"]
    code, text, err = run(*PRUNE, *taught, *cheap, "--output", tmp_path / "taught")
    found = json.loads(text)
    assert found["held_back"]["agreement"] == found["pruned"]["agreement"]
    assert found["held_back"]["broken"] == err.replace("BROKEN", "").count("a lower rate") > 0


def test_no_second_of_measuring_is_hidden(run, tmp_path, monkeypatch):
    def slow(function):
        def slowly(*args, **kwargs):
            time.sleep(0.25)
            return function(*args, **kwargs)

        return slowly

    for name in ("_timed", "evaluate", "shown_changes"):
        monkeypatch.setattr(session_results, name, slow(getattr(session_results, name)))
    out = tmp_path / "out"
    _, text, _ = run(
        *PRUNE, *("--num-images", "24", "--repair", "none", "--keep", "0.7"),
        *("--eval-dir", "classes", "--latency-repeats", "2", "--json", "--output", out),
    )  # fmt: skip
    timings = json.loads(text)["timings"]
    for name in ("latency", "comparing"):
        assert timings[name] >= 0.25
    assert timings["top-1"] >= 0.5  # of both models
    assert timings["reading images"] > 0
    assert {"ranking", "selection", "measurement"} <= timings.keys()
    assert json.loads((out / "report.json").read_text("utf-8"))["timings"] == timings


# ---- how many images agreement is measured on ---------------------------------------------------


def a_subject(width=1, side=32):
    model = nn.Sequential(nn.Conv2d(3, width, 1), nn.Flatten())
    return SimpleNamespace(model=model, example=torch.zeros(2, 3, side, side))


def test_evaluation_images_are_bounded_by_what_they_cost(monkeypatch):
    assert num_eval_images(a_subject()) == 512  # costs next to nothing
    macs = count_macs(a_subject().model, a_subject().example)
    found = []
    for times in (8, 64, 100, 511, 512, 10_000):
        monkeypatch.setattr(session_images, "_EVALUATED_MACS", macs * times)
        found.append(num_eval_images(a_subject()))
    assert found == [64, 64, 100, 511, 512, 512]
    # The budget is one of MACs: twice the width, half of the images.
    monkeypatch.setattr(session_images, "_EVALUATED_MACS", macs * 400)
    assert num_eval_images(a_subject(width=2)) == 200


@pytest.mark.parametrize(
    ("asked", "bound", "num", "kind"),
    [(20, 70, 70, "other"), (20, 500, 80, "other"), (60, 3, 3, "held-back"),
     (60, 20, 20, "held-back"), (60, 500, 46, "held-back"), (100, 4, 4, "held-back")],
)  # fmt: skip
def test_no_path_measures_agreement_on_more(root, asked, bound, num, kind):
    how = resolve_preprocessing(timm.create_model("test_resnet"), input_size=(3, 32, 32))
    args = Namespace(seed=0, batch_size=8, workers=1, num_images=asked, class_map=None)
    subject = SimpleNamespace(preprocessing=how)
    images = open_images(root / "flat")
    batches = calibration(args, subject, images, labelled=False)
    eval_images = others(args, subject, images, batches, bound)
    assert (num_images(eval_images.batches), eval_images.kind) == (num, kind)
    assert num_images(batches) == min(asked, 100)


@pytest.mark.parametrize(
    ("dense_ms", "pruned_ms", "of", "how", "hint"),
    [
        (10.0, 9.4, "macs", None, None),
        (10.0, 9.6, "macs", "not measurably faster", "--of latency"),
        (10.0, 11.2, "macs", "not measurably faster", "--of latency"),
        (10.0, 12.0, "params", "no faster", "--of latency"),
        (10.0, 12.0, "latency", "no faster", "a smaller --keep"),
        (None, None, "macs", None, None),
    ],
)
def test_a_cut_that_is_no_faster_than_the_fastest_dense_round_is_said_to_be_so(
    dense_ms, pruned_ms, of, how, hint
):
    dense = {
        "latency_ms": dense_ms,
        "latency_range_ms": dense_ms and [dense_ms - 0.5, dense_ms + 1],
    }
    pruned = {
        "latency_ms": pruned_ms,
        "latency_range_ms": pruned_ms and [pruned_ms - 0.5, pruned_ms + 0.5],
    }
    said = session_results.said_of_speed(dense, pruned, of=of)
    assert len(said) == (hint is not None)
    if hint:
        assert said[0].startswith(f"{how} on this device: {pruned_ms:.2f} ms")
        assert hint in said[0]


def test_a_pipe_gets_a_line_now_and_then(capsys):
    """Where stderr is no terminal long work must not look as if it hung."""
    with stages(seconds=0.05) as progress:
        time.sleep(0.12)  # nothing runs yet: nothing is said
        progress("curves", 1, 4)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(re.fullmatch(r"curves 1/4 \.\.\. \d s, about \d s left", line) for line in lines)


def test_short_work_says_nothing_to_a_pipe(capsys):
    with stages() as progress:
        progress("curves", 1, 4)
    assert capsys.readouterr().err == ""


def test_what_runs_after_the_last_part_has_no_count():
    """It would look as if that part took for ever."""
    shown = Stages()
    shown.update("curves", 3, 4)
    assert shown.line().startswith("curves 3/4 ... ")
    shown.update("curves", 4, 4)
    assert re.fullmatch(r"curves \.\.\. \d+ s", shown.line())


def test_work_without_parts_is_named_to_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(console, "stages", partial(stages, seconds=0.02))
    with console.running("exporting"):
        time.sleep(0.15)
    assert set(capsys.readouterr().err.splitlines()) == {"exporting ... 0 s"}


@pytest.mark.parametrize(
    ("gone", "granularity", "warnings", "said"),
    [
        (False, "channel,branch", [], "0 of 1: without some the outputs would be further"),
        (False, "channel,branch", ["max_depth_removed: 0.1 of 1 branches are none"], "0 of 1"),
        (False, "branch", [], "0 of 1"),
        (True, "channel,branch", [], "1 of 1: a"),
    ],
)
def test_it_is_said_why_no_branch_went(gone, granularity, warnings, said):
    document = {
        "branches": [{"name": "a", "score": 1.0, "gone": gone}],
        "granularity": granularity,
        "warnings": warnings,
    }
    line = outcome.branches(document)
    assert line.startswith(f"branches removed: {said}")
    assert (":" in line.removeprefix("branches removed: ")) == (":" in said)
