"""The whole method: groups, ranking, widths, removal, repair, measurement.

- ``pruning``: :func:`tpvprune.prune`, on one screen, :func:`tpvprune.rank_channels`, and
  :class:`tpvprune.Sizes`, what several sizes of one model share;
- ``within``: :func:`tpvprune.prune_within`, several sizes of one ranking under a limit of loss;
- ``choices``: what it is told, one record, passed on whole;
- ``setup``: what it is given, checked: the network, its groups, the images, the budget;
- ``run``: its rounds, each a cut, a repair and a measurement, and what is said of them.
"""

from tpvprune.pipeline.pruning import PruningResult, Sizes, prune, rank_channels
from tpvprune.pipeline.within import prune_within

__all__ = ["PruningResult", "Sizes", "prune", "prune_within", "rank_channels"]
