"""How many branches go: tried, as what a repair makes up for is known only behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

_PARTS = 4  # of the range, at whose ends the first trials are


Damage = tuple[float, float]  # how far beyond the budget, and the output variance


def most_trials(most: int) -> int:
    """Return how many numbers of branches are tried at most.

    Returns the number; where the best one is near an end of the range fewer are.
    """
    return min(2 * _PARTS, most) + 1


def best_depth(damage: Callable[[int], Damage], most: int) -> int:
    """Return the number of branches whose removal leaves the least damage.

    First a few numbers all over the range are tried, then those between the best one and its
    neighbours.

    ``damage``: number of branches -> how far what is left exceeds the budget, which is then as
    small as it gets, and what is lost. Returns the number; where no trial meets the budget that
    which is closest to it.
    """
    known = cache(damage)
    tried = sorted({round(i * most / _PARTS) for i in range(_PARTS + 1)})
    while True:
        best = min(tried, key=known)
        at = tried.index(best)
        around = [
            (best + near) // 2 for near in tried[max(0, at - 1) : at + 2] if abs(best - near) > 1
        ]
        new = sorted({*tried, *around})
        if new == tried or len(new) > most_trials(most):
            return best
        tried = new
