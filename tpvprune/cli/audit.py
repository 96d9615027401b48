"""`audit`: how sensitive a model is, and how far criteria and measures are to be trusted."""

from __future__ import annotations

import argparse
import difflib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tpvprune.cli.console import percent, say, stages, table
from tpvprune.cli.session import Outcome, Subject, ignored, open_subject, provenance
from tpvprune.cli.session_images import calibration, choose, open_data
from tpvprune.cli.session_results import write_json
from tpvprune.diagnostics.catalogue import MEASURES, Setting, setting_of
from tpvprune.diagnostics.changes import changes_of
from tpvprune.diagnostics.fragility import (
    CRITERIA,
    DEFAULT_CRITERIA,
    Fragility,
    fragility,
)
from tpvprune.diagnostics.jacobian_norms import jacobian_norms
from tpvprune.diagnostics.measures import own_predictions
from tpvprune.diagnostics.tpv import parameter_points, stability_rows
from tpvprune.disk.atomic import present_in, write_text
from tpvprune.disk.path_checks import check_writable
from tpvprune.groups import find_groups
from tpvprune.images.loading import in_memory
from tpvprune.images.sources import ImageSource, open_images
from tpvprune.passes.evaluation import evaluate
from tpvprune.reports.audit import render_audit
from tpvprune.scores.criteria import NEEDS_LABELS

_JSON, _PAGE = "audit.json", "report.html"
_FEWEST = 16
_NOISY_IMAGES, _DRAWS = 256, 4  # of the Monte-Carlo forms, whose cost is their product


def run_audit(args: argparse.Namespace) -> Outcome:
    """Measure the model, change what should not matter, measure again, and show what moved."""
    criteria = args.criteria or DEFAULT_CRITERIA
    _known("--criteria", criteria, CRITERIA)
    measures = args.measures or list(MEASURES)
    _known("--measures", measures, MEASURES)
    _check_output(args)
    start = time.monotonic()
    subject = open_subject(args)
    layers = ignored(args, subject)
    images = open_data(args, labelled=args.labels)
    x, y = _read(args, subject, images)
    held_out = _held_out(args, subject)
    groups = find_groups(subject.model, subject.example, ignore=layers)
    if not len(groups):
        raise ValueError(f"{args.model}: expected channel groups to score, found none")
    size = args.batch_size
    batches = list(x.to(subject.device).split(size))
    if y is None:
        eval_images = own_predictions(subject.model, batches)
    else:
        eval_images = list(zip(batches, y.to(batches[0].device).split(size), strict=True))
    half = max(len(batches) // 2, 1)
    setting = setting_of(
        subject.model,
        groups,
        batches[:half],
        labelled=eval_images[:half] if args.labels else None,
        eval_images=eval_images,
        seed=args.seed,
    )
    others, labelled_others = batches[half:], eval_images[half:] if args.labels else None
    with stages() as progress:
        progress("changing what should not matter", 0, 1)
        changes, unchanged = changes_of(
            setting, others, labelled_others=labelled_others, seed=args.seed
        )
        found = fragility(
            setting,
            changes,
            measures={name: MEASURES[name] for name in measures},
            criteria=criteria,
            keep=args.keep,
            left_out=unchanged,
            progress=progress,
        )
        progress("TPV under noise", 0, 1)
        stability = _stability(setting, held_out or others)
    document = {
        **provenance(args, subject),
        "used_labels": args.labels,
        "images": {
            "source": images.name,
            "num_images": len(x),
            "num_measured": sum(map(len, setting.batches)),
            "held_out": "other images of the same source"
            if args.held_out_dir is None
            else str(args.held_out_dir),
        },
        "keep": args.keep,
        "top1": evaluate(subject.model, eval_images).top1 if args.labels else None,
        **_facts(found),
        "tpv": stability,
        "seconds": round(time.monotonic() - start, 1),
        "output": str(args.output),
    }
    write_json(args.output / _JSON, document)
    write_text(args.output / _PAGE, render_audit(document))
    _show(document)
    return 0, document


# ---- images ---------------------------------------------------------------------------------


def _read(
    args: argparse.Namespace, subject: Subject, images: ImageSource
) -> tuple[Tensor, Tensor | None]:
    """Return all images and, with `--labels`, their labels."""
    batches = calibration(args, subject, images, labelled=args.labels)
    pairs = [b if isinstance(b, (tuple, list)) else (b,) for b in batches]
    x = torch.cat([pair[0] for pair in pairs])
    if len(x) < _FEWEST:
        raise ValueError(f"{images.name}: expected at least {_FEWEST} images, found {len(x)}")
    args.batch_size = min(args.images_per_batch, len(x) // 2)
    return x, torch.cat([pair[1] for pair in pairs]) if args.labels else None


def _held_out(args: argparse.Namespace, subject: Subject) -> list[Tensor]:
    if args.held_out_dir is None:
        return []
    images = open_images(args.held_out_dir, split="validation", labelled=False)
    num = min(args.num_images, _NOISY_IMAGES)
    return [x.to(subject.device) for x in in_memory(choose(args, subject, images, num))]


# ---- results --------------------------------------------------------------------------------


def _stability(setting: Setting, others: Sequence[Tensor]) -> dict[str, Any]:
    sets = [_first(batches, _NOISY_IMAGES) for batches in (setting.batches, others)]
    rows = stability_rows(setting.model, *sets, num_draws=_DRAWS, seed=setting.seed)
    norms = [jacobian_norms(setting.model, batches, seed=setting.seed) for batches in sets]
    points = parameter_points(*norms)
    return {
        "num_images": [sum(map(len, batches)) for batches in sets],
        "num_draws": _DRAWS,
        "rows": rows,
        "parameters": [[name, list(a), list(b)] for name, a, b in points],
    }


def _first(batches: Sequence[Tensor], num: int) -> list[Tensor]:
    return list(torch.cat(list(batches))[:num].split(len(batches[0])))


def _facts(found: Fragility) -> dict[str, Any]:
    return {
        "changes": [
            {name: getattr(change, name) for name in ("name", "kind", "moved", "neutral", "note")}
            for change in found.changes
        ],
        "measures": {
            name: {
                **asdict(value),
                "title": MEASURES[name].title,
                "reads_classes": MEASURES[name].loss,
                "cost": MEASURES[name].cost,
                "unmoved_by_rescaling": MEASURES[name].still,
                "source": MEASURES[name].source,
                "moved": found.moved[name],
            }
            for name, value in found.values.items()
        },
        "criteria": {
            name: {
                "used_labels": name in NEEDS_LABELS,
                "tau": found.tau[name],
                "overlap": found.overlap[name],
            }
            for name in found.tau
        },
        "left_out": dict(found.left_out),
    }


def _show(document: Mapping[str, Any]) -> None:
    images = document["images"]
    say(
        f"{document['model']}: {images['num_measured']} of {images['num_images']} images measured, "
        "the rest for comparison"
    )
    kinds = _kinds(document)
    say()
    say("How far each measure moves, at most, while the model stays as good as it was:")
    rows = [
        (
            measure["title"] + (" *" if measure["reads_classes"] else ""),
            f"{measure['value']:.4g}",
            "" if measure["stderr"] is None else f"{measure['stderr']:.2g}",
            *(_largest(measure["moved"], names) for names in kinds.values()),
        )
        for measure in document["measures"].values()
    ]
    table([("measure", "value", "± error", *kinds), *rows])
    classes = "labels were read" if document["used_labels"] else "the model's own classes, no label"
    say(f"* cross-entropy or errors against {classes}", indent="  ")
    say()
    say(
        f"Kendall's tau of each criterion's ranking, and how much of the cut to "
        f"{percent(document['keep'])} of MACs stays the same, at least:"
    )
    rows = [
        (name, *(_smallest(criterion, names) for names in kinds.values()))
        for name, criterion in document["criteria"].items()
    ]
    table([("criterion", *kinds), *rows])
    say()
    say("TPV on the measured images and on held-out ones:")
    rows = [
        (
            *(row["perturbation"], row["form"], f"{row['train']:.4g}", f"{row['held_out']:.4g}"),
            "" if row["ratio"] is None else f"{row['ratio']:.3f}",
        )
        for row in document["tpv"]["rows"]
    ]
    table([("perturbation", "form", "measured", "held out", "ratio"), *rows])
    for change in document["changes"]:
        if not change["neutral"]:
            say(
                f"left out of the tables above: {change['name']} changed "
                f"{100 * change['moved']:+.2f} points ({change['note']})",
                indent="  ",
            )
    for what, reason in document["left_out"].items():
        say(f"left out: {what}: {reason}", indent="  ")
    say(f"saved: {document['output']} ({document['seconds']:.0f} s)")


def _kinds(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return kind -> names of its neutral changes."""
    kinds: dict[str, list[str]] = {}
    for change in document["changes"]:
        if change["neutral"]:
            kinds.setdefault(change["kind"], []).append(change["name"])
    return kinds


def _largest(moved: Mapping[str, float], names: Collection[str]) -> str:
    found = [moved[name] for name in names if name in moved]
    return f"{100 * max(found, key=abs):+.1f} %" if found else ""


def _smallest(criterion: Mapping[str, Any], names: Collection[str]) -> str:
    tau, overlap = (
        [criterion[key][name] for name in names if name in criterion[key]]
        for key in ("tau", "overlap")
    )
    return f"{min(tau):.3f}, {100 * min(overlap):.0f} %" if tau else ""


# ---- checks ---------------------------------------------------------------------------------


def _known(flag: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{flag}: unknown name {name!r}: {hint}")


def _check_output(args: argparse.Namespace) -> None:
    folder = args.output
    present = present_in(folder)
    if present - {_JSON, _PAGE}:
        raise ValueError(
            f"{folder}: expected an audit to replace, found other files "
            f"({min(present - {_JSON, _PAGE})!r}): choose another folder"
        )
    if present and not args.overwrite:
        raise ValueError(f"{folder}: holds an audit already: pass --overwrite or another --output")
    check_writable(folder)
