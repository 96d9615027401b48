"""What a result depends on besides the code: versions, hardware, arguments."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def write_environment(path: Path, args: argparse.Namespace) -> None:
    """Write arguments, versions and hardware beside a result file."""
    path.write_text(json.dumps(environment(args), indent=2) + "\n")


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments, versions and hardware; of paths only the last part."""
    return {
        "arguments": {k: _plain(v) for k, v in vars(args).items()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "torch-pruning")},
        },
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def processor() -> str:
    """Return the name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _plain(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
        # Folders of one machine mean nothing on another.
        return Path(value).name
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)
