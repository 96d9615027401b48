"""The training loop: timm's optimizers, schedules and averages, resumable at every epoch."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import Tensor, nn

from tpvprune.disk.digest import digest_of
from tpvprune.disk.tensors import load_state, read_facts, save_state
from tpvprune.groups.shared_norms import shared_norms
from tpvprune.passes.batches import private_randomness
from tpvprune.passes.running import fast_layout
from tpvprune.processes.membership import is_first
from tpvprune.processes.shares import check_same, spread_weights, sum_gradients, total
from tpvprune.repairs.batchnorm import batchnorms, rebase_batchnorm
from tpvprune.repairs.duration import PARTS, Duration

Loss = Callable[[nn.Module, Any, tuple[int, int]], Tensor]
"""Of the model in training, a batch, and (view, position) that tell the batch apart.

Of several processes each sees its part of the batch; their losses add up to that of the batch.
"""

_REBASED = 16  # batches: enough for a mean and a variance
_SCHEDULES = ("cosine", "tanh", "poly")
_MOST = 1e30  # tensors of 32 bits hold no numbers above 3e38


@dataclass(frozen=True)
class Recipe:
    """How to train; every number that decides the result besides model and images.

    The fields are arguments of :func:`tpvprune.distill`.
    """

    epochs: int | None = None
    minutes: float | None = None
    lr: float = 0.01
    opt: str = "sgd"
    sched: str = "cosine"
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.2
    clip_grad: float | None = None
    ema_decay: float | None = None
    amp: torch.dtype | None = None
    freeze_batchnorm: bool = False
    num_views: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.minutes is None):
            found = "neither" if self.epochs is None else "both"
            raise ValueError(f"epochs: expected a number of epochs or of minutes, found {found}")
        parts = PARTS if self.epochs is None else self.epochs
        for name, fits, expected in (
            ("epochs", self.epochs is None or self.epochs >= 1, "at least 1"),
            ("minutes", self.minutes is None or 0 < self.minutes <= _MOST, "a number above 0"),
            ("lr", 0 < self.lr <= _MOST, "a number above 0, at most 1e30"),
            ("opt", _is_known(self.opt), "a name of timm.optim, of first order"),
            ("sched", self.sched in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
            ("weight_decay", 0 <= self.weight_decay <= _MOST, "at least 0, at most 1e30"),
            ("warmup_epochs", 0 <= self.warmup_epochs < parts, "0 to less than epochs"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "a number above 0"),
            ("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1"),
            ("amp", self.amp in (None, torch.bfloat16, torch.float16), "bfloat16 or float16"),
            ("num_views", self.num_views is None or self.num_views >= 1, "at least 1"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")


def _is_known(opt: str) -> bool:
    known = opt in timm.optim.list_optimizers()
    return known and not timm.optim.get_optimizer_info(opt).second_order


def train(
    student: nn.Module,
    epoch_batches: Callable[[int], Iterable[Any]],
    num_batches: int,
    loss_of: Loss,
    recipe: Recipe,
    *,
    state: str | Path | None = None,
    masks: Mapping[str, Tensor] | None = None,
    identity: Sequence[str | bytes | nn.Module] = (),
    progress: Callable[[str, int, int], None] | None = None,
    watch: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Train a copy of a model.

    Every epoch has its own random state, so a run that goes on from a saved state is the
    unbroken one, bit for bit, on one machine with the same number of threads. A run of so many
    minutes is never the same twice; one that goes on has what the other has left of them.

    ``epoch_batches``: seed -> the ``num_batches`` batches of one epoch. ``identity``: what decides
    the result besides model, recipe and masks; a state of another identity is refused.
    ``progress``: called with ("epoch 2/10", updates done, all updates); in a run of minutes with
    ("epoch 2", ten-thousandths of the time that are gone, 10000). The others, what is returned and
    the errors are those of :func:`tpvprune.distill`.
    """
    if num_batches < 1:
        raise ValueError("batches: expected at least one batch, found none: pass images")
    length = Duration(recipe.epochs, recipe.minutes, num_batches)
    path = None if state is None else Path(state)
    model = copy.deepcopy(student)
    model.zero_grad(set_to_none=True)
    device = _device_of(model, recipe)
    model.train()
    fixed = _fixed(model, masks or {})
    settings = _settings(recipe, *(entry for entry in identity if isinstance(entry, str)))
    given = (settings, str(num_batches), model, *identity, *fixed.values())
    own = "" if path is None else digest_of(*given).hex()
    goes_on = path is not None and path.exists()
    check_same("saved state", int(goes_on))
    spread_weights(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if not (goes_on or recipe.freeze_batchnorm):
            first = islice(epoch_batches(_seed_all(recipe.seed, 0, device)), _REBASED)
            rebase_batchnorm(model, (b[0] if isinstance(b, (tuple, list)) else b for b in first))
        if recipe.freeze_batchnorm:
            for norm in batchnorms(model):
                norm.eval()
        run = _Run(model, recipe, length, fixed)
        done = run.resume(path, own) if path is not None and goes_on else 0
        check_same("epochs done", done)
        with torch.enable_grad(), shared_norms():
            for epoch in count(done):
                if length.step(epoch * num_batches) is None:
                    break
                view = epoch % recipe.num_views if recipe.num_views else epoch
                batches = islice(epoch_batches(_seed_all(recipe.seed, view, device)), num_batches)
                title = f"epoch {epoch + 1}" + (f"/{recipe.epochs}" if recipe.epochs else "")
                losses = torch.zeros((), device=device)
                for loss, step in run.updates(batches, epoch * num_batches, view, loss_of):
                    losses += loss
                    if watch is not None:
                        watch(model)
                    if progress is not None:
                        progress(title, step + 1, length.total)
                _check_finite(total(float(losses)), title, recipe)
                if path is not None and is_first():
                    run.save(path, own, epoch + 1, settings)
    return _returned(run.result, student)


class _Run:
    """Model, optimizer, schedule, average and loss scale, which go together."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, length: Duration, masks: Mapping[str, Tensor]
    ) -> None:
        self.model, self.recipe, self.length = model, recipe, length
        self.masked = [(model.get_parameter(name), mask) for name, mask in masks.items()]
        self.optimizer = timm.optim.create_optimizer_v2(
            model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.schedule, _ = timm.scheduler.create_scheduler_v2(
            self.optimizer,
            sched=recipe.sched,
            num_epochs=length.epochs,
            warmup_epochs=recipe.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=recipe.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=length.updates_per_epoch,
        )
        self.average = None
        if recipe.ema_decay is not None:
            self.average = timm.utils.ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        # Disabled it passes everything through.
        self.scaler = torch.amp.GradScaler(enabled=recipe.amp == torch.float16)
        self.trained = [p for p in model.parameters() if p.requires_grad]

    @property
    def result(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    @property
    def modules(self) -> dict[str, nn.Module]:
        parts = {"model": self.model}
        return parts if self.average is None else {**parts, "average": self.average.module}

    def updates(
        self, batches: Iterable[Any], done: int, view: int, loss_of: Loss
    ) -> Iterator[tuple[Tensor, int]]:
        """Make the updates of an epoch for which there is time; yield loss and step of each."""
        for position, batch in enumerate(batches):
            if (step := self.length.step(done + position)) is None:
                return
            loss = loss_of(self.model, batch, (view, position))
            self.update(loss, done + position, step)
            yield loss.detach(), step

    def update(self, loss: Tensor, number: int, step: int) -> None:
        self.schedule.step_update(step)
        self.scaler.scale(loss).backward()
        sum_gradients(self.trained)
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, mask in self.masked:  # no optimizer can be trusted to leave zeros alone
                weight.mul_(mask)
        if self.average is not None:
            self.average.update(self.model, step=number + 1)

    def save(self, path: Path, identity: str, epochs: int, settings: str) -> None:
        facts = {"identity": identity, "epochs": epochs, "scaler": self.scaler.state_dict()}
        facts |= {"seconds": self.length.used, "settings": settings}
        save_state(path, self.modules, self.optimizer, facts)

    def resume(self, path: Path, identity: str) -> int:
        facts = read_facts(path)
        if facts.get("identity") != identity:
            raise ValueError(_of_another(path))
        load_state(path, self.modules, self.optimizer)
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.length.go_on(facts["seconds"])
        return int(facts["epochs"])


def identity_of(batches: Any) -> bytes:
    """Return what tells images and manner from others, where batches know it."""
    return bytes(getattr(batches, "identity", b""))


def check_state(path: Path, recipe: Recipe, *words: str) -> None:
    """Refuse the state of a run with other settings, before models and images are at hand.

    ``words``: the strings of the identity of the run.
    """
    settings = _settings(recipe, *words)
    if read_facts(path).get("settings", settings) != settings:
        raise ValueError(_of_another(path))


def _settings(recipe: Recipe, *words: str) -> str:
    # Minutes may differ: who goes on has used some.
    same = replace(recipe, minutes=None if recipe.minutes is None else 1.0)
    return "; ".join([repr(asdict(same)), *words])


def _of_another(path: Path) -> str:
    return (
        f"{path}: expected the state of this run, found one with other settings, weights or "
        "images: repeat its command, or remove it to start anew"
    )


def returned_by(model: nn.Module, inputs: Tensor, amp: torch.dtype | None) -> Any:
    """Run a model on images in its fast layout, in mixed precision if asked."""
    inputs = fast_layout(inputs, model)
    try:
        with torch.autocast(inputs.device.type, dtype=amp, enabled=amp is not None):
            return model(inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "batches: expected several values for the mean and variance of a BatchNorm, found one "
            "input on a map of one pixel: use larger batches, or freeze_batchnorm"
        ) from error


def count_batches(batches: Iterable[Any]) -> int:
    """Return the number of batches: their length, or that of a pass where they have none."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in private_randomness(batches))


def _fixed(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks on the device of their weights, which are zero where they are False."""
    weights = dict(model.named_parameters())
    fixed = {}
    for name, mask in masks.items():
        shape = tuple(weights[name].shape) if name in weights else None
        if shape != tuple(mask.shape):
            raise ValueError(
                f"masks: expected names and shapes of parameters, found {name!r} with "
                f"{tuple(mask.shape)} where the model has {shape or 'none'}"
            )
        fixed[name] = mask.to(weights[name].device)
        if bool(weights[name].detach().masked_fill(fixed[name], 0).count_nonzero()):
            raise ValueError(
                f"masks: expected zeros where they are False, found other weights in {name!r}: "
                "multiply by the mask first"
            )
    return fixed


def _device_of(model: nn.Module, recipe: Recipe) -> torch.device:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "expected a model with parameters to train, found none that requires a gradient: "
            "call model.requires_grad_()"
        )
    device = trained[0].device
    check_amp(recipe.amp, device)
    return device


def check_amp(amp: torch.dtype | None, device: torch.device) -> None:
    """Check that a device trains in this precision."""
    if amp == torch.float16 and device.type != "cuda":
        raise ValueError(f"amp: expected bfloat16 on {device.type}, found float16")


def _seed_all(seed: int, view: int, device: torch.device) -> int:
    mixed = random.Random(f"{seed}/{view}").getrandbits(32)
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(mixed)
    return mixed


def _check_finite(loss: float, title: str, recipe: Recipe) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"training: expected a finite loss, found {loss} in {title}: lower lr "
            f"({recipe.lr:g}) or set clip_grad"
        )


def _returned(model: nn.Module, student: nn.Module) -> nn.Module:
    for module, original in zip(model.modules(), student.modules(), strict=True):
        module.training = original.training
    model.zero_grad(set_to_none=True)
    return model
