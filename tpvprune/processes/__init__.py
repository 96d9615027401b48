"""Several processes on the same work: ``membership`` (who takes part), ``shares`` (sums, parts)."""
