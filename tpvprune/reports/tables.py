"""The report's sentences and tables; each is left out where its data is missing."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpvprune.passes.loss import agreement_interval
from tpvprune.reports.page import section, table, table_row
from tpvprune.reports.text import (
    cell,
    cost_labels,
    head_of,
    minus,
    percent,
    short,
    side_by_side,
    significant,
    whole,
)

_COLUMNS = (
    "criterion", "repair", "labels", "macs", "params", "output_variance", "agreement", "top1",
)  # fmt: skip
_SETTINGS = (
    "weights", "criterion", "repair", "repair_chosen", "num_images", "num_held_back",
    "granularity", "round_to", "seed",
)  # fmt: skip
_NAMED = 4  # branches in the first lines of a page
_NO_MORE = {
    False: "What is left is protected or blocked; see the layers left whole below.",
    True: "By the limits that were set no more could leave: see branches and widths below.",
}
_USED = {"selection": "To choose widths", "repair": "To repair", "layers": "Of each layer"}
_WHAT = {"macs": "MACs", "params": "parameters", "latency": "latency"}


def title_of(data: Mapping[str, Any]) -> str:
    """Name the model and what was asked for."""
    model = data.get("model") or "Model"
    keep = data.get("keep")
    if keep is None:
        return f"{model}, pruned"
    of = str(data.get("of") or "MACs")
    share = percent(keep, 0 if keep * 100 % 1 < 1e-9 else 1)
    return f"{model}, pruned to {share} of its {_WHAT.get(of, of)}"


def header(data: Mapping[str, Any]) -> str:
    """Say in a sentence what was won, and whether the budget was reached."""
    dense, pruned = both(data)
    sentences = []
    agreement = pruned.get("agreement")
    if agreement is not None:
        seen_on = str((data.get("images") or {}).get("agreement_on", "the images"))
        sentences.append(
            f"It chooses the same class as the dense model on "
            f"<strong>{percent(agreement)}</strong> of {cell(seen_on)}."
        )
    gone, could = branches_of(data)
    if gone:
        names = f": {', '.join(map(cell, gone))}" if len(gone) <= _NAMED else ""
        sentences.append(f"{len(gone)} of {could} branches left as a whole{names}.")
    if data.get("used_labels") is False:
        sentences.append("<strong>No label was used</strong> to score, cut or repair it.")
    elif (data.get("training") or {}).get("used_labels"):
        sentences.append("It was trained with labels after the cut.")
    elif data.get("used_labels"):
        sentences.append(f"The criterion {cell(data.get('criterion'))} used labels.")
    lead = f'<p class="lead">{" ".join(sentences)}</p>' if sentences else ""
    warnings = "".join(f'<p class="warn">{cell(line)}</p>' for line in data.get("warnings") or ())
    if data.get("reached") is False and data.get("quality"):
        warnings += (
            '<p class="warn"><strong>The limit of loss was not kept</strong> by any size.</p>'
        )
    elif data.get("reached") is False:
        of, speed = str(data.get("of") or "macs"), data.get("speed") or {}
        share = speed.get("ratio") if of == "latency" else share_of(pruned, dense, of)
        found = f": it stopped at {percent(share)}" if share is not None else ""
        warnings += (
            f'<p class="warn"><strong>The budget was not reached</strong>{found}. '
            f"{_NO_MORE[could > 0]}</p>"
        )
    return f"<header><h1>{cell(title_of(data))}</h1>{warnings}{lead}</header>"


def figures(data: Mapping[str, Any]) -> str:
    """Show the numbers that matter most."""
    dense, pruned = both(data)
    found = []
    for key, label in cost_labels(dense, pruned).items():
        share = share_of(pruned, dense, key)
        if share is not None:
            found.append(
                (capitalised(label), percent(share), f"{short(pruned[key])} of {short(dense[key])}")
            )
    if pruned.get("top1") is not None:
        sub = ""
        if dense.get("top1") is not None:
            change = minus(f"{100 * (pruned['top1'] - dense['top1']):+.1f}")
            sub = f"{percent(dense['top1'])} dense ({change})"
        found.append(("Top-1", percent(pruned["top1"]), sub))
    if pruned.get("agreement") is not None:
        found.append(("Agreement", percent(pruned["agreement"]), "with the dense model"))
    if pruned.get("latency_ms") is not None:
        sub = ""
        if (share := share_of(pruned, dense, "latency_ms")) is not None:
            part = percent(share)
            sub = f"{part} of {significant(dense['latency_ms'])}\u202fms dense"
        found.append(("Latency", f"{significant(pruned['latency_ms'])}\u202fms", sub))
    items = "".join(
        f'<div><dt>{label}</dt><dd class="big">{_small_unit(value)}</dd>'
        f'<dd class="sub">{sub}</dd></div>'
        for label, value, sub in found
    )
    return f'<dl class="figures">{items}</dl>' if items else ""


def _removed(data: Mapping[str, Any]) -> dict[str, str]:
    """Return how many branches left, and which, where they could."""
    gone, could = branches_of(data)
    return {f"{len(gone)} of {could}": ", ".join(gone) or "none"} if could else {}


def branches_of(data: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the names of the branches that left, and how many could have."""
    branches = data.get("branches")
    found = [b for b in branches if isinstance(b, Mapping)] if isinstance(branches, list) else []
    return [str(branch.get("name")) for branch in found if branch.get("gone")], len(found)


def before_after(data: Mapping[str, Any]) -> str:
    """Tabulate every measured number of both models."""
    dense, pruned = both(data)
    share = "output_variance_share"
    if pruned.get("output_variance") is not None and data.get("output_second_moment"):
        pruned[share] = pruned["output_variance"] / data["output_second_moment"]
    costs = {key: (capitalised(name), whole) for key, name in cost_labels(dense, pruned).items()}
    writers: dict[str, tuple[str, Callable[[Any], str]]] = {
        **costs,
        "macs": ("MACs of one input", whole),
        "top1": ("Top-1", lambda x: percent(x, 2)),
        "top5": ("Top-5", lambda x: percent(x, 2)),
        "agreement": ("Agreement with dense", lambda x: percent(x, 2)),
        "output_variance": ("Output variance E\u2016\u0394f\u2016\u00b2", significant),
        share: ("\u2026 as a share of E\u2016f\u2016\u00b2", lambda x: percent(x, 2)),
        "latency_ms": ("Latency, median", lambda x: f"{significant(x)}\u202fms"),
        "latency_sd_ms": ("\u2026 standard deviation", lambda x: f"{significant(x)}\u202fms"),
        "latency_range_ms": (
            "\u2026 quartiles"
            if pruned.get("latency_runtime")
            else "\u2026 fastest to slowest round",
            lambda x: f"{significant(x[0])} \u2013 {significant(x[1])}\u202fms",
        ),
    }
    named = [(key, *writer) for key, writer in writers.items()]
    rows = [table_row(*line) for line in side_by_side(named, dense, pruned).items()]
    if not rows:
        return ""
    count = next((s["num_images"] for s in (pruned, dense) if s.get("num_images")), None)
    about = f"<p>Accuracy on {whole(count)} labelled images.</p>" if count else ""
    batch = pruned.get("latency_batch_size")
    where = f", {cell(pruned['latency_device'])}" if pruned.get("latency_device") else ""
    about += f"<p>Latency of one call with a batch of {cell(batch)}{where}.</p>" if batch else ""
    about += _held_back(data.get("held_back") or {})
    return section("Before and after", about, table(("", "Dense", "Pruned"), rows))


def _held_back(facts: Mapping[str, Any]) -> str:
    """Return how far the model is from the dense one on images that nothing was fitted to."""
    found, about = [], []
    if facts.get("agreement") is not None:
        text = f"agreement {percent(facts['agreement'])}"
        if math.isfinite(facts["agreement"]):
            about.append(agreement_interval(facts["agreement"], facts["num_images"]))
        if facts.get("chance_agreement") is not None:
            about.append(f"by chance {percent(facts['chance_agreement'])}")
        found.append(text + (f" ({', '.join(about)})" if about else ""))
    if facts.get("variance_share") is not None and facts["num_images"] > 1:
        share = significant(facts["variance_share"], 2)
        found.append(f"output variance {share} of the dense model\u2019s own")
    if not found:
        return ""
    images = "image" if facts["num_images"] == 1 else "images"
    return f"<p>On {whole(facts['num_images'])} {images} held back: {', '.join(found)}.</p>"


def comparison(data: Mapping[str, Any]) -> str:
    """Tabulate criteria side by side."""
    rows = data.get("comparison")
    if not rows:
        return ""
    keys = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    others = dict.fromkeys(key for row in rows for key in row)
    keys += [key for key in others if key not in (*_COLUMNS, "saved")]
    dense_macs = both(data)[0].get("macs")
    heads = [cell(head_of(key) if key in _COLUMNS else key) for key in keys]
    lines = [
        table_row(
            None,
            (_cell(key, row.get(key), dense_macs) for key in keys),
            ours=row.get("saved") is True,
        )
        for row in rows
    ]
    about = "<p>Same budget, same repair, same images. The saved model stands out.</p>"
    if data.get("comparison_note"):
        about += f"<p>{cell(data['comparison_note'])}</p>"
    return section("Criteria compared", about, f'<div class="scroll">{table(heads, lines)}</div>')


def making(data: Mapping[str, Any]) -> str:
    """State command, settings, times and versions."""
    command = command_lines(data.get("command"))
    body = f"<pre>{cell(command)}</pre>" if command else ""
    settings = {head_of(key): data.get(key) for key in _SETTINGS}
    if data.get("round_to") == "auto":
        settings[head_of("round_to")] = "16 in wide groups to 1 in narrow ones"
    fits = data.get("reconstructions")
    if isinstance(fits, int) and fits > 1:
        settings[head_of("repair")] = f"{data.get('repair')}, mean of {fits}"
    used = {_USED.get(name, name): num for name, num in (data.get("images_used") or {}).items()}
    if data.get("mirrored"):
        used[_USED["repair"]] = f"{used[_USED['repair']]} and their mirror images"
    timings = {k: f"{significant(v)}\u202fs" for k, v in (data.get("timings") or {}).items() if v}
    lists = (
        ("Settings", settings),
        ("Images used", used),
        ("Branches removed", _removed(data)),
        ("Preprocessing", data.get("preprocessing") or {}),
        ("Time", timings),
        ("Versions", data.get("versions") or {}),
    )
    facts = "".join(_facts(title, entries) for title, entries in lists)
    if not body and not facts:
        return ""
    about = ""
    if data.get("used_labels") is False:
        about = (
            "<p>Scoring, cutting and repair saw inputs only; labels are dropped from every batch."
        )
        if both(data)[1].get("top1") is not None:
            about += " Labels were read afterwards, to measure the accuracy above."
        about += "</p>"
    elif data.get("used_labels"):
        about = "<p>Labels were used.</p>"
    return section("How it was made", about, f'{body}<div class="facts">{facts}</div>')


def both(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two evaluations, the agreement among them."""
    dense, pruned = dict(data.get("dense") or {}), dict(data.get("pruned") or {})
    if pruned.get("agreement") is None and data.get("agreement") is not None:
        pruned["agreement"] = data["agreement"]
    return dense, pruned


def capitalised(label: str) -> str:
    """Return a label as a heading: its first letter large, the others as they are."""
    return label[:1].upper() + label[1:]


def _small_unit(text: str) -> str:
    number, _, unit = text.partition("\u202f")
    return f"{number}<small>{unit}</small>"


def _cell(key: str, value: Any, dense_macs: Any) -> str:
    if value is None:
        return '<span class="soft">\u2013</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "macs" and value > 1 and dense_macs:
        return percent(value / dense_macs)
    if key in ("top1", "top5", "agreement") or (key == "macs" and value <= 1):
        return percent(value)
    if isinstance(value, (int, float)):
        return short(value) if key in ("macs", "params") else significant(value)
    return cell(value)


def command_lines(command: Any) -> str:
    """Write a command with one flag a line where it is long."""
    try:
        words = shlex.split(command) if isinstance(command, str) else list(map(str, command or ()))
    except ValueError:  # not a shell's line: as it is
        return str(command)
    line = shlex.join(words)
    if len(line) <= 76:
        return line
    return " ".join(
        ("\\\n  " if word.startswith("--") else "") + shlex.quote(word) for word in words
    )


def _facts(title: str, entries: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{cell(key)}</dt><dd>{cell(_fact(value))}</dd>"
        for key, value in entries.items()
        if value is not None
    )
    return f"<div><h3>{title}</h3><dl>{items}</dl></div>" if items else ""


def _fact(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_fact, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def share_of(pruned: Mapping[str, Any], dense: Mapping[str, Any], key: str) -> float | None:
    """Return a cost as a share of the dense model's, if both are known.

    Of milliseconds the median of what two calls, one after the other, were to each other: their
    medians by themselves hold what else the machine did.
    """
    if not dense.get(key) or pruned.get(key) is None:
        return None
    if key == "latency_ms" and pruned.get("latency_ratio") is not None:
        return float(pruned["latency_ratio"])
    return float(pruned[key] / dense[key])
