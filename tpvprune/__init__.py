"""Label-free structured pruning of PyTorch vision models by test prediction variance."""

from tpvprune.groups import ChannelGroup, ChannelGroups, ParamSlice, find_groups
from tpvprune.removal import remove_channels
