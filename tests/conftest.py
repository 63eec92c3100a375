"""What the tests of every floor share: real data, real servers, cached weights."""

from __future__ import annotations

import fcntl
import itertools
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from winnow_connectors.label_studio import LabelStudio
    from winnow_jobs.local_label_studio import LocalLabelStudio
    from winnow_jobs.local_s3 import LocalS3

SHARED_DATA = (Path(__file__).resolve().parents[1] / ".." / "shared" / "data").resolve()
"""Real images and weights that are not part of the repository."""

WEIGHTS = "mobilenet_v2-b0353104.pth"

# In the background of a shell Ctrl-C is ignored, and every process that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images and weights; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the shared test data, which is not at {SHARED_DATA}")
    return SHARED_DATA


class S3Server:
    """The session's S3 server. Tests that stop or kill one start a ``LocalS3`` of their own."""

    def __init__(self, server: LocalS3) -> None:
        self.server = server
        self.endpoint = server.endpoint
        self.access_key = server.access_key
        self.secret_key = server.secret_key
        self.region = "us-east-1"
        self.credentials_file = server.credentials_file
        self._numbers = itertools.count(1)

    def make_bucket(self, prefix: str = "test") -> str:
        """Create a bucket that no other test uses; its name."""
        name = f"{prefix}-{next(self._numbers)}"
        self.server.create_bucket(name)
        return name


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server (SeaweedFS) on 127.0.0.1, started once."""
    from winnow_jobs.local_s3 import LocalS3  # the tests of the lower floors need nothing of the jobs

    server = LocalS3(tmp_path_factory.mktemp("s3"))
    server.start()
    try:
        yield S3Server(server)
    finally:
        server.kill9()  # its data go with the session's folder; a gentle end takes up to 10 s


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The session's S3 server, with its keys in the environment for this test."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    monkeypatch.setenv("AWS_REGION", s3_server.region)
    return s3_server


@pytest.fixture(scope="session")
def label_studio_cache(pytestconfig: pytest.Config) -> Path:
    """Folder with Label Studio's ``environment`` and a ``blank`` home, whose database is made.

    The first time it is installed into pytest's cache (about 1 GB).
    """
    from winnow_jobs.local_label_studio import RELEASE, LocalLabelStudio

    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir(f"label-studio-{RELEASE}")
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another session of this checkout may be at it
        if not (cache / "made").exists():
            first = LocalLabelStudio(cache / "blank", environment=cache / "environment")
            first.start()
            first.stop()
            (cache / "made").touch()
    return cache


@pytest.fixture(scope="session")
def label_studio_server(
    label_studio_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalLabelStudio]:
    """A real Label Studio on 127.0.0.1, started once, from a copy of the blank home."""
    from winnow_jobs.local_label_studio import LocalLabelStudio

    home = tmp_path_factory.mktemp("label-studio") / "home"
    shutil.copytree(label_studio_cache / "blank", home)
    (home / "label-studio.json").unlink()  # a port of its own
    server = LocalLabelStudio(home, environment=label_studio_cache / "environment")
    server.start()
    try:
        yield server
    finally:
        server.kill9()


@pytest.fixture
def label_studio(label_studio_server: LocalLabelStudio) -> LabelStudio:
    """The session's Label Studio, opened with its token."""
    from winnow_connectors.label_studio import LabelStudio
    from winnow_connectors.objects import Patience

    return LabelStudio(label_studio_server.url, label_studio_server.token, patience=Patience(60.0, 60.0))


@pytest.fixture(scope="session")
def torch_home_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch_home")
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copyfile(shared_data / "weights" / WEIGHTS, checkpoints / WEIGHTS)
    return folder


@pytest.fixture
def torch_home(torch_home_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch home that already holds torchvision's MobileNetV2 weights; TORCH_HOME names it for this test."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home_folder))
    return torch_home_folder
