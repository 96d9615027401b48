"""Channel groups: what belongs together, the proof that it can be cut, and cutting it.

- :func:`find_groups` follows the channels through one traced forward (``finding``, ``tracing``)
  and returns :class:`ChannelGroups`, plain records (``records``, ``axes``);
- every group is verified: masking it and removing it give the same outputs (``verification``);
- :func:`remove_channels` cuts (``removal``), :class:`MaskedChannels` only zeroes (``masking``);
- :func:`unfuse_attention` makes the heads of ``nn.MultiheadAttention`` removable (``attention``),
  :func:`fold_weights` what ``weight_norm`` and its like compute (``computed``).
"""

from tpvprune.groups.attention import fused_attention, unfuse_attention
from tpvprune.groups.axes import Axis, Kept
from tpvprune.groups.computed import fold_weights, folded_if_equal
from tpvprune.groups.finding import find_groups
from tpvprune.groups.masking import MaskedChannels
from tpvprune.groups.records import (
    CallCost,
    ChannelGroup,
    ChannelGroups,
    Pad,
    ParamSlice,
    Reader,
    with_blocked,
)
from tpvprune.groups.removal import remove_channels

__all__ = [
    "Axis",
    "CallCost",
    "ChannelGroup",
    "ChannelGroups",
    "Kept",
    "MaskedChannels",
    "Pad",
    "ParamSlice",
    "Reader",
    "find_groups",
    "fold_weights",
    "folded_if_equal",
    "fused_attention",
    "remove_channels",
    "unfuse_attention",
    "with_blocked",
]
