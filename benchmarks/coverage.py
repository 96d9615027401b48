"""Which of timm's model modules can be pruned to half of their MACs, with every cut verified.

    python benchmarks/coverage.py                       # every module, resumes where it stopped
    python benchmarks/coverage.py --family swin --fresh # modules whose name contains "swin"

The smallest model of each module, random weights; image size, depth or width are reduced where
the model has more than 30 M parameters (both are columns of the table). `reload`: what
`save_pruned` wrote `load_pruned` gives back, its outputs the same bit for bit. Each model runs in a
process of its own with a time limit, so that a crash or a hang is a row of the table.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from rows import add_output_file
from surveys import (
    bounded,
    equal,
    exported,
    read_rows,
    real_outputs,
    relative_gap,
    write_rows,
)
from torch import Tensor, nn

import tpvprune
from tpvprune.groups import ChannelGroups, find_groups
from tpvprune.groups.masking import MaskedChannels
from tpvprune.groups.removal import remove_channels, restore_empty

COLUMNS = [
    "family", "model", "model_kwargs", "img_size", "params_m", "groups", "blocked", "reasons",
    "macs_ratio", "smallest_ratio", "verified", "gap", "reload", "export", "seconds", "error",
    "versions",
]  # fmt: skip

# family, model, image size, keyword arguments (only what shrinks a model of more than 30 M
# parameters, or what a class needs to take the small image)
MODELS = """
beit beit_base_patch16_224 64 {'depth':4,'embed_dim':192,'num_heads':3,'img_size':64}
byoanet halonet_h1 256
byoanet eca_botnext26ts_256 256
byoanet lambda_resnet26t 128
byobnet test_byobnet 64
cait cait_xxs24_224 64 {'img_size':64}
coat coat_lite_tiny 224
coat coat_tiny 224
convit convit_tiny 224
convmixer convmixer_768_32 64
convnext test_convnext 64
convnext convnextv2_atto 64
cpubone cpubone_nano 64
crossvit crossvit_tiny_240 240
csatv2 csatv2 64
cspnet cs3darknet_focus_s 64
cspnet cspresnet50 64
cspnext cspnext_tiny 64
davit davit_tiny 64
deepseek_vit deepseek_vit_412m 126 {'embed_dim':192,'depth':2,'num_heads':3}
deit deit_tiny_patch16_224 64 {'img_size':64}
deit deit_tiny_distilled_patch16_224 64 {'img_size':64}
densenet densenet121 64
densenet densenetblur121d 64
dla dla46x_c 64
dla dla60_res2next 64
dpn dpn48b 64
edgenext edgenext_xx_small 64
efficientformer efficientformer_l1 224
efficientformer_v2 efficientformerv2_s0 224
efficientnet test_efficientnet 64
efficientnet test_efficientnet_evos 64
efficientnet test_efficientnet_gn 64
efficientnet mixnet_s 64
efficientvim efficientvim_m1 64
efficientvit_mit efficientvit_b0 64
efficientvit_msra efficientvit_m0 224
eva eva02_tiny_patch14_224 56 {'img_size':56}
eva vit_tiny_patch16_dinov3_qkvb 64 {'img_size':64}
fasternet fasternet_t0 64
fastvit fastvit_t8 64
fastvit fastvit_sa12 64
focalnet focalnet_tiny_srf 64
gcvit gcvit_xxtiny 224
gemma4_vit gemma4_vit_167m 96 {'embed_dim':192,'depth':2,'num_heads':3}
ghostnet ghostnet_050 64
ghostnet ghostnetv3_050 64
hardcorenas hardcorenas_a 64
hgnet hgnetv2_b0 64
hiera hiera_tiny_224 224
hieradet_sam2 hieradet_small 224
hrnet hrnet_w18_small 64
iformer iformer_t 64
inception_next inception_next_atto 64
inception_resnet_v2 inception_resnet_v2 128
inception_v3 inception_v3 128
inception_v4 inception_v4 128
lcnetv2 lcnetv2_small 64
levit levit_128s 224
lowformer lowformer_b0 64
mambaout test_mambaout 64
maxxvit test_coatnet 160
maxxvit test_maxvit 160
metaformer poolformerv2_s12 64
metaformer caformer_s18 64
mlp_mixer gmlp_ti16_224 224
mlp_mixer resmlp_12_224 224
mobilenetv3 mobilenetv3_small_050 64
mobilenetv3 mobilenetv4_hybrid_medium 64
mobilenetv5 mobilenetv5_base 128
mobilevit mobilevit_xxs 64
mobilevit mobilevitv2_050 64
mvitv2 mvitv2_tiny 224
naflexvit naflexvit_base_patch16_gap 64 {'embed_dim':192,'depth':2,'num_heads':3}
nasnet nasnetalarge 64
nest nest_tiny 224
nextvit nextvit_small 64
nfnet test_nfnet 64
nfnet nf_regnet_b0 64
pit pit_ti_224 224
pnasnet pnasnet5large 64
pvt_v2 pvt_v2_b0 64
pvt_v2 pvt_v2_b2_li 64
qwen3_vit qwen3_vit_88m 64 {'embed_dim':192,'depth':2,'num_heads':3}
rdnet rdnet_tiny 64
regnet regnetx_002 64
repghost repghostnet_050 64
repvit repvit_m1 64
res2net res2next50 64
resnest resnest14d 64
resnet resnet10t 64
resnet ecaresnet26t 64
resnetv2 resnetv2_18 64
rexnet rexnet_100 64
selecsls selecsls42 64
senet legacy_seresnet18 64
sequencer sequencer2d_s 224
shvit shvit_s1 64
sknet skresnet18 64
starnet starnet_s050 64
swiftformer swiftformer_xs 224
swin_transformer swin_tiny_patch4_window7_224 224
swin_transformer_v2 swinv2_tiny_window8_256 256
swin_transformer_v2_cr swinv2_cr_tiny_224 224
tiny_vit tiny_vit_5m_224 64
tnt tnt_s_legacy_patch16_224 224
tresnet tresnet_m 64
twins twins_pcpvt_small 224
twins twins_svt_small 224
vgg vgg11 64 {'mlp_ratio':0.125}
visformer visformer_tiny 224
vision_transformer test_vit 64 {'img_size':64}
vision_transformer test_vit3 64 {'img_size':64}
vision_transformer_hybrid vit_tiny_r_s16_p8_224 64 {'img_size':64}
vision_transformer_relpos test_vit_relpos 64 {'img_size':64}
vision_transformer_sam samvit_base_patch16_224 224 {'embed_dim':192,'depth':4,'num_heads':3,'global_attn_indexes':(1,3)}
vitamin vitamin_small_224 224
volo volo_d1_224 224
vovnet ese_vovnet19b_slim_dw 64
xception legacy_xception 64
xception_aligned xception41p 64
xcit xcit_nano_12_p16_224 64
"""  # noqa: E501


def uniform(groups: ChannelGroups, keep: float) -> tuple[dict[str, Tensor], float]:
    """Keep the first channels of every group, the same fraction of each, within the budget."""

    def at(fraction: float) -> dict[str, Tensor]:
        kept = {
            g.name: torch.arange(g.num_channels) < max(1, round(fraction * g.num_channels))
            for g in groups
        }
        return restore_empty(groups, kept)

    low, high, dense = 0.0, 1.0, groups.macs()
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if groups.macs(at(middle)) <= keep * dense else (low, middle)
    return at(low), groups.macs(at(0.0)) / dense


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs).eval()


def saved_and_loaded(small: nn.Module, name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Return a pruned model as its folder gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = tpvprune.save_pruned(
            small, Path(folder) / "pruned", model_name=name,
            model_kwargs={"num_classes": 10, **kwargs},
        )  # fmt: skip
        return tpvprune.load_pruned(path)


def survey(
    name: str, size: int, kwargs: dict[str, Any], keep: float, export: bool
) -> dict[str, Any]:
    """Return one row of the table."""
    model = build(name, kwargs)
    x = torch.randn(1, 3, size, size)
    start = time.perf_counter()
    groups = find_groups(model, x)
    seconds = time.perf_counter() - start
    kept, smallest = uniform(groups, keep)
    small = remove_channels(model, groups, kept)
    with torch.no_grad():
        with MaskedChannels(groups, kept):
            masked = copy.deepcopy(model).double()(x.double())
        removed = copy.deepcopy(small).double()(x.double())
        gap = relative_gap(removed, masked)
        plain, reloaded = small(x), saved_and_loaded(small, name, kwargs)(x)
    small.train()
    sum(t.sum() for t in real_outputs(small(torch.cat([x, -x])))).backward()
    row = {
        "params_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "groups": len(groups),
        "blocked": len(groups.blocked),
        "reasons": " | ".join(
            sorted({f"{b.name} [{b.num_channels}]: {b.blocked}" for b in groups.blocked})
        ),
        "macs_ratio": round(groups.macs(kept) / groups.macs(), 4),
        "smallest_ratio": round(smallest, 4),
        "verified": gap < 1e-10,
        "gap": f"{gap:.1e}",
        "reload": equal(reloaded, plain),
        "seconds": round(seconds, 2),
    }
    if export:
        row["export"] = exported(copy.deepcopy(small).eval(), model, x)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--family", default="", help="comma-separated parts of module names")
    parser.add_argument("--models", default="", help="comma-separated model names")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--limit", type=float, default=120, help="seconds a model")
    parser.add_argument(
        "--export", action="store_true", help="also run torch.export on the pruned model"
    )
    parser.add_argument("--fresh", action="store_true", help="run again what the table already has")
    add_output_file(parser, "coverage.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = (
        f"torch {torch.__version__}, timm {timm.__version__}, python {platform.python_version()}"
    )
    rows = read_rows(args.output, "model")
    for line in MODELS.strip().splitlines():
        family, name, size, *rest = line.split()
        kwargs = ast.literal_eval(rest[0]) if rest else {}
        wanted = any(f in family for f in args.family.split(",")) and (
            not args.models or name in args.models.split(",")
        )
        known = name in rows and (rows[name]["export"] or not args.export)
        if not wanted or (known and not args.fresh):
            continue
        row = bounded(survey, args.limit, name, int(size), kwargs, args.keep, args.export)
        rows[name] = {"family": family, "model": name, "model_kwargs": rest[0] if rest else "",
                      "img_size": size, "versions": versions, **row}  # fmt: skip
        ordered = sorted(rows.values(), key=lambda r: (r["family"], r["model"]))
        write_rows(args.output, COLUMNS, ordered)
        said = "  ".join(f"{k} {v}" for k, v in row.items() if k != "reasons")
        print(f"{family:24s} {name:32s} {said[:200]}", flush=True)
    done = list(rows.values())
    verified = [r for r in done if str(r.get("verified")) == "True"]
    good = {r["family"] for r in verified if float(r["macs_ratio"]) <= 0.55}
    families = {r["family"] for r in done}
    print(f"{len(good)} of {len(families)} modules reach MACs <= 0.55 with verified cuts")
    print(f"others: {sorted(families - good)}")


if __name__ == "__main__":
    main()
