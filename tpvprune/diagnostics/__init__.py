"""Checks of whether a score is to be trusted."""

from tpvprune.diagnostics.ablation import ablation_scores, spearman

__all__ = ["ablation_scores", "spearman"]
