"""State dicts from files: plain tensors, without the versions that torch keeps beside them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors strictly, as those of the version that the classes of the module have now.

    Files of tensors do not hold versions, and some classes refuse a state dict of none (MNASNet of
    torchvision).
    """
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(module.state_dict(), "_metadata", {})
    module.load_state_dict(state, strict=True)
