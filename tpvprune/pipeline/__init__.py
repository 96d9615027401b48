"""The whole method: groups, ranking, widths, removal, repair, measurement.

- ``pruning``: :func:`tpvprune.prune`, on one screen, and :func:`tpvprune.rank_channels`;
- ``sizes``: :class:`tpvprune.Sizes`, what several sizes of one model share;
- ``within``: :func:`tpvprune.prune_within`, several sizes of one ranking under a limit of loss;
- ``choices``: what it is told, one record, passed on whole;
- ``setup``: what it is given: the network, its groups, the images that are drawn, the budget;
- ``run``: its rounds, each a cut, a repair and a measurement;
- ``report``: what is said of it; ``checks``: what does not go together.
"""

from tpvprune.pipeline.pruning import PruningResult, prune, rank_channels
from tpvprune.pipeline.sizes import Sizes
from tpvprune.pipeline.within import prune_within

__all__ = ["PruningResult", "Sizes", "prune", "prune_within", "rank_channels"]
