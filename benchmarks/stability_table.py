"""The table of stability.py's figures, as benchmarks/README.md shows it."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from rows import RESULTS
from titles import markdown

MODELS = ("cifar_resnet20", "cifar_resnet56")
STEPS = {"model": "steps of the model's range", "tensor": "steps of each tensor's"}
HEAD = "network|perturbation|trace|Monte Carlo|sd of a draw|rounded once|trace, training / held-out"


def stability(results: Path = RESULTS) -> str:
    """Return the two forms on training images with their standard errors, and what rounding does.

    The standard deviation of one draw is that of the mean times the root of the number of draws.
    """
    lines = []
    for model in MODELS:
        path = results / f"stability-{model}.csv"
        num_draws = json.loads(path.with_suffix(".json").read_text())["arguments"]["num_draws"]
        with path.open(newline="") as file:
            rows = {(r["step_of"], r["perturbation"], r["form"]): r for r in csv.DictReader(file)}
        for step_of, name in dict.fromkeys(key[:2] for key in rows):
            trace, drawn = (rows[step_of, name, form] for form in ("trace", "monte carlo"))
            once = rows.get((step_of, name, "rounding"))
            error = drawn["train_stderr"]
            lines.append([
                f"`{model}`",
                f"{name}, {STEPS[step_of]}" if once else name,
                _with_error(trace),
                _with_error(drawn),
                f"{float(error) * math.sqrt(num_draws):#.2g}" if once and error else "",
                _rounded(once["train"]) if once else "",
                f"{float(trace['ratio']):.3f}",
            ])  # fmt: skip
    return markdown(HEAD.split("|"), lines)


def _with_error(row: dict[str, str]) -> str:
    error = row["train_stderr"]
    return f"{_rounded(row['train'])} ± {float(error):#.2g}" if error else _rounded(row["train"])


def _rounded(number: str) -> str:
    return f"{float(number):#.3g}"
