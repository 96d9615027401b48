"""Out of memory: the same command once more, with half as many images per batch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from tpvprune.cli.console import say
from tpvprune.passes.memory import is_lack_of_memory, release_memory

_TRAINING = ("distill", "finetune")


def within_memory(
    run: Callable[[argparse.Namespace], tuple[int, Any]], args: argparse.Namespace
) -> tuple[int, Any]:
    """Run a command; when memory runs out, again with batches half as large, down to one image.

    A command starts anew; finished rows of a benchmark are on the disk. How images are split into
    batches decides the result of training, and a little that of BatchNorm recalibration.
    """
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    while True:
        attempt = argparse.Namespace(**vars(args))
        try:
            return run(attempt)
        except Exception as error:
            size = _images_per_batch(attempt)
            if not is_lack_of_memory(error) or size == 1 or shared or "batch_size" not in args:
                raise
        # Outside of the handler, where the error no longer holds what filled the memory.
        size //= 2
        args = argparse.Namespace(**{**vars(args), "batch_size": size})
        differs = " (which trains differently)" if args.command in _TRAINING else ""
        say(f"note: out of memory: going on with {size} images per batch{differs}")
        release_memory()


def _images_per_batch(args: argparse.Namespace) -> int:
    """Return how many images a batch has, as the flags say or the command decided."""
    default = 128 if args.command in _TRAINING else getattr(args, "images_per_batch", 64)
    return int(getattr(args, "batch_size", None) or default)
