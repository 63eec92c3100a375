"""Masks as files: exact, complete, kept on a rerun, and never stopped by one bad image."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import workspaces as ws
from conftest import S3Server
from delta_tables import HandMade, at
from winnow import uris
from winnow.config import PredictConfig
from winnow.errors import CallError, QueryError
from winnow.images import View
from winnow.mask_files import read_png
from winnow.masks import encode_classes, resize_to_source
from winnow.models.references import ResolvedModel
from winnow_jobs.export_masks import MasksResult
from winnow_jobs.spec import make_spec
from winnow_jobs.workspace import Workspace

CLASSES = ("background", "cat", "dog")
TASKS = """
[tasks.parts]
kind = "segmentation"
model = "torchvision/lraspp_mobilenet_v3_large"
[tasks.other]
kind = "segmentation"
model = "torchvision/lraspp_mobilenet_v3_large"
[tasks.kind]
model = "torchvision/mobilenet_v2"
"""


def recorded(classes: tuple[str, ...] = CLASSES) -> str:
    """``runs.config`` of a predict run."""
    model = ResolvedModel(
        id="parts@1",
        source="registry",
        architecture="torchvision/lraspp_mobilenet_v3_large",
        weights="weights.safetensors",
        location="models/parts/1/weights.safetensors",
        sha256=64 * "0",
        classes=classes,
        view=View(fit=(520, 520)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        output="masks",
    )
    tasks: dict[str, Any] = {"parts": ("segmentation", model, False)}
    spec = make_spec(PredictConfig(), tasks, batch_size=0, chunk_rows=0, fragment_rows=0, asked={})
    return json.dumps({"spec": spec.to_dict(), "num_asked": 1})


def photo(number: int, width: int = 60, height: int = 40, **options: Any) -> bytes:
    pixels = np.full((height, width, 3), 40 * (number % 5), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=95, **options)
    return sink.getvalue()


def mask_of(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """A label map in half the size of an image, with two or three classes."""
    labels = np.zeros((max(1, height // 2), max(1, width // 2)), dtype=np.uint8)
    labels[: 1 + number % 7, :5] = 1
    labels[-2:, -3:] = 2 * (number % 2)
    return labels


def answer(
    workspace: Workspace, *, run: str = "p1", finished: int = 9, classes: tuple[str, ...] = CLASSES
) -> dict[str, NDArray[np.uint8]]:
    """What a model would answer for all current images, by file name."""
    tables = HandMade(workspace.folder / "warehouse" / "tables", exist=True)
    tables.add("runs", run_id=run, finished_at=at(finished), config=recorded(classes))
    found, outcomes, segments = {}, [], []
    for number, row in enumerate(workspace.query("FROM current_images ORDER BY uri").to_pylist()):
        name = uris.name_of(row["uri"])
        width, height = (40, 60) if "rotated" in name else (60, 40)
        found[name] = mask_of(number, width, height)
        mine = {"image_id": row["image_id"], "task": "parts", "model": "parts@1", "run": run}
        outcomes.append({**mine, "width": width, "height": height})
        segments += [{**mine, "label": CLASSES[entry.value], "rle": entry.rle} for entry in encode_classes(found[name])]
    tables.add_rows("outcomes", outcomes)
    tables.add_rows("segments", segments)
    return found


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Six photographs, one of them turned by its EXIF orientation, all answered."""
    (tmp_path / "winnow.toml").write_text(TASKS)
    (tmp_path / "photos").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in range(5):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(photo(number))
    (tmp_path / "photos" / "rotated.jpg").write_bytes(photo(5, exif=turned))
    found = Workspace(tmp_path / "winnow.toml")
    found.init()
    found.ingest([str(tmp_path / "photos")])
    return found


def index(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of the index by file name of the image."""
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        return {uris.name_of(row["uri"]): row for row in csv.DictReader(file)}


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def counts(result: MasksResult) -> tuple[int, int, int, int]:
    return result.num_images, result.num_written, result.num_kept, result.num_failed


# --------------------------------------------------------------------------------------------------------------- files


def test_every_answered_image_gets_a_mask_of_its_own_size(workspace: Workspace, tmp_path: Path) -> None:
    masks = answer(workspace)
    result = workspace.export_masks("parts", "out")
    assert counts(result) == (6, 6, 0, 0)
    assert result.uri == (tmp_path / "out").as_uri()
    rows = index(tmp_path / "out")
    assert rows.keys() == masks.keys()
    for name, row in rows.items():
        assert (row["mask"], row["overlay"], row["error"]) == (f"{row['image_id']}.png", "", "")
        size = (40, 60) if name == "rotated.jpg" else (60, 40)
        found = read_png((tmp_path / "out" / row["mask"]).read_bytes(), width=size[0], height=size[1])
        assert np.array_equal(found, resize_to_source(masks[name], *size))
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {
        "task": "parts",
        "classes": {"0": "background", "1": "cat", "2": "dog"},
    }


def test_an_overlay_shows_the_image_upright_with_its_mask_in_place(workspace: Workspace, tmp_path: Path) -> None:
    answer(workspace)
    assert counts(workspace.export_masks("parts", "out", overlay=True)) == (6, 12, 0, 0)
    for name, row in index(tmp_path / "out").items():
        with Image.open(tmp_path / "out" / row["overlay"]) as image:
            width = 40 if name == "rotated.jpg" else 60
            assert image.format == "JPEG"
            assert image.width == width * (360 // 60)  # small photographs are enlarged
            pixels = np.asarray(image).astype(int)
        corner, middle = pixels[3, 3], pixels[pixels.shape[0] // 3, pixels.shape[1] // 2]
        assert corner[0] > corner[2] + 30, "the cat in the corner is tinted orange"
        assert np.ptp(middle) < 12, "the middle is grey as the photograph is"


def test_a_rerun_does_nothing_and_overwrite_writes_all(workspace: Workspace, tmp_path: Path) -> None:
    answer(workspace)
    workspace.export_masks("parts", "out", overlay=True)
    before = state(tmp_path / "out")
    assert counts(workspace.export_masks("parts", "out", overlay=True)) == (6, 0, 12, 0)
    assert state(tmp_path / "out") == before
    assert counts(workspace.export_masks("parts", "out", overlay=True, overwrite=True)) == (6, 12, 0, 0)
    assert {name: data for name, (_, data) in state(tmp_path / "out").items()} == {
        name: data for name, (_, data) in before.items()
    }


def test_overlays_can_be_added_later(workspace: Workspace, tmp_path: Path) -> None:
    answer(workspace)
    workspace.export_masks("parts", "out")
    assert counts(workspace.export_masks("parts", "out", overlay=True)) == (6, 6, 6, 0)
    assert all(row["overlay"] for row in index(tmp_path / "out").values())


def test_an_image_that_cannot_be_read_is_an_error_in_the_index(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "photos" / "0.jpg").write_bytes(photo(0)[:-200])
    (tmp_path / "photos" / "1.jpg").write_bytes(b"no image")
    workspace.ingest([str(tmp_path / "photos")])
    answer(workspace)
    (tmp_path / "photos" / "2.jpg").write_bytes(b"changed since")
    (tmp_path / "photos" / "3.jpg").unlink()
    result = workspace.export_masks("parts", "out", overlay=True)
    assert counts(result) == (6, 8, 0, 4)
    assert result.failures == {"truncated": 1, "not_an_image": 1, "changed": 1, "missing": 1}
    rows = index(tmp_path / "out")
    assert all((tmp_path / "out" / row["mask"]).is_file() for row in rows.values()), "a mask needs no photograph"
    assert {name: row["error"].partition(":")[0] for name, row in rows.items() if row["error"]} == {
        "0.jpg": "truncated", "1.jpg": "not_an_image", "2.jpg": "changed", "3.jpg": "missing",
    }  # fmt: skip
    assert {name for name, row in rows.items() if row["overlay"]} == {"4.jpg", "rotated.jpg"}


def test_a_damaged_answer_is_an_error_in_the_index(workspace: Workspace, tmp_path: Path) -> None:
    answer(workspace)
    tables = HandMade(workspace.folder / "warehouse" / "tables", exist=True)
    tables.run("p2", finished=20)
    (row,) = workspace.query("FROM current_images WHERE uri LIKE '%/0.jpg'").to_pylist()
    tables.add("segments", image_id=row["image_id"], run="p2", label="cat", rle={"size": [20, 30], "counts": "zz"})
    result = workspace.export_masks("parts", "out")
    assert counts(result) == (6, 5, 0, 1)
    assert index(tmp_path / "out")["0.jpg"]["error"].startswith("mask: character 1 of the counts")
    assert index(tmp_path / "out")["0.jpg"]["mask"] == ""


# ------------------------------------------------------------------------------------------------------------- choosing


def test_where_and_limit_choose_images_and_gone_ones_are_left_out(workspace: Workspace, tmp_path: Path) -> None:
    answer(workspace)
    assert counts(workspace.export_masks("parts", "one", where="uri LIKE '%/4.jpg' -- the last")) == (1, 1, 0, 0)
    assert counts(workspace.export_masks("parts", "two", limit=2)) == (2, 2, 0, 0)
    assert counts(workspace.export_masks("parts", "two", limit=2)) == (2, 0, 2, 0)
    assert counts(workspace.export_masks("parts", "two", limit=3)) == (3, 1, 2, 0)
    (tmp_path / "photos" / "0.jpg").unlink()
    workspace.ingest([str(tmp_path / "photos")])
    assert counts(workspace.export_masks("parts", "all")) == (5, 5, 0, 0)
    with pytest.raises(QueryError, match="colour"):
        workspace.export_masks("parts", "none", where="colour = 'red'")
    assert not (tmp_path / "none").exists()


def test_nothing_answered_is_nothing_written(workspace: Workspace, tmp_path: Path) -> None:
    assert counts(workspace.export_masks("parts", "out")) == (0, 0, 0, 0)
    answer(workspace)
    assert counts(workspace.export_masks("other", "out")) == (0, 0, 0, 0)
    assert counts(workspace.export_masks("parts", "out", where="false")) == (0, 0, 0, 0)
    assert not (tmp_path / "out").exists()


def test_masks_of_other_classes_are_not_mixed(workspace: Workspace, tmp_path: Path) -> None:
    answer(workspace)
    workspace.export_masks("parts", "out", limit=2)
    file = tmp_path / "out" / "classes.json"
    file.write_text(json.dumps({"task": "parts", "classes": {"0": "background", "1": "dog"}}))
    with pytest.raises(CallError, match=r"another task or with other classes.*--overwrite"):
        workspace.export_masks("parts", "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert counts(workspace.export_masks("parts", "out", overwrite=True)) == (6, 6, 0, 0)
    # A class that comes on top changes no value that stands.
    file.write_text(json.dumps({"task": "parts", "classes": {"0": "background", "1": "cat"}}))
    assert counts(workspace.export_masks("parts", "out")) == (6, 0, 6, 0)
    assert json.loads(file.read_text())["classes"]["2"] == "dog"


def test_classes_are_in_the_order_of_the_model_that_answered_last(workspace: Workspace, tmp_path: Path) -> None:
    answer(workspace)
    answer(workspace, run="p2", finished=10, classes=("dog", "eel", "background"))
    workspace.export_masks("parts", "out")
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["classes"] == {
        "0": "dog", "1": "eel", "2": "background", "3": "cat",
    }  # fmt: skip


def test_classes_are_those_of_the_configuration_first(workspace: Workspace, tmp_path: Path) -> None:
    answer(workspace)
    config = TASKS.replace("[tasks.parts]", '[tasks.parts]\nclasses = ["dog", "background"]')
    (tmp_path / "winnow.toml").write_text(config)
    Workspace(tmp_path / "winnow.toml").export_masks("parts", "out")
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["classes"] == {
        "0": "dog", "1": "background", "2": "cat",
    }  # fmt: skip


def test_a_wrong_call_is_refused_before_anything_is_written(workspace: Workspace, tmp_path: Path) -> None:
    for arguments, says in [
        (("nothing", "out"), "task 'nothing' is unknown; configured tasks: kind, other, parts"),
        (("kind", "out"), "task 'kind' is a classification task and has no masks; segmentation tasks: other, parts"),
        (("parts", "winnow.toml"), "is a file; name a folder"),
        (("parts", "https://server/masks"), "cannot be written to"),
    ]:
        with pytest.raises(CallError, match=says):
            workspace.export_masks(*arguments)
    with pytest.raises(CallError, match="limit = 0"):
        workspace.export_masks("parts", "out", limit=0)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- command, kills


def test_the_command_says_what_it_wrote(workspace: Workspace) -> None:
    config = workspace.config_path
    nothing = ws.run(config, "export", "masks", "--task", "parts", "--to", "out")
    assert nothing == "nothing to export: no current image asked for is answered by task 'parts'\n"
    answer(workspace)
    shown = ws.run(config, "export", "masks", "--task", "parts", "--to", "out", "--where", "split IS NOT NULL")
    assert shown == f"6 images, 6 files written, 0 kept: {(workspace.folder / 'out').as_uri()}\n"
    found = json.loads(ws.run(config, "export", "masks", "--task", "parts", "--to", "out", "--json"))
    assert (found["num_images"], found["num_written"], found["num_kept"]) == (6, 0, 6)
    assert "is a classification task" in ws.run(config, "export", "masks", "--task", "kind", "--to", "o", code=2)


def test_an_export_that_was_stopped_and_killed_is_completed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "winnow.toml").write_text(TASKS)
    (tmp_path / "photos").mkdir()
    num_images = 120
    for number in range(num_images):
        (tmp_path / "photos" / f"{number:03}.jpg").write_bytes(photo(number))
    workspace = Workspace(tmp_path / "winnow.toml")
    workspace.init()
    workspace.ingest([str(tmp_path / "photos")])
    answer(workspace)
    whole = workspace.export_masks("parts", "whole", overlay=True)
    assert counts(whole) == (num_images, 2 * num_images, 0, 0)

    out, log = tmp_path / "out", tmp_path / "log.txt"
    arguments = ("export", "masks", "--task", "parts", "--to", "out", "--overlay")
    for how, code, num_before in ((signal.SIGINT, 130, 10), (signal.SIGKILL, -signal.SIGKILL, 50)):
        process = ws.start(workspace.config_path, *arguments, log=log)
        try:
            ws.wait_until(lambda n=num_before: len(list(out.glob("*.jpg"))) >= n, timeout_s=60, what="overlays")
            process.send_signal(how)
            assert process.wait(60) == code, log.read_text()
        finally:
            ws.kill_all_started()
    assert "Traceback" not in log.read_text()
    kept = state(out)
    kept = {name: kept[name] for name in kept if name.endswith((".png", ".jpg"))}
    assert 100 <= len(kept) < 2 * num_images, "it was stopped in between"
    result = workspace.export_masks("parts", "out", overlay=True)
    assert (result.num_kept, result.num_written) == (len(kept), 2 * num_images - len(kept))
    found = state(out)
    assert {name: found[name] for name in kept} == kept, "what was there is kept as it was"
    finished = {name: data for name, (_, data) in found.items() if not name.endswith(".tmp")}  # drafts
    assert finished == {name: data for name, (_, data) in state(tmp_path / "whole").items()}


@pytest.mark.s3
def test_masks_go_to_a_bucket(workspace: Workspace, s3_env: S3Server) -> None:
    answer(workspace)
    section = f'[storage."s3://"]\nendpoint = "{s3_env.endpoint}"\nregion = "{s3_env.region}"\n'
    workspace.config_path.write_text(TASKS + section)
    again = Workspace(workspace.config_path)
    uri = f"s3://{s3_env.make_bucket('masks')}/of today"
    assert counts(again.export_masks("parts", uri, overlay=True)) == (6, 12, 0, 0)
    again.export_masks("parts", "local", overlay=True)
    store = again.stores.at(uri)
    assert {info.key: store.get(info.key) for info in store.list()} == {
        path.name: path.read_bytes() for path in (workspace.folder / "local").iterdir()
    }
    assert counts(again.export_masks("parts", uri, overlay=True)) == (6, 0, 12, 0)
