"""Names of torch functions by what they do to channels: the tables of the tracker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
CONTRACTIONS = RECURRENT | words(
    "conv1d conv2d conv3d linear conv_transpose1d conv_transpose2d conv_transpose3d"
)
NORMS = frozenset({"layer_norm", "rms_norm"})
MATMULS = words("matmul bmm mm einsum")
_SUMMARIES = words(
    "mean sum amax amin max min var std var_mean std_mean logsumexp norm vector_norm "
    "linalg_vector_norm linalg_norm"
)
REDUCTIONS = _SUMMARIES | {"prod"}
# What mixes channels without weights of its own: over labelled channels it becomes the same
# over those that stay. The matrix products are here because they contract.
MIXERS = _SUMMARIES | MATMULS | words("group_norm normalize softmax log_softmax batch_norm")
# Functions of one number, with the same parameters for all channels.
ACTIVATIONS = words(
    "relu relu6 gelu silu sigmoid logsigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu "
    "celu selu mish softplus softsign clamp clamp_min clamp_max clip threshold"
)
POINTWISE = ACTIVATIONS | words(
    "add sub rsub mul div truediv true_divide maximum minimum where masked_fill addcmul addcdiv "
    "lerp pow rpow exp expm1 log log1p sqrt rsqrt abs neg square reciprocal erf sin cos sign "
    "clone contiguous to float double half bfloat16 type type_as detach dropout dropout1d "
    "dropout2d alpha_dropout feature_dropout softmax log_softmax normalize nan_to_num prelu "
    "identity alias zero fill "
    "requires_grad copy gt lt ge le eq ne logical_not logical_and logical_or"
)
CASTS = words("to type type_as")  # another tensor among their arguments lends its type alone
POOLS = words(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d lp_pool2d "
    "interpolate upsample grid_sample max_pool2d_with_indices boolean_dispatch _max_pool2d "
    "_max_pool1d"
)
# Values that have nothing to do with a tensor's, of its shape: narrow where that is.
LIKE = words("zeros_like ones_like empty_like full_like rand_like randn_like")
NEW = words(
    "new_zeros new_ones new_empty new_full new_tensor bernoulli is_floating_point size dim numel "
    "stride is_contiguous"
)
JOINS = words("cat concat concatenate stack")
SPLITS = words("split split_with_sizes chunk tensor_split")
SHAPED = words("view reshape expand unflatten")
MOVES = words(
    "view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t "
    "squeeze unsqueeze expand expand_as repeat tile repeat_interleave chunk split "
    "split_with_sizes tensor_split unbind select narrow getitem index_select flip roll cat "
    "concat concatenate stack hstack vstack pixel_shuffle pixel_unshuffle channel_shuffle "
    "view_as reshape_as rot90 diagonal broadcast_to get unfold_copy take_along_dim gather "
    "unfold"
)


def function_name(func: Callable[..., Any]) -> str:
    """Return the plain name of a torch function: ``__iadd__`` and ``add_`` are both ``add``."""
    name = getattr(func, "__name__", type(func).__name__)
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        # __radd__, __iadd__ and __add__ unite the same operands.
        if name[:1] in "ir" and name[1:] in {"add", "sub", "mul", "truediv", "pow", "matmul"}:
            name = name[1:]
    elif name.endswith("_") and not name.startswith("_"):
        name = name.rstrip("_")
    return name
