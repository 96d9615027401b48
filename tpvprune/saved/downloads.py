"""Folders that lie on the Hugging Face hub, fetched or taken from its local cache."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tpvprune.disk.path_checks import BUFFER_FILE
from tpvprune.weights.masks import MASK_FILE

HUB = ("hf-hub:", "hf_hub:")
# What loading reads; nothing else is fetched.
_FILES = ["config.json", "model.safetensors", BUFFER_FILE, MASK_FILE]


def local_folder(folder: str | Path) -> Path:
    """Return a folder as it lies on this machine; ``hf-hub:org/name[@revision]`` is fetched."""
    if not str(folder).startswith(HUB):
        return Path(folder)
    repo_id, _, revision = str(folder).partition(":")[2].partition("@")
    try:
        with offline_if_unreachable():
            found = snapshot_download(repo_id, revision=revision or None, allow_patterns=_FILES)
        return Path(found)
    except HFValidationError as error:
        raise ValueError(f"{folder}: expected hf-hub:org/name, found another name") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{folder}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{folder}: the hub has no such model, or it is private: run `hf auth login` for one "
            "that you may read"
        ) from error
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise ValueError(
            f"{folder}: the hub cannot be reached, and the local cache does not hold it: check "
            "the network, or copy the folder here and load that"
        ) from error


def is_unreachable(error: Exception) -> bool:
    """Tell whether an error of huggingface_hub means that there is no connection."""
    # huggingface_hub has changed its HTTP library, and passes that one's errors on.
    no_answer = isinstance(error, OSError) or "httpx" in type(error).__module__
    return isinstance(error, LocalEntryNotFoundError) or (
        no_answer and not isinstance(error, FileNotFoundError)
    )


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Spare the user a minute of retries where the hub's name does not resolve.

    Only for as long: other libraries of the process, and later downloads, may find it again.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _is_known()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_known() -> bool:
    """Return whether the hub's name resolves here, or a proxy is asked for it."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    endpoint = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(endpoint.hostname, endpoint.port or 443)
    except OSError:
        return False
    return True
