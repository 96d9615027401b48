"""The report of one pruning run: ``report.json``, and the same as one HTML page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvprune.reports.page import page
from tpvprune.reports.pictures import (
    blocked,
    classes,
    repairs,
    samples,
    scores,
    steps,
    weights,
    widths,
)
from tpvprune.reports.quality import sizes_tried, training
from tpvprune.reports.tables import before_after, comparison, figures, header, making, title_of

DAMAGE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What comes of a page that is made of data of the wrong kind."""
_MAX_BYTES = 256 * 2**20
_SECTIONS = (
    before_after, sizes_tried, comparison, training, widths, weights, steps, classes, samples,
    scores, repairs, blocked, making,
)  # fmt: skip


def report_data(result: Any) -> dict[str, Any]:
    """Return a ``PruningResult`` as the data of a report, scores included."""
    data = dict(result.report)
    if result.scores is not None:
        stderr = getattr(result.scores, "stderr", None) or {}
        data["scores"] = {
            name: {
                "values": values,
                "stderr": stderr.get(name),
                "kept": _stayed(result, name, values),
            }
            for name, values in result.scores.items()
        }
    return data


def write_report(data: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html``, a page without any outside resource.

    Every part may be missing; its section is then left out.
    """
    data = plain(data)
    folder = Path(folder)
    files = folder / "report.json", folder / "report.html"
    files[0].write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files[1].write_text(render(data), encoding="utf-8")
    return files


def read_report(folder: str | Path) -> dict[str, Any]:
    """Read the ``report.json`` of a saved run, and see that a page can be made of it."""
    path = Path(folder) / "report.json"
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_BYTES} bytes, found more")
    try:
        report = dict(json.loads(path.read_text(encoding="utf-8")))
        render(report)
    except DAMAGE as error:
        raise ValueError(f"{path}: expected the report of a run, found damage") from error
    return report


def render(data: Mapping[str, Any]) -> str:
    """Render the report's data as one HTML page."""
    parts = [header(data), figures(data), *(section(data) for section in _SECTIONS)]
    return page(title_of(data), parts)


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: tensors as lists, what is not finite as null."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _stayed(result: Any, group: str, values: Tensor) -> Tensor | None:
    """Return which channels of a group stayed, if that is known of those that have scores."""
    removed = result.removed.modules if hasattr(result, "removed") else ()
    if any(f"{group}.".startswith(f"{name}.") for name in removed):
        return torch.zeros(len(values), dtype=torch.bool)
    kept = result.kept.get(group)
    return kept if kept is not None and len(kept) == len(values) else None
