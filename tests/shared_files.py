"""Real weights and images in a folder 'shared' beside the checkout, which users do not have."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def shared(relative):
    """Return the path of a shared file; skip the test where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs {relative} in a folder 'shared' beside the checkout")
    return path
