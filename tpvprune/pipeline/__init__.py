"""The whole method: groups, ranking, widths, removal, repair, measurement.

What it is told (``choices``) and given (``setup``), its rounds (``run``), the flow on one screen
(``pruning``), and several sizes under a limit of loss (``within``).
"""

from tpvprune.pipeline.pruning import PruningResult, Sizes, prune, rank_channels
from tpvprune.pipeline.within import prune_within

__all__ = ["PruningResult", "Sizes", "prune", "prune_within", "rank_channels"]
