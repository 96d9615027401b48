"""What is said of a run: plain data, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.budget import cost
from tpvprune.passes.evaluation import Difference
from tpvprune.pipeline.run import Run
from tpvprune.pipeline.setup import Depth
from tpvprune.processes.shares import total
from tpvprune.repairs import guard
from tpvprune.widths.rounds import Rounds


def report_of(
    run: Run, rounds: Rounds, measured: Mapping[str, Difference], best: str
) -> dict[str, Any]:
    """Return the report; ``measured``: how far each repair is from the dense model."""
    given, told = run.given, run.given.told
    num_fit = int(total(sum(map(len, given.fit))))
    spent = cost(given.groups, rounds.kept, given.budget)
    reached = spent <= told.keep * given.dense_cost * (1 + 1e-9)
    speed = {} if rounds.speed is None else {"speed": asdict(rounds.speed)}
    if rounds.speed is not None and rounds.speed.rounds:  # else a table says it
        reached = rounds.speed.ratio <= told.keep
    return {
        "keep": told.keep,
        "of": told.of,
        "repair": told.repair,
        "repair_chosen": best,
        "warnings": [*guard.warnings_of(measured, told.repair, best), *run.notes, *given.notes],
        "seed": told.seed,
        "criterion": given.by.name,
        "used_labels": rounds.ranking.scores.used_labels,
        "allocation": given.by.how,
        "num_images": num_fit,
        "num_held_back": int(total(sum(map(len, given.held)))),
        "images_used": {"selection": num_fit, "repair": num_fit, **run.used},
        "reached": reached,
        **speed,
        "held_back": guard.facts(measured[best]),
        "output_variance": {n: m.output_variance for n, m in measured.items()},
        "variance_share": {n: m.share for n, m in measured.items()},
        "output_second_moment": given.reference.second_moment(),
        "steps": rounds.history,
        "timings": given.clock.seconds,
        **_widths(given.groups, rounds.kept),
        **_depth(given.depth),
    }


def _depth(depth: Depth | None) -> dict[str, Any]:
    """Return what is said of branches, and the dense costs with them."""
    if depth is None:
        return {}
    return {
        "dense": dict(depth.dense),
        "branches": [
            {"name": name, "score": score, "gone": name in depth.gone}
            for name, score in depth.branches.items()
        ],
    }


def _widths(groups: ChannelGroups, kept: Kept) -> dict[str, Any]:
    return {
        "dense": {"macs": groups.macs(), "params": groups.params()},
        "pruned": {"macs": groups.macs(kept), "params": groups.params(kept)},
        "groups": [
            {
                "name": g.name,
                "unit": g.unit,
                "num_channels": g.num_channels,
                "kept": int(kept[g.name].sum()),
            }
            for g in groups
        ],
        "blocked": [
            {"name": b.name, "num_channels": b.num_channels, "reason": b.blocked}
            for b in groups.blocked
        ],
    }
