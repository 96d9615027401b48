"""Which costs of a model are shown, and what they are called, on every page and table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LABELS = {
    "macs": "MACs",
    "params": "parameters",
    "nonzero_params": "non-zero parameters",
}


def cost_labels(*sides: Mapping[str, Any]) -> dict[str, str]:
    """Return what to show of some models; non-zero parameters only where some are zero."""
    masked = any(
        side.get("nonzero_params") is not None and side["nonzero_params"] != side.get("params")
        for side in sides
    )
    return {key: label for key, label in _LABELS.items() if masked or key != "nonzero_params"}
