"""Which networks outside of timm can be pruned to 0.6 of their MACs, from groups to a trained step.

    python benchmarks/networks.py                     # all, resumes where it stopped
    python benchmarks/networks.py --only Swin,Unet    # names that contain one of these

Classifiers, segmentation and detectors of torchvision, vision models of transformers, segmentation
models of segmentation_models_pytorch, YOLOs of ultralytics; random weights, small sizes, nothing is
downloaded. Each runs in a process of its own with a time limit, so that a crash or a hang is a row
of the table. Of a detector the outputs before its post-processing count. The MACs are those of
torch's own counter, before and after; seconds are those of one core.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo  # noqa: F401  (here, not in each process)
from rows import add_output_file
from surveys import (
    Row,
    bounded,
    equal,
    exported,
    read_rows,
    real_outputs,
    relative_gap,
    write_rows,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tpvprune
from tpvprune.groups import ChannelGroups, Kept
from tpvprune.groups.masking import MaskedChannels
from tpvprune.passes.forwards import forward_of, with_forward

COLUMNS = [
    "library", "network", "size", "kwargs", "num_images", "verdict", "groups", "blocked", "reasons",
    "macs_ratio", "reported_ratio", "gap", "effect", "repaired_share", "reload", "trains", "export",
    "groups_seconds", "prune_seconds", "warnings", "error", "versions",
]  # fmt: skip
_EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}  # relative: as find_groups verifies
_NUM_IMAGES = 48

# library, name, image size, keyword arguments (of the model, of transformers its configuration)
NETWORKS = """
transformers ViTForImageClassification 64 VIT
transformers DeiTForImageClassification 64 VIT
transformers DeiTForImageClassificationWithTeacher 64 VIT
transformers BeitForImageClassification 64 VIT+{'use_relative_position_bias':True}
transformers BeitForSemanticSegmentation 64 VIT+{'out_indices':[1,2,3,4],'num_hidden_layers':4,'pool_scales':[1,2]}
transformers Data2VecVisionForImageClassification 64 VIT+{'use_relative_position_bias':True}
transformers Dinov2ForImageClassification 64 VIT
transformers Dinov2WithRegistersForImageClassification 64 VIT
transformers DINOv3ViTModel 64 VIT
transformers CLIPVisionModel 64 VIT
transformers CLIPForImageClassification 64 {'vision_config':VIT}
transformers SiglipVisionModel 64 VIT
transformers SiglipForImageClassification 64 {'vision_config':VIT}
transformers ViTMSNForImageClassification 64 VIT
transformers IJepaForImageClassification 64 VIT
transformers YolosForObjectDetection 64 VIT+{'num_detection_tokens':5,'image_size':[64,64]}
transformers DPTForDepthEstimation 64 VIT+{'num_hidden_layers':4,'backbone_out_indices':[0,1,2,3],'neck_hidden_sizes':[8,16,24,32],'fusion_hidden_size':32}
transformers DPTForSemanticSegmentation 64 VIT+{'num_hidden_layers':4,'backbone_out_indices':[0,1,2,3],'neck_hidden_sizes':[8,16,24,32],'fusion_hidden_size':32}
transformers SwinForImageClassification 64 SWIN
transformers Swinv2ForImageClassification 64 SWIN
transformers Swin2SRForImageSuperResolution 32 {'image_size':32,'embed_dim':24,'depths':[2,2],'num_heads':[2,2],'window_size':8}
transformers SegformerForSemanticSegmentation 64 SEGFORMER
transformers SegformerForImageClassification 64 SEGFORMER
transformers PvtForImageClassification 64 {'image_size':64,'depths':[1,1,1,1],'hidden_sizes':[16,32,48,64],'num_attention_heads':[1,2,3,4]}
transformers PvtV2ForImageClassification 64 {'image_size':64,'depths':[1,1,1,1],'hidden_sizes':[16,32,48,64],'num_attention_heads':[1,2,3,4]}
transformers GLPNForDepthEstimation 64 {'depths':[1,1,1,1],'hidden_sizes':[16,32,48,64],'num_attention_heads':[1,2,3,4],'decoder_hidden_size':32}
transformers PoolFormerForImageClassification 64 {'depths':[1,1,1,1],'hidden_sizes':[16,32,48,64]}
transformers ConvNextForImageClassification 64 STAGES
transformers ConvNextV2ForImageClassification 64 STAGES
transformers CvtForImageClassification 64 {'embed_dim':[16,32,48],'num_heads':[1,2,3],'depth':[1,2,3],'cls_token':[False,False,True]}
transformers MobileViTForImageClassification 64 MOBILEVIT
transformers MobileViTForSemanticSegmentation 64 MOBILEVIT
transformers MobileViTV2ForImageClassification 64 {'image_size':64,'width_multiplier':0.5}
transformers MobileNetV2ForImageClassification 64 {'image_size':64,'depth_multiplier':0.5}
transformers ResNetForImageClassification 64 {'embedding_size':16,'hidden_sizes':[16,32,48,64],'depths':[1,1,1,1]}
transformers RegNetForImageClassification 64 {'embedding_size':16,'hidden_sizes':[16,32,48,64],'depths':[1,1,1,1],'groups_width':8}
transformers BitForImageClassification 64 {'embedding_size':32,'hidden_sizes':[32,64,96,128],'depths':[1,1,1,1],'num_groups':8}
transformers FocalNetForImageClassification 64 {'image_size':64,'embed_dim':24,'depths':[1,1,1,1]}
transformers LevitForImageClassification 64 {'image_size':64,'hidden_sizes':[32,48,64],'depths':[1,1,1],'num_attention_heads':[2,3,4],'key_dim':[8,8,8]}
transformers DetrForObjectDetection 64 DETR
transformers ConditionalDetrForObjectDetection 64 DETR
transformers UperNetForSemanticSegmentation 64 {'backbone_config':{'model_type':'convnext','depths':[1,1,1,1],'hidden_sizes':[16,32,48,64],'out_features':['stage1','stage2','stage3','stage4']},'hidden_size':32,'pool_scales':[1,2],'use_auxiliary_head':False}
transformers DepthAnythingForDepthEstimation 56 {'backbone_config':{'model_type':'dinov2','hidden_size':48,'num_hidden_layers':4,'num_attention_heads':3,'image_size':56,'patch_size':14,'out_features':['stage1','stage2','stage3','stage4'],'reshape_hidden_states':False},'reassemble_hidden_size':48,'patch_size':14,'neck_hidden_sizes':[8,16,24,32],'fusion_hidden_size':16,'head_hidden_size':16}
segmentation_models_pytorch Unet 64 {'encoder_name':'resnet18'}
segmentation_models_pytorch UnetPlusPlus 64 {'encoder_name':'resnet18'}
segmentation_models_pytorch FPN 64 {'encoder_name':'resnet18'}
segmentation_models_pytorch DeepLabV3Plus 64 {'encoder_name':'mobilenet_v2'}
segmentation_models_pytorch Linknet 64 {'encoder_name':'resnet18'}
segmentation_models_pytorch PSPNet 64 {'encoder_name':'resnet18'}
segmentation_models_pytorch MAnet 64 {'encoder_name':'resnet18'}
segmentation_models_pytorch PAN 128 {'encoder_name':'resnet18'}
segmentation_models_pytorch Segformer 64 {'encoder_name':'mit_b0'}
segmentation_models_pytorch UPerNet 64 {'encoder_name':'resnet18'}
torchvision DenseNet 64 {'block_config':(2,2,2,2)}
torchvision efficientnet_b0 64
torchvision googlenet 64 {'init_weights':True}
torchvision MaxVit 64 {'input_size':(64,64),'stem_channels':16,'partition_size':2,'block_channels':[16,32],'block_layers':[1,1],'head_dim':8,'stochastic_depth_prob':0.0}
torchvision mnasnet0_5 64
torchvision mobilenet_v2 64
torchvision mobilenet_v3_small 64
torchvision regnet_x_400mf 64
torchvision regnet_y_400mf 64
torchvision resnet18 64
torchvision resnext50_32x4d 64
torchvision shufflenet_v2_x0_5 64
torchvision squeezenet1_1 64
torchvision SwinTransformer 64 {'patch_size':[4,4],'embed_dim':24,'depths':[2,2],'num_heads':[2,4],'window_size':[4,4]}
torchvision swin_v2_t 64
torchvision vgg11_bn 64
torchvision VisionTransformer 64 {'image_size':64,'patch_size':16,'num_layers':2,'num_heads':3,'hidden_dim':48,'mlp_dim':96}
torchvision fcn_resnet50 64
torchvision deeplabv3_mobilenet_v3_large 64
torchvision lraspp_mobilenet_v3_large 64
torchvision r3d_18 32
torchvision fasterrcnn_mobilenet_v3_large_320_fpn 64 {'num_classes':3,'min_size':64,'max_size':64}
torchvision retinanet_resnet50_fpn 64 {'num_classes':3,'min_size':64,'max_size':64}
torchvision fcos_resnet50_fpn 64 {'num_classes':3,'min_size':64,'max_size':64}
torchvision ssdlite320_mobilenet_v3_large 320 {'num_classes':3}
ultralytics yolov8n 64 {'nc':4}
ultralytics yolo11n 64 {'nc':4}
ultralytics yolo26n 64 {'nc':4}
ultralytics yolov8n-seg 64 {'nc':4}
"""  # noqa: E501

VIT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
       "intermediate_size": 96, "image_size": 64, "patch_size": 16}  # fmt: skip
_SHORT = {
    "VIT": VIT,
    "SWIN": {"image_size": 64, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8],
             "window_size": 4, "patch_size": 4},
    "SEGFORMER": {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64],
                  "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 48},
    "STAGES": {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]},
    "MOBILEVIT": {"image_size": 64, "hidden_sizes": [24, 32, 40], "num_attention_heads": 4,
                  "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96], "aspp_out_channels": 32},
    "DETR": {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
             "backbone_config": {"model_type": "resnet", "embedding_size": 16,
                                 "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1],
                                 "out_features": ["stage4"]},
             "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 5,
             "encoder_attention_heads": 3, "decoder_attention_heads": 3,
             "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
}  # fmt: skip


def arguments(text: str) -> dict[str, Any]:
    """Return keyword arguments: a dictionary, the name of one, or one that adds to a named one."""
    name, _, more = text.partition("+")
    if name in _SHORT:
        return {**_SHORT[name], **(ast.literal_eval(more) if more else {})}
    return dict(ast.literal_eval(text.replace(":VIT", f":{VIT}"))) if text else {}


def parts(line: str) -> tuple[str, str, int, str]:
    """Return library, network, image size and arguments of a line of :data:`NETWORKS`."""
    library, name, size, *rest = line.split()
    return library, name, int(size), rest[0] if rest else ""


def build(library: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Return a network with random weights in evaluation mode."""
    module = importlib.import_module(library)
    if library == "torchvision":
        models = module.models
        if name in dir(models) and name[0].isupper():
            model = getattr(models, name)(**kwargs)
        else:
            model = models.get_model(name, weights=None, **_no_backbone(name), **kwargs)
    elif library == "transformers":
        kind = getattr(module, name)
        model = kind(kind.config_class(**kwargs))
    elif library == "ultralytics":
        tasks = importlib.import_module("ultralytics.nn.tasks")
        kind = tasks.SegmentationModel if name.endswith("-seg") else tasks.DetectionModel
        model = kind(f"{name}.yaml", verbose=False, **kwargs)
    else:
        model = getattr(module, name)(encoder_weights=None, **kwargs)
    _enliven(model)
    forward = forward_of(model)
    return (model if forward is None else with_forward(model, forward)).eval()


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Give layers weights that let their inputs through: many start so small that nothing does."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            nn.init.kaiming_normal_(module.weight)
    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() < 1e-4:
            parameter.normal_(0, 0.1)


def _no_backbone(name: str) -> dict[str, None]:
    has_one = ("fcn", "deeplab", "lraspp", "fasterrcnn", "retinanet", "fcos", "ssd")
    return {"weights_backbone": None} if name.startswith(has_one) else {}


def flops(model: nn.Module, x: Tensor) -> int:
    """Count the floating-point operations of one forward by torch's own counter, nothing added."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(x)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())


def masked_gap(model: nn.Module, groups: ChannelGroups, kept: Kept, x: Tensor) -> tuple[float, Any]:
    """Return how far masking and removing the same channels differ, and in which precision."""
    small = tpvprune.remove_channels(model, groups, kept)
    for dtype in _EXACT:
        dense, cut = (copy.deepcopy(m).to(dtype) for m in (model, small))
        try:
            with torch.no_grad():
                removed = cut(x.to(dtype))
                with MaskedChannels(groups, kept):
                    return relative_gap(removed, dense(x.to(dtype))), dtype
        except RuntimeError:
            if dtype is torch.float32:
                raise
    raise AssertionError


@torch.no_grad()
def variance(model: nn.Module, dense: nn.Module, x: Tensor) -> list[float]:
    """Return E|Δ|² of every output on images that nothing has seen."""
    pairs = zip(real_outputs(model(x)), real_outputs(dense(x)), strict=True)
    return [float((a - b).square().mean()) for a, b in pairs]


def trains(model: nn.Module, x: Tensor) -> bool:
    """Return whether a step of gradient descent in training mode leaves outputs finite."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    sum(t.square().mean() for t in real_outputs(model(x))).backward()
    moved = sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    optimizer.step()
    with torch.no_grad():
        return moved > 0 and all(bool(t.isfinite().all()) for t in real_outputs(model.eval()(x)))


def living(library: str, name: str, kwargs: dict[str, Any], x: Tensor) -> nn.Module:
    """Return a network with the first random weights under which every output varies with ``x``."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = tpvprune.unfuse_attention(build(library, name, kwargs))
        model = tpvprune.recalibrate_batchnorm(model, x.split(16))
        with torch.no_grad():
            if all(float(t.std(0).max()) > 0 for t in real_outputs(model(x[:4]))):
                return model
    raise ValueError("its outputs do not depend on its input under any of 8 seeds")


def survey(line: str, keep: float, num_images: int) -> Row:
    """Measure a network.

    Args:
        line: Of :data:`NETWORKS`.
        keep: The fraction of the MACs that stays.
        num_images: So many random images are what the network is pruned with.

    Returns:
        A row of the table, without the columns that name the network.
    """
    library, name, size, text = parts(line)
    shape = (3, 8, size, size) if name.startswith("r3d") else (3, size, size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_images, *shape, generator=generator)
    fresh = torch.randn(8, *shape, generator=generator)
    model = living(library, name, arguments(text), x)
    start = time.process_time()
    groups = tpvprune.find_groups(model, x[:2])
    found = time.process_time()
    row: Row = {
        "groups": len(groups),
        "blocked": len(groups.blocked),
        "reasons": _reasons(groups),
        "groups_seconds": round(found - start, 2),
    }
    result = tpvprune.prune(model, x.split(16), keep=keep)
    row["prune_seconds"] = round(time.process_time() - found, 2)
    small = result.model.eval()
    gap, dtype = masked_gap(model, groups, result.kept, fresh)
    removed = tpvprune.remove_channels(model, groups, result.kept)
    plain, repaired = variance(removed, model, fresh), variance(small, model, fresh)
    share = max((r / p for r, p in zip(repaired, plain, strict=True) if p > 0), default=0.0)
    report = result.report
    return row | {
        "macs_ratio": round(flops(small, fresh[:1]) / flops(model, fresh[:1]), 4),
        "reported_ratio": round(report["pruned"]["macs"] / report["dense"]["macs"], 4),
        "gap": f"{gap:.1e}",
        "effect": round(relative_gap(removed(fresh), model(fresh)), 4),
        "exact": gap < _EXACT[dtype],
        "repaired_share": round(share, 4),
        "reload": _reloads(result, model, fresh),
        "trains": trains(small, fresh),
        "export": exported(small, model, fresh[:2]),
        "warnings": " | ".join(result.warnings),
    }


def _reasons(groups: ChannelGroups) -> str:
    return " | ".join(sorted(f"{b.name} [{b.num_channels}]: {b.blocked}" for b in groups.blocked))


def _reloads(result: Any, dense: nn.Module, x: Tensor) -> bool:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tpvprune.save_pruned(result, Path(folder) / "pruned", dense=dense)
        loaded = tpvprune.load_pruned(Path(folder) / "pruned", model=dense)
        return equal(loaded(x), result.model(x))


def verdict(row: Row, keep: float) -> str:
    """Return "ok", or what is wrong with a row.

    Args:
        row: What :func:`survey` gives, or an error.
        keep: The budget.

    Returns:
        A few words.
    """
    if row.get("error"):
        return "failed"
    wrong = {
        "masked and removed differ": not row["exact"],
        "nothing to see": row["effect"] < 1e-3,
        "budget not reached": row["macs_ratio"] > keep + 0.01,
        "repair makes it worse": row["repaired_share"] > 1,
        "does not load back": not row["reload"],
        "does not train": not row["trains"],
        "does not export": not str(row["export"]).startswith(("True", "neither")),
    }
    return ", ".join(name for name, is_so in wrong.items() if is_so) or "ok"


def versions(library: str) -> str:
    """Return the versions that a row was measured with."""
    names = ("torch", library.replace("_", "-"))
    return ", ".join([*(f"{n} {version(n)}" for n in names), f"python {platform.python_version()}"])


def summary(rows: Sequence[Row]) -> str:
    """Return the table of what was measured, in Markdown."""
    head = ("network", "verdict", "MACs", "repaired / unrepaired", "groups", "blocked", "seconds")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for r in rows:
        cells = (r["network"], r["verdict"], r.get("macs_ratio"), r.get("repaired_share"),
                 r.get("groups"), r.get("blocked"), r.get("prune_seconds"))  # fmt: skip
        lines.append(f"| {' | '.join('' if c is None else str(c) for c in cells)} |")
    good = sum(r["verdict"] == "ok" for r in rows)
    return "\n".join([*lines, "", f"{good} of {len(rows)} networks: all as it should be."])


def main() -> None:
    """Measure what is missing in the table, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="comma-separated parts of names")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--num-images", type=int, default=_NUM_IMAGES)
    parser.add_argument("--limit", type=float, default=600, help="seconds a network")
    parser.add_argument("--fresh", action="store_true", help="run again what the table already has")
    parser.add_argument("--failed", action="store_true", help="run again what is not ok")
    add_output_file(parser, "networks.csv")
    args = parser.parse_args()
    rows = read_rows(args.output, "network")
    for line in NETWORKS.strip().splitlines():
        library, name, size, text = parts(line)
        known = name in rows and not (args.failed and rows[name]["verdict"] != "ok")
        if not any(part in name for part in args.only.split(",")) or (known and not args.fresh):
            continue
        row: Row = {"library": library, "network": name, "size": size, "kwargs": text,
                    "num_images": args.num_images}  # fmt: skip
        try:
            row["versions"] = versions(library)
            importlib.import_module(library)  # here, not in each process
        except PackageNotFoundError:
            print(f"{name}: {library} is not installed, left out", flush=True)
            continue
        row |= bounded(survey, args.limit, line, args.keep, args.num_images)
        row["verdict"] = verdict(row, args.keep)
        row.pop("exact", None)
        rows[name] = row
        write_rows(args.output, COLUMNS, sorted(rows.values(), key=lambda r: r["network"].lower()))
        said = "  ".join(f"{k} {v}" for k, v in row.items() if k in {"error", "macs_ratio", "gap"})
        print(f"{name:40s} {row['verdict']:20s} {said[:300]}", flush=True)
    print(summary(list(rows.values())))


if __name__ == "__main__":
    main()
