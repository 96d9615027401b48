"""What criteria are called in tables, and how a table is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tpvprune.benchmark.rows import Summary

NAMES = {
    "magnitude": "magnitude, L2",
    "magnitude_l1": "magnitude, L1",
    "taylor": "Taylor, corrected",
    "taylor_torch_pruning": "Taylor, torch-pruning's",
    "jacobian": "Jacobian",
    "jbr": "JBR, the paper's code",
    "bn_scale": "BatchNorm scale",
    "activation_variance": "activation variance",
    "fpgm": "FPGM",
    "whc": "WHC",
    "lamp": "LAMP",
    "lfh": "LFH",
    "wanda": "Wanda",
    "tpv": "TPV, 1 probe",
    "tpv_8_probes": "TPV, 8 probes",
    "tp:magnitude": "magnitude, torch-pruning's pruner",
    "tp:taylor": "Taylor, torch-pruning's pruner",
}


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def criterion_of(s: Summary) -> str:
    """Return what the criterion and the ranking of some rows are called."""
    if s.criterion == "tpv":
        return "TPV, curves" if s.ranking == "curves" else "TPV, ranked"
    return NAMES.get(s.criterion, s.criterion)
