"""How many channels of every group stay under a budget.

- ``ranking``: in which order channels leave, and the damage, by curves or by scores;
- ``allocation``: widths by joint curves and a dynamic programme (``knapsack``);
- ``selection``: widths by greedy selection; ``problem``: what the two have in common;
- ``limits``: how far groups may shrink; ``narrowest``: what the smallest model would be;
- ``repair_factors``: how much of a cut the repair makes up for;
- ``latency``: milliseconds as a budget, measured here (``latency_file``: or elsewhere); ``speed``:
  whether the pruned network keeps it;
- ``rounds``: what the rounds of :func:`tpvprune.prune` have led to, to go on from there.
"""
