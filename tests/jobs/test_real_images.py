"""predict on real photographs and on hostile files, end to end: nothing unexplained, and the reference's answers."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import workspaces as ws
from winnow.errors import FAILURE_KINDS
from winnow.uncertainty import margin, softmax
from winnow_jobs import Workspace
from winnow_jobs.search import draw_sheet

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("cached_weights", "ray_session")]

MODEL = "torchvision/mobilenet_v2@IMAGENET1K_V1"


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


def test_near_duplicates_are_found_and_nothing_else(shared_data: Path, tmp_path: Path) -> None:
    """Fifteen pictures in nine forms each, among thirty other photographs of the same kind."""
    folder = shared_data / "retrieval"
    with (folder / "groups.csv").open() as file:
        known = list(csv.DictReader(file))
    pictures = sorted({row["group"] for row in known if row["role"] == "original"})[:15]
    distractors = [row for row in known if row["role"] == "distractor"][:30]
    chosen = {Path(row["file"]).name: row for row in known if row["group"] in pictures} | {
        Path(row["file"]).name: row for row in distractors
    }
    (tmp_path / "images").mkdir()
    for name in chosen:
        (tmp_path / "images" / name).symlink_to(folder / "images" / name)
    config = tmp_path / "winnow.toml"
    config.write_text(f'[tasks.alike]\nkind = "embedding"\nmodel = "{MODEL}"\n')
    workspace = Workspace(config)
    workspace.init()
    workspace.ingest([str(tmp_path / "images")])
    workspace.predict()
    result = workspace.duplicates()

    rows = workspace.query("SELECT uri, group_id, kind, similarity, hamming FROM duplicate_groups").to_pylist()
    found = {row["uri"].rpartition("/")[2]: row for row in rows}
    assert not {name for name in found if chosen[name]["role"] == "distractor"}
    of_group: dict[str, set[str]] = {}
    for name, row in found.items():
        of_group.setdefault(row["group_id"], set()).add(chosen[name]["group"])
    assert all(len(groups) == 1 for groups in of_group.values())  # no group mixes two pictures
    assert len(of_group) >= len(pictures)
    for transform in ("png_same_pixels", "jpeg_q25", "resize_50", "gray", "rotate_5", "mirror", "caption_bar"):
        names = [name for name, row in chosen.items() if row["transform"] == transform]
        together = [
            found.get(name, {}).get("group_id") == found[f"{chosen[name]['group']}_original.jpg"]["group_id"]
            for name in names
        ]
        assert names
        assert all(together), transform
    assert result.num_members["pixels"] >= sum(row["transform"] == "png_same_pixels" for row in chosen.values()) > 0
    known_hashes = "SELECT count(pixel_hash) = count(*) AND count(phash) = count(*) AS all_known FROM outcomes"
    assert ws.one(workspace, known_hashes) == {"all_known": True}

    # Asked for as a file that is not known, a picture finds all its forms before anything else.
    original = next(name for name in sorted(chosen) if chosen[name]["role"] == "original")
    copy = tmp_path / "copy.jpg"
    copy.write_bytes((folder / "images" / original).read_bytes())
    forms = sum(row["group"] == chosen[original]["group"] for row in chosen.values())
    search = workspace.search(str(copy), k=forms)
    names = [uri.rpartition("/")[2] for uri in search.rows["uri"].to_pylist()]
    assert original in names[:2]  # beside the copy with the same pixels
    assert search.rows["similarity"][0].as_py() > 0.9999
    assert {chosen[name]["group"] for name in names} == {chosen[original]["group"]}
    draw_sheet(workspace, search, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 20  # photographs, not grey tiles
