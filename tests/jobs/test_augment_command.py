"""Augmented copies end to end: lineage, labels and masks, failures as rows, exactly once, on folders and on S3."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import workspaces as ws
from conftest import S3Server
from winnow.augment import Policy
from winnow.config import AugmentationConfig
from winnow.errors import CallError, OpenRunError
from winnow.images import DecodeLimits, decode_rgb
from winnow_connectors.ledger import Plan, new_run_id
from winnow_jobs import Workspace

pytestmark = [pytest.mark.timeout(600)]

LIMITS = DecodeLimits(max_bytes=10**8, max_pixels=10**8, timeout_s=20)
POLICIES = """
[tasks.cells]
kind = "segmentation"
model = "torchvision/lraspp_mobilenet_v3_large"
classes = ["background", "cell"]

[augmentations.mild]
transforms = [
    { name = "RandomHorizontalFlip", p = 1.0 },
    { name = "RandomRotation", degrees = 20, fill = [255, 0, 0] },
    { name = "ColorJitter", brightness = 0.3 },
]

[augmentations.crop]
transforms = [{ name = "RandomCrop", size = [30, 30] }]

[augmentations.wide]
transforms = [{ name = "RandAugment" }]
"""
MILD = Policy(
    "mild",
    (
        {"name": "RandomHorizontalFlip", "p": 1.0},
        {"name": "RandomRotation", "degrees": 20, "fill": [255, 0, 0]},
        {"name": "ColorJitter", "brightness": 0.3},
    ),
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ws.save_model(tmp_path_factory.mktemp("model") / "small.safetensors")


def make_workspace(folder: Path, model_file: Path, storage: str = "", audit: float = 0.0) -> Workspace:
    (folder / "small.safetensors").write_bytes(model_file.read_bytes())
    (folder / "images").mkdir()
    config = ws.write_config(folder, storage=storage)
    config.write_text(f"{config.read_text()}\n[splits]\naudit = {audit}\n{POLICIES}")
    workspace = Workspace(config)
    workspace.init()
    return workspace


@pytest.fixture
def workspace(tmp_path: Path, model_file: Path) -> Workspace:
    """An empty workspace with a folder ``images``, the small model and policies."""
    return make_workspace(tmp_path, model_file)


def add(workspace: Workspace, num_images: int) -> None:
    for number in range(num_images):
        (workspace.folder / "images" / f"{number:05d}.jpg").write_bytes(ws.small_jpeg(number))
    workspace.ingest([str(workspace.folder / "images")])


def publish(workspace: Workspace, table: str, rows: list[dict[str, Any]]) -> None:
    """Rows of a table as a finished run of their own."""
    ledger = workspace.warehouse.ledger
    run = ledger.begin(
        Plan(
            run_id=new_run_id("import"),
            job="import",
            claims=ledger.next_numbers(["import"]),
            digest="",
            config={},
            num_planned=0,
            started_at=datetime.now(UTC).isoformat(),
            code_version="",
        )
    )
    assert run is not None
    stamped = [{"updated_at": datetime.now(UTC), **row, "run": run.run_id} for row in rows]
    run.decide("finished", [run.stage(table, pa.Table.from_pylist(stamped))], {})
    run.close()


def label(image_id: str, task: str, label: str | None, value: Any = None) -> dict[str, Any]:
    text = None if value is None else json.dumps(value)
    return {
        "image_id": image_id,
        "task": task,
        "event": "imported",
        "origin": "imported",
        "label": label,
        "value": text,
    }


def check_copies(workspace: Workspace, num_images: int, num_copies: int, *, num_failed: int = 0) -> None:
    """Every original answered once, every copy known once, nothing else."""
    found = ws.one(
        workspace,
        """
        SELECT count(*) FILTER (parent IS NULL) AS originals, count(parent) AS copies,
            count(DISTINCT uri) FILTER (parent IS NOT NULL) AS copied_uris,
            (SELECT count(*) FROM outcomes WHERE task LIKE 'augment:%') AS outcomes,
            (SELECT count(DISTINCT image_id) FROM outcomes WHERE task LIKE 'augment:%') AS asked,
            (SELECT count(*) FROM images WHERE parent IS NOT NULL) AS rows
        FROM current_images
        """,
    )
    copies = (num_images - num_failed) * num_copies
    assert found == {
        "originals": num_images,
        "copies": copies,
        "copied_uris": copies,
        "outcomes": num_images,
        "asked": num_images,
        "rows": copies,
    }


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestCopies:
    def test_copies_are_images_with_split_labels_and_lineage_of_their_originals(
        self, workspace: Workspace, tmp_path: Path
    ) -> None:
        rotated = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        rotated.save(tmp_path / "images" / "rotated.jpg", exif=exif)
        add(workspace, 8)
        originals = workspace.query("SELECT * FROM current_images").to_pylist()
        publish(workspace, "labels", [label(row["image_id"], ws.TASK, "bee") for row in originals[:5]])

        result = workspace.augment("mild", str(tmp_path / "copies"), num_copies=2)
        assert (result.status, result.num_asked, result.num_answered, result.num_copies) == ("finished", 9, 9, 18)
        check_copies(workspace, 9, 2)
        by_id = {row["image_id"]: row for row in originals}
        copies = workspace.query("SELECT * FROM current_images WHERE parent IS NOT NULL").to_pylist()
        for row in copies:
            parent = by_id[row["parent"]]
            assert [row[name] for name in ("split", "group")] == [parent[name] for name in ("split", "group")]
            assert not row["audit"]
            assert row["source"] == (tmp_path / "copies").as_uri()
            lineage = dict(row["metadata"])
            assert json.loads(lineage["augmentation_transforms"]) == list(MILD.transforms)
            assert (lineage["augmentation"], lineage["augmentation_seed"]) == ("mild", "0")
            image = decode_rgb(Path(parent["uri"].removeprefix("file://")).read_bytes(), LIMITS)
            expected, _ = MILD.apply(image, image_id=row["parent"], view=int(lineage["augmentation_copy"]))
            pixels = decode_rgb(Path(row["uri"].removeprefix("file://")).read_bytes(), LIMITS)
            np.testing.assert_array_equal(pixels, expected)
            assert row["size"] == len(Path(row["uri"].removeprefix("file://")).read_bytes())
        labels = workspace.query(
            "SELECT * FROM current_labels SEMI JOIN (FROM current_images WHERE parent IS NOT NULL) USING (image_id)"
        )
        assert labels.num_rows == 10
        assert {(row["label"], row["origin"], row["task"]) for row in labels.to_pylist()} == {
            ("bee", "imported", ws.TASK)
        }

        # Doing it again, and listing the copies, changes nothing; neither are copies copied.
        assert workspace.augment("mild", str(tmp_path / "copies"), num_copies=2).status == "nothing to do"
        listed = workspace.ingest([str(tmp_path / "copies")])
        assert (listed.num_added, listed.num_changed, listed.num_vanished, listed.num_unchanged) == (0, 0, 0, 18)
        # They are images: predict answers them.
        assert workspace.predict([ws.TASK]).num_answered == 27
        for path in (tmp_path / "copies").glob("*/*.png"):
            path.unlink()
        assert workspace.ingest([str(tmp_path / "copies")]).num_vanished == 18

    def test_more_copies_later_keep_those_that_are_there(self, workspace: Workspace, tmp_path: Path) -> None:
        add(workspace, 3)
        workspace.augment("mild", str(tmp_path / "copies"), format="jpeg")
        first = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").glob("*/*.jpg")}
        assert len(first) == 3
        assert workspace.augment("mild", str(tmp_path / "copies"), num_copies=3, format="jpeg").num_copies == 9
        after = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").glob("*/*.jpg")}
        assert len(after) == 9
        assert first.items() <= after.items()
        assert ws.one(workspace, "SELECT count(*) AS n FROM current_images WHERE parent IS NOT NULL") == {"n": 9}

    def test_masks_move_with_their_images(self, workspace: Workspace, tmp_path: Path) -> None:
        add(workspace, 4)
        masks = {}
        for number, row in enumerate(workspace.query("SELECT image_id FROM current_images ORDER BY uri").to_pylist()):
            masks[row["image_id"]] = np.zeros((32, 40), dtype=np.uint8)
            masks[row["image_id"]][5 : 10 + 5 * number, 3:20] = 1
            Image.fromarray(masks[row["image_id"]]).save(tmp_path / f"mask-{number}.png")
        values = [{"mask": (tmp_path / f"mask-{number}.png").as_uri()} for number in range(4)]
        publish(
            workspace, "labels", [label(key, "cells", None, value) for key, value in zip(masks, values, strict=True)]
        )
        with pytest.raises(CallError, match="uses RandAugment, which torchvision does not apply to masks"):
            workspace.augment("wide", str(tmp_path / "copies"))
        workspace.augment("mild", str(tmp_path / "copies"), num_copies=2)
        rows = workspace.query(
            "SELECT uri, parent, metadata, value FROM current_images JOIN current_labels USING (image_id) "
            "WHERE parent IS NOT NULL"
        )
        assert rows.num_rows == 8
        for row in rows.to_pylist():
            path = Path(json.loads(row["value"])["mask"].removeprefix("file://"))
            moved = np.asarray(Image.open(path))
            pixels = np.asarray(Image.open(row["uri"].removeprefix("file://")))
            assert moved.shape == pixels.shape[:2]
            number = int(dict(row["metadata"])["augmentation_copy"])
            image = np.zeros((32, 40, 3), dtype=np.uint8)
            _, expected = MILD.apply(image, image_id=row["parent"], view=number, mask_HW=masks[row["parent"]])
            np.testing.assert_array_equal(moved, expected)
            assert {0, 1} <= set(np.unique(moved)) <= {0, 1, 255}
        assert workspace.ingest([str(tmp_path / "copies")]).num_added == 0  # masks are no images

    def test_failures_become_rows_and_may_be_tried_again(self, workspace: Workspace, tmp_path: Path) -> None:
        images = tmp_path / "images"
        (images / "text.jpg").write_bytes(b"not an image")
        small = io.BytesIO()
        Image.new("RGB", (20, 20)).save(small, "PNG")
        (images / "small.png").write_bytes(small.getvalue())
        add(workspace, 6)
        ids = {
            Path(row["uri"]).stem: row["image_id"]
            for row in workspace.query("SELECT * FROM current_images").to_pylist()
        }
        Image.new("L", (7, 7)).save(tmp_path / "tiny-mask.png")
        publish(
            workspace,
            "labels",
            [
                label(ids["00000"], "cells", None, {"mask": (tmp_path / "tiny-mask.png").as_uri()}),
                label(ids["00001"], "cells", None, {"mask": (tmp_path / "no-mask.png").as_uri()}),
            ],
        )
        (images / "00002.jpg").rename(tmp_path / "away.jpg")
        result = workspace.augment("crop", str(tmp_path / "copies"))
        assert (result.num_asked, result.num_answered, result.num_copies) == (8, 3, 3)
        assert result.failures == {"not_an_image": 1, "not_augmented": 1, "bad_mask": 1, "missing": 2}
        check_copies(workspace, 8, 1, num_failed=5)
        rows = workspace.query(
            "SELECT uri, stage, error, message FROM failures WHERE task = 'augment:crop'"
        ).to_pylist()
        found = {Path(row["uri"]).stem: (row["stage"], row["error"]) for row in rows}
        assert found["small"] == ("augment", "not_augmented")
        assert found["00000"] == ("augment", "bad_mask")
        assert found["text"] == ("decode", "not_an_image")
        assert any(
            "Required crop size (30, 30) is larger than input image size (20, 20)" in row["message"] for row in rows
        )
        assert any("the mask has 7 x 7 pixels, its image has 40 x 32" in row["message"] for row in rows)

        assert workspace.augment("crop", str(tmp_path / "copies")).status == "nothing to do"
        (tmp_path / "away.jpg").rename(images / "00002.jpg")
        again = workspace.augment("crop", str(tmp_path / "copies"), retry_failures="storage")
        assert (again.num_asked, again.num_answered) == (2, 1)

    def test_an_open_run_is_joined_refused_resumed_and_abandoned(self, workspace: Workspace, tmp_path: Path) -> None:
        add(workspace, 10)
        to = str(tmp_path / "copies")
        run_id = leave_open(workspace, to, limit=4)
        with pytest.raises(OpenRunError, match=f"winnow runs abandon {run_id}"):
            workspace.augment("mild", to)
        assert workspace.augment("mild", to, limit=4, dry_run=True).run_id == run_id
        resumed: Any = workspace.resume(run_id)
        assert (resumed.run_id, resumed.num_copies) == (run_id, 4)
        second = leave_open(workspace, to)
        assert workspace.abandon(second) == "abandoned"
        # What an abandoned run left lies there unknown, and ingest leaves it out.
        (tmp_path / "copies" / "ab").mkdir(exist_ok=True)
        orphan = ws.one(
            workspace, "SELECT image_id FROM current_images WHERE parent IS NULL ORDER BY image_id DESC LIMIT 1"
        )
        (tmp_path / "copies" / "ab" / f"{orphan['image_id']}-{MILD.digest}-9.png").write_bytes(b"half-made")
        assert workspace.ingest([to]).skipped["unpublished_copy"] == 1
        assert workspace.augment("mild", to).num_answered == 6
        check_copies(workspace, 10, 1)

    @pytest.mark.s3
    def test_copies_on_s3_of_images_on_s3(self, tmp_path: Path, model_file: Path, s3_server: S3Server) -> None:
        bucket = s3_server.make_bucket("augment")
        storage = ws.storage_section(s3_server.endpoint, s3_server.credentials_file)
        workspace = make_workspace(tmp_path, model_file, storage=storage)
        ws.fill(workspace, f"s3://{bucket}/photos", 12)
        workspace.ingest([f"s3://{bucket}/photos"])
        result = workspace.augment("mild", f"s3://{bucket}/copies/", num_copies=2)
        assert (result.num_copies, result.destination) == (24, f"s3://{bucket}/copies")
        check_copies(workspace, 12, 2)
        listed = workspace.ingest([f"s3://{bucket}/copies"])
        assert (listed.num_added, listed.num_changed, listed.num_unchanged) == (0, 0, 24)
        # The version recorded is the object's: predict reads it, and would refuse another.
        assert workspace.predict([ws.TASK], where="parent IS NOT NULL").num_answered == 24


def leave_open(workspace: Workspace, to: str, limit: int | None = None) -> str:
    """What a driver leaves that dies right after its claim."""
    import winnow_jobs.augment as module

    class Died(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Died

    original, module.work_off = module.work_off, die  # type: ignore[assignment]
    try:
        with pytest.raises(Died):
            workspace.augment("mild", to, limit=limit)
    finally:
        module.work_off = original
    return workspace.warehouse.ledger.open_runs()[-1].run_id


# --------------------------------------------------------------------------------------------------------- without Ray


def test_audit_images_and_copies_are_never_copied(tmp_path: Path, model_file: Path) -> None:
    workspace = make_workspace(tmp_path, model_file, audit=0.5)
    add(workspace, 40)
    counts = ws.one(workspace, "SELECT count(*) AS n, count(*) FILTER (audit) AS audit FROM current_images")
    assert 5 < counts["audit"] < 35
    dry = workspace.augment("mild", str(tmp_path / "copies"), dry_run=True)
    assert (dry.status, dry.num_asked, dry.run_id) == ("dry run", counts["n"] - counts["audit"], None)
    some = workspace.augment("mild", str(tmp_path / "copies"), where="uri LIKE '%0_.jpg' OR audit", dry_run=True)
    assert some.num_asked < dry.num_asked
    assert not (tmp_path / "copies").exists()


def test_nothing_to_copy_starts_nothing(workspace: Workspace, tmp_path: Path) -> None:
    assert workspace.augment("mild", str(tmp_path / "copies")).status == "nothing to do"
    assert not (tmp_path / "copies").exists()


def test_wrong_calls_say_what_is_valid(workspace: Workspace, tmp_path: Path) -> None:
    to = str(tmp_path / "copies")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"policy": "strong"}, "'strong' is unknown; configured augmentations: "),
        ({"num_copies": 0}, "--copies 0 is not valid; give a number from 1 to 1,000"),
        ({"format": "gif"}, "'gif' is unknown; choose png or jpeg"),
        ({"limit": 0}, "--limit 0 is not valid"),
        ({"to": "http://example.com/copies"}, "cannot be written to"),
        ({"to": str(tmp_path / "warehouse" / "copies")}, "must not lie in each other"),
        ({"to": str(tmp_path)}, "must not lie in each other"),
        ({"where": "no_such_column"}, "no_such_column"),
    ]
    for options, message in wrong:
        with pytest.raises(CallError, match=message):
            workspace.augment(**{"policy": "mild", "to": to, **options})
    (tmp_path / "winnow.toml").write_text(
        (tmp_path / "winnow.toml").read_text() + '\n[augmentations.odd]\ntransforms = [{ name = "RandomFlip" }]\n'
    )
    with pytest.raises(CallError, match="'odd', transform 1: 'RandomFlip' is no transform"):
        Workspace(tmp_path / "winnow.toml").augment("odd", to)
    assert not Path(to).exists()


def test_a_destination_that_cannot_be_written_is_found_before_a_run_begins(
    workspace: Workspace, tmp_path: Path
) -> None:
    from winnow.errors import StorageError

    add(workspace, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        workspace.augment("mild", str(tmp_path / "file" / "copies"))
    assert workspace.warehouse.ledger.open_runs() == []


def test_the_policy_of_the_tests_is_that_of_the_configuration(workspace: Workspace) -> None:
    assert Policy.from_config("mild", workspace.config.augmentation("mild")).digest == MILD.digest
    assert Policy.from_config("mild", AugmentationConfig(transforms=MILD.transforms)) == MILD


@pytest.fixture
def nothing_left_running() -> Iterator[None]:
    yield
    ws.kill_all_started()


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.usefixtures("nothing_left_running")
def test_stopped_and_killed_and_run_again_every_copy_is_made_once(tmp_path: Path, model_file: Path) -> None:
    workspace = make_workspace(tmp_path, model_file)
    add(workspace, 300)
    copies = tmp_path / "copies"
    command = ("augment", "mild", "--to", str(copies), "--copies", "2", "--num-cpus", "2")

    def num_files() -> int:
        return sum(1 for _ in copies.glob("*/*.png"))

    process = ws.start(workspace.config_path, *command, log=tmp_path / "log.txt")
    ws.wait_until(lambda: num_files() > 50, timeout_s=180, what="the first copies")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "log.txt").read_text()[-3000:]
    assert "Run the same command to continue" in (tmp_path / "log.txt").read_text()
    assert ws.one(workspace, "SELECT count(*) AS n FROM current_images WHERE parent IS NOT NULL") == {"n": 0}
    assert workspace.ingest([str(copies)]).skipped["unpublished_copy"] == num_files()
    before = num_files()

    process = ws.start(workspace.config_path, *command, log=tmp_path / "log.txt")
    ws.wait_until(lambda: num_files() > before + 50, timeout_s=180, what="more copies")
    ws.kill_driver(process)

    output = json.loads(ws.run(workspace.config_path, *command, "--json"))
    assert (output["status"], output["num_asked"], output["num_copies"]) == ("finished", 300, 600)
    check_copies(workspace, 300, 2)
    assert num_files() == 600
    assert "nothing to do" in ws.run(workspace.config_path, *command)
