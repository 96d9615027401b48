"""Criteria to compare with: from weights, activations and gradients."""
