"""How a script ends when its input is bad: one line, exit code 2."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")


def in_one_line(main: Callable[P, int]) -> Callable[P, int]:
    """Return a script's ``main`` that says what is wrong with its input, and returns 2.

    Bad input is a ValueError or an OSError: a checkpoint or a folder that is not there, an image
    that cannot be read, a flag that does not fit.
    """
    script = Path(inspect.getfile(main)).name

    @wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError) as error:
            print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return guarded
