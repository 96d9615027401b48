"""`latency-table`: what widths cost on this device, for a run on another."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from tpvprune.cli.console import say
from tpvprune.cli.session import open_subject, provenance
from tpvprune.groups import find_groups, fused_attention, unfuse_attention
from tpvprune.widths.latency import calibrated, measured_table
from tpvprune.widths.latency_file import write_latency_table


def run_latency_table(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Measure layers and whole networks, write the table, and say how far it can be trusted."""
    subject = open_subject(args)
    model, x = subject.model, subject.example[:1]
    model = unfuse_attention(model) if fused_attention(model) else model
    groups = find_groups(model, x)
    batch = x.repeat_interleave(args.latency_batch_size, 0)
    first = measured_table(
        model, groups, batch, runtime=args.latency_runtime, num_threads=args.latency_threads
    )
    table, speed = calibrated(first, model, groups, batch)
    write_latency_table(args.output, replace(table, model=subject.made.name))
    say(f"{subject.made.name}: {len(table.layers)} layers timed, {table.device}")
    say(
        f"the whole network: {speed.dense_ms:.2f} ms, at half of every width "
        f"{speed.pruned_ms:.2f} ms (quartiles of the ratio {speed.ratio_low:.3f} to "
        f"{speed.ratio_high:.3f})"
    )
    say(f"saved: {args.output}")
    document = {
        **provenance(args, subject),
        "device": table.device,
        "runtime": table.runtime,
        "batch_size": table.batch_size,
        "num_threads": table.num_threads,
        "num_layers": len(table.layers),
        "dense_ms": speed.dense_ms,
        "half_ms": speed.pruned_ms,
        "output": str(args.output),
    }
    return 0, document
