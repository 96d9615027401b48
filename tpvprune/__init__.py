"""Label-free structured pruning of PyTorch vision models by test prediction variance."""

# the flow
from tpvprune.pipeline import PruningResult, prune

# groups -> scores -> selection -> removal
from tpvprune.groups import ChannelGroup, ChannelGroups, ParamSlice, find_groups
from tpvprune.scores import Scores, tpv_scores
from tpvprune.criteria import SCORERS
from tpvprune.selection import select_channels
from tpvprune.allocation import allocate
from tpvprune.curves import variance_curves
from tpvprune.removal import remove_channels

# repairs
from tpvprune.batchnorm import recalibrate_batchnorm
from tpvprune.compensation import compensate_weights

# evaluation
from tpvprune.evaluation import Evaluation, agreement, evaluate
from tpvprune.checkpoint import load_pruned, save_pruned
