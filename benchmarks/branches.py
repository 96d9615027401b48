"""Which residual branches are found in the networks of coverage.py, and is each proof right?

    python benchmarks/branches.py

One row a network: how many branches can go, how many of them as whole blocks, what share of the
MACs and parameters they hold, and the largest difference between the network without a branch and
the network that adds zeros in its place, one branch at a time, with the weights as they are. Rows
that exist are skipped.
"""

from __future__ import annotations

import argparse
import ast
import platform
import time
from typing import Any

import timm
import torch
from coverage import MODELS
from rows import add_output_file
from surveys import bounded, read_rows, relative_gap, write_rows

from tpvprune.depth import Removal, find_branches, remove_branches
from tpvprune.depth.additions import without_branches
from tpvprune.depth.savings import branch_savings
from tpvprune.groups import find_groups

COLUMNS = (
    "family", "model", "model_kwargs", "img_size", "branches", "blocks", "macs_share",
    "params_share", "gap", "seconds", "error", "versions",
)  # fmt: skip


def survey(name: str, size: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one network."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    x = torch.randn(2, 3, size, size)
    start = time.perf_counter()
    branches = find_branches(model, x[:1])
    seconds = time.perf_counter() - start
    gaps = [0.0]
    with torch.no_grad():
        for branch in branches:
            removed = remove_branches(model, Removal.of(branches, [branch.name]), share=True)(x)
            with without_branches(model, [branch]):
                gaps.append(relative_gap(removed, model(x)))
    groups = find_groups(model, x[:1], verify=False)
    shares = {
        f"{of}_share": sum(branch_savings(model, groups, branches, of, x).values()) / whole
        for of, whole in (("macs", groups.macs()), ("params", groups.params()))
    }
    return {
        "branches": len(branches),
        "blocks": sum(branch.block is not None for branch in branches),
        **{key: round(share, 4) for key, share in shares.items()},
        "gap": f"{max(gaps):.1e}",
        "seconds": round(seconds, 2),
    }


def main() -> None:
    """Survey what is missing, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=120, help="seconds a model")
    add_output_file(parser, "branches.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, timm {timm.__version__}, python "
    rows = read_rows(args.output, "model")
    for line in MODELS.strip().splitlines():
        family, name, size, *rest = line.split()
        if name in rows:
            continue
        kwargs = ast.literal_eval(rest[0]) if rest else {}
        row = bounded(survey, args.limit, name, int(size), kwargs)
        rows[name] = {"family": family, "model": name, "model_kwargs": rest[0] if rest else "",
                      "img_size": size, "versions": versions + platform.python_version(),
                      **row}  # fmt: skip
        write_rows(args.output, COLUMNS, sorted(rows.values(), key=lambda r: r["model"]))
        print(f"{family:24s} {name:32s} {row}"[:160], flush=True)
    found = {r["family"] for r in rows.values() if int(r.get("branches") or 0)}
    worst = max((float(r["gap"]) for r in rows.values() if r.get("gap")), default=0.0)
    print(f"branches in {len(found)} of {len({r['family'] for r in rows.values()})} modules")
    print(f"largest difference between removed and masked: {worst:.1e}")


if __name__ == "__main__":
    main()
