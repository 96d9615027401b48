"""Follow every channel through one forward pass: labels, movements, contractions, sizes."""
