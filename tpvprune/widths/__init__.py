"""How many channels of every group stay under a budget.

- ``allocation``: by joint curves and a dynamic programme (``knapsack``);
- ``selection``: greedily by scores; ``narrowest``: what the smallest model would be;
- ``absorption``: how much of a cut the repair makes up for;
- ``latency``: milliseconds as a budget, measured here;
- ``choosing``, ``rounds``: what one round of :func:`tpvprune.prune` does, and what it keeps.
"""
