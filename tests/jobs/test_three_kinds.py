"""Classification, segmentation and embedding in one run: every image is read once, and conserved for each task."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import workspaces as ws
from faulty_http import FaultyHttp
from winnow import masks
from winnow.decoders import DecoderPool
from winnow.errors import CallError
from winnow_jobs import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NUM_IMAGES = 40
TASKS = """
[tasks.alike]
kind = "embedding"
model = "./small.safetensors"
architecture = "timm/test_resnet"

[tasks.parts]
kind = "segmentation"
model = "./masks.safetensors"
architecture = "torchvision/lraspp_mobilenet_v3_large"
classes = ["background", "left", "right"]
size = 64
"""


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import save_file
    from torchvision.models import get_model

    folder = tmp_path_factory.mktemp("models")
    ws.save_model(folder / "small.safetensors")
    torch.manual_seed(0)
    network = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "masks.safetensors"
    )
    return folder


@pytest.fixture
def workspace(tmp_path: Path, model_files: Path) -> Workspace:
    for file in model_files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = ws.write_config(tmp_path)
    config.write_text(config.read_text() + TASKS)
    workspace = Workspace(config)
    workspace.init()
    return workspace


@pytest.fixture
def web() -> Iterator[FaultyHttp]:
    with FaultyHttp() as server:
        yield server


def turned_jpeg() -> bytes:
    """60 × 20 pixels whose EXIF says: turn by a quarter, so 20 × 60 to look at. Upper half white, lower half black."""
    pixels = np.zeros((60, 20, 3), dtype=np.uint8)
    pixels[:30] = 255
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    exif = stored.getexif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    stored.save(sink, "JPEG", quality=95, exif=exif)
    return sink.getvalue()


def serve(workspace: Workspace, web: FaultyHttp) -> None:
    files = {f"{number:03d}.jpg": ws.small_jpeg(number) for number in range(NUM_IMAGES - 2)}
    files |= {"turned.jpg": turned_jpeg(), "text.jpg": b"not an image"}
    lines = ["uri,etag,size"]
    for name, data in files.items():
        etag = web.put(f"/{name}", data) or ""
        lines.append(f'{web.url}/{name},"{etag.replace(chr(34), chr(34) * 2)}",{len(data)}')
    manifest = workspace.folder / "list.csv"
    manifest.write_text("\n".join(lines) + "\n")
    workspace.ingest([str(manifest)])


@pytest.mark.usefixtures("ray_session")
def test_one_run_answers_three_tasks_and_reads_every_image_once(workspace: Workspace, web: FaultyHttp) -> None:
    serve(workspace, web)
    before = {name: workspace.warehouse.tables.open(name).version() for name in workspace.warehouse.tables.names}
    result = workspace.predict()
    assert (result.num_asked, result.num_answered, result.num_failed) == (3 * NUM_IMAGES, 3 * (NUM_IMAGES - 1), 3)
    assert {name: hits for name, hits in web.hits.items() if hits != 1} == {}
    after = {name: workspace.warehouse.tables.open(name).version() - version for name, version in before.items()}
    written = {"outcomes", "predictions", "segments", "embeddings", "runs"}
    assert after == {name: int(name in written) for name in after}

    outcomes = workspace.query("SELECT task, status, count(*) AS n FROM outcomes GROUP BY ALL ORDER BY ALL").to_pylist()
    assert [tuple(row.values()) for row in outcomes] == [
        (task, status, num)
        for task in ("alike", "objects", "parts")
        for status, num in (("answered", NUM_IMAGES - 1), ("failed", 1))
    ]
    for table in ("predictions", "segments", "embeddings"):
        kept = ws.one(
            workspace, f"SELECT count(DISTINCT image_id) AS n FROM {table} SEMI JOIN outcomes USING (image_id, task)"
        )
        assert kept["n"] == NUM_IMAGES - 1
    lengths = ws.one(workspace, "SELECT min(len(vector)) AS a, max(len(vector)) AS b, count(*) AS n FROM embeddings")
    assert (lengths["a"], lengths["n"]) == (lengths["b"], NUM_IMAGES - 1)
    hashes = ws.one(workspace, "SELECT count(pixel_hash) AS a, count(phash) AS b FROM outcomes WHERE task = 'alike'")
    assert hashes == {"a": NUM_IMAGES - 1, "b": NUM_IMAGES - 1}

    again = workspace.predict()
    assert (again.status, again.num_asked) == ("nothing to do", 0)
    check_masks(workspace)


def check_masks(workspace: Workspace) -> None:
    """Each image's segments share out its pixels; the mask has the shape of the turned image."""
    rows = workspace.query(
        "SELECT s.*, o.width, o.height FROM latest_segments s JOIN latest_outcomes o USING (image_id, task)"
    ).to_pylist()
    by_image: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_image.setdefault(row["uri"], []).append(row)
    assert len(by_image) == NUM_IMAGES - 1
    for uri, found in by_image.items():
        total = sum(masks.decode(row["rle"]).astype(int) for row in found)
        assert (np.asarray(total) == 1).all()
        height, width = np.asarray(total).shape
        assert max(height, width) == 64
        assert sum(row["area_share"] for row in found) == pytest.approx(1.0, abs=1e-5)
        for row in found:
            mask = masks.decode(row["rle"])
            left, top, wide, high = row["box"]
            columns, lines = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
            across, down = row["width"] / width, row["height"] / height
            assert (left, top) == pytest.approx((columns[0] * across, lines[0] * down), abs=1e-3)
            assert (wide, high) == pytest.approx(((np.ptp(columns) + 1) * across, (np.ptp(lines) + 1) * down), abs=1e-3)
            assert 0 < row["confidence"] <= 1
            assert 0 <= row["entropy"] <= np.log(3) + 1e-5
        if uri.endswith("turned.jpg"):
            assert (found[0]["width"], found[0]["height"], width, height) == (20, 60, 21, 64)


@pytest.mark.usefixtures("ray_session")
def test_tasks_ask_only_the_images_that_each_has_not_answered(workspace: Workspace, web: FaultyHttp) -> None:
    serve(workspace, web)
    workspace.predict(["objects"], where="uri < 'http://127.0.0.1:99999' AND uri LIKE '%/00_.jpg'")
    first = workspace.predict(["parts"], limit=3)
    assert first.num_asked == 3
    rest = workspace.predict()
    assert rest.num_asked == 3 * NUM_IMAGES - 10 - 3
    counts = ws.one(
        workspace,
        "SELECT count(*) AS n, count(DISTINCT (image_id, task)) AS d, count(DISTINCT run) AS runs FROM outcomes",
    )
    assert counts == {"n": 3 * NUM_IMAGES, "d": 3 * NUM_IMAGES, "runs": 3}


@pytest.mark.usefixtures("ray_session")
def test_answers_are_the_mean_over_augmented_views_where_a_task_asks_for_it(workspace: Workspace) -> None:
    images = workspace.folder / "images"
    images.mkdir()
    for number in range(12):
        (images / f"{number}.jpg").write_bytes(ws.small_jpeg(number))
    workspace.ingest([str(images)])
    assert workspace.predict(["objects"]).num_answered == 12
    text = workspace.config_path.read_text()
    for section in ("objects", "alike", "parts"):
        text = text.replace(f"[tasks.{section}]", f'[tasks.{section}]\naugmentation = "mild"\nnum_views = 3')
    policy = 'transforms = [{ name = "RandomHorizontalFlip" }, { name = "RandomAffine", degrees = 20 }]'
    workspace.config_path.write_text(f"{text}\n[augmentations.mild]\n{policy}\n")
    averaged = Workspace(workspace.config_path)
    result = averaged.predict()  # of views and of the image alone are two answers: those of before stay
    assert (result.num_asked, result.num_answered) == (36, 36)
    assert all("+mild." in model and model.endswith("x3") for model in result.models.values())
    assert averaged.predict().status == "nothing to do"
    found = ws.one(
        averaged,
        """
        SELECT count(*) AS n, count(*) FILTER (disagreement BETWEEN 0 AND ln(3)) AS measured,
            count(*) FILTER (disagreement > 0) > 6 AS disagreeing,  -- random weights may see no difference
            (SELECT count(*) FROM predictions WHERE disagreement IS NULL) AS alone,
            (SELECT count(*) FROM segments WHERE disagreement IS NULL OR disagreement < 0) AS wrong_segments,
            (SELECT count(DISTINCT image_id) FROM segments) AS segmented,
            (SELECT count(*) FROM embeddings WHERE abs(list_dot_product(vector, vector) - 1) < 1e-5) AS vectors
        FROM latest_predictions
        """,
    )
    assert found == {
        "n": 12,
        "measured": 12,
        "disagreeing": True,
        "alone": 12,
        "wrong_segments": 0,
        "segmented": 12,
        "vectors": 12,
    }


@pytest.mark.parametrize(
    ("section", "transform", "message"),
    [
        ("parts", '{ name = "RandAugment" }', "does not apply to masks"),
        ("objects", '{ name = "RandomCrop", size = 1000 }', r"mend \[augmentations.odd\]"),
        ("alike", '{ name = "RandomFlip" }', "is no transform for images"),
    ],
)
def test_a_policy_that_does_not_fit_its_task_is_a_wrong_call(
    workspace: Workspace, section: str, transform: str, message: str
) -> None:
    text = workspace.config_path.read_text().replace(f"[tasks.{section}]", f'[tasks.{section}]\naugmentation = "odd"')
    workspace.config_path.write_text(f"{text}\n[augmentations.odd]\ntransforms = [{transform}]\n")
    with pytest.raises(CallError, match=message):
        Workspace(workspace.config_path).predict([section])


def test_every_image_is_decoded_once_for_all_tasks(
    workspace: Workspace, web: FaultyHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages themselves, without Ray, with the real decoders counted."""
    from winnow_jobs.spec import PredictSpec
    from winnow_jobs.stages import AnswerWriter, FetchDecode, Infer

    serve(workspace, web)
    run = workspace.warehouse.ledger.load(ws.leave_open(workspace))
    decoded: list[int] = []
    submit = DecoderPool.submit

    def counted(pool: DecoderPool, data: bytes) -> Any:
        decoded.append(len(data))
        return submit(pool, data)

    monkeypatch.setattr(DecoderPool, "submit", counted)
    values = {**run.plan.config["spec"], "batch_size": 16}
    spec = PredictSpec.from_dict(values)
    fetch = FetchDecode(spec, run, workspace.stores, lambda **_: None, num_decoders=1)
    infer = Infer(spec, workspace.stores, lambda **_: None, device="cpu", num_threads=1)
    assert len(infer._predictors) == 2  # one backbone answers two of the three tasks
    writer = AnswerWriter(spec, run, lambda **_: None, attempt="a", generation=0)
    import pyarrow as pa

    chunks = pa.table({"chunk": [0], "starts": [[0]], "stops": [[NUM_IMAGES]]})
    writer.write(pa.concat_tables([infer(table) for table in fetch(chunks)]))
    assert len(decoded) == NUM_IMAGES
    assert set(web.hits.values()) == {1}
    assert run.select().is_complete
    workspace.resume(run.run_id)
    ws.one(workspace, "SELECT run FROM segments GROUP BY 1")
