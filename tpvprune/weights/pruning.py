"""Weight removal as one call: scores -> masks -> repair -> proof."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from tpvprune.groups import folded_if_equal
from tpvprune.passes.clock import Clock, Progress
from tpvprune.passes.costs import count_macs, count_nonzero_params, count_params
from tpvprune.passes.drawing import NUM_IMAGES, hold_back
from tpvprune.passes.evaluation import Reference
from tpvprune.passes.outputs import Chosen, Outputs
from tpvprune.passes.running import on_device
from tpvprune.repairs.guard import facts, warnings_of
from tpvprune.repairs.targets import blind_layers
from tpvprune.weights.choice import joint_weight_masks
from tpvprune.weights.masks import density, pattern_of, select_n_of_m, select_weights
from tpvprune.weights.repair import apply_masks, compensate_masked
from tpvprune.weights.scores import WEIGHT_SCORERS, WeightScores

WeightRepair = Literal["none", "compensate"]
WeightScope = Literal["joint", "global", "layer", "row"]
_SCOPES: Mapping[str, WeightScope] = {"tpv": "joint", "magnitude": "global", "wanda": "row"}
_UNFIT = {("joint", "magnitude"), ("joint", "wanda")}


@dataclass(frozen=True)
class WeightPruningResult:
    """What :func:`prune_weights` returns; ``masks`` are True where a weight stays.

    The shapes of ``model`` are the dense ones, its removed weights are zero. ``report`` is plain
    data.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    scores: WeightScores
    report: dict[str, Any]


def prune_weights(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_images: int | None = NUM_IMAGES,
    keep: float = 0.5,
    pattern: str | None = None,
    criterion: str = "tpv",
    scope: WeightScope | None = None,
    repair: WeightRepair = "compensate",
    num_probes: int = 1,
    ignore: Iterable[str] = (),
    outputs: Chosen | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> WeightPruningResult:
    """Set weights of convolutions and linear layers to zero, and refit the others, without labels.

    Args:
        model: Any vision model; untouched.
        batches: Re-iterable of unlabeled inputs.
        num_images: So many are drawn (None: all), as by :func:`tpvprune.prune`; a random tenth of
            them, at most 128, measures the result.
        keep: Fraction of these weights that stays, in (0, 1]; a pattern sets its own.
        pattern: ``"2:4"``: of every 4 neighbours along the input channels 2 stay; None: any.
        criterion: ``"tpv"``, ``"magnitude"`` or ``"wanda"``.
        scope: What is ranked together: ``"joint"`` (``"tpv"`` only, its default) what leaves a
            layer as a whole (:func:`tpvprune.weights.choice.joint_weight_masks`); ``"global"`` all
            weights one by one, ``"layer"`` those of a layer, ``"row"`` those of one output. The
            default of ``"magnitude"`` is global, that of ``"wanda"`` row. With a pattern all but
            ``"joint"`` are the same.
        repair: ``"compensate"`` refits what stays, ``"none"`` does not.
        num_probes: Random output directions per input (``"tpv"``).
        ignore: Layers that stay whole.
        outputs: See :func:`tpvprune.prune`.
        seed: Of everything random.
        progress: Called with (stage, done, total).

    Returns:
        The result; ``report`` has weights, agreement and output variance before and after, and
        how many weights of each layer stay.

    Raises:
        ValueError: If an argument is out of range.
    """
    if criterion not in WEIGHT_SCORERS:
        known = ", ".join(WEIGHT_SCORERS)
        raise ValueError(
            f"criterion: expected one of {known} for single weights, found {criterion!r}."
        )
    if repair not in get_args(WeightRepair):
        raise ValueError(
            f"repair: expected 'none' or 'compensate' for single weights, found {repair!r}."
        )
    if scope is not None and (scope not in get_args(WeightScope) or (scope, criterion) in _UNFIT):
        known = "'global', 'layer' or 'row', or 'joint' with criterion 'tpv'"
        raise ValueError(f"scope: expected {known}, found {scope!r} with {criterion!r}.")
    if pattern is not None:
        pattern_of(pattern)
    fit, held = hold_back(batches, num_images=num_images, seed=seed)
    clock = Clock(progress)
    model, said_of_folded = folded_if_equal(model, on_device(fit[0][:1], model))
    scope = scope or _SCOPES[criterion]
    blind = blind_layers(model, fit[0][:1])
    ignore = [*ignore, *blind]
    counted = Outputs.measured(model, fit, outputs)
    with clock("scores"):
        if scope == "joint":
            masks, scores = joint_weight_masks(
                model, fit,
                keep=keep, pattern=pattern, num_probes=num_probes, ignore=ignore, seed=seed,
                outputs=counted,
            )  # fmt: skip
        else:
            options = {"num_probes": num_probes, "outputs": counted} if criterion == "tpv" else {}
            score = WEIGHT_SCORERS[criterion]
            scores = score(model, fit, ignore=ignore, seed=seed, **options)
            masks = (
                select_weights(scores, keep=keep, scope=scope)
                if pattern is None
                else select_n_of_m(scores, pattern=pattern)
            )
    masked = apply_masks(model, masks)
    pruned = masked
    if repair == "compensate":
        with clock("compensation"):
            pruned = compensate_masked(model, fit, masks, seed=seed)
    models = {"none": masked, repair: pruned}
    with clock("measurement"):
        dense = Reference(model, held, counted)
        measured = {name: dense.difference(found) for name, found in models.items()}
    name = repair if repair == "none" else "weights"
    more = "a larger keep" if pattern is None else "a pattern that keeps more"
    report = {
        "granularity": pattern or "weight",
        "keep": keep if pattern is None else density(masks),
        "of": "weights",
        "criterion": criterion,
        "scope": "neighbours" if pattern is not None and scope != "joint" else scope,
        "used_labels": False,
        "repair": repair,
        "repair_chosen": repair,
        "seed": seed,
        "num_images": sum(map(len, fit)),
        "num_held_back": sum(map(len, held)),
        "reached": pattern is not None or _is_reached(masks, keep, scope),
        "warnings": [
            *warnings_of({name: measured[repair]}, name, name, keep=more),
            *counted.said(),
            *said_of_folded,
        ],
        "held_back": facts(measured[repair]),
        "output_variance": {n: m.output_variance for n, m in measured.items()},
        "variance_share": {n: m.share for n, m in measured.items()},
        "agreement": facts(measured[repair])["agreement"],
        "layers": [
            {"name": n.removesuffix(".weight"), "num_weights": m.numel(), "kept": int(m.sum())}
            for n, m in masks.items()
        ],
        "timings": clock.seconds,
        "blocked": [
            {"name": n, "num_channels": m.numel(), "reason": f"inputs do not divide into {pattern}"}
            for n, m in masks.items()
            if bool(m.all()) and pattern is not None
        ]
        + [
            {"name": n, "num_channels": model.get_parameter(n).numel(), "reason": "sees no image"}
            for n in (f"{layer}.weight" for layer in blind)
        ],
        **_costs(model, pruned, masks, fit[0]),
    }
    return WeightPruningResult(pruned, masks, scores, report)


def _costs(
    model: nn.Module, pruned: nn.Module, masks: Mapping[str, Tensor], x: Tensor
) -> dict[str, Any]:
    """Return dense and pruned costs; MACs count zeros too, as dense arithmetic does."""
    macs = count_macs(model, on_device(x[:1], model))
    left = sum(int(m.sum()) for m in masks.values())

    def costs(of: nn.Module, weights: int) -> dict[str, int]:
        params, nonzero = count_params(of), count_nonzero_params(of)
        return {"macs": macs, "params": params, "nonzero_params": nonzero, "weights": weights}

    return {"dense": costs(model, _total(masks)), "pruned": costs(pruned, left)}


def _is_reached(masks: Mapping[str, Tensor], keep: float, scope: str) -> bool:
    """Tell whether no more stay than asked for: of each part that is ranked, to the next weight."""
    parts = {"row": sum(map(len, masks.values())), "layer": len(masks)}.get(scope, 2)
    kept = sum(int(m.sum()) for m in masks.values())
    return kept <= keep * _total(masks) + parts / 2


def _total(masks: Mapping[str, Tensor]) -> int:
    return sum(m.numel() for m in masks.values())
