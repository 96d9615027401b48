"""How one layer is called, at any widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.runtimes.onnx_files import onnx_node


@dataclass(frozen=True)
class LayerCall:
    """One layer as it is called, but for its widths."""

    kind: str
    shape: tuple[int, ...]  # of the input, 0 in the place of the channels
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    depthwise: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, module: Any, x: Tensor) -> LayerCall | None:
        """Return how a layer is called; None for a grouped convolution that is not depthwise."""
        if isinstance(module, nn.Linear):
            return cls("linear", (*x.shape[:-1], 0), (), (), 0, (), False, x.dtype)
        depthwise = 1 < module.groups == module.in_channels == module.out_channels
        if module.groups > 1 and not depthwise:
            return None
        kind = "conv1d" if isinstance(module, nn.Conv1d) else "conv2d"
        return cls(
            kind, (x.shape[0], 0, *x.shape[2:]), module.kernel_size, module.stride, module.padding,
            module.dilation, depthwise, x.dtype,
        )  # fmt: skip

    def run(self, num_in: int, num_out: int, device: torch.device) -> Callable[[], Tensor]:
        """Return a call with these widths in PyTorch; its time knows no values.

        ``num_in``: channels that it reads; of a depthwise convolution ``num_out`` counts.
        """
        shape, size = self._shapes(num_in, num_out)
        x = torch.ones(shape, device=device, dtype=self.dtype)
        weight = torch.ones(size, device=device, dtype=self.dtype)
        if self.kind == "linear":
            return lambda: F.linear(x, weight)
        convolve: Any = F.conv1d if self.kind == "conv1d" else F.conv2d
        groups = num_out if self.depthwise else 1
        return lambda: convolve(x, weight, None, self.stride, self.padding, self.dilation, groups)

    def graph(self, num_in: int, num_out: int) -> tuple[bytes, Tensor]:
        """Return it with widths as of ``run`` as an ONNX file, and ones to run it on; float32."""
        shape, size = self._shapes(num_in, num_out)
        if self.kind == "linear":
            return onnx_node("MatMul", (shape, size[::-1])), torch.ones(shape)
        padding: dict[str, Any] = {"auto_pad": "VALID"}
        if self.padding == "same":
            padding = {"auto_pad": "SAME_UPPER"}
        elif not isinstance(self.padding, str):
            padding = {"pads": [*self.padding, *self.padding]}
        attributes = {
            "strides": list(self.stride),
            "dilations": list(self.dilation),
            "group": num_out if self.depthwise else 1,
            **padding,
        }
        return onnx_node("Conv", (shape, size), attributes), torch.ones(shape)

    def _shapes(self, num_in: int, num_out: int) -> tuple[list[int], list[int]]:
        """Return the shape of the input, and of the weight."""
        num_in = num_out if self.depthwise else num_in
        inner = 1 if self.depthwise else num_in
        return [num_in if s == 0 else s for s in self.shape], [num_out, inner, *self.kernel]
