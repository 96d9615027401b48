"""Training of a pruned model: `distill`, `finetune`, and `prune --repair distill`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tpvprune.cli.console import bar, counted, length_of, say, show_trained, updates
from tpvprune.cli.first_checks import NO_FILES
from tpvprune.cli.flag_groups import errors_by_flag
from tpvprune.cli.pruning_options import outputs_of
from tpvprune.cli.session import Outcome, Subject, known_weights, open_pruned, provenance
from tpvprune.cli.session_images import (
    Shown,
    check_classes,
    choose,
    labelled_images,
    open_data,
)
from tpvprune.cli.session_results import costs, measured, note_top1, shown_changes
from tpvprune.images.fitted import Fit, Fits, fitted_facts
from tpvprune.images.loading import in_memory
from tpvprune.images.sources import ImageSource
from tpvprune.images.training import training_images
from tpvprune.passes.difference import Reference
from tpvprune.passes.evaluation import Difference, difference, evaluate
from tpvprune.processes.shares import by_first
from tpvprune.repairs import guard
from tpvprune.repairs.distillation import check_loss, distill, said_of, teacher_of
from tpvprune.repairs.finetuning import LABELS, finetune
from tpvprune.repairs.interpolation import FRACTIONS, nearest_between
from tpvprune.repairs.training import Recipe, check_amp, check_state
from tpvprune.reports.report import read_report
from tpvprune.saved.checkpoint import read_config, save_pruned, saved_masks
from tpvprune.saved.downloads import local_folder

_MOST_HELD_BACK = 512
_EPOCHS = 10
# What a report of pruning says that training does not change.
_KEPT = (
    "criterion", "allocation", "granularity", "round_to", "keep", "of", "reached", "used_labels",
    "num_images", "groups", "branches", "blocked", "steps", "output_variance", "variance_share",
    "output_second_moment", "images_used", "timings",
)  # fmt: skip
# What a recipe calls as the flags do.
_AS_FLAGS = (
    "minutes", "lr", "opt", "sched", "weight_decay", "warmup_epochs", "clip_grad",
    "freeze_batchnorm", "seed",
)  # fmt: skip
_OTHER_FLAGS = {"ema_decay": "model_ema_decay", "amp": "amp_dtype"}


class Trained(NamedTuple):
    """A model, the facts and the verdict for the report, images held back, and what they found."""

    model: nn.Module
    facts: dict[str, Any]
    verdict: dict[str, Any]
    held: Iterable[Any]
    found: Difference


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return how the flags say to train; a ValueError tells what is out of range."""
    with errors_by_flag(**_OTHER_FLAGS):
        return Recipe(
            **{name: getattr(args, name) for name in _AS_FLAGS},
            epochs=None if args.minutes else args.epochs or _EPOCHS,
            ema_decay=args.model_ema_decay,
            amp=getattr(torch, args.amp_dtype) if args.amp else None,
            num_views=getattr(args, "num_views", None),
        )


def check_trainable(args: argparse.Namespace, subject: Subject, *, labelled: bool = False) -> None:
    """Check, before images are read, that a model can be trained as the flags say."""
    with errors_by_flag(**_OTHER_FLAGS):
        check_amp(recipe_of(args).amp, subject.device)
        if not labelled:
            check_loss(args.loss, subject.model)


def num_held_back(images: ImageSource) -> int:
    """Return how many images measure what training does and take no part in it."""
    if images.count is None:
        return _MOST_HELD_BACK
    if images.count < 3:
        raise ValueError(
            f"{images.name}: expected at least 3 images to train, found {images.count}"
        )
    return max(1, min(_MOST_HELD_BACK, images.count // 10))


def held_back_places(args: argparse.Namespace, fits: Fits) -> list[int]:
    """Return the places of images that no fit has seen, to be held back from training, too.

    Of a set of which nothing is known the last by the flags' seed, of a stream the next.
    """
    most = num_held_back(fits.images)
    found = fits.least_seen(most, seed=args.seed)
    if not fits.unseen(1, seed=args.seed):
        say(
            f"note: all images of {fits.images.name} took part in the cut or a training: those "
            "held back from this one look closer to the dense model than others do"
        )
    return found


class _Images(NamedTuple):
    """Batches to train on, how many images, what is done to each, and images held back."""

    batches: Any
    num: int | None
    augment: Any
    held: Any
    num_held: int


def trained(
    args: argparse.Namespace,
    subject: Subject,
    dense: nn.Module,
    images: ImageSource,
    *,
    num_images: int | None,
    held_back: Sequence[int],
    labelled: bool = False,
    scored: Any = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Trained:
    """Train a pruned model, and measure it before and after on images held back.

    ``held_back``: their places in the set; all others, or so many, are trained on. ``scored``:
    labelled batches, which only measure top-1, or None.
    """
    recipe, state = recipe_of(args), state_file(args.output)
    resumed = _goes_on(args, recipe, state, labelled=labelled)
    shown = _read(args, subject, images, num_images, held_back, labelled=labelled)
    top1 = _top1(args, subject.model, scored)
    start = monotonic()
    held = Shown(shown.held, "measuring")
    reference = Reference(teacher_of(dense, mirrored=not labelled and args.mirrored), held)
    before = reference.difference(subject.model)
    measured = 2 if labelled else len(FRACTIONS)
    during = _between(recipe, measured * (monotonic() - start), shown.num_held)
    with updates() as progress:
        how: dict[str, Any] = {
            "augment": shown.augment, "masks": masks, "state": state, "progress": progress,
        }  # fmt: skip
        if labelled:
            model = finetune(subject.model, shown.batches, recipe=during, **how)
        else:
            how |= dataclasses.asdict(during)
            how |= {k: getattr(args, k) for k in ("loss", "temperature", "mirrored")}
            model = distill(subject.model, dense, shown.batches, **how)
    if labelled:
        after = found = reference.difference(model)
        fraction = 1.0
    else:
        nearest = nearest_between(subject.model, model, reference, before)
        model, fraction = nearest.model, nearest.fraction
        found, after = nearest.found, nearest.end
    _check_finite(after, recipe, state)
    facts = {
        **_said_of(args, recipe, shown, labelled=labelled),
        # Of a run that was stopped in between, only the last part is known.
        "seconds": None if resumed else round(monotonic() - start, 1),
        "decided_by": "divergence" if reference.classifies and not labelled else None,
        "before": {**_measured(before), "top1": top1},
        "after": {**_measured(after if fraction == 0 else found), "top1": None},
        "fraction": fraction,
        "saved": "trained" if fraction else "start",
    }
    further = guard.further(before, found, decided_by="labels" if labelled else facts["decided_by"])
    if facts["mirrored"]:  # what was measured is how close it is to that teacher
        found = difference(model, dense, held)
    repair = "finetune" if labelled else "distill"
    verdict = {
        "repair": repair,
        "warnings": [*guard.warnings_of({repair: found}, repair, repair), *further],
        "held_back": guard.facts(found),
    }
    return Trained(model, facts, verdict, shown.held, found)


def _read(
    args: argparse.Namespace,
    subject: Subject,
    images: ImageSource,
    num_images: int | None,
    held_back: Sequence[int],
    *,
    labelled: bool,
) -> _Images:
    """Choose images to train on, and read those held back from it."""
    chosen = choose(args, subject, images, None, places=held_back)
    held = in_memory(chosen, progress=bar("reading images"))
    batches, augment = training_images(
        images,
        subject.preprocessing,
        num_images=num_images,
        apart=held_back,
        seed=args.seed,
        batch_size=args.batch_size or 128,
        workers=args.workers,
        labelled=labelled,
        mixed=_mixes(args, labelled=labelled),
        progress=bar("reading images"),
        notice=say,
    )
    num = num_images
    if hasattr(batches, "images"):  # without damaged ones
        num = len(batches.images)
    elif images.count is not None:
        rest = images.count - len(held_back)
        num = rest if num_images is None else min(num_images, rest)
    return _Images(batches, num, augment, held, len(held_back))


def _mixes(args: argparse.Namespace, *, labelled: bool) -> bool:
    return not (labelled or args.no_mix)


def _said_of(
    args: argparse.Namespace, recipe: Recipe, shown: _Images, *, labelled: bool
) -> dict[str, Any]:
    """Return what a report says of how a model was trained, and with what."""
    return {
        **dataclasses.asdict(recipe),
        "amp": str(recipe.amp).removeprefix("torch.") if recipe.amp else None,
        "loss": "cross-entropy" if labelled else args.loss,
        "temperature": args.temperature if not labelled and args.loss == "divergence" else None,
        "mirrored": not labelled and args.mirrored,
        "mixed": _mixes(args, labelled=labelled),
        "batch_size": shown.batches.batch_size,
        "num_images": shown.num,
        "num_held_back": shown.num_held,
        "used_labels": labelled,
    }


def _goes_on(args: argparse.Namespace, recipe: Recipe, state: Path, *, labelled: bool) -> bool:
    """Tell whether there is a state to go on from; that of other settings is a ValueError."""
    if not state.exists():
        return False
    words = LABELS
    if not labelled:
        words = said_of(args.loss, args.temperature, mirrored=args.mirrored)
    by_first(check_state, state, recipe, words)
    say(f"going on with the run in {state}")
    return True


def _top1(args: argparse.Namespace, model: nn.Module, scored: Any) -> float | None:
    if scored is None:
        return None
    return evaluate(model, Shown(scored, "top-1"), outputs=outputs_of(args)).top1


def _check_finite(found: Difference, recipe: Recipe, state: Path) -> None:
    if math.isfinite(found.output_variance):
        return
    by_first(state.unlink, missing_ok=True)
    raise ValueError(
        "training: expected finite outputs, found others after "
        f"{length_of(recipe.epochs, recipe.minutes)}: lower --lr ({recipe.lr:g}) or "
        f"--weight-decay ({recipe.weight_decay:g})"
    )


def _between(recipe: Recipe, measuring: float, held: int) -> Recipe:
    """Return the recipe for what measuring before and after, in seconds, leaves of the minutes."""
    if recipe.minutes is None:
        return recipe
    left = recipe.minutes - measuring / 60
    if by_first(lambda: left) <= 0:
        raise ValueError(
            f"--minutes: expected more than measuring on {counted(held, 'held-back image')} before "
            f"and after takes, about {measuring / 60:.2g}, found {recipe.minutes:g}"
        )
    return dataclasses.replace(recipe, minutes=left)


def state_file(output: Path, kind: str = "unfinished") -> Path:
    """Return where the state of an unfinished run lies: beside its output."""
    output = output.expanduser().resolve()
    return output.with_name(f"{output.name}.{kind}.safetensors")


def _run(args: argparse.Namespace, *, labelled: bool) -> Outcome:
    """Train a saved pruned model towards the dense one, or with labels."""
    recipe_of(args)
    args.folder = local_folder(args.folder)
    config, earlier = read_config(args.folder), read_report(args.folder)
    args.dense = args.dense or dense_weights(config, args.folder)
    subject, dense = open_pruned(args)
    assert dense is not None
    check_trainable(args, subject, labelled=labelled)
    images = open_data(args, labelled=labelled)
    if labelled:
        check_classes(images, subject, class_map=args.class_map)
    eval_images = labelled_images(args, subject, images)
    masks = saved_masks(args.folder)
    held_back = held_back_places(args, Fits.of_report(earlier, images))
    model, facts, verdict, seen, found = trained(
        args, subject, dense, images, num_images=args.num_images, held_back=held_back,
        labelled=labelled, scored=eval_images, masks=masks,
    )  # fmt: skip
    fit = Fit.beside(images, held_back, seed=args.seed, num=args.num_images)
    sides = measured(args, subject, (dense, model), eval_images)
    note_top1(facts, sides[1])
    document = {
        **{key: earlier.get(key) for key in _KEPT},
        **provenance(args, subject),
        "weights": config["provenance"].get("weights"),
        **verdict,
        "used_labels": labelled or bool(earlier.get("used_labels")),
        "training": facts,
        "dense": {
            **costs(dense, subject),
            **sides[0],
            "agreement": 1.0 if found.has_classes else None,
        },
        "pruned": {**costs(model, subject), **sides[1], **_closeness(found)},
        "images": {
            "source": images.name,
            "num_images": facts["num_images"],
            "agreement_on": counted(facts["num_held_back"], "held-back image"),
            "fitted": fitted_facts([fit], earlier),
        },
        "output": str(args.output),
    }
    shown = shown_changes(args, subject, model, dense, seen)
    by_first(
        save_pruned,
        model,
        args.output,
        overwrite=args.overwrite,
        dense=dense,
        origin=args.folder,
        masks=masks,
        provenance={"command": args.command_line, "seed": args.seed},
        report={**document, **shown, "scores": earlier.get("scores")},
    )
    by_first(state_file(args.output).unlink, missing_ok=True)
    show_trained(document)
    return 0, document


run_distill, run_finetune = partial(_run, labelled=False), partial(_run, labelled=True)


def _closeness(found: Difference) -> dict[str, float]:
    keys = ("output_variance", "variance_share", "agreement")
    return {key: guard.facts(found)[key] for key in keys}


def _measured(found: Difference) -> dict[str, float]:
    return {"divergence": found.divergence, **_closeness(found)}


def dense_weights(config: Mapping[str, Any], folder: str | Path) -> str:
    """Return the weights that a saved model was pruned from; ValueError if they are not there."""
    found = known_weights(config, folder)
    if found is not None:
        return found
    weights, digest = (config["provenance"].get(key) for key in ("weights", "weights_sha256"))
    if weights in NO_FILES:
        return str(weights)
    what = repr(weights)[:300]
    if isinstance(weights, str) and Path(weights).is_file():
        what += " without its SHA-256" if digest is None else " with another SHA-256"
    raise ValueError(
        f"{folder}: expected the weights that it was pruned from, found {what}: pass "
        "--dense with the dense model's checkpoint, or --dense pretrained or factory"
    )
