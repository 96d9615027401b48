"""The commands: what is known of each, and its flags, section by section."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from tpvprune.cli.flag_groups import (
    Parser,
    add,
    add_criterion,
    add_data,
    add_file,
    add_folder,
    add_latency_budget,
    add_model,
    add_model_kwargs,
    add_output,
    add_preprocessing,
    add_training,
    flag,
    switch,
)
from tpvprune.cli.flag_values import (
    AUTO,
    count,
    count_or_auto,
    fraction,
    granularity,
    listed,
    points,
    word,
)


def _add_prune(sub: Parser) -> None:
    add_folder(sub, "folder that `prune` or `distill` wrote, to prune what it holds further")
    add_data(sub, 1024, auto=True)
    add(sub, "--eval-dir")
    add_criterion(sub)
    recipe = sub.section("recipe (flags win)").add_mutually_exclusive_group()
    flag(recipe, "--like", "OUT", "folder of an earlier run, whose choices are repeated")
    flag(
        recipe, "--recipe", "F", type=Path,
        text='TOML or .json file of choices: keep = 0.6, repair = "reconstruct", ...',
    )  # fmt: skip
    how = sub.section("pruning")
    flag(
        how, "--granularity", "G", type=granularity,
        text="what is removed: channel (heads and convolution groups too), head (those alone), "
        "branch (residual branches, layers of chains), channel,branch (both under one budget), "
        "weight (single ones become zero), or 2:4 (2 of every 4 weights stay) (channel; "
        "channel,branch with --of latency)",
    )  # fmt: skip
    size = how.add_mutually_exclusive_group()
    flag(
        size, "--keep", "X", dest="keeps", type=fraction, nargs="+", default=[0.5],
        text="fraction that stays, 0 to 1 (0.5); of several each gets a folder in OUT, from one "
        "ranking, and a page compares them",
    )  # fmt: skip
    flag(
        size, "--max-loss", "X", type=points,
        text="instead of --keep: the smallest model that loses at most X points of agreement, of "
        "top-1 with --eval-dir; tries up to five sizes, a repair each, and sets images aside, "
        "half of which decide and half of which judge",
    )  # fmt: skip
    flag(
        how, "--ranking", "OUT",
        "folder of an earlier run on the same weights: its ranking serves this budget, too",
    )  # fmt: skip
    flag(
        how, "--of", None, choices=("macs", "params", "latency"), default="macs",
        text="what --keep is a fraction of; latency: milliseconds by --latency-runtime (macs)",
    )  # fmt: skip
    add_latency_budget(how)
    flag(
        how, "--repair", None, default="compensate",
        choices=("none", "bn", "compensate", "reconstruct", "auto", "distill"),
        text="what follows a cut; reconstruct: refit whole blocks, mostly better and minutes "
        "instead of seconds; auto takes the closest to the dense model; distill: compensate, then "
        "train towards the dense model on all of the images. All but a tenth of --num-images, at "
        "most 128, are used; on these what is further from the dense model than a cheaper repair "
        "is not taken (compensate)",
    )  # fmt: skip
    flag(
        how, "--reconstructions", "N", type=count, default=1,
        text="with --repair reconstruct: take the mean of so many, each of its own part of the "
        "images, of which it wants about a thousand (1)",
    )  # fmt: skip
    flag(how, "--steps", "N", "rounds of cutting (1)", type=count, default=1)
    flag(
        how, "--allocation", None, choices=("curves", "rank", "plain"),
        text="widths by joint variance curves (tpv), by score per cost, or by score alone",
    )  # fmt: skip
    flag(
        how, "--round-to", "N", type=count_or_auto, default=AUTO,
        text="width multiples, 1 for any width; auto: 16 in wide groups, 8 to 1 in narrow ones "
        "(auto)",
    )  # fmt: skip
    flag(how, "--min-channels", "N", "narrowest width allowed (1)", type=count, default=1)
    flag(
        how, "--max-removed", "X", "largest fraction of one group that may go (1)",
        type=fraction, default=1.0,
    )  # fmt: skip
    flag(
        how, "--max-depth-removed", "X", type=fraction, default=1.0,
        text="where branches may go, the largest fraction of them that may (1)",
    )  # fmt: skip
    add(sub, "--grad-checkpointing", "--ignore")
    add_training(
        sub, "training (with --repair distill)",
        mirror="; any repair of weights fits to mirror images, too",
    )  # fmt: skip
    add(sub, "--device", "--latency-repeats")
    add_output(sub, "folder for the pruned model and its report")
    add(sub, "--dry-run")


def _add_score(sub: Parser) -> None:
    add_model(sub)
    add_data(sub, 1024, auto=True)
    add_criterion(sub)
    switch(sub.section("pruning"), "--amp", "mixed precision (tpv)")
    add(sub, "--grad-checkpointing", "--ignore", "--device")
    add_output(sub, "JSON file for the scores")


def _add_groups(sub: Parser) -> None:
    add_folder(sub)
    add_preprocessing(sub)
    add(sub, "--ignore")


def _add_evaluate(sub: Parser) -> None:
    add_folder(sub)
    flag(
        sub.section("model"), "--dense", "F",
        "OUT is compared with this checkpoint of the dense model, or with `pretrained`",
    )  # fmt: skip
    add_data(sub, None, split="validation")
    add(sub, "--device", "--latency-repeats")
    add_latency_budget(sub.section("run"), table=False)


def _add_trained(sub: Parser, *, teacher: bool = True) -> None:
    sub.add_argument("folder", metavar="OUT", help="folder that `prune` wrote; it stays as it is")
    model = sub.section("model")
    flag(
        model, "--dense", "F",
        "checkpoint of the dense model, or `pretrained` (else what OUT was pruned from)",
    )  # fmt: skip
    flag(model, "--model", "M", "package.module:factory, if OUT holds a model of your own")
    add_model_kwargs(model)
    add_data(sub, None, labelled=not teacher)
    add(sub, "--eval-dir", "--device", "--latency-repeats")
    add_output(sub, "folder for the trained model and its report")
    add(sub, "--dry-run")
    add_training(sub, teacher=teacher)


def _add_latency_table(sub: Parser) -> None:
    add_model(sub)
    add_preprocessing(sub)
    add_latency_budget(sub.section("time"), table=False)
    add(sub, "--device")
    add_output(sub, "JSON file for the table")


def _add_benchmark(sub: Parser) -> None:
    add_model(sub)
    add_data(sub, 1024)
    add(sub, "--eval-dir")
    how = sub.section("comparison (lists with commas between)")
    flag(
        how, "--criteria", "LIST", type=listed(word), default=["tpv", "magnitude", "taylor"],
        text="criteria; tp:magnitude, tp:taylor, ... are torch-pruning as it comes "
        "(tpv,magnitude,taylor)",
    )  # fmt: skip
    flag(
        how, "--keep", "LIST", "fractions of the MACs that stay (0.9,0.7,0.5)",
        type=listed(fraction), default=[0.9, 0.7, 0.5],
    )  # fmt: skip
    flag(
        how, "--repair", "LIST", type=listed(word), default=["none", "bn", "compensate"],
        text="what follows a cut, of none, bn, compensate, reconstruct (none,bn,compensate)",
    )  # fmt: skip
    flag(
        how, "--ranking", "LIST", type=listed(word), default=["curves", "per_cost", "plain"],
        text="channels go by score per MAC saved (per_cost), by score alone (plain), or, tpv "
        "only, by joint variance curves (curves,per_cost,plain)",
    )  # fmt: skip
    flag(how, "--seeds", "N", "repetitions, from --seed on (3)", type=count, default=3)
    flag(
        how, "--iterative", "N", type=count, default=1,
        text="go to the one --keep in N equal steps, scored anew each, and measure after each (1)",
    )  # fmt: skip
    add(sub, "--device")
    add_output(sub, "folder for rows, table and page; a run that was stopped goes on")
    add(sub, "--dry-run")


def _add_compare(sub: Parser) -> None:
    sub.add_argument(
        "folders", nargs="+", metavar="OUT",
        help="two or more folders that `prune` or `distill` wrote",
    )  # fmt: skip
    add_file(sub.section("page"), "HTML file to write (none)")


def _add_export(sub: Parser) -> None:
    add_folder(sub)
    how = sub.section("file")
    flag(
        how, "--format", None, "pt2: torch.export's (onnx)", choices=("onnx", "pt2"), default="onnx"
    )  # fmt: skip
    switch(how, "--dynamic-batch", "leave the batch size free (else -b, or 1)")
    add_file(how, "file to write (OUT/model[-int8].FORMAT)")
    switch(
        how, "--int8",
        "weights and activations in int8 (onnx), ranges from --data-dir; float32 and int8 "
        "are compared on other images of it",
    )  # fmt: skip
    flag(
        how, "--ranges", "R", nargs="+",
        text="of activations, with --int8: the best of min-max, percentile, entropy (all three)",
    )  # fmt: skip
    flag(
        how, "--weight-bits", "N", type=int, nargs="+",
        text="of weights, with --int8 (8, and 7 where 8 are not close on this processor); 7 for "
        "one without VNNI",
    )  # fmt: skip
    flag(
        sub.section("model"), "--dense", "F",
        "checkpoint of the dense model, or `pretrained`, to compare OUT with (--int8)",
    )  # fmt: skip
    add_data(sub, None, shown="64, with --int8 512")
    add(sub, "--latency-repeats")


def _add_audit(sub: Parser) -> None:
    add_model(sub)
    add_data(sub, 1000)
    flag(
        sub.section("images"), "--held-out-dir", "D",
        "images that the model was not trained on, no labels needed (else others of the same)",
    )  # fmt: skip
    how = sub.section("audit (lists with commas between)")
    switch(
        how, "--labels",
        "measure losses and errors against labels (else the model's own classes)",
    )  # fmt: skip
    flag(
        how, "--criteria", "LIST", type=listed(word),
        text="rankings to compare (tpv,tpv_uncompensated,jbr,activation_variance,magnitude)",
    )  # fmt: skip
    flag(how, "--measures", "LIST", "what to measure (all)", type=listed(word))
    flag(how, "--keep", "X", "the cut to compare, of MACs (0.5)", type=fraction, default=0.5)
    add(sub, "--ignore", "--device")
    add_output(sub, "folder for page and JSON (audit-output)", default="audit-output")


def _add_demo(sub: Parser) -> None:
    add_output(sub, "folder for the report (demo-output)", default="demo-output")


class Command(NamedTuple):
    """What is known of a command beside its flags.

    ``home``: the module in this folder that holds it. ``writes``: what ``--output`` names where
    nothing but that is to be checked. ``after``: what is said after an interruption. ``saves``:
    after what a run that is stopped can go on. ``shared``: whether several processes may run it.
    ``plain``: whether memory that tensors leave behind goes
    back, as in a plain process.
    """

    add: Callable[[Parser], None]
    home: str
    usage: str
    text: str
    writes: Literal["model", "file"] | None = None
    after: str = ""
    saves: str = ""
    shared: bool = False
    plain: bool = True


_UNTOUCHED = ": nothing was written"

COMMANDS = {
    "prune": Command(
        _add_prune, "pruning", "(OUT | --model M) --data-dir D --output OUT2 [options]",
        "Prune a model and save the smaller one.",
        None, _UNTOUCHED, "selection or epoch", shared=True, plain=False,
    ),
    "score": Command(
        _add_score, "commands", "--model M --data-dir D --output F [options]",
        "Score every channel and write the scores as JSON.",
        "file", _UNTOUCHED, shared=True, plain=False,
    ),
    "groups": Command(
        _add_groups, "commands", "(OUT | --model M) [options]",
        "Show what can be pruned, what not, and why.",
    ),
    "evaluate": Command(
        _add_evaluate, "commands", "(OUT | --model M) --data-dir D [options]",
        "Measure a model or a saved pruned model.", shared=True,
    ),
    "distill": Command(
        _add_trained, "training", "OUT --data-dir D --output OUT2 [options]",
        "Train a saved pruned model towards the dense one, without labels. A run that was stopped "
        "goes on when it is started again.",
        "model", _UNTOUCHED, "epoch", shared=True, plain=False,
    ),
    "finetune": Command(
        partial(_add_trained, teacher=False), "training",
        "OUT --data-dir D --output OUT2 [options]",
        "Train a saved pruned model with labels, to compare distillation with.",
        "model", _UNTOUCHED, "epoch", shared=True, plain=False,
    ),
    "benchmark": Command(
        _add_benchmark, "benchmark", "--model M --data-dir D --eval-dir D --output OUT ...",
        "Compare criteria at equal images, budgets and repairs. A run that was stopped goes on "
        "when it is started again.",
        after=": the same command goes on with the rows that are missing", shared=True, plain=False,
    ),
    "compare": Command(
        _add_compare, "comparing", "OUT OUT ... [--output F] [options]",
        "Put several saved runs side by side, in a table and on one HTML page.", "file",
    ),
    "export": Command(
        _add_export, "exporting", "(OUT | --model M) [--format onnx|pt2] [options]",
        "Write a model as one ONNX or torch.export file and compare its outputs.",
        "file", _UNTOUCHED,
    ),
    "latency-table": Command(
        _add_latency_table, "commands", "--model M --output F [options]",
        "Measure what widths cost on this device, for `prune --latency-runtime table` on another.",
        "file", _UNTOUCHED,
    ),
    "audit": Command(
        _add_audit, "audit", "--model M --data-dir D [options]",
        "Measure how sensitive a model is, and how far measures and rankings move under changes "
        "that leave it as good as it was.",
    ),
    "demo": Command(
        _add_demo, "demo", "[options]", "Prune a small model on handwritten digits, offline.",
        "model",
    ),
}  # fmt: skip
