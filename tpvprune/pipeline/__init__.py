"""The whole method: groups, ranking, widths, removal, repair, measurement.

- ``pruning``: :func:`tpvprune.prune`, on one screen, and :func:`tpvprune.rank_channels`;
- ``setup``: what it is given: the network, its groups, the images that are drawn, the budget;
- ``run``: its rounds, each a cut, a repair and a measurement;
- ``report``: what is said of it; ``checks``: arguments that do not go together.
"""

from tpvprune.pipeline.pruning import PruningResult, prune, rank_channels

__all__ = ["PruningResult", "prune", "rank_channels"]
