"""`tpvprune audit`: the table, the page, the JSON, and what it refuses."""

import json
from argparse import Namespace

import pytest
import timm
import torch
from image_cases import write_classes, write_images

from tpvprune.cli import audit
from tpvprune.cli.entry import main

CLASSES = 4
AUDIT = [
    *("audit", "--model", "test_resnet", "--checkpoint", "weights.pt", "--img-size", "32"),
    *("--crop-pct", "1", "-b", "8", "-j", "2"),
]
CHEAP = ["--measures", "channel_tpv,l2_norm,path_norm", "--criteria", "tpv_uncompensated,magnitude"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    with torch.no_grad():
        model.fc.weight.mul_(100)  # classes that depend on the image
    torch.save(model.state_dict(), root / "weights.pt")
    write_images(root / "flat", 32)
    write_images(root / "few", 10)
    write_classes(root / "classes", "abcd", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        images = ["--data-dir", "flat", "--held-out-dir", "few"]
        assert main([*AUDIT, *CHEAP, *images, "--output", "out"]) == 0
    return root


def test_audit_writes_json_and_page(root):
    found = json.loads((root / "out" / "audit.json").read_text())
    assert found["used_labels"] is False
    assert found["top1"] is None
    assert found["images"]["num_images"] == 32
    assert set(found["measures"]) == {"channel_tpv", "l2_norm", "path_norm"}
    assert set(found["criteria"]) == {"tpv_uncompensated", "magnitude"}
    assert len(found["changes"]) == 8
    for change in ("rescaled by channel", "rescaled by layer"):
        assert found["criteria"]["tpv_uncompensated"]["tau"][change] == 1
        assert abs(found["measures"]["channel_tpv"]["moved"][change]) < 1e-5
        assert abs(found["measures"]["l2_norm"]["moved"][change]) > 0.01
    assert {row["form"] for row in found["tpv"]["rows"]} >= {"trace", "monte carlo"}
    page = (root / "out" / "report.html").read_text()
    assert "No label was read" in page
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_audit_reads_labels_on_request(run):
    code, out, err = run(
        *AUDIT, "--measures", "normalized_loss", "--criteria", "taylor,magnitude", "--data-dir",
        "classes", "--num-images", "16", "--labels", "--json", "--output", "labelled",
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["used_labels"] is True
    assert found["top1"] is not None
    assert found["criteria"]["taylor"]["used_labels"] is True
    assert "labels were read" in err


def test_audit_says_what_it_leaves_out(run):
    code, out, err = run(
        *AUDIT, "--measures", "l2_norm", "--criteria", "taylor", "--data-dir", "flat",
        "--num-images", "16", "--json", "--output", "left",
    )  # fmt: skip
    assert code == 0
    assert "labelled images" in json.loads(out)["left_out"]["taylor"]
    assert "left out: taylor" in err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--criteria", "tvp"], "--criteria: unknown name 'tvp': did you mean tpv"),
        (["--measures", "pathnorm"], "--measures: unknown name 'pathnorm': did you mean path_norm"),
        (["--data-dir", "few"], "expected at least 16 images, found 10"),
        (["--output", "out"], "holds an audit already"),
        (["--output", "flat"], "expected an audit to replace, found other files"),
        (["--output", "weights.pt"], "expected a folder, found a file"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_told_in_one_line(run, extra, message):
    code, out, err = run(*AUDIT, *CHEAP, "--data-dir", "flat", "--output", "new", *extra)
    assert code == 2
    assert message in err
    assert not out
    assert err.count("\n") <= 2


def test_what_a_killed_audit_left_is_in_nobodys_way(tmp_path):
    (tmp_path / f".audit.json.{'0' * 32}.tmp").touch()
    audit._check_output(Namespace(output=tmp_path, overwrite=False))
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"found other files \('mine.txt'\)"):
        audit._check_output(Namespace(output=tmp_path, overwrite=True))
