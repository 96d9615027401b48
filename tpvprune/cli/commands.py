"""The commands behind the flags; imported only when one runs."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tpvprune.cli.console import (
    bar,
    blocked_lines,
    counted,
    percent,
    running,
    say,
    short,
    show_evaluated,
    table,
)
from tpvprune.cli.flag_values import AUTO
from tpvprune.cli.pruning_options import outputs_of, probing_options
from tpvprune.cli.session import Outcome, Subject, ignored, open_evaluated, open_subject, provenance
from tpvprune.cli.session_images import (
    Shown,
    calibration,
    choose,
    has_labels,
    open_data,
    scored_until_known,
)
from tpvprune.cli.session_results import (
    blocked_facts,
    costs,
    group_facts,
    image_facts,
    measured,
    said_of_speed,
    smallest_facts,
    write_json,
)
from tpvprune.depth import branch_savings, find_branches
from tpvprune.groups import ChannelGroups, find_groups, fused_attention, unfuse_attention
from tpvprune.images.fitted import said_of_seen
from tpvprune.images.loading import ImageBatches, in_memory
from tpvprune.images.sources import ImageSource
from tpvprune.passes.evaluation import difference
from tpvprune.processes.shares import by_first
from tpvprune.reports.report import read_report
from tpvprune.scores.criteria import scorer
from tpvprune.scores.criterion_names import is_labelled
from tpvprune.widths.latency import calibrated, measured_table
from tpvprune.widths.latency_file import write_latency_table
from tpvprune.widths.narrowest import narrowest


def run_score(args: argparse.Namespace) -> Outcome:
    """Score every channel and write the scores."""
    used_labels = is_labelled(args.criterion)
    subject = open_subject(args)
    layers = ignored(args, subject)
    images = open_data(args, labelled=used_labels)
    groups = find_groups(subject.model, subject.example, ignore=layers)
    if args.num_images == AUTO:
        scores = scored_until_known(args, subject, images, groups)
    else:
        batches = calibration(args, subject, images, labelled=used_labels)
        score = scorer(args.criterion)
        known = inspect.signature(score).parameters
        given = {**probing_options(args), "outputs": outputs_of(args)}
        options = {k: v for k, v in given.items() if k in known}
        scores = score(subject.model, groups, Shown(batches, "scoring"), **options)
    document = {
        **provenance(args, subject),
        "criterion": args.criterion,
        "used_labels": used_labels,
        "num_images": scores.num_samples,
        "groups": {
            group.name: {
                "unit": group.unit,
                "num_channels": group.num_channels,
                "scores": scores[group.name].tolist(),
                "stderr": scores.stderr[group.name].tolist() if scores.stderr else None,
            }
            for group in groups
        },
        "blocked": blocked_facts(groups),
    }
    by_first(write_json, args.output, document)
    say(f"{len(list(groups))} groups scored with {args.criterion}: {args.output}")
    blocked_lines(document["blocked"])
    return 0, document


def run_groups(args: argparse.Namespace) -> Outcome:
    """Show what can be pruned, what not and why."""
    args.device, args.dense = "cpu", None
    subject, _ = open_evaluated(args)
    with running("finding and verifying groups"):
        groups = find_groups(subject.model, subject.example, ignore=ignored(args, subject))
        branches = _branches(subject, groups)
    total = groups.macs()
    smallest = narrowest(groups)
    rows = [("group", "unit", "channels", "saves up to")]
    listed = []
    for group in groups:
        share = 1 - groups.macs({group.name: smallest[group.name]}) / total
        rows.append((group.name, group.unit, str(group.num_channels), percent(share)))
        listed.append({**group_facts(group), "macs_share": share})
    document = {
        **provenance(args, subject),
        "dense": {"macs": total, "params": groups.params()},
        "smallest": smallest_facts(groups),
        "groups": listed,
        "branches": branches,
        "blocked": blocked_facts(groups),
    }
    table(rows)
    say("saves up to: share of all MACs that goes if this group alone shrinks as far as it can")
    blocked_lines(document["blocked"])
    _say_branches(document)
    say(
        f"{args.folder or args.model}: {short(total)} MACs, {short(groups.params())} parameters; "
        f"smallest reachable: {short(document['smallest']['macs'])} MACs "
        f"({percent(document['smallest']['macs'] / total)})"
    )
    return 0, document


def _branches(subject: Subject, groups: ChannelGroups) -> list[dict[str, Any]]:
    """Return the branches that can go whole, and what leaves with each."""
    model, x = subject.model, subject.example
    found = find_branches(model, x)
    macs, params = (branch_savings(model, groups, found, of, x) for of in ("macs", "params"))
    return [{"name": b.name, "macs": macs[b.name], "params": params[b.name]} for b in found]


def _say_branches(document: Mapping[str, Any]) -> None:
    dense, branches = document["dense"], document["branches"]
    if not branches:
        say("no branch can go whole")
        return
    rows = [
        (b["name"], *(percent(b[of] / dense[of]) for of in ("macs", "params"))) for b in branches
    ]
    table([("branch", "MACs", "parameters"), *rows])
    say("share of all that leaves with a whole branch (prune --granularity channel,branch)")


def run_evaluate(args: argparse.Namespace) -> Outcome:
    """Measure a model or a saved pruned model."""
    subject, dense = open_evaluated(args, compared=True)
    images = open_data(args, labelled=False)
    labelled = has_labels(images, subject, explicit=bool(args.class_map or args.dataset))
    if labelled:
        images = open_data(args, labelled=True, again=True)
    chosen = choose(args, subject, images, args.num_images, labelled=labelled)
    batches = in_memory(chosen, progress=bar("reading images"))
    models = [subject.model] if dense is None else [dense, subject.model]
    found = measured(args, subject, models, batches if labelled else None, title="evaluating")
    sides = [
        {**costs(model, subject), **facts, "agreement": None}
        for model, facts in zip(models, found, strict=True)
    ]
    for side in sides:
        side.pop("num_images", None)  # said once, of all
    *before, side = sides
    if dense is not None:
        apart = difference(subject.model, dense, Shown(batches, "agreement"))
        side["variance_share"] = apart.share
        if apart.has_classes:
            side["agreement"], before[0]["agreement"] = apart.agreement, 1.0
    document = {
        **provenance(args, subject),
        **side,
        "dense": before[0] if before else None,
        "images": image_facts(images, batches),
    }
    told = {} if subject.folder is None else read_report(subject.folder)
    if dense is not None:
        slow = said_of_speed(*sides, of=str(told.get("of", "macs")))
        document["warnings"] = slow
    show_evaluated(document)
    if dense is not None and document["agreement"] is None:
        say(f"output variance {document['variance_share']:.2g} of the dense model's own")
    if dense is not None or document["top1"] is not None:
        _say_images(document["images"], told, images, chosen)
    return 0, document


def _say_images(
    images: Mapping[str, Any], report: Mapping[str, Any], source: ImageSource, chosen: ImageBatches
) -> None:
    """Say on how many images a model was measured, and how many of them it was fitted to."""
    num = images["num_images"]
    say(f"measured on {counted(num, 'image')} of {images['source']}")
    places = range(num) if source.count is None else chosen.items()
    what = said_of_seen(report, source, places, "of them")
    if what:
        say(
            f"note: {what}: on images that it was fitted to it is closer to the dense model than "
            "on others"
        )


def run_latency_table(args: argparse.Namespace) -> Outcome:
    """Measure layers and whole networks, write the table, and say how far it can be trusted."""
    subject = open_subject(args)
    model, x = subject.model, subject.example[:1]
    model = unfuse_attention(model) if fused_attention(model) else model
    groups = find_groups(model, x)
    batch = x.repeat_interleave(args.latency_batch_size, 0)
    first = measured_table(
        model, groups, batch, runtime=args.latency_runtime, num_threads=args.latency_threads
    )
    timed, speed = calibrated(first, model, groups, batch)
    write_latency_table(args.output, replace(timed, model=subject.made.name))
    say(f"{subject.made.name}: {len(timed.layers)} layers timed, {timed.device}")
    say(
        f"the whole network: {speed.dense_ms:.2f} ms, at half of every width "
        f"{speed.pruned_ms:.2f} ms (quartiles of the ratio {speed.ratio_low:.3f} to "
        f"{speed.ratio_high:.3f})"
    )
    say(f"saved: {args.output}")
    document = {
        **provenance(args, subject),
        **{key: getattr(timed, key) for key in ("device", "runtime", "batch_size", "num_threads")},
        "num_layers": len(timed.layers),
        "dense_ms": speed.dense_ms,
        "half_ms": speed.pruned_ms,
        "output": str(args.output),
    }
    return 0, document
