"""The flags of each command, section by section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tpvprune.cli.flag_groups import (
    Parser,
    add_checkpointing,
    add_criterion,
    add_data,
    add_device,
    add_dry_run,
    add_eval_dir,
    add_ignore,
    add_latency,
    add_latency_budget,
    add_model,
    add_output,
    add_own_model,
    add_preprocessing,
    add_training,
    count,
    fraction,
    granularity,
    listed,
    points,
    word,
)


def _add_prune(sub: Parser) -> None:
    sub.add_argument(
        "folder", nargs="?", metavar="OUT",
        help="folder that `prune` or `distill` wrote, to prune what it holds further",
    )  # fmt: skip
    add_model(sub, required=False)
    add_data(sub, num_images=True, auto=True)
    add_eval_dir(sub)
    add_criterion(sub)
    recipe = sub.section("recipe (flags win)").add_mutually_exclusive_group()
    recipe.add_argument(
        "--like", metavar="OUT", help="folder of an earlier run, whose choices are repeated"
    )
    recipe.add_argument(
        "--recipe", type=Path, metavar="F",
        help='TOML or .json file of choices: keep = 0.6, repair = "reconstruct", ...',
    )  # fmt: skip
    how = sub.section("pruning")
    how.add_argument(
        "--granularity", type=granularity, metavar="G",
        help="what is removed: channel (heads and convolution groups too), head (those alone), "
        "branch (residual branches, layers of chains), channel,branch (both under one budget), "
        "weight (single ones become zero), or 2:4 (2 of every 4 weights stay) (channel; "
        "channel,branch with --of latency)",
    )  # fmt: skip
    size = how.add_mutually_exclusive_group()
    size.add_argument(
        "--keep", dest="keeps", type=fraction, nargs="+", default=[0.5], metavar="X",
        help="fraction that stays, 0 to 1 (0.5); of several each gets a folder in OUT, from one "
        "ranking, and a page compares them",
    )  # fmt: skip
    size.add_argument(
        "--max-loss", type=points, metavar="X",
        help="instead of --keep: the smallest model that loses at most X points of agreement, of "
        "top-1 with --eval-dir; tries up to five sizes, a repair each, and sets images aside, "
        "half of which decide and half of which judge",
    )  # fmt: skip
    how.add_argument(
        "--ranking", metavar="OUT",
        help="folder of an earlier run on the same weights: its ranking serves this budget, too",
    )  # fmt: skip
    how.add_argument(
        "--of", choices=("macs", "params", "latency"), default="macs",
        help="what --keep is a fraction of; latency: milliseconds by --latency-runtime (macs)",
    )  # fmt: skip
    add_latency_budget(how)
    how.add_argument(
        "--repair", choices=("none", "bn", "compensate", "reconstruct", "auto", "distill"),
        default="compensate",
        help="what follows a cut; reconstruct: refit whole blocks, mostly better and minutes "
        "instead of seconds; auto takes the closest to the dense model; distill: compensate, then "
        "train towards the dense model on all of the images. All but a tenth of --num-images, at "
        "most 128, are used; on these what is further from the dense model than a cheaper repair "
        "is not taken (compensate)",
    )  # fmt: skip
    how.add_argument("--steps", type=count, default=1, metavar="N", help="rounds of cutting (1)")
    how.add_argument(
        "--allocation", choices=("curves", "rank", "plain"),
        help="widths by joint variance curves (tpv), by score per cost, or by score alone",
    )  # fmt: skip
    how.add_argument("--round-to", type=count, default=1, metavar="N", help="width multiples (1)")
    how.add_argument(
        "--min-channels", type=count, default=1, metavar="N", help="narrowest width allowed (1)"
    )
    how.add_argument(
        "--max-removed", type=fraction, default=1.0, metavar="X",
        help="largest fraction of one group that may go (1)",
    )  # fmt: skip
    how.add_argument(
        "--max-depth-removed", type=fraction, default=0.5, metavar="X",
        help="where branches may go, the largest fraction of them that may (0.5)",
    )  # fmt: skip
    add_checkpointing(how)
    add_ignore(how)
    add_training(sub, "training (with --repair distill)")
    add_device(sub)
    add_latency(sub)
    add_output(sub, "folder for the pruned model and its report")
    add_dry_run(sub)


def _add_score(sub: Parser) -> None:
    add_model(sub)
    add_data(sub, num_images=True, auto=True)
    add_criterion(sub)
    how = sub.section("pruning")
    how.add_argument("--amp", action="store_true", help="mixed precision (tpv)")
    add_checkpointing(how)
    add_ignore(how)
    add_device(sub)
    add_output(sub, "JSON file for the scores")


def _add_groups(sub: Parser) -> None:
    sub.add_argument("folder", nargs="?", metavar="OUT", help="folder that `prune` wrote")
    add_model(sub, required=False)
    add_preprocessing(sub)
    add_ignore(sub.section("pruning"))


def _add_evaluate(sub: Parser) -> None:
    sub.add_argument("folder", nargs="?", metavar="OUT", help="folder that `prune` wrote")
    add_model(sub, required=False)
    sub.section("model").add_argument(
        "--dense", metavar="F",
        help="OUT is compared with this checkpoint of the dense model, or with `pretrained`",
    )  # fmt: skip
    add_data(sub, num_images=False)
    add_device(sub)
    add_latency(sub)


def _add_distill(sub: Parser) -> None:
    _add_trained(sub)
    add_training(sub, "training")


def _add_finetune(sub: Parser) -> None:
    _add_trained(sub)
    add_training(sub, "training", teacher=False)


def _add_trained(sub: Parser) -> None:
    sub.add_argument("folder", metavar="OUT", help="folder that `prune` wrote; it stays as it is")
    sub.section("model").add_argument(
        "--dense", metavar="F",
        help="checkpoint of the dense model, or `pretrained` (else what OUT was pruned from)",
    )  # fmt: skip
    add_own_model(sub)
    add_data(sub, num_images=False, split="train")
    add_eval_dir(sub)
    add_device(sub)
    add_latency(sub)
    add_output(sub, "folder for the trained model and its report")
    add_dry_run(sub)


def _add_latency_table(sub: Parser) -> None:
    add_model(sub)
    add_preprocessing(sub)
    add_latency_budget(sub.section("time"), table=False)
    add_device(sub)
    add_output(sub, "JSON file for the table")


def _add_benchmark(sub: Parser) -> None:
    add_model(sub)
    add_data(sub, num_images=True)
    add_eval_dir(sub)
    how = sub.section("comparison (lists with commas between)")
    how.add_argument(
        "--criteria", type=listed(word), default=["tpv", "magnitude", "taylor"], metavar="LIST",
        help="criteria; tp:magnitude, tp:taylor, ... are torch-pruning as it comes "
        "(tpv,magnitude,taylor)",
    )  # fmt: skip
    how.add_argument(
        "--keep", type=listed(fraction), default=[0.9, 0.7, 0.5], metavar="LIST",
        help="fractions of the MACs that stay (0.9,0.7,0.5)",
    )  # fmt: skip
    how.add_argument(
        "--repair", type=listed(word), default=["none", "bn", "compensate"], metavar="LIST",
        help="what follows a cut, of none, bn, compensate, reconstruct (none,bn,compensate)",
    )  # fmt: skip
    how.add_argument(
        "--ranking", type=listed(word), default=["curves", "per_cost", "plain"], metavar="LIST",
        help="channels go by score per MAC saved (per_cost), by score alone (plain), or, tpv "
        "only, by joint variance curves (curves,per_cost,plain)",
    )  # fmt: skip
    how.add_argument(
        "--seeds", type=count, default=3, metavar="N", help="repetitions, from --seed on (3)"
    )
    how.add_argument(
        "--iterative", type=count, default=1, metavar="N",
        help="go to the one --keep in N equal steps, scored anew each, and measure after each (1)",
    )  # fmt: skip
    add_device(sub)
    add_output(sub, "folder for rows, table and page; a run that was stopped goes on")
    add_dry_run(sub)


def _add_compare(sub: Parser) -> None:
    sub.add_argument(
        "folders", nargs="+", metavar="OUT",
        help="two or more folders that `prune` or `distill` wrote",
    )  # fmt: skip
    page = sub.section("page")
    page.add_argument("--output", type=Path, metavar="F", help="HTML file to write (none)")
    page.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def _add_export(sub: Parser) -> None:
    sub.add_argument("folder", nargs="?", metavar="OUT", help="folder that `prune` wrote")
    add_model(sub, required=False)
    how = sub.section("file")
    how.add_argument(
        "--format", choices=("onnx", "pt2"), default="onnx", help="pt2: torch.export's (onnx)"
    )
    how.add_argument(
        "--dynamic-batch", action="store_true", help="leave the batch size free (else -b, or 1)"
    )
    how.add_argument(
        "--output", type=Path, metavar="F", help="file to write (OUT/model[-int8].FORMAT)"
    )
    how.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    how.add_argument(
        "--int8", action="store_true",
        help="weights and activations in int8 (onnx), ranges from --data-dir; float32 and int8 "
        "are compared on other images of it",
    )  # fmt: skip
    how.add_argument(
        "--ranges", nargs="+", metavar="R",
        help="of activations, with --int8: the best of min-max, percentile, entropy (all three)",
    )  # fmt: skip
    how.add_argument(
        "--weight-bits", type=int, nargs="+", metavar="N",
        help="of weights, with --int8 (8, and 7 where 8 are not close on this processor); 7 for "
        "one without VNNI",
    )  # fmt: skip
    sub.section("model").add_argument(
        "--dense", metavar="F",
        help="checkpoint of the dense model, or `pretrained`, to compare OUT with (--int8)",
    )  # fmt: skip
    add_data(sub, num_images=True, default=None, shown="64, with --int8 512")
    add_latency(sub)


def _add_audit(sub: Parser) -> None:
    add_model(sub)
    add_data(sub, num_images=True, default=1000)
    sub.section("images").add_argument(
        "--held-out-dir", metavar="D",
        help="images that the model was not trained on, no labels needed (else others of the same)",
    )  # fmt: skip
    how = sub.section("audit (lists with commas between)")
    how.add_argument(
        "--labels", action="store_true",
        help="measure losses and errors against labels (else the model's own classes)",
    )  # fmt: skip
    how.add_argument(
        "--criteria", type=listed(word), metavar="LIST",
        help="rankings to compare (tpv,tpv_uncompensated,jbr,activation_variance,magnitude)",
    )  # fmt: skip
    how.add_argument("--measures", type=listed(word), metavar="LIST", help="what to measure (all)")
    how.add_argument(
        "--keep", type=fraction, default=0.5, metavar="X", help="the cut to compare, of MACs (0.5)"
    )
    add_ignore(sub.section("pruning"))
    add_device(sub)
    add_output(sub, "folder for page and JSON (audit-output)", default="audit-output")


def _add_demo(sub: Parser) -> None:
    add_output(sub, "folder for the report (demo-output)", default="demo-output")


COMMANDS: tuple[tuple[str, Callable[[Parser], None], str, str], ...] = (
    ("prune", _add_prune, "(OUT | --model M) --data-dir D --output OUT2 [options]",
     "Prune a model and save the smaller one."),
    ("score", _add_score, "--model M --data-dir D --output F [options]",
     "Score every channel and write the scores as JSON."),
    ("groups", _add_groups, "(OUT | --model M) [options]",
     "Show what can be pruned, what not, and why."),
    ("evaluate", _add_evaluate, "(OUT | --model M) --data-dir D [options]",
     "Measure a model or a saved pruned model."),
    ("distill", _add_distill, "OUT --data-dir D --output OUT2 [options]",
     "Train a saved pruned model towards the dense one, without labels. A run that was stopped "
     "goes on when it is started again."),
    ("finetune", _add_finetune, "OUT --data-dir D --output OUT2 [options]",
     "Train a saved pruned model with labels, to compare distillation with."),
    ("benchmark", _add_benchmark, "--model M --data-dir D --eval-dir D --output OUT [options]",
     "Compare criteria at equal images, budgets and repairs. A run that was stopped goes on "
     "when it is started again."),
    ("compare", _add_compare, "OUT OUT ... [--output F] [options]",
     "Put several saved runs side by side, in a table and on one HTML page."),
    ("export", _add_export, "(OUT | --model M) [--format onnx|pt2] [options]",
     "Write a model as one ONNX or torch.export file and compare its outputs."),
    ("latency-table", _add_latency_table, "--model M --output F [options]",
     "Measure what widths cost on this device, for `prune --latency-runtime table` on another."),
    ("audit", _add_audit, "--model M --data-dir D [options]",
     "Measure how sensitive a model is, and how far measures and rankings move under changes "
     "that leave it as good as it was."),
    ("demo", _add_demo, "[options]",
     "Prune a small model on handwritten digits, offline."),
)  # fmt: skip
