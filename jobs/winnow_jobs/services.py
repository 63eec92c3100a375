"""Local services of a workspace, for trying things out; state lives in ``<workspace>/.winnow/services/``."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from winnow.errors import CallError, JobError
from winnow_jobs.daemons import ServiceStatus
from winnow_jobs.local_label_studio import LocalLabelStudio
from winnow_jobs.local_s3 import LocalS3, check_bucket_name

_LOCK_TIMEOUT_S = 60.0
_INSTALL_LOCK_TIMEOUT_S = 1800.0


def up(folder: Path, *, port: int | None = None, buckets: Sequence[str] = ()) -> ServiceStatus:
    """Start the S3 server of a workspace, or find it running; create the buckets that do not exist yet.

    Args:
        folder: the workspace: the folder of winnow.toml.
        port: where S3 shall answer; by default a free port, kept for the next start.
        buckets: names to create.

    Raises:
        CallError: no such folder, the ``weed`` program is not installed, the port is taken, a bucket name is not valid.
        JobError: the server did not start.
    """
    for bucket in buckets:
        check_bucket_name(bucket)
    home = _home(folder)
    with _locked(home):
        server = LocalS3(home)
        server.start(port=port)
        for bucket in buckets:
            server.create_bucket(bucket)
        return server.status()


def down(folder: Path) -> ServiceStatus:
    """End the S3 server of a workspace, and only it; its data stay.

    Raises:
        CallError: no such folder.
        JobError: the process could not be ended.
    """
    home = _home(folder)
    if home.exists():
        with _locked(home):
            LocalS3(home).stop()
    return status(folder)


def status(folder: Path) -> ServiceStatus:
    """The S3 server of a workspace as it is now; changes nothing.

    Raises:
        CallError: no such folder.
    """
    return LocalS3(_home(folder)).status()


def has_label_studio(folder: Path) -> bool:
    """Whether the Label Studio of a workspace is installed.

    Raises:
        CallError: no such folder.
    """
    return LocalLabelStudio(_home(folder)).is_installed


def up_label_studio(folder: Path, *, port: int | None = None, files: Path | None = None) -> ServiceStatus:
    """Start the Label Studio of a workspace, or find it running. The first time it is installed: about 1 GB.

    Args:
        folder: the workspace: the folder of winnow.toml.
        port: where it shall answer; by default a free port, kept for the next start.
        files: folder whose subfolders a project may show images from; by default one beside its data.

    Raises:
        CallError: no such folder, or the port is taken.
        JobError: it could not be installed, or did not start.
    """
    home = _home(folder)
    with _locked(home, "label-studio.lock", _INSTALL_LOCK_TIMEOUT_S):
        server = LocalLabelStudio(home)
        server.start(port=port, files=files)
        return server.status()


def down_label_studio(folder: Path) -> ServiceStatus:
    """End the Label Studio of a workspace, and only it; its projects stay.

    Raises:
        CallError: no such folder.
        JobError: the process could not be ended.
    """
    home = _home(folder)
    if home.exists():
        with _locked(home, "label-studio.lock"):
            LocalLabelStudio(home).stop()
    return status_label_studio(folder)


def status_label_studio(folder: Path) -> ServiceStatus:
    """The Label Studio of a workspace as it is now; changes nothing.

    Raises:
        CallError: no such folder.
    """
    return LocalLabelStudio(_home(folder)).status()


def _home(folder: Path) -> Path:
    if not folder.is_dir():
        raise CallError(f"{folder} is not a folder; name the workspace, the folder of winnow.toml")
    return folder.resolve() / ".winnow" / "services"


@contextmanager
def _locked(home: Path, name: str = "lock", timeout_s: float = _LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold one of the workspace's services locks; it ends with the process, whatever ends that.

    Raises:
        JobError: another command holds it for longer.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(home / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise JobError(
                        f"another `winnow services` command has held {home / name} for {timeout_s:g} s; "
                        "end it and try again"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(file)
