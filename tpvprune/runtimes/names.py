"""What runtimes are called and which packages they need, known without importing any."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal, get_args

Runtime = Literal["eager", "compile", "onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
TABLE = "table"  # in the place of a runtime: times that were measured elsewhere
WRITES_ONNX = ("onnx", "onnxscript")
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "onnxruntime": ((*WRITES_ONNX, "onnxruntime"), "onnx"),
    "openvino": ((*WRITES_ONNX, "openvino"), "openvino"),
}


def missing(packages: Sequence[str]) -> list[str]:
    """Return those of some packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def check_runtime(name: str) -> None:
    """Check that a runtime is known and can be used here."""
    if name not in RUNTIMES:
        raise ValueError(
            f"latency runtime: expected one of {', '.join(RUNTIMES)}, found {name!r}; for times "
            "measured elsewhere pass their table"
        )
    packages, extra = _NEEDS.get(name, ((), ""))
    lacking = missing(packages)
    if lacking:
        raise ValueError(
            f"latency runtime {name}: expected the packages {', '.join(packages)}, found no "
            f"{' and no '.join(lacking)}: pip install 'tpvprune[{extra}]'"
        )
