"""Repair 3: the dense model teaches the pruned one on unlabeled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.passes.batches import unlabeled
from tpvprune.passes.difference import Reference, has_classes
from tpvprune.passes.moments import in_single
from tpvprune.passes.outputs import Outputs
from tpvprune.passes.running import evaluating, first_output, on_device
from tpvprune.processes.shares import part_of, summed
from tpvprune.repairs.interpolation import nearest_between
from tpvprune.repairs.training import Recipe, count_batches, identity_of, returned_by, train

DistillationLoss = Literal["logits", "divergence"]
# Brings the relative error's gradients to where learning rates of 0.001 to 0.01 are right.
_GAIN = 50.0
_FAR = 0.2  # relative error beyond which gradients do not grow: they are those of its logarithm


def distill(
    student: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int | None = None,
    minutes: float | None = None,
    lr: float = 1e-3,
    loss: DistillationLoss = "logits",
    temperature: float = 3.0,
    mirrored: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    num_views: int | None = None,
    opt: str = "sgd",
    sched: str = "cosine",
    weight_decay: float = 1e-4,
    warmup_epochs: float = 0.2,
    clip_grad: float | None = 1.0,
    ema_decay: float | None = None,
    amp: torch.dtype | None = None,
    freeze_batchnorm: bool = False,
    masks: Mapping[str, Tensor] | None = None,
    held_back: Iterable[Any] | None = None,
    seed: int = 0,
    state: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    watch: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Train a copy of the pruned model to give the outputs of the dense one.

    Both see the same augmented inputs; no label is read. The loss is the relative squared error
    of the outputs (``feature_error``, times 50; beyond 0.2 its logarithm): the output variance,
    as in compensation before; or, for classifiers, the divergence of their classes at a
    temperature (``divergence``). Before the first update the statistics of BatchNorm are brought
    up to date without changing the function (``batchnorm.rebase_batchnorm``).
    A high learning rate throws away what compensation has won: networks with BatchNorm and many
    images to learn from bear 0.01. Gradients are clipped because this loss, unlike cross-entropy,
    can have very large ones.
    Images of which the dense model is sure teach little: ``augmentation.mix`` helps.

    Args:
        student: The pruned model; left as it is.
        dense: The model it came from; left as it is.
        batches: Re-iterable of inputs [B, ...], such as ``HeldImages`` or a shuffling loader;
            labels are dropped unread.
        epochs: Passes over them; or None and minutes.
        minutes: Wall time in their place, decoding included: rise and way down of the learning
            rate are laid out over it, whatever an update costs. At least one update is made.
        lr: Peak learning rate.
        loss: ``"logits"``, the outputs whatever they are, or ``"divergence"`` of the classes, which
            a model without a classifier (``num_classes`` 0) does not have.
        temperature: T of the softmax in the divergence, > 0.
        mirrored: Teach the mean of the dense model's outputs on an input [B, C, H, W] and on its
            mirror image, which is the better teacher where left and right mean nothing (photos,
            not writing): outputs [B, K] only, at twice the time of the dense model.
        augment: Inputs [B, ...] -> inputs of any one shape, by torch's global random state,
            which is a private one meanwhile.
        num_views: Let order and augmentation repeat after so many epochs, so that the dense
            model runs only in these; its outputs are held in memory. None: never.
        opt: Name of a timm optimizer.
        sched: timm's name of the way down to 0: cosine, tanh or poly.
        weight_decay: Of weights; biases and norms have none.
        warmup_epochs: Linear rise to the peak rate, may be a fraction; of minutes, in tenths of
            them.
        clip_grad: Largest norm of the gradient; None for any.
        ema_decay: Return the moving average of the weights instead of the last; None for no.
        amp: ``torch.bfloat16``, or ``torch.float16`` on CUDA, for mixed precision.
        freeze_batchnorm: Keep the running statistics of BatchNorm and normalise by them.
        masks: Parameter name -> BoolTensor of its shape, as ``prune_weights`` returns them; where
            False the weight stays zero.
        held_back: Re-iterable of inputs [B, ...] that are not in ``batches``: of five points
            between the student and what training made of it, both included, that is returned which
            is closest to the dense model on these (:mod:`tpvprune.repairs.interpolation`), after
            and besides the epochs or minutes. None: what training made of it, be it worse.
        seed: Of everything random.
        state: File for the state of the unfinished run, written after every epoch; if it is
            there the run goes on from it, to the same result; in a run of minutes for what is
            left of them. Delete it when all is done.
        progress: Called with (stage, updates done, all updates); of minutes, with parts of them.
        watch: Called with the student after every update, to look at it only, such as
            ``diagnostics.Trajectory``; of a run that goes on it sees the rest.

    Returns:
        The trained copy, in the modes of the argument.

    Raises:
        ValueError: If an argument is out of range, the outputs of the two have unequal
            shapes, the masks are not the student's, the state is another run's, or the loss is
            not finite.

    Reference:
        Hinton, Vinyals, Dean, Distilling the knowledge in a neural network, 2015, section 2,
        https://arxiv.org/abs/1503.02531
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number above 0, found {temperature}")
    check_loss(loss, dense)
    recipe = Recipe(
        epochs=epochs, minutes=minutes, lr=lr, opt=opt, sched=sched, weight_decay=weight_decay,
        warmup_epochs=warmup_epochs, clip_grad=clip_grad, ema_decay=ema_decay, amp=amp,
        freeze_batchnorm=freeze_batchnorm, num_views=num_views, seed=seed,
    )  # fmt: skip
    like = next(student.parameters())
    source = unlabeled(batches)

    def epoch_batches(seed: int) -> Iterator[Tensor]:
        for inputs in unlabeled(source, device=like.device, dtype=like.dtype, seed=seed):
            yield inputs if augment is None else augment(inputs)

    teacher = teacher_of(dense, mirrored=mirrored)
    loss_of = _Difference(teacher, recipe, temperature if loss == "divergence" else None)
    with evaluating(dense):
        trained = train(
            student, epoch_batches, count_batches(source), loss_of, recipe,
            state=state, masks=masks, progress=progress, watch=watch,
            identity=(said_of(loss, temperature, mirrored=mirrored), dense, identity_of(batches)),
        )  # fmt: skip
    if held_back is None:
        return trained
    return nearest_between(student, trained, Reference(teacher, held_back)).model


def check_loss(loss: str, dense: nn.Module) -> None:
    """Check that a dense model can be taught by this loss; a ValueError says why not."""
    if loss not in get_args(DistillationLoss):
        known = " or ".join(get_args(DistillationLoss))
        raise ValueError(f"loss: expected {known}, found {loss!r}")
    if loss == "divergence" and not has_classes(dense):
        raise ValueError(
            "loss: expected logits for a model without classes (num_classes 0), whose features are "
            "taught, found 'divergence', which is one of classes"
        )


def said_of(loss: str, temperature: float, *, mirrored: bool) -> str:
    """Return what decides a distillation besides models, recipe and images, as one line."""
    return f"loss {loss}, temperature {temperature}, mirrored {mirrored}"


def teacher_of(dense: nn.Module, *, mirrored: bool) -> nn.Module:
    """Return the model whose outputs a student learns; ``mirrored``: see :func:`distill`."""
    return _Mirrored(dense) if mirrored else dense


def divergence(outputs: Tensor, dense_outputs: Tensor, *, temperature: float) -> Tensor:
    """Compute T² KL(softmax(dense / T) ‖ softmax(outputs / T)) of logits [B, K, ...].

    Returns the mean over inputs, in nats times T², which makes gradients alike for all T.
    """
    given, wanted = (F.log_softmax(x / temperature, 1) for x in (outputs, dense_outputs))
    apart = F.kl_div(given, wanted, reduction="none", log_target=True).sum(1)
    return apart.mean() * temperature**2


def feature_error(outputs: Tensor, dense_outputs: Tensor) -> Tensor:
    """Compute ‖outputs − dense‖² / ‖dense‖², of the whole batch [B, ...].

    It has no unit, so that one learning rate suits features of any size.
    """
    square = dense_outputs.square().sum()
    smallest = torch.finfo(square.dtype).tiny
    return (outputs - dense_outputs).square().sum() / square.clamp_min(smallest)


class _Mirrored(nn.Module):
    """The mean of a model's outputs on inputs and on their mirror images."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.num_classes = getattr(dense, "num_classes", None)

    def forward(self, x: Tensor) -> Tensor:
        returned = self.dense(x)
        outputs = first_output(returned)
        several = len(Outputs.among(returned, len(x)).scales) > 1
        if x.ndim != 4 or outputs.ndim != 2 or several:
            raise ValueError(
                "mirrored: expected inputs [B, C, H, W] and outputs [B, K], found "
                f"{tuple(x.shape)} and {'several' if several else tuple(outputs.shape)}: distil "
                "without it"
            )
        return (outputs + first_output(self.dense(x.flip(-1)))) / 2


class _Difference:
    """The loss of one batch; the dense model's outputs are held where views repeat."""

    def __init__(self, dense: nn.Module, recipe: Recipe, temperature: float | None) -> None:
        self._dense, self._recipe, self._temperature = dense, recipe, temperature
        self._counted: Outputs | None = None
        self._held: dict[tuple[int, int], list[Tensor]] = {}

    def __call__(self, model: nn.Module, inputs: Tensor, which: tuple[int, int]) -> Tensor:
        wanted = self._wanted(inputs, which)
        outputs = self._chosen(returned_by(model, inputs, self._recipe.amp))
        losses = map(self._loss, outputs, wanted, range(len(wanted)))
        return sum(losses, outputs[0].new_zeros(()))

    def _loss(self, outputs: Tensor, wanted: Tensor, number: int) -> Tensor:
        """Return the loss of one output: only the first is logits."""
        if outputs.shape != wanted.shape:
            raise ValueError(
                f"expected outputs of the dense model's shape {tuple(wanted.shape)}, found "
                f"{tuple(outputs.shape)}: distil between models with the same head"
            )
        if self._temperature is None or number:
            error = feature_error(outputs, wanted) * part_of(wanted.square().sum())
            (whole,) = summed(error.detach().double())
            far = torch.full_like(whole, _FAR)
            return _GAIN * error * (far / whole.maximum(far)).to(error)  # no wait for the GPU
        return divergence(outputs, wanted, temperature=self._temperature) * part_of(len(wanted))

    @torch.no_grad()
    def _wanted(self, inputs: Tensor, which: tuple[int, int]) -> list[Tensor]:
        if which in self._held:
            return self._held[which]
        moved = on_device(inputs, self._dense)
        returned = returned_by(self._dense, moved, self._recipe.amp)
        self._counted = self._counted or Outputs.among(returned, len(moved))
        wanted = [w.to(inputs.device) for w in self._chosen(returned)]
        if self._recipe.num_views is not None:
            self._held[which] = wanted
        return wanted

    def _chosen(self, returned: Any) -> list[Tensor]:
        assert self._counted is not None
        return list(map(in_single, self._counted.of(returned).values()))
