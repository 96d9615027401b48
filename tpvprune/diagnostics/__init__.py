"""Checks of whether a score, or a measure of the whole network, is to be trusted."""

from tpvprune.diagnostics.ablation import ablation_scores, spearman
from tpvprune.diagnostics.catalogue import MEASURES, Measure, Setting, setting_of
from tpvprune.diagnostics.changes import Change, changes_of
from tpvprune.diagnostics.fragility import Fragility, fragility, kendall, same_cut
from tpvprune.diagnostics.jacobian_norms import Estimate, JacobianNorms, jacobian_norms
from tpvprune.diagnostics.label_noise import label_noise_variance
from tpvprune.diagnostics.measures import (
    Measurement,
    channel_tpv,
    l2_norm,
    own_predictions,
    pac_bayes_origin,
    path_norm,
    sharpness,
)
from tpvprune.diagnostics.normalized_loss import Line, NormalizedLoss, fit_line, normalized_loss
from tpvprune.diagnostics.rescaling import Rescaling, rescale
from tpvprune.diagnostics.tpv import (
    perturbed_variance,
    selection_variance,
    stability_rows,
)
from tpvprune.diagnostics.trajectory import Trajectory, input_lipschitz
from tpvprune.diagnostics.volume import LocalVolume, local_volume

__all__ = [
    "MEASURES",
    "Change",
    "Estimate",
    "Fragility",
    "JacobianNorms",
    "Line",
    "LocalVolume",
    "Measure",
    "Measurement",
    "NormalizedLoss",
    "Rescaling",
    "Setting",
    "Trajectory",
    "ablation_scores",
    "changes_of",
    "channel_tpv",
    "fit_line",
    "fragility",
    "input_lipschitz",
    "jacobian_norms",
    "kendall",
    "l2_norm",
    "label_noise_variance",
    "local_volume",
    "normalized_loss",
    "own_predictions",
    "pac_bayes_origin",
    "path_norm",
    "perturbed_variance",
    "rescale",
    "same_cut",
    "selection_variance",
    "setting_of",
    "sharpness",
    "spearman",
    "stability_rows",
]
