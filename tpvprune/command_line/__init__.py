"""What the commands behind ``tpvprune.cli`` are made of."""
