"""The measures of an audit: what each is called, needs and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

from tpvprune.diagnostics.measures import (
    Labelled,
    Measurement,
    l2_norm,
    own_predictions,
    pac_bayes_origin,
    path_norm,
    sharpness,
    summed,
)
from tpvprune.diagnostics.normalized_loss import normalized_loss
from tpvprune.diagnostics.trajectory import input_lipschitz
from tpvprune.diagnostics.volume import local_volume
from tpvprune.groups import ChannelGroups
from tpvprune.passes.batches import unlabeled
from tpvprune.scores.tpv import Scores, tpv_scores

_FEW, _FEWER = 1 / 4, 1 / 16  # of the images, for measures of many passes


@dataclass(frozen=True)
class Setting:
    """What is measured, as :func:`setting_of` puts it together.

    ``labelled`` holds labels, or the model's own classes in their place; ``has_labels`` says which.
    """

    model: nn.Module = field(repr=False)
    groups: ChannelGroups = field(repr=False)
    batches: Sequence[Tensor] = field(repr=False)
    labelled: Labelled = field(repr=False)
    has_labels: bool
    seed: int = 0
    eval_images: Labelled = field(default=(), repr=False)

    @cached_property
    def tpv(self) -> Scores:
        """Uncompensated TPV of every channel: both a criterion and, summed, a measure."""
        return tpv_scores(self.model, self.groups, self.batches, compensated=False, seed=self.seed)

    def with_images(self, batches: Sequence[Tensor], labelled: Labelled | None) -> Setting:
        """Return the same on other images; without labels the model's own classes are taken."""
        if labelled is None:
            labelled = own_predictions(self.model, batches)
        return replace(self, batches=batches, labelled=labelled)


def setting_of(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Sequence[Tensor],
    *,
    labelled: Labelled | None = None,
    eval_images: Labelled | None = None,
    seed: int = 0,
) -> Setting:
    """Put together what an audit looks at.

    Args:
        model: Classifier with outputs [B, K].
        groups: Its channel groups.
        batches: Inputs; labels are dropped.
        labelled: The same inputs with labels; None takes the model's own classes.
        eval_images: Images that tell whether a change is neutral, labelled likewise; None takes
            those above.
        seed: Of probes and noise.

    Returns:
        The setting.
    """
    inputs = list(unlabeled(batches))
    pairs = own_predictions(model, inputs) if labelled is None else labelled
    has_labels = labelled is not None
    return Setting(model, groups, inputs, pairs, has_labels, seed, eval_images or pairs)


@dataclass(frozen=True)
class Measure:
    """A measure as users see it."""

    title: str  # its name in tables
    of: Callable[[Setting], Measurement]
    loss: bool  # it reads labels, or the model's own classes in their place
    cost: str  # passes over how many images; a backward counts two
    still: str  # whether theory says that rescaling a ReLU network leaves it as it is
    source: str  # who proposed it


def _few(s: Setting, part: float) -> Labelled:
    left = max(int(part * sum(map(len, s.batches))), 2)
    chosen: list[tuple[Tensor, Tensor]] = []
    for x, y in s.labelled:
        if left > 0:
            chosen.append((x[:left], y[:left]))
        left -= len(x)
    return chosen


def _below_chance(s: Setting) -> Measurement:
    found = normalized_loss(s.model, s.labelled)
    return Measurement(found.below_chance, found.stderr)


def _log_radius(s: Setting) -> Measurement:
    few = [x for x, _ in _few(s, _FEW)]
    found = local_volume(s.model, few, num_directions=4, seed=s.seed)
    return Measurement(found.log_radius, found.log_radius_stderr)


MEASURES: Mapping[str, Measure] = {
    "channel_tpv": Measure(
        "TPV of channels", lambda s: summed(s.tpv, s.groups),
        loss=False, cost="3 on all", still="yes", source="Arpit 2025",
    ),
    "sharpness": Measure(
        "Sharpness, Hessian trace",
        lambda s: sharpness(s.model, _few(s, _FEW), num_probes=1, seed=s.seed),
        loss=True, cost="9 on a quarter of the images", still="no",
        source="Hutchinson 1989; Dinh et al. 2017",
    ),
    "path_norm": Measure(
        "Path norm", lambda s: path_norm(s.model, s.batches[0][:2]),
        loss=False, cost="3 on one image", still="yes", source="Neyshabur et al. 2015",
    ),
    "pac_bayes_origin": Measure(
        "PAC-Bayes, origin",
        lambda s: pac_bayes_origin(s.model, _few(s, _FEW), num_draws=2, seed=s.seed),
        loss=True, cost="20 on a quarter", still="no", source="Jiang et al. 2020",
    ),
    "l2_norm": Measure(
        "L2 norm", lambda s: l2_norm(s.model, s.batches[0][:2]),
        loss=False, cost="1 on one image", still="no", source="Jiang et al. 2020",
    ),
    "normalized_loss": Measure(
        "Normalized loss, below chance", _below_chance,
        loss=True, cost="1 on all", still="by layer", source="Liao et al. 2018",
    ),
    "log_radius": Measure(
        "Local volume, log radius", _log_radius,
        loss=False, cost="25 on a quarter", still="yes", source="Zhang et al. 2021",
    ),
    "input_lipschitz": Measure(
        "Input Lipschitz constant",
        lambda s: input_lipschitz(
            s.model, [x for x, _ in _few(s, _FEWER)], num_iterations=8, seed=s.seed
        ),
        loss=False, cost="35 on a sixteenth", still="yes", source="Loukas et al. 2021",
    ),
}  # fmt: skip
"""Name -> measure, in the order of the tables."""
