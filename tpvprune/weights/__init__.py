"""Single weights removed instead of whole channels: scores, masks, repair."""
