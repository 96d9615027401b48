"""A run repeated from its recipe is the same run; flags win; what is no choice is refused."""

import dataclasses
import json

import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import write_images

from tpvprune.cli import recipes
from tpvprune.cli.entry import main
from tpvprune.cli.flags import build_parser
from tpvprune.pipeline.choices import Choices
from tpvprune.scores.taps import Probing
from tpvprune.widths.limits import Limits

MODEL = ["--model", "cifar_resnet20", "--num-classes", "4", "--data-dir", "flat"]
QUICK = ["-j", "1", "--latency-repeats", "0"]
CHOICES = [
    *("--img-size", "16", "--num-images", "16", "-b", "8", "--seed", "3", "--keep", "0.6"),
    *("--criterion", "magnitude", "--repair", "bn", "--round-to", "2", "--mean", "0.4"),
    *("--ignore", "layer1.0.conv1", "--of", "params"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, and a run with choices of its own."""
    place = tmp_path_factory.mktemp("recipes")
    write_images(place / "flat", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["prune", *MODEL, *QUICK, *CHOICES, "--output", "first"]) == 0
    return place


@pytest.fixture
def run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def run(*argv):
        code = main([str(part) for part in argv])
        return code, *capsys.readouterr()

    return run


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


def without(record, *names):
    return {key: value for key, value in record.items() if key not in names}


def test_a_flag_that_excludes_a_choice_takes_its_place():
    prune = recipes.prune_parser(build_parser())
    chosen = {"minutes": 4.0, "lr": 0.01}
    assert recipes._left(prune, chosen, {"epochs": 3}) == {"lr": 0.01}
    assert recipes._left(prune, chosen, {"lr": 0.1}) == chosen


def test_a_run_repeated_from_its_recipe_is_the_same_bit_for_bit(run, place, tmp_path):
    second = tmp_path / "second"
    assert run("prune", *MODEL, *QUICK, "--like", "first", "--output", second)[0] == 0
    first = place / "first"
    assert {p.name for p in first.iterdir()} == {p.name for p in second.iterdir()}
    for name in ("model.safetensors", "ranking.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    # When, by which words and in how many seconds is another matter, and so is where to.
    configs = [read(folder, "config.json") for folder in (first, second)]
    mine, other = (without(c["provenance"], "date", "command") for c in configs)
    assert mine == other
    assert without(configs[0], "provenance") == without(configs[1], "provenance")
    reports = [read(folder, "report.json") for folder in (first, second)]
    others = ("timings", "command", "output")
    assert without(reports[0], *others) == without(reports[1], *others)


def test_a_recipe_holds_what_was_chosen_and_nothing_else(place):
    recipe = read(place / "first", "config.json")["provenance"]["recipe"]
    assert recipe["keep"] == [0.6]
    assert recipe["mean"] == [0.4]
    assert (recipe["seed"], recipe["num_images"], recipe["batch_size"]) == (3, 16, 8)
    assert recipe["ignore"] == ["layer1.0.conv1"]
    others = {"model", "data_dir", "output", "max_loss", "epochs", "latency_runtime", "checkpoint"}
    assert not others & recipe.keys()


def test_flags_win(run, place, tmp_path):
    out = tmp_path / "out"
    flags = ["--keep", "0.9", "--repair", "none", "--round-to", "1"]
    assert run("prune", *MODEL, *QUICK, "--like", "first", *flags, "--output", out)[0] == 0
    first, second = (
        read(folder, "config.json")["provenance"]["recipe"] for folder in (place / "first", out)
    )
    assert second == {**first, "keep": [0.9], "repair": "none", "round_to": 1}


def test_a_file_of_choices_is_a_recipe(run, place, tmp_path):
    recipe = read(place / "first", "config.json")["provenance"]["recipe"]
    lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in recipe.items()]
    text = "\n".join(lines)
    assert tomllib.loads(text)
    (tmp_path / "r.toml").write_text(text)
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    for name in ("r.toml", "r.json"):
        args = recipes.parsed(
            build_parser(), ["prune", "--recipe", str(tmp_path / name), "--output", "x"]
        )
        assert args.choices == recipe
    argv = ["prune", *MODEL, *QUICK, "--recipe", tmp_path / "r.toml", "--output", tmp_path / "o"]
    assert run(*argv)[0] == 0
    found = tmp_path / "o" / "model.safetensors"
    assert found.read_bytes() == (place / "first" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kep = 0.5", "unknown key 'kep': did you mean keep?"),
        ("data-dir = 'x'", "unknown key 'data_dir'"),
        ("output = 'x'", "unknown key 'output'"),
        ("ranking = 'x'", "unknown key 'ranking'"),
        ("keep = 2", "expected a fraction above 0"),
        ("keep = {}", "keep: expected numbers or names"),
        ("keep = 0.5\nmax-loss = 1", "not allowed with"),
        ("round-to = 1.5", "expected a whole number"),
        ("steps = true", "steps: expected numbers or names, found True"),
        ("steps = [1, 2]", "steps: expected numbers or names, found [1, 2]"),
        ("amp = 1", "amp: expected true or false, found 1"),
        ("ignore = ['--overwrite']", "ignore: expected a value, found the flag '--overwrite'"),
        ("of = 'time'", "invalid choice"),
        ("keep = ", "expected TOML, found damage"),
        ("epochs = 3", "--epochs: expected only with --repair distill"),
        ("latency-threads = 3", "--latency-threads: expected only with --of latency"),
    ],
)
def test_what_is_no_choice_is_refused_in_one_line(run, tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    code, _, err = run("prune", *MODEL, "--recipe", tmp_path / "r.toml", "--output", "none")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_folders_without_a_recipe_are_refused(run, place, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((place / "first" / name).read_bytes())
    config = read(tmp_path, "config.json")
    for provenance in ({}, {"recipe": [1]}, 3):
        (tmp_path / "config.json").write_text(json.dumps({**config, "provenance": provenance}))
        code, _, err = run("prune", *MODEL, "--like", tmp_path, "--output", "none")
        assert code == 2
        assert "expected a recipe in its config.json, found none" in err
    assert run("prune", *MODEL, "--like", "flat", "--output", "none")[0] == 2
    assert run("prune", *MODEL, "--recipe", "none.toml", "--output", "none")[0] == 2
    code, _, err = run(
        "prune", *MODEL, "--recipe", "x", "--like", "first", "--output", "none"
    )  # fmt: skip
    assert code == 2
    assert "not allowed with" in err


def test_mirror_images_need_no_training(run, place):
    few = ["--img-size", "16", "--num-images", "16", "--mirrored"]
    code, _, err = run("prune", *MODEL, *QUICK, *few, "--output", "mirrored")
    assert code == 0
    assert "repair 15 and their mirror images" in " ".join(err.split())
    assert read(place / "mirrored", "config.json")["provenance"]["recipe"]["mirrored"] is True
    assert "and their mirror images" in (place / "mirrored" / "report.html").read_text("utf-8")
    code, _, err = run("prune", *MODEL, *few, "--repair", "bn", "--output", "none")
    assert code == 2
    assert "mirrored: expected only with a repair that fits weights" in err


def test_several_reconstructions_are_told(run, place):
    how = ["--img-size", "16", "--num-images", "16", "-b", "4", "--repair", "reconstruct"]
    code, out, err = run(
        "prune", *MODEL, *how, *QUICK, "--reconstructions", "3", "--json", "--output", "several"
    )
    document = json.loads(out)
    assert code == 0
    assert document["reconstructions"] == 3
    assert set(document["images_used"].values()) == {15}
    recipe = read(place / "several", "config.json")["provenance"]["recipe"]
    assert recipe["reconstructions"] == 3
    assert "reconstruct, mean of 3" in (place / "several" / "report.html").read_text("utf-8")
    code, _, err = run(
        "prune", *MODEL, *how, "--reconstructions", "3", "--dry-run", "--output", "x"
    )
    assert code == 0
    assert "3 block reconstructions (minutes each)" in " ".join(err.split())
    code, _, err = run("prune", *MODEL, *how, "--reconstructions", "5", "--output", "none")
    assert code == 2
    assert "reconstructions: expected at most 4, as many as there are batches" in err


def test_several_values_of_one_flag_are_a_list_or_have_commas_between(tmp_path):
    def granularity_of(value):
        path = tmp_path / "r.json"
        path.write_text(json.dumps({"granularity": value}))
        argv = ["prune", "--recipe", str(path), "--output", "x"]
        return recipes.parsed(build_parser(), argv).granularity

    assert granularity_of(["channel", "branch"]) == granularity_of("channel,branch")
    with pytest.raises(ValueError, match=r"expected channel, head, .* found 'channel,depth'"):
        granularity_of(["channel", "depth"])


PRUNE = recipes.prune_parser(build_parser())


def value_of(action):
    if action.nargs == 0:
        return st.booleans()
    if action.choices:
        return st.sampled_from(list(action.choices))
    special = {"granularity": "channel,branch", "outputs": ["a=0.5", "b"], "num_images": "auto"}
    name = recipes._name(action)
    number = st.sampled_from([1, 2, 0.5]) if name in {"lr", "weight_decay"} else st.just(1)
    one = st.just(special[name]) if name in special else number
    return st.lists(one, min_size=3, max_size=3) if action.nargs == 3 else one


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({}, optional={
    name: value_of(action) for name, action in recipes.choices(PRUNE).items()
    if name not in {"max_loss", "img_size", "outputs", "minutes"}
}))  # fmt: skip
def test_what_is_recorded_gives_the_same_choices_again(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "r.json"

    def choices_of(recipe):
        path.write_text(json.dumps(recipe))
        argv = ["prune", "--recipe", str(path), "--output", "x"]
        return json.loads(json.dumps(recipes.parsed(build_parser(), argv).choices))

    first = choices_of(recipe)
    assert choices_of(first) == first
    for name, value in recipe.items():
        if name in first:
            found = first[name]
            found = found[0] if isinstance(found, list) and not isinstance(value, list) else found
            assert found in (value, str(value))


def test_outputs_keep_their_weights():
    argv = ["prune", "--outputs", "a=0.25", "b", "--output", "x"]
    args = recipes.parsed(build_parser(), argv)
    assert args.choices["outputs"] == ["a=0.25", "b=1.0"]


def test_a_budget_that_is_given_takes_the_place_of_the_recipes(tmp_path):
    path = tmp_path / "r.toml"

    def parsed(text, *flags):
        path.write_text(text)
        argv = ["prune", "--recipe", str(path), *flags, "--output", "x"]
        return recipes.parsed(build_parser(), argv)

    args = parsed("keep = 0.7", "--max-loss", "2")
    assert (args.max_loss, args.keeps) == (2, [0.5])
    args = parsed("max-loss = 2", "--keep", "0.7")
    assert (args.max_loss, args.keeps) == (None, [0.7])
    assert "max_loss" not in args.choices
    args = parsed("of = 'latency'\nlatency-threads = 2", "--of", "macs")
    assert (args.of, args.latency_threads) == ("macs", None)
    args = parsed("repair = 'distill'\nepochs = 3", "--repair", "bn")
    assert (args.repair, args.epochs) == ("bn", None)
    args = parsed("keep = [0.9, 0.5]")
    assert args.keeps == [0.9, 0.5]
    assert recipes.of_size(args.choices, 0.9)["keep"] == [0.9]


def test_flags_and_python_have_the_same_defaults():
    args = build_parser().parse_args(["prune", "--output", "out"])
    given = {**vars(args), "keep": args.keeps[0]}
    for record in (Choices(), Limits(), Probing()):
        for field in dataclasses.fields(record):
            # `ignore` is a list, and granularities have names.
            if field.name in given and field.name not in {"ignore", "amp"}:
                assert given[field.name] == getattr(record, field.name), field.name
