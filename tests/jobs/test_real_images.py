"""predict on real photographs and on hostile files, end to end: nothing unexplained, and the reference's answers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import workspaces as ws
from winnow.errors import FAILURE_KINDS
from winnow.uncertainty import margin, softmax
from winnow_jobs import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("cached_weights", "ray_session")]

MODEL = "torchvision/mobilenet_v2@IMAGENET1K_V1"


@pytest.fixture(scope="module")
def cached_weights(torch_home_folder: Path) -> Iterator[None]:
    """The weights are in torch's cache, for workers too: this comes before Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(torch_home_folder))
        yield


def reference(files: list[bytes]) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Probabilities (N, 1000) and class names, as torchvision's own transforms and eager float32 network give them."""
    import torch
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    weights = MobileNet_V2_Weights.IMAGENET1K_V1
    network, transforms = mobilenet_v2(weights=weights).eval(), weights.transforms()
    logits = []
    with torch.inference_mode():
        for data in files:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            logits.append(network(transforms(image).unsqueeze(0))[0].numpy())
    return softmax(np.stack(logits)), weights.meta["categories"]


@pytest.mark.s3
def test_photographs_on_s3_get_the_answers_of_torchvision(shared_data: Path, s3_server: Any, tmp_path: Path) -> None:
    """The test split of the clothing photographs: 339 images, labels from their folders."""
    bucket = s3_server.make_bucket("clothes")
    config = tmp_path / "winnow.toml"
    config.write_text(
        ws.storage_section(s3_server.endpoint, s3_server.credentials_file)
        + f'[warehouse]\nuri = "s3://{bucket}/warehouse"\n'
        + f'[tasks.objects]\nmodel = "{MODEL}"\nstore_probabilities = true\n'
    )
    workspace = Workspace(config)
    workspace.init()
    paths = sorted((shared_data / "classification" / "test").rglob("*.jpg"))
    place = workspace.stores.at(f"s3://{bucket}/photos/")
    for path in paths:
        place.put(f"{path.parent.name}/{path.name}", path.read_bytes())
    ingested = workspace.ingest([f"s3://{bucket}/photos/"], pattern="{label}/*")
    assert (ingested.num_added, ingested.num_labels) == (len(paths), len(paths)) == (339, 339)

    result = workspace.predict()
    assert (result.num_asked, result.num_answered, result.num_failed) == (339, 339, 0)
    ws.check_conserved(workspace, 339)

    rows = workspace.query(
        "SELECT uri, label, probabilities FROM latest_predictions JOIN current_images USING (image_id, uri)"
    )
    by_name = {row["uri"].rpartition("/")[2]: row for row in rows.to_pylist()}
    expected, classes = reference([path.read_bytes() for path in paths])
    got = np.array([by_name[path.name]["probabilities"] for path in paths], dtype=np.float32)
    differs = expected.argmax(axis=1) != np.array([classes.index(by_name[path.name]["label"]) for path in paths])
    assert differs.mean() <= 0.01
    assert (margin(expected)[differs] < 0.05).all()
    assert np.abs(got - expected).max() < 1e-4
    # The folder names are there to be compared with, in SQL.
    labels = workspace.query("SELECT count(*) AS n FROM current_labels WHERE origin = 'imported'")
    assert labels["n"].to_pylist() == [339]


def test_every_hostile_file_has_one_outcome(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "hostile" / "files"
    num_files = sum(path.is_file() for path in folder.rglob("*"))
    config = ws.write_config(tmp_path, predict="max_pixels = 50000000")
    workspace = Workspace(config)
    workspace.init()
    ingested = workspace.ingest([str(folder)])
    assert ingested.num_added + sum(ingested.skipped.values()) == num_files
    result = workspace.predict()
    assert result.num_asked == ingested.num_added
    ws.check_conserved(workspace, ingested.num_added, num_failed=result.num_failed)
    assert result.num_answered > 150
    rows = workspace.query("SELECT uri, stage, error, message, sha256 FROM failures").to_pylist()
    assert len(rows) == result.num_failed > 100
    for row in rows:
        assert row["stage"] in ("fetch", "decode"), row
        assert row["error"] in FAILURE_KINDS, row
        assert len(row["message"]) > 20, row
    kinds = {row["error"] for row in rows}
    assert {"corrupt", "truncated", "not_an_image", "unsupported", "too_many_pixels", "empty"} <= kinds
    assert not kinds & {"crashed", "out_of_memory", "timeout"}
    assert not list(Path.cwd().glob("EVIL*"))
    assert not list(tmp_path.glob("EVIL*"))
