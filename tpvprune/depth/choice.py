"""How many branches go: tried, as what a repair makes up for is known only behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

_PARTS = 4  # of the range, at whose ends the first trials are


def best_depth(damage: Callable[[int], float], most: int) -> int:
    """Return the number of branches whose removal leaves the least damage.

    First a few numbers all over the range are tried, then those between the best one and its
    neighbours.

    Args:
        damage: Number of branches -> what is lost when so many go and the widths make up for the
            rest of the budget; infinite where that cannot be met.
        most: How many may go.

    Returns:
        The number; 0 where every trial is infinite.
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
        if new == tried or len(new) > 2 * _PARTS + 1:
            return best
        tried = new
