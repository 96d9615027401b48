"""Which versions of packages are installed."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of packages; "not installed" where one is not."""
    found = {"python": platform.python_version(), **dict.fromkeys(packages, "not installed")}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
