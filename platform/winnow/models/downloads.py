"""Published weights on this machine: torch.hub's cache and the Hugging Face hub's cache, filled when needed."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from winnow.errors import JobError
from winnow.models.checkpoints import sha256_of

logger = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
"""Longest silence of a server while weights are downloaded."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Where timm keeps weights in a repository on the hub; the first that exists is taken."""


def torch_hub_file(url: str, sha256: str, name: str) -> Path:
    """The file of that URL in torch.hub's cache (``$TORCH_HOME/hub/checkpoints``), downloaded if it is not there.

    Args:
        url: where it is published.
        sha256: first digits of its hash, checked on every call; empty when unknown.
        name: of the model, for messages.

    Raises:
        JobError: it is not there and cannot be downloaded, or is damaged.
    """
    folder = torch_hub_folder()
    path = folder / urlsplit(url).path.rsplit("/", 1)[-1]
    if not path.exists():
        try:
            _download(url, path, sha256)
        except (OSError, http.client.HTTPException) as error:
            raise JobError(
                f"the weights of {name} are not in the cache and cannot be downloaded from {urlsplit(url).hostname}: "
                f"{error}; put the file {path.name} into {folder} (TORCH_HOME moves that cache)"
            ) from None
    elif not sha256_of(path).startswith(sha256):
        raise JobError(f"{path} is damaged: its SHA-256 does not start with {sha256}; delete it and run again")
    return path


def torch_hub_folder() -> Path:
    """Where torch.hub keeps weights, found without importing torch: $TORCH_HOME, else torch in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def hub_file(repo: str, filename: str, revision: str, name: str) -> Path:
    """The file of a repository in the Hugging Face hub's cache, downloaded if it is not there.

    Args:
        repo: such as ``timm/resnet50.a1_in1k``.
        filename: empty for the file in which timm keeps weights.
        revision: commit; empty for the newest.
        name: of the model, for messages.

    Raises:
        JobError: it is not there and cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    # The bases of its own error: what its HTTP client raises.
    faults: tuple[type[BaseException], ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
    candidates = (filename,) if filename else _HUB_FILES
    for candidate in candidates:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(repo, candidate, revision=revision or None, local_files_only=True))
    last: BaseException | None = None
    for candidate in candidates:
        try:
            return Path(hf_hub_download(repo, candidate, revision=revision or None))
        except LocalEntryNotFoundError as error:  # no network; an EntryNotFoundError too, but it does not mean absent
            last = error
            break
        except EntryNotFoundError as error:
            last = error
        except faults as error:
            last = error
            break
    reason = str(last).strip().splitlines()[0] if str(last).strip() else type(last).__name__
    host = urlsplit(constants.ENDPOINT).hostname
    raise JobError(
        f"the weights of {name} are not in the cache and cannot be downloaded from {host}: {reason}; fetch "
        f"{filename or _HUB_FILES[0]} of the repository {repo} where there is a network and copy the folder "
        f"models--{repo.replace('/', '--')} into {constants.HF_HUB_CACHE} (HF_HOME moves that cache)"
    )


def _download(url: str, path: Path, sha256: str) -> None:
    """Download beside ``path`` and move there when whole, so that several processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s to %s", url, path)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if not digest.hexdigest().startswith(sha256):
            raise OSError(f"what arrived has SHA-256 {digest.hexdigest()[:12]}…, not {sha256}…")
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
