"""A minute's demonstration, offline: train, prune without labels, compare, report."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.cli.console import bar, before_after, percent, say, stages, table
from tpvprune.cli.session import Outcome, Subject, provenance
from tpvprune.cli.session_results import measured
from tpvprune.groups.removal import remove_channels
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.passes.disagreement import disagreement
from tpvprune.passes.drawing import drawn_indices
from tpvprune.passes.evaluation import evaluate
from tpvprune.passes.running import evaluating
from tpvprune.pipeline import PruningResult, prune
from tpvprune.reports.report import report_data
from tpvprune.saved.checkpoint import save_pruned
from tpvprune.saved.models import load_model
from tpvprune.scores.criteria import with_labels

_MODEL, _SIZE, _MEAN, _STD = "cifar_resnet20", (1, 16, 16), (0.305,), (0.35,)
_KEEP = 0.4
_NUM_HELD_OUT = 897

_ROWS: tuple[tuple[str, str, Literal["curves", "rank"]], ...] = (
    ("TPV, joint curves", "tpv", "curves"),
    ("TPV, rank", "tpv", "rank"),
    ("Magnitude, rank", "magnitude", "rank"),
    ("Taylor, rank", "taylor", "rank"),
    ("Random, rank", "random", "rank"),
)

Labelled = tuple[Tensor, Tensor]


def run_demo(args: argparse.Namespace, *, num_images: int = 900, num_epochs: int = 14) -> Outcome:
    """Prune a small model on handwritten digits, compare criteria, and write the report."""
    (images, labels), held_out = _digits(args.seed)
    training = images[:num_images], labels[:num_images]
    say(
        f"{len(labels) + len(held_out[1])} handwritten digits (scikit-learn), "
        f"{_MODEL} at {_SIZE[1]} x {_SIZE[2]} pixels"
    )
    subject = _subject(training, args.seed, num_epochs)
    say(f"dense model: trained here with labels, on {len(training[1])} of them")
    say(f"pruning to {_KEEP:.0%} of its MACs with the same {len(training[1])} images, unlabeled")
    rows, result, note = _compared(subject.model, training, held_out, args.seed)

    timed = argparse.Namespace(**vars(args), latency_repeats=50)
    dense, pruned = measured(timed, subject, (subject.model, result.model), [held_out])
    pruned["agreement"] = rows[1]["agreement"]
    document: dict[str, Any] = {
        **provenance(args, subject),
        **result.report,
        "dense": {**result.report["dense"], **dense, "agreement": 1.0},
        "pruned": {**result.report["pruned"], **pruned},
        "comparison": rows,
        "comparison_note": note,
        "images": {"source": "sklearn.datasets.load_digits", "num_images": len(training[1]),
                   "num_held_out": len(held_out[1]),
                   "agreement_on": f"{len(held_out[1])} held-out images"},
        "output": str(args.output),
    }  # fmt: skip
    document["versions"]["scikit-learn"] = version("scikit-learn")
    shown = {
        "disagreement": disagreement(result.model, subject.model, [held_out], mean=_MEAN, std=_STD),
        "class_names": [f"digit {number}" for number in range(10)],
    }
    _save(args, subject, result, document, shown)
    _show(document)
    return (0 if result.report["reached"] else 3), document


# ---- images and model -----------------------------------------------------------------------


def _digits(seed: int) -> tuple[Labelled, Labelled]:
    """Return training and held-out images [N, 1, 16, 16] and labels [N], split by the seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(grey, size=_SIZE[1:], mode="bilinear")
    images = (images - _MEAN[0]) / _STD[0]
    labels = torch.as_tensor(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    training, held_out = order[:-_NUM_HELD_OUT], order[-_NUM_HELD_OUT:]
    return (images[training], labels[training]), (images[held_out], labels[held_out])


def _subject(training: Labelled, seed: int, num_epochs: int) -> Subject:
    model, made = load_model(_MODEL, num_classes=10, input_size=_SIZE, seed=seed)
    _train(model, *training, num_epochs=num_epochs, seed=seed)
    preprocessing = resolve_preprocessing(
        model, input_size=_SIZE, mean=_MEAN, std=_STD, crop_pct=1.0, interpolation="bilinear"
    )
    made = dataclasses.replace(made, weights="trained by tpvprune demo")
    return Subject(model.eval(), made, preprocessing, torch.device("cpu"))


def _train(model: nn.Module, images: Tensor, labels: Tensor, *, num_epochs: int, seed: int) -> None:
    """Train in place: SGD with one cycle of the learning rate, shifts of up to two pixels."""
    generator = torch.Generator().manual_seed(seed)
    size, shift = images.shape[-1], 2
    padded = nn.functional.pad(images, (shift,) * 4, value=float(images.min()))
    num_batches = len(images) // 64
    steps = num_epochs * num_batches
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    order = torch.empty(0)
    for step in bar("training", unit="step")(range(steps)):
        if step % num_batches == 0:
            order = torch.randperm(len(images), generator=generator)
        batch = order[step % num_batches * 64 :][:64]
        top, left = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
        outputs = model(padded[batch, :, top : top + size, left : left + size])
        loss = nn.functional.cross_entropy(outputs, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


# ---- comparison -----------------------------------------------------------------------------


def _compared(
    dense: nn.Module, training: Labelled, held_out: Labelled, seed: int
) -> tuple[list[dict[str, Any]], PruningResult, str]:
    """Return the table's rows, one per criterion, the first result, which is saved, and why."""
    size = -(-len(training[1]) // 10)
    batches = list(training[0].split(size))
    # `prune` holds some back to measure repairs: no criterion scores on those.
    fit, _ = drawn_indices(len(training[1]), seed=seed)
    labelled = list(zip(*(t[fit].split(size) for t in training), strict=True))
    whole = evaluate(dense, [held_out])
    rows: list[dict[str, Any]] = [
        {"criterion": "Dense model", "macs": whole.macs, "top1": whole.top1}
    ]
    results = []
    with stages() as progress:
        for number, (name, criterion, allocation) in enumerate(_ROWS):
            progress(name, number, len(_ROWS))
            result = prune(
                dense,
                batches,
                num_images=None,
                keep=_KEEP,
                criterion=with_labels(criterion, labelled),
                allocation=allocation,
                repair="compensate",
                seed=seed,
            )
            cut = evaluate(remove_channels(dense, result.groups, result.kept), [held_out])
            repaired = evaluate(result.model, [held_out], dense=dense)
            rows.append(
                {
                    "criterion": name,
                    "labels": result.report["used_labels"],
                    "macs": repaired.macs,
                    "top1_cut_only": cut.top1,
                    "top1": repaired.top1,
                    "agreement": repaired.agreement,
                    "output_variance": repaired.output_variance,
                }
            )
            results.append(result)
    rows[1]["saved"] = True
    best = max(range(len(results)), key=lambda i: rows[i + 1]["top1"])  # the first among equals
    right = [_right(results[i].model, held_out) for i in (best, 0)]
    return rows, results[0], _why_saved(rows[1]["criterion"], rows[best + 1]["criterion"], *right)


def _right(model: nn.Module, held_out: Labelled) -> Tensor:
    """Return which images [N] a model names right."""
    with evaluating(model), torch.no_grad():
        return model(held_out[0]).argmax(1) == held_out[1]


def _why_saved(saved: str, best: str, best_right: Tensor, saved_right: Tensor) -> str:
    """Say which row is saved though labels may favour another, and what that is worth."""
    why = f"Saved is {saved!r}, chosen beforehand and without labels"
    difference = best_right.double() - saved_right.double()
    points = 100 * float(difference.mean())
    if points <= 0:
        return f"{why}; no other row has a higher top-1."
    # Both models saw the same images: those that both name right, or wrong, make no noise.
    error = 100 * float(difference.std()) / len(difference) ** 0.5
    noise = "within noise" if points <= 2 * error else "more than noise"
    return (
        f"{why}; {best!r} has {points:.1f} points more top-1. On {len(difference)} images the "
        f"standard error of that difference is {error:.1f} points: it is {noise}."
    )


def _save(
    args: argparse.Namespace,
    subject: Subject,
    result: PruningResult,
    document: dict[str, Any],
    shown: dict[str, Any],
) -> None:
    rows = []
    for row in document["comparison"]:
        cells = {key: value for key, value in row.items() if key != "top1_cut_only"}
        if "top1_cut_only" in row:
            cells["Cut only"] = f"{100 * row['top1_cut_only']:.1f}\u202f%"
        rows.append(cells)
    save_pruned(
        result,
        args.output,
        overwrite=args.overwrite,
        dense=subject.model,
        model_name=subject.made.name,
        model_kwargs=subject.made.kwargs,
        pretrained_cfg={**subject.preprocessing.config, "num_classes": 10},
        provenance={
            "command": args.command_line,
            "weights": subject.made.weights,
            "seed": args.seed,
        },
        report={**report_data(result), **document, "comparison": rows, **shown},
    )


def _show(document: dict[str, Any]) -> None:
    dense = document["comparison"][0]
    heads = ("criterion", "labels", "MACs", "cut only", "repaired", "agreement", "variance")
    lines = [heads, ("dense", "", percent(1.0), "", percent(dense["top1"]), "", "")]
    for row in document["comparison"][1:]:
        labels, kept = "yes" if row["labels"] else "no", percent(row["macs"] / dense["macs"])
        shares = (percent(row[key]) for key in ("top1_cut_only", "top1", "agreement"))
        lines.append((row["criterion"], labels, kept, *shares, f"{row['output_variance']:.2f}"))
    num = document["images"]["num_held_out"]
    say()
    table(lines)
    say()
    for note in (
        f"cut only, repaired: top-1 on {num} held-out images, one run with seed "
        f"{document['seed']}; one image is {100 / num:.1f} points",
        "agreement: share of them with the dense model's class; variance: mean squared change "
        "of the outputs",
        "every row: the same images, budget and repair (compensation, no labels); Taylor alone "
        "scored with labels",
        "joint curves: how tpvprune sets widths by default; rank: by score per MAC saved, "
        "which every criterion can do",
    ):
        say(note, indent="  ")
    say()
    say(document["comparison_note"])
    before_after(document["dense"], document["pruned"])
    say(f"saved: {document['output']} (open {document['output']}/report.html)")
