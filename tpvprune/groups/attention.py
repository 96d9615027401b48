"""``nn.MultiheadAttention`` taken apart into linear layers, whose heads can be removed one by one.

The fused module computes the width of a head from its weight [3 * E, E]: without a head it cannot
run.
"""

from __future__ import annotations

import copy
import math
from functools import cache, reduce
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UnfusedAttention(nn.MultiheadAttention):
    """Multi-head attention of four linear layers; it is called as ``nn.MultiheadAttention`` is.

    A subclass, because models ask for the type. Of a module with fewer heads ``head_dim`` stays,
    and with it the scale of the products.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)  # no fused weights
        self.head_dim, self.batch_first = fused.head_dim, fused.batch_first
        self.dropout = fused.dropout
        weight, bias = fused.in_proj_weight, fused.in_proj_bias
        own = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        weights = own if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.q, self.k, self.v = map(_linear, weights, biases)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)  # type: ignore[assignment]
        self.train(fused.training)

    # What nn.TransformerEncoderLayer asks before it takes a path that reads the fused weights.
    _qkv_same_embed_dim = False
    in_proj_bias = None  # type: ignore[assignment]

    @property
    def num_heads(self) -> int:
        """How many heads there are, of a pruned module those that stay."""
        return len(self.q.weight) // self.head_dim

    def forward(  # noqa: PLR0917  (called by place, as the fused module is)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and shapes are those of ``nn.MultiheadAttention``.

        ``is_causal`` says something of ``attn_mask``, which is passed anyway: ignored.
        """
        alone = query.ndim == 2
        dim = 0 if alone or self.batch_first else 1
        if alone:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        # The channels stay in the last dimension until heads are formed.
        q, k, v = (
            layer(t).unflatten(-1, (-1, self.head_dim)).movedim(dim, 0).transpose(1, 2)
            for layer, t in zip((self.q, self.k, self.v), (query, key, value), strict=True)
        )
        mask = _joined(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            products = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (products if mask is None else products + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(heads.transpose(1, 2).flatten(2)).movedim(0, dim)
        if alone:
            return out[0], None if weights is None else weights[0]
        return out, weights


def unfuse_attention(model: nn.Module) -> nn.Module:
    """Return a copy of a model with linear layers in the place of fused attention modules.

    The copy computes the same. ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer`` and what
    is made of them can then be pruned: heads, widths of heads, and the stream.

    Args:
        model: Any module; untouched.

    Returns:
        The copy. Modules with ``add_bias_kv`` or ``add_zero_attn`` stay as they are, as do
        subclasses, which may compute something else.
    """
    copied = copy.deepcopy(model)
    if _can_be_unfused(copied):
        return UnfusedAttention(copied)
    unfused = cache(UnfusedAttention)  # one that is used twice stays one
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if child is not None and _can_be_unfused(child):
                module._modules[name] = unfused(child)
    return copied


def fused_attention(model: nn.Module) -> list[str]:
    """Return the qualified names of the modules that :func:`unfuse_attention` would replace."""
    return [name for name, module in model.named_modules() if _can_be_unfused(module)]


def _can_be_unfused(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    if type(module) is not nn.MultiheadAttention:
        return False
    return module.bias_k is None and not module.add_zero_attn


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, inputs = weight.shape
    layer = nn.Linear(inputs, out, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _joined(pairs: Tensor | None, keys: Tensor | None, q: Tensor) -> Tensor | None:
    """Return what is added to the products, of a shape that [B, heads, L, S] is made of."""
    masks = []
    if pairs is not None:
        masks.append(pairs.unflatten(0, (len(q), -1)) if pairs.ndim == 3 else pairs)
    if keys is not None:
        masks.append(keys.reshape(len(q), 1, 1, -1))
    added = [  # what is left out becomes what is added
        torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m
        for m in masks
    ]
    return reduce(torch.add, added) if added else None
