"""A table of milliseconds as a JSON file, written where a model will run and read elsewhere."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpvprune.disk.atomic import write_text
from tpvprune.groups.budget import LatencyTable, LayerTime
from tpvprune.runtimes.names import TABLE

FORMAT = 2
_NUMBERS = {"ms_per_value": 0.0, "constant_ms": 0.0, "step": 1, "batch_size": 1, "num_threads": 0}
_TEXTS = ("device", "runtime", "shapes", "model")


def write_latency_table(path: Path, table: LatencyTable) -> None:
    """Write a table, whole or not at all."""
    write_text(path, json.dumps({"format": FORMAT, **asdict(table)}, indent=1) + "\n")


def read_latency_table(path: str | Path) -> LatencyTable:
    """Read a table.

    Args:
        path: Of a file that :func:`write_latency_table`, or ``tpvprune latency-table``, wrote.

    Returns:
        The table.

    Raises:
        ValueError: If it is no such file, or damaged.
    """
    expected = f"{path}: expected a table that `tpvprune latency-table` wrote, found"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{expected} no JSON") from error
    if not isinstance(found, dict) or "layers" not in found:
        raise ValueError(f"{expected} other JSON")
    number = found.pop("format", None)
    if number != FORMAT:
        raise ValueError(
            f"{path}: expected a latency table of format {FORMAT}, found {number!r}: write it anew "
            "with `tpvprune latency-table` of this version"
        )
    try:
        return _table(found)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path}: this latency table is damaged ({error}): write it anew with `tpvprune "
            "latency-table`"
        ) from error


def measured_elsewhere(table: LatencyTable, model: nn.Module, x: Tensor) -> LatencyTable:
    """Return a table of another device as a budget for a model: nothing will be measured here.

    ``x``: an input of the model [1, ...]. ValueError if the table is of another model, or of inputs
    of another shape.
    """
    whose = table.model or "another model"
    if table.shapes != shapes_digest(model):
        raise ValueError(
            f"latency table: expected one of this model, found one of {whose} with parameters of "
            "other shapes: write one with `tpvprune latency-table`"
        )
    found = tuple(x.shape[1:])
    if table.input_shape != found:
        raise ValueError(
            f"latency table: expected one for inputs of {_times(found)}, found one for "
            f"{_times(table.input_shape)}: write one with `tpvprune latency-table`"
        )
    return replace(table, runtime=TABLE)


def shapes_digest(model: nn.Module) -> str:
    """Return 32 hexadecimal digits of the names and shapes of all parameters of a model."""
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:32]


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _table(found: dict[str, Any]) -> LatencyTable:
    numbers: dict[str, Any] = {n: type(least)(found[n]) for n, least in _NUMBERS.items()}
    for name, number in numbers.items():
        _check(math.isfinite(number) and number >= _NUMBERS[name], name, found[name])
    texts: dict[str, Any] = {name: found[name] for name in _TEXTS}
    for name, text in texts.items():
        _check(isinstance(text, str), name, text)
    layers = {str(name): _layer(str(name), entry) for name, entry in found["layers"].items()}
    shape = tuple(int(size) for size in found["input_shape"])
    return LatencyTable(layers=layers, input_shape=shape, **numbers, **texts)


def _layer(name: str, entry: dict[str, Any]) -> LayerTime:
    ins, outs = (tuple(map(int, entry[side])) for side in ("ins", "outs"))
    ms = tuple(tuple(map(float, row)) for row in entry["ms"])
    for widths in (ins, outs):
        rising = all(a < b for a, b in itertools.pairwise(widths))
        _check(bool(widths) and widths[0] > 0 and rising, f"widths of {name}", widths)
    whole = len(ms) == len(ins) and all(len(row) == len(outs) for row in ms)
    _check(whole, f"milliseconds of {name}", entry["ms"])
    values = [value for row in ms for value in row]
    _check(all(math.isfinite(v) and v >= 0 for v in values), f"milliseconds of {name}", values)
    _check(int(entry["values"]) >= 0, f"values of {name}", entry["values"])
    return LayerTime(ins, outs, ms, int(entry["values"]))


def _check(fits: bool, name: str, found: object) -> None:
    if not fits:
        raise ValueError(f"{name}: {str(found)[:60]}")
