"""The model card of a pruned model, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpvprune.reports.text import cost_labels, percent, side_by_side, significant, whole

_ROWS = (
    ("top1", "top-1", lambda x: percent(x, 2)),
    ("top5", "top-5", lambda x: percent(x, 2)),
    ("agreement", "agreement with the dense model", lambda x: percent(x, 2)),
    ("latency_ms", "latency of one input, ms", significant),
)
_OF = {"macs": "MACs", "params": "parameters", "latency": "latency", "weights": "weights"}
_CHANNELS = "whole channels were removed, so it is a smaller network that needs no special runtime."
_WEIGHTS = "single weights were set to zero and the others refitted; shapes and MACs are as before."


def card(
    repo_id: str, config: Mapping[str, Any], report: Mapping[str, Any], *, license: str | None
) -> str:
    """Write what a stranger needs to know about a pruned model."""
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        _caveats(report),
        _lead(config, report),
        _numbers(report),
        _loading(repo_id, config),
        _making(config, report),
        _licence(config, license),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lead(config: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    model = _plain(config["model"] or report.get("model") or "A model of the user's own")
    keep, of = report.get("keep"), _OF.get(str(report.get("of")), "MACs")
    share = f" to {percent(keep, 0 if keep * 100 % 1 < 1e-9 else 1)} of its {of}" if keep else ""
    text = f"`{model}`, pruned{share} with tpvprune: "
    text += _WEIGHTS if report.get("of") == "weights" else _CHANNELS
    if report.get("used_labels") is False:
        text += " No label was used to score, cut or repair it."
    elif report.get("used_labels"):
        text += " Labels were used."
    return text


def _caveats(report: Mapping[str, Any]) -> str:
    return "\n>\n".join(f"> {_plain(line)}" for line in report.get("warnings") or ())


def _numbers(report: Mapping[str, Any]) -> str:
    dense, pruned = report.get("dense") or {}, report.get("pruned") or {}
    labels = {**cost_labels(dense, pruned), "macs": "MACs of one input"}
    costs = [(key, label, whole) for key, label in labels.items()]
    found = side_by_side((*costs, *_ROWS), dense, pruned)
    lines = [f"| {label} | {' | '.join(texts)} |" for label, texts in found.items()]
    if not lines:
        return ""
    seen = (report.get("images") or {}).get("agreement_on")
    note = f"\n\nAgreement: fraction of equal top-1, on {_plain(seen)}." if seen else ""
    return "| | dense | pruned |\n|---|---|---|\n" + "\n".join(lines) + note


def _loading(repo_id: str, config: Mapping[str, Any]) -> str:
    own = ", model=the_dense_model" if config["model"] is None else ""
    return (
        "## Use\n\n"
        "```sh\npip install tpvprune\n```\n\n"
        "```python\n"
        "import timm, tpvprune\n\n"
        f'model = tpvprune.load_pruned("hf-hub:{repo_id}"{own})\n'
        "config = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**config, is_training=False)\n"
        "outputs = model(transform(image).unsqueeze(0))  # image: a PIL image\n"
        "```\n\n"
        "Weights are safetensors and the rest is JSON: no pickle is read, no code is run."
    )


def _making(config: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    provenance = config["provenance"]
    lines = []
    if provenance.get("command"):
        lines.append(f"```sh\n{_plain(provenance['command'])}\n```")
    images = (report.get("images") or {}).get("num_images") or report.get("num_images")
    facts = {
        "criterion": report.get("criterion"),
        "repair": report.get("repair_chosen") or report.get("repair"),
        "images": images,
        "seed": provenance.get("seed"),
        "weights before pruning": provenance.get("weights"),
        "date": provenance.get("date"),
        **(provenance.get("versions") or {}),
    }
    found = [f"{name} {_plain(value)}" for name, value in facts.items() if value is not None]
    return "\n\n".join(["## How it was made", *lines, "; ".join(found) + "."])


def _licence(config: Mapping[str, Any], license: str | None) -> str:
    if license is None:
        return (
            "## Licence\n\nNot known: the weights are derived from a model whose licence was not "
            "stated. Ask the author before use."
        )
    origin = config["pretrained_cfg"].get("origin_url")
    more = f" Architecture and parent weights: {_plain(origin)}." if origin else ""
    return f"## Licence\n\n{_plain(license)}.{more}"


def _plain(value: Any) -> str:
    # One line without what Markdown or HTML would take for its own.
    return " ".join(str(value).split()).replace("`", "'").replace("<", "&lt;")
