"""What a stranger's folder, and a hurried user's flags, may look like: strategies of hypothesis."""

import argparse
import copy
import json

from hypothesis import strategies as st

from tpvprune.cli.flags import build_parser

HUGE = [2**31, 2**53, 10**12, 10**30, -(2**63)]
NAMES = [
    *("", ".", "../../etc/passwd", "/etc/passwd", "~", "\x00", "a\nb", "x" * 5000, "ünïcödé", "%s"),
    *("__class__", "forward", "evil:make", "os:system", "hf-hub:a/b/c", "local-dir:.", "resnet18"),
]
HOSTILE = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 3, 1.5, 1e308, 1e-320, *HUGE, *NAMES]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from([[], {}, [[]], [3, 10**5, 10**5], [1, 1, 1], [10**9] * 4, {"a": {"b": [1]}}]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=6,
    ),
)

# Arguments of timm's constructors: a few bytes that may ask for all memory or all time.
_MODELS = [
    *("test_resnet", "test_vit", "test_efficientnet", "resnet18"),
    "swin_tiny_patch4_window7_224",
]
_ARGUMENTS = [
    *("num_classes", "in_chans", "layers", "channels", "stem_width", "base_width", "cardinality"),
    *("depth", "depths", "embed_dim", "num_heads", "img_size", "patch_size", "window_size"),
    *("drop_path_rate", "block_args", "global_pool", "act_layer", "norm_layer", "mlp_ratio"),
    *("pretrained", "pretrained_cfg", "checkpoint_path", "features_only", "cache_dir", "**"),
]
_SIZES = [0, -1, 1, 2, 7, 224, 10**4, 10**6, *HUGE]
_ARGUMENT_VALUES = (
    HOSTILE | st.sampled_from(_SIZES) | st.lists(st.sampled_from(_SIZES), min_size=4, max_size=4)
)


@st.composite
def configs(draw, valid):
    """A valid record with one to three changes somewhere in it."""
    record = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        if "model_kwargs" in record and draw(st.integers(0, 3)) == 0:
            record["model"] = draw(st.sampled_from(_MODELS))
            arguments = st.dictionaries(st.sampled_from(_ARGUMENTS), _ARGUMENT_VALUES, max_size=2)
            record["model_kwargs"] = draw(arguments)
            continue
        _change(draw, record)
    return record


def _change(draw, value):
    """Change something at a random depth, in place."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        deeper = isinstance(value[key], dict | list) and value[key]
        if not deeper or draw(st.integers(0, 3)) == 0:
            break
        value = value[key]
    how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    new = copy.deepcopy(draw(HOSTILE))  # a later change may go into it
    if how == "remove":
        del value[key]
    elif how == "replace":
        value[key] = new
    elif isinstance(value, dict):
        value[draw(st.sampled_from(NAMES))] = new
    else:
        value.append(new)


@st.composite
def damaged(draw, content):
    """Bytes that are cut short, or have some replaced, doubled or inserted."""
    start = draw(st.integers(0, len(content)) | st.integers(0, min(64, len(content))))
    how = draw(st.sampled_from(["cut", "replace", "insert", "double", "shorten"]))
    piece = draw(st.binary(min_size=1, max_size=16))
    return {
        "cut": content[:start],
        "replace": content[:start] + piece + content[start + len(piece) :],
        "insert": content[:start] + piece + content[start:],
        "double": content[:start] + content[start : start + 64] + content[start:],
        "shorten": content[:start] + content[start + len(piece) :],
    }[how]


# ---- flags ----------------------------------------------------------------------------------

_NUMBERS = [
    *("0", "1", "2", "3", "-1", "0.5", "1e-300", "1e300", "nan", "inf", "-inf", "", " ", "x", "٣"),
    *("1_0", "0x10", str(10**9), str(2**63), str(10**30), "9" * 300, "1,2", "--", "-"),
]
# A user may ask for hours, and gets them.
_ENDLESS = {
    *("--epochs", "--steps", "--seeds", "--iterative", "--num-probes", "--latency-repeats"),
    *("--num-views", "--warmup-epochs", "--latency-batch-size"),
}
_SHORT = ["0", "1", "2", "-1", "x", "", "nan", "1.5", "-inf"]
_TEXTS = [
    *("", " ", "x", "../x", "no/such/place", "flat", "classes", "file.txt", "evil.pt", "cut.tar"),
    *("evil.npy", "weights.pt", "cut.safetensors", "out", "bad", "empty", "list.txt", "x.npy"),
    *("a\nb", "ü", "x" * 300, "/", ".", "-", "classes/class0", "loop", "evil.json", "pipe"),
]
_SPECIAL = {
    "--model": [
        *("test_resnet", "test_vit", "resnet", "cifar_resnet20", "os:system", "json:loads"),
        *("no.such:thing", "evil.pt", "local-dir:flat", "local-dir:out", "../x", "out", "a:b:c"),
    ],
    "--device": ["cpu", "cpu:7", "cuda", "cuda:99", "meta", "mps", "xla", "", "gpu", "cpu:-1"],
    "--criterion": [
        *("tpv", "magnitude", "taylor", "random", "jbr", "bn_scale", "fpgm", "whc", "lamp"),
        *("activation_variance", "lfh", "jacobian", "hessian", "tpvv", ""),
    ],
    "--granularity": [
        "channel",
        "head",
        "branch",
        "channel,branch",
        "weight",
        "2:4",
        "4:2",
        "0:0",
        "1:1000000",
        "2:4:6",
        "",
    ],
    "--model-kwargs": [
        *("num_classes=-1", "num_classes=0", "in_chans=1", "layers=[1,1,1,1]", "layers=7", "a=b"),
        *("checkpoint_path=evil.pt", "pretrained=True", "act_layer=relu", "block=print", "=", "x"),
        *("a=" + "(" * 500, "drop_rate=nan", "global_pool=", "features_only=True"),
    ],
    "--criteria": ["magnitude", "tpv,magnitude", "tp:magnitude", "tp:x", ",", "random,random", "x"],
    "--keep": ["0.5", "1", "0.001", "1e-9", "0.9,0.5", "nan", "2", "0", ",", "0.5,,"],
    "--repair": ["none", "bn", "compensate", "auto", "none,bn", "x", ""],
    "--ranking": ["curves", "plain,per_cost", "x", ""],
    "--ignore": ["conv1", "layer1", "fc", "no.such", "", "layer1.0.conv1"],
    "--dataset": ["torch/cifar10", "hfds/x", "wds/x", "tfds/x", "imagenet", "", "../x", "torch/"],
    "--opt": ["sgd", "adamw", "lion", "x", "", "adahessian", "lbfgs"],
    "--interpolation": ["bilinear", "bicubic", "random", "nearest", "x", ""],
    "--format": ["onnx", "pt2", "x"],
    "--measures": ["tpv", "x", "", ","],
}
# Kept out: they reach for the network, or take long by design.
_LEFT_OUT = {"--help", "--pretrained", "--dataset-download", "--version"}
_MODEL = ["--model", "test_resnet", "--checkpoint", "weights.pt", "--img-size", "24"]
_IMAGES = ["--data-dir", "flat", "-j", "1", "-b", "4", "--num-images", "4"]
_QUICK = ["--latency-repeats", "0"]
_OUTPUTS = ["new", "old", "file.txt", "flat", "deep/new", "old/config.json", "loop", "x" * 300, ""]
BASES = {
    "prune": [*_MODEL, *_IMAGES, *_QUICK, "--criterion", "magnitude", "--repair", "none"],
    "score": [*_MODEL, *_IMAGES, "--criterion", "magnitude"],
    "groups": _MODEL,
    "evaluate": ["out", *_IMAGES, *_QUICK, "--img-size", "24"],
    "distill": ["out", *_IMAGES, *_QUICK, "--img-size", "24", "--epochs", "1"],
    "finetune": [
        *("out", "--data-dir", "classes", "-j", "1", *_QUICK, "--img-size", "24", "--epochs", "1")
    ],
    "benchmark": [
        *(*_MODEL, *_IMAGES, "--eval-dir", "classes", "--criteria", "magnitude", "--keep", "0.5"),
        *("--repair", "none", "--seeds", "1"),
    ],
    "compare": ["out", "old"],
    "export": ["out", "--format", "pt2"],
    "audit": [*_MODEL, *_IMAGES, "--measures", "tpv", "--criteria", "magnitude"],
}
_NO_OUTPUT = {"groups", "evaluate"}


def _flags():
    """Name -> action of every flag, by command."""
    parser = build_parser()
    subs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: {a.option_strings[-1]: a for a in sub._actions if a.option_strings}
        for name, sub in subs.choices.items()
    }


FLAGS = _flags()


@st.composite
def command_lines(draw):
    """A command line that works, with one to four flags added, and at times others taken away."""
    command = draw(st.sampled_from(sorted(BASES)))
    argv = list(BASES[command])
    if command not in _NO_OUTPUT:
        argv += ["--output", draw(st.sampled_from(["new", *_OUTPUTS]))]
    if draw(st.integers(0, 7)) == 0:
        del argv[draw(st.integers(0, len(argv) - 1))]
    names = sorted(set(FLAGS[command]) - _LEFT_OUT - {"--output"})
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4)):
        argv += [name, *draw(_values(name, FLAGS[command][name]))]
    if command in {"export", "audit"}:  # the slow ones: most of the time, not all the way
        argv += draw(st.sampled_from([["--img-size", "x"], ["--seed", "y"], ["--nothing"]]))
    return [command, *argv]


def _values(name, action):
    if action.nargs == 0:
        return st.just([])
    if name in _ENDLESS:
        pool = _SHORT
    elif name in _SPECIAL:
        pool = [*_SPECIAL[name], *_SPECIAL[name], "x" * 300]
    elif action.choices:
        pool = [*action.choices, "x", ""]
    else:
        pool = _TEXTS if action.type is None else _NUMBERS
    number = action.nargs if isinstance(action.nargs, int) else 1
    most = 4 if action.nargs in {"+", "*"} else number
    return st.lists(st.sampled_from(pool), min_size=number, max_size=most)
