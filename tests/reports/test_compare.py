"""Several runs side by side: the numbers are those of the runs, and the page stands alone."""

import json
import re

import pytest

from tpvprune.cli.entry import main
from tpvprune.reports.comparing import figures_of, render_comparison

EVIL = '<script>alert("x")</script>&'


def report(**changes):
    data = {
        "model": "resnet10t",
        "keep": 0.5,
        "of": "macs",
        "criterion": "tpv",
        "repair": "compensate",
        "used_labels": False,
        "seed": 0,
        "dense": {"macs": 1000, "params": 400, "latency_ms": 4.0, "top1": 0.9},
        "pruned": {
            "macs": 500, "params": 100, "latency_ms": 3.0, "top1": 0.85, "agreement": 0.93
        },
        "groups": [{"name": "conv1", "num_channels": 16, "kept": 7}],
        "images": {"agreement_on": "512 other images"},
        "versions": {"torch": "2.15.0"},
        "command": "tpvprune prune --model resnet10t",
    }  # fmt: skip
    return {**data, **changes}


@pytest.fixture
def folders(tmp_path):
    """Three runs; the second has a long name, the third lacks what can be lacking."""
    runs = {
        "first": report(),
        "a-very-long-name-of-a-run-that-was-made-last-week": report(
            keep=0.3, pruned={"macs": 300, "params": 60, "top1": 0.8, "agreement": 0.85}
        ),
        "bare": {"model": "other", "dense": {"macs": 10}, "pruned": {"macs": 4}},
    }
    for name, data in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(data))
    return [str(tmp_path / name) for name in runs]


def test_figures_are_fractions_of_the_dense_model():
    assert figures_of(report()) == {
        "macs": 0.5, "params": 0.25, "latency": 0.75, "top1": 0.85,
        "top1_change": pytest.approx(-0.05), "agreement": 0.93, "nonzero_params": None,
        "variance": None,
    }  # fmt: skip
    assert set(figures_of({}).values()) == {None}


def test_table_fits_80_columns_and_has_every_run(folders, capsys):
    assert main(["compare", *folders]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert max(map(len, err.splitlines())) <= 80
    lines = {line.split()[0]: line for line in err.splitlines()}
    assert lines["run"].split()[-2:] == ["agreement", "images"]
    assert lines["first"].split()[1:] == [
        "50.00", "25.00", "75.00", "85.00", "-5.00", "93.00", "512"
    ]  # fmt: skip
    assert lines["bare"].split()[1:] == ["40.00", "-", "-", "-", "-", "-", "-"]


def test_broken_runs_are_named(folders, tmp_path, capsys):
    held = report(held_back={"broken": True})
    (tmp_path / "first" / "report.json").write_text(json.dumps(held))
    assert main(["compare", *folders[:2], "--output", str(tmp_path / "page.html")]) == 0
    assert "BROKEN, by the images held back: first\n" in capsys.readouterr().err
    assert "held back: first.</p>" in (tmp_path / "page.html").read_text("utf-8")


def test_runs_without_branches_say_which_went(folders, tmp_path, capsys):
    branches = [{"name": name, "score": 1.0, "gone": name != "layer1.0"} for name in
                ("layer1.0", "layer1.1", "layer2.1<b>")]  # fmt: skip
    held = {"num_images": 128, "variance_share": 0.0725}
    deep = report(branches=branches, granularity="channel,branch", held_back=held)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "report.json").write_text(json.dumps(deep))
    page = tmp_path / "page.html"
    assert main(["compare", folders[0], str(tmp_path / "deep"), "--output", str(page)]) == 0
    assert "branches removed: 2 of 3 (deep)\n" in capsys.readouterr().err
    text = page.read_text("utf-8")
    rows = dict(re.findall(r'<tr><th><span class="name">(layer[^/]+)</span></th>(.*?)</tr>', text))
    assert rows == {
        "layer1.1": "<td></td><td>gone</td>", "layer2.1&lt;b&gt;": "<td></td><td>gone</td>"
    }  # fmt: skip
    assert "What may leave" in text
    assert "channel,branch" in text
    # Of one run alone it is known, and of images of its own: no best of it.
    assert 'data-label="Output variance">7.25' in text
    assert main(["compare", *folders]) == 0
    assert "branches" not in capsys.readouterr().err


def test_runs_with_zeroed_weights_have_a_column_more(folders, tmp_path, capsys):
    dense = {"macs": 1000, "params": 400, "nonzero_params": 400, "latency_ms": 4.0, "top1": 0.9}
    masked = {**dense, "nonzero_params": 210, "agreement": 0.9}
    sparse = tmp_path / "a-run-of-single-weights-that-was-made-last-week"
    sparse.mkdir()
    (sparse / "report.json").write_text(json.dumps(report(dense=dense, pruned=masked)))
    page = tmp_path / "page.html"
    assert main(["compare", folders[0], str(sparse), "--output", str(page)]) == 0
    err = capsys.readouterr().err
    assert max(map(len, err.splitlines()[:3])) <= 80
    assert err.splitlines()[0].split()[:4] == ["run", "MACs", "params", "non-zero"]
    assert err.splitlines()[2].split()[1:4] == ["100.00", "100.00", "52.50"]
    assert err.splitlines()[1].split()[1:4] == ["50.00", "25.00", "25.00"]
    text = page.read_text("utf-8")
    assert 'data-label="Non-zero parameters" class=best>25.0' in text
    assert main(["compare", folders[0], folders[1]]) == 0
    assert "non-zero" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "num_labelled", "marked"),
    [
        ("512 other images", 300, {"Top-1", "Change", "Agreement"}),
        ("64 held-back images", 300, {"Top-1", "Change"}),
        ("511 other images", 300, {"Top-1", "Change"}),
        ("512 other images", 299, {"Agreement"}),
        ("512 other images", None, {"Agreement"}),
        (None, 300, {"Top-1", "Change"}),
    ],
)
def test_best_is_marked_only_among_equal_images(images, num_labelled, marked):
    pruned = {**report()["pruned"], "num_images": 300}
    other = report(
        pruned={**pruned, "top1": 0.86, "agreement": 0.95, "num_images": num_labelled},
        images={"agreement_on": images},
    )
    text = render_comparison([("a", report(pruned=pruned)), ("b", other)])
    found = set(re.findall(r'data-label="([^"]+)" class=best', text))
    assert found - {"MACs", "Parameters", "Latency"} == marked
    assert ("but not of agreement" in text.lower()) == ("Agreement" not in marked)
    assert '<span class="on">512 other images</span>' in text
    assert '<span class="on">300 labelled images</span>' in text


def test_runs_that_saw_different_images_say_so(folders, tmp_path, capsys):
    (tmp_path / "odd").mkdir()
    odd = report(images={"agreement_on": "64 held-back images"})
    (tmp_path / "odd" / "report.json").write_text(json.dumps(odd))
    assert main(["compare", folders[0], str(tmp_path / "odd")]) == 0
    err = capsys.readouterr().err
    assert "agreement on 512 other images: first" in err
    assert "agreement on 64 held-back images: odd" in err
    assert "compare those runs with care" in err
    assert main(["compare", folders[0], folders[1]]) == 0
    assert "with care" not in capsys.readouterr().err
    few = report(pruned={**report()["pruned"], "num_images": 60})
    (tmp_path / "odd" / "report.json").write_text(json.dumps(few))
    many = report(pruned={**report()["pruned"], "num_images": 1500})
    (tmp_path / "even").mkdir()
    (tmp_path / "even" / "report.json").write_text(json.dumps(many))
    assert main(["compare", str(tmp_path / "odd"), str(tmp_path / "even")]) == 0
    err = capsys.readouterr().err
    assert "top-1 on 60 labelled images: odd" in err
    assert "top-1 on 1500 labelled images: even" in err
    assert "top-1 on different images" in err and "agreement on different" not in err


def test_json_holds_each_run(folders, capsys):
    assert main(["compare", *folders, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["share"]["macs"] for run in runs] == [0.5, 0.3, 0.4]
    assert runs[0]["folder"] == folders[0]


def test_page_is_written_once_and_stands_alone(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", *folders, "--output", str(page)]) == 0
    text = page.read_text("utf-8")
    assert not re.search(r'(src|href)="http|@import|<script', text)
    for expected in ("85.00", "What differs", "conv1", "tpvprune prune --model resnet10t"):
        assert expected in text
    assert main(["compare", *folders, "--output", str(page)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_runs_of_equal_names_are_told_apart(tmp_path, capsys):
    folders = [tmp_path / seed / "pruned" for seed in ("s0", "s1")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report()))
    assert main(["compare", *map(str, folders), "--json"]) == 0
    names = [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert names == ["s0/pruned", "s1/pruned"]


def test_names_are_escaped():
    data = report(model=EVIL, groups=[{"name": EVIL, "num_channels": 2, "kept": 1}], command=EVIL)
    assert "<script" not in render_comparison([(EVIL, data), ("b", report(criterion=EVIL))])


def test_one_run_is_nothing_to_compare(folders, tmp_path, capsys):
    assert main(["compare", folders[0]]) == 2
    assert "expected at least two folders, found 1" in capsys.readouterr().err
    (tmp_path / "comparison.html").touch()
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "x.html")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "found one that holds several" in said
    assert "comparison.html compares them" in said


MIXED = '{"dense": {"macs": "x"}, "pruned": {"macs": 1}}'


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"dense": 3}', MIXED])
def test_what_is_no_run_is_said_in_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "report" in err
