"""The report: complete, self-contained, and safe for whatever names and numbers it is given."""

import copy
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from tpvprune.passes.evaluation import Evaluation
from tpvprune.reports.card import card
from tpvprune.reports.charts import scale_of
from tpvprune.reports.comparing import render_comparison
from tpvprune.reports.report import DAMAGE, render, report_data, write_report
from tpvprune.reports.text import percent, short, significant, whole

EVIL = '<script>alert("x")</script>&'


def evaluation(**changes):
    numbers = {
        "num_images": 10_000,
        "top1": 0.9339,
        "top5": 0.998,
        "agreement": None,
        "output_variance": None,
        "macs": 125_485_706,
        "params": 853_018,
        "latency_ms": 12.4,
        "latency_sd_ms": 0.3,
        "latency_batch_size": 32,
    }
    return Evaluation(**{**numbers, **changes})


def full_data(name="layer1.0.conv1"):
    return {
        "model": name,
        "keep": 0.5,
        "of": "macs",
        "criterion": "tpv",
        "used_labels": False,
        "repair": "auto",
        "repair_chosen": name,
        "seed": 0,
        "reached": True,
        "dense": evaluation(),
        "pruned": evaluation(macs=62_611_210, top1=0.9103, agreement=0.942, output_variance=14.1),
        "warnings": [f"BROKEN: {name}", f"step 1: {name}"],
        "held_back": {
            "num_images": 77,
            "agreement": 0.4321,
            "chance_agreement": 0.1234,
            "output_variance": 13.9,
            "variance_share": 0.0567,
            "broken": True,
        },
        "images_used": {"selection": 901, "repair": 902, "layers": 903, name: 55},
        "num_images": 900,
        "num_held_back": 77,
        "images": {"source": name, "num_images": 900, "agreement_on": f"512 {name}"},
        "training": {
            **{"epochs": 3, "lr": 0.01, "num_images": 900, "batch_size": 128, "seconds": 1.5},
            **{"num_held_back": 77, "used_labels": False, "saved": "trained"},
            "before": {"output_variance": 20.0, "agreement": 0.9},
            "after": {"output_variance": 14.1, "agreement": 0.942},
        },
        "disagreement": {
            "num_images": 512,
            "num_changed": 30,
            "classes": [{"class": k, "num_images": 9, "agreement": 0.9} for k in range(3)],
            "samples": [
                {"image": f"data:image/png;base64,{'A' * 8}", "dense": 1, "pruned": 2}
                | {"dense_share": 0.9, "pruned_share": 0.4}
            ],
        },
        "class_names": ["ant", name, "cat"],
        "layers": [{"name": name, "num_weights": 90, "kept": 40}],
        "output_variance": {"none": 310.0, name: 13.9},
        "variance_share": {"none": 1.4, name: 0.0567},
        "output_second_moment": 402.0,
        "steps": [
            {"macs": 94e6, "params": 6e5, "agreement": 0.981, "output_variance": 4.0},
            {"macs": 62_611_210, "params": 4e5, "agreement": 0.942, "output_variance": 13.9}
            | {"num_images": 77, "chance_agreement": 0.1, "variance_share": 0.1, "broken": False},
        ],
        "groups": [
            {"name": name, "unit": "channel", "num_channels": 16, "kept": 7},
            {"name": "layer2.0.conv1", "unit": "channel", "num_channels": 32, "kept": 30},
        ],
        "blocked": [{"name": name, "num_channels": 10, "reason": name}],
        "timings": {name: 9.2},
        "scores": {
            name: {
                "values": torch.logspace(-3, 1, 16),
                "stderr": torch.logspace(-4, 0, 16),
                "kept": torch.arange(16) > 8,
            }
        },
        "comparison": [
            {"criterion": "tpv", "labels": False, "macs": 62e6, "agreement": 0.95, "top1": 0.94},
            {"criterion": name, "labels": True, "macs": 0.5, "agreement": None, name: 1},
        ],
        "command": ["tpvprune", "prune", "--model", name],
        "versions": {"torch": "2.15.0", name: name},
        "preprocessing": {"mean": (0.485, 0.456, 0.406), "input_size": [3, 32, 32]},
    }


class Headings(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open, self.tags = [], False, []

    def handle_starttag(self, tag, attrs):
        self.open = tag in ("h1", "h2")
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open:
            self.found.append(data)
            self.open = False


def parse(page):
    parser = Headings()
    parser.feed(page)
    return parser


def test_classes_of_few_images_are_counted_but_not_shown(tmp_path):
    data = full_data()
    data["disagreement"]["classes"] += [
        {"class": 3, "num_images": 4, "agreement": 0.0},
        {"class": 4, "num_images": 5, "agreement": 0.25},
    ]
    data.pop("class_names", None)
    _, page = write_report(data, tmp_path)
    text = page.read_text()
    assert "1 of fewer than 5 images each are left out" in text
    shown = text[text.index("Agreement by class") : text.index("Images that changed")]
    assert "class 3" not in shown
    assert "25.0" in shown


def test_every_section_is_there(tmp_path):
    _, page = write_report(full_data(), tmp_path)
    assert parse(page.read_text()).found == [
        "layer1.0.conv1, pruned to 50\u202f% of its MACs",
        "Before and after",
        "Criteria compared",
        "Training",
        "Kept width",
        "Weights that stay",
        "Along the steps",
        "Agreement by class",
        "Images that changed",
        "Scores",
        "Repair",
        "Layers left whole",
        "How it was made",
    ]


def test_headline_numbers_are_written_out(tmp_path):
    page = write_report(full_data(), tmp_path)[1].read_text().replace("\u202f", " ")
    text = re.sub(r"<[^>]*>", "", page)
    for number in (
        "49.9%",
        "62.6 M of 125.5 M",
        "94.2 %",
        "91.03 %",
        "(\u22122.4)",
        "14.1",
        "3.51 %",
    ):
        assert number in text, number
    assert "No label was used" in text
    assert "tpvprune prune --model layer1.0.conv1" in text


def test_page_needs_nothing_from_outside(tmp_path):
    page = write_report(full_data(), tmp_path)[1].read_text()
    page = page.replace(' src="data:image/png;base64,AAAAAAAA"', "")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", page)
    assert not any({"src", "href", "onload"} & attrs.keys() for _, attrs in parse(page).tags)


def test_names_are_escaped_everywhere(tmp_path):
    page = write_report(full_data(EVIL), tmp_path)[1].read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12
    assert not any(tag == "script" for tag, _ in parse(page).tags)


def leaves(value, path=()):
    """Yield the path of everything that is no container."""
    if not isinstance(value, dict | list):
        yield path
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        yield from leaves(value[key], (*path, key))


def test_nothing_in_a_report_is_taken_for_html():
    # A stranger's: whatever stands in the place of a string or a number is text, or is refused.
    valid = json.loads(json.dumps(full_data(), default=_as_list))
    places = list(leaves(valid))
    assert len(places) > 150
    shown = 0
    for path in places:
        data = copy.deepcopy(valid)
        inside = data
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = EVIL
        for write in (render, lambda x: render_comparison([("a", x), ("b", valid)])):
            try:
                page = write(data)
            except DAMAGE:
                continue
            assert "<script" not in page, path
            assert not any(tag == "script" for tag, _ in parse(page).tags), path
            shown += "&lt;script&gt;" in page
    assert shown > 40


def test_units_and_counts_that_are_strings_are_escaped():
    data = json.loads(json.dumps(full_data(), default=_as_list))
    data["groups"][0]["unit"] = data["blocked"][0]["num_channels"] = EVIL
    data["num_held_back"] = data["pruned"]["latency_batch_size"] = EVIL
    page = render(data)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_warnings_stand_above_all_else_and_what_was_held_back_is_told():
    data = json.loads(json.dumps(full_data(EVIL), default=_as_list))
    page = render(data)
    warned = re.findall(r'<p class="warn">(.*?)</p>', page)
    assert [line.partition(":")[0] for line in warned] == ["BROKEN", "step 1"]
    assert page.index(warned[1]) < page.index('class="lead"')
    text = re.sub(r"<[^>]*>", "", page).replace("\u202f", " ")
    interval = "95% interval 33 to 54"  # Wilson's, by hand
    for fact in (f"agreement 43.2 % ({interval}, by chance 12.3 %)", "variance 0.057"):
        assert fact in text
    for name, num in {"To choose widths": 901, "To repair": 902, "Of each layer": 903}.items():
        assert f"<dt>{name}</dt><dd>{num}</dd>" in page


def test_a_card_begins_with_the_caveats():
    config = {"model": "resnet18", "provenance": {}, "pretrained_cfg": {}}
    text = card("org/small", config, {"warnings": [f"BROKEN: {EVIL}", "repair none"]}, license=None)
    assert text.startswith("# small\n\n> BROKEN: ")
    assert "\n>\n> repair none\n\n" in text
    assert "<script" not in text
    assert ">" not in card("org/small", config, {}, license=None).partition("\n\n")[2][:40]


@pytest.mark.parametrize("part", sorted(full_data()))
def test_any_part_may_be_missing(part):
    data = json.loads(json.dumps(full_data(), default=_as_list))
    del data[part]
    assert parse(render(data)).found


def _as_list(value):
    return vars(value) if isinstance(value, Evaluation) else value.tolist()


def test_empty_data_gives_a_page():
    assert parse(render({})).found == ["Model, pruned"]


def test_budget_that_was_not_reached_is_said(tmp_path):
    page = write_report({**full_data(), "reached": False}, tmp_path)[1].read_text()
    assert "The budget was not reached" in page
    assert "stopped at 49.9" in page
    late = {"reached": False, "of": "latency", "speed": {"ratio": 0.712}}
    assert "stopped at 71.2" in write_report({**full_data(), **late}, tmp_path)[1].read_text()


def test_use_of_labels_is_said(tmp_path):
    data = {**full_data(), "criterion": "taylor", "used_labels": True}
    page = write_report(data, tmp_path)[1].read_text()
    assert "The criterion taylor used labels" in page
    assert "No label was used" not in page


def test_numbers_that_are_not_finite_become_null(tmp_path):
    data = full_data()
    data["output_variance"]["broken"] = float("inf")
    data["scores"]["layer1.0.conv1"]["values"][:3] = torch.tensor([float("nan"), 0.0, -1.0])
    data["steps"][0]["agreement"] = float("nan")
    path, page = write_report(data, tmp_path)
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read["output_variance"]["broken"] is None
    assert read["scores"]["layer1.0.conv1"]["values"][:2] == [None, 0.0]
    assert "nan" not in page.read_text()


def test_json_holds_all_that_was_given(tmp_path):
    read = json.loads(write_report(full_data(), tmp_path)[0].read_text())
    assert read.keys() == full_data().keys()
    assert read["dense"]["macs"] == 125_485_706
    assert read["scores"]["layer1.0.conv1"]["kept"] == [False] * 9 + [True] * 7


def test_widths_of_bars_are_the_kept_shares(tmp_path):
    page = write_report({**full_data(), "layers": []}, tmp_path)[1].read_text()
    assert re.findall(r'"dense" style="width:([\d.]+)%"', page) == ["50.00", "100.00"]
    bars = re.findall(r'<span class="stays" style="width:([\d.]+)%"></span></span></span>', page)
    assert bars == ["43.75", "93.75"]


def test_data_of_a_result_has_its_scores_and_masks():
    result = SimpleNamespace(
        report={"keep": 0.5},
        scores={"a": torch.ones(3), "b": torch.ones(2)},
        kept={"a": torch.tensor([True, False, True]), "b": torch.ones(5, dtype=torch.bool)},
    )
    data = report_data(result)
    assert data["keep"] == 0.5
    assert data["scores"]["a"]["kept"].tolist() == [True, False, True]
    assert data["scores"]["b"]["kept"] is None
    assert result.report == {"keep": 0.5}


def test_numbers_read_well():
    assert percent(0.50123) == "50.1\u202f%"
    assert percent(-0.5, 0) == "\u221250\u202f%"
    assert [short(n) for n in (999, 11_002_300, 125_485_706, 4.09e9)] == [
        "999",
        "11.0\u202fM",
        "125.5\u202fM",
        "4.09\u202fG",
    ]
    assert whole(853_018) == "853\u202f018"
    assert [significant(x) for x in (0.0, 0.013249, 1480.2, 3.14e-6)] == [
        "0",
        "0.0132",
        "1\u202f480",
        "3.14·10⁻⁶",
    ]


def test_scale_spans_the_scores_and_ignores_the_lowest_few():
    assert scale_of([0.0, 0.0]) is None
    low, high = scale_of([1e-30, *(10.0 ** (k / 33) for k in range(100))])
    assert -0.5 < low < 0
    assert 3 < high < 3.5


@pytest.mark.parametrize(
    ("round_to", "told"), [("auto", "16 in wide groups to 1 in narrow ones"), (8, "8")]
)
def test_the_multiples_of_widths_are_told(round_to, told):
    page = render(json.loads(json.dumps(full_data(), default=_as_list)) | {"round_to": round_to})
    assert f"<dt>Widths in multiples of</dt><dd>{told}</dd>" in page
