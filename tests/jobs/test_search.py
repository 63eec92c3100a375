"""``winnow search`` against brute force, over vectors made by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import made_vectors as made
import workspaces as ws
from winnow.errors import CallError, QueryError
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli

NUM_IMAGES = 300
VECTORS = made.unit(np.random.default_rng(0).standard_normal((NUM_IMAGES, 96)))  # as many numbers as the model gives
TEST = dict.fromkeys(range(200, NUM_IMAGES), "test")
TIED = (41, 42, 43)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two runs and several files; three equal vectors; decoys of other models and of runs that do not count."""
    workspace = made.make_workspace(tmp_path_factory.mktemp("search"))
    VECTORS[list(TIED)] = VECTORS[41]
    made.publish(workspace, VECTORS[:150], num_files=3, split=TEST)
    made.publish(workspace, VECTORS[150:], start=150, split=TEST)
    for start, other in ((1000, {"status": "open"}), (2000, {"status": "abandoned"}), (3000, {"model": "another"})):
        made.publish(workspace, VECTORS[:5], start=start, num_files=1, **other)
    made.publish(workspace, VECTORS[:2], start=4000, num_files=1)
    made.vanish(workspace, [4000, 4001])
    return workspace


def expected(number: int, k: int, among: range = range(NUM_IMAGES)) -> list[str]:
    scores = VECTORS @ VECTORS[number]
    others = [other for other in among if other != number]
    best = sorted(others, key=lambda other: (-np.float32(scores[other]), made.image_id(other)))[:k]
    return [made.image_id(other) for other in best]


@pytest.mark.parametrize("number", [0, 41, 149, 150, 299])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_every_nearest_image_is_found_and_the_image_itself_is_not(workspace: Workspace, number: int, k: int) -> None:
    by_id = workspace.search(made.image_id(number), k=k)
    assert by_id.rows["image_id"].to_pylist() == expected(number, k)
    assert by_id.rows["rank"].to_pylist() == list(range(1, min(k, NUM_IMAGES - 1) + 1))
    scores = by_id.rows["similarity"].to_pylist()
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(float(np.sort(VECTORS @ VECTORS[number])[-2]), abs=1e-6)
    assert by_id.num_compared == NUM_IMAGES - 1
    assert workspace.search(made.uri(number), k=k).rows.equals(by_id.rows)


def test_rows_say_where_the_image_lies(workspace: Workspace) -> None:
    (row,) = workspace.search(made.uri(41), k=1).rows.to_pylist()
    assert row == {
        "rank": 1,
        "similarity": 1.0,
        "uri": made.uri(min((42, 43), key=made.image_id)),
        "image_id": min(map(made.image_id, (42, 43))),
        "split": "train",
    }


def test_a_condition_narrows_what_is_compared(workspace: Workspace) -> None:
    found = workspace.search(made.uri(7), k=20, where="split = 'test' -- and nothing else")
    assert found.rows["image_id"].to_pylist() == expected(7, 20, range(200, NUM_IMAGES))
    assert found.num_compared == 100
    assert workspace.search(made.uri(7), where="false").rows.num_rows == 0


def test_a_file_that_is_not_known_is_asked_of_the_model(workspace: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "new.png"
    file.write_bytes(ws.small_jpeg(1))
    found = workspace.search(str(file), k=3)
    assert found.image_id is None
    assert found.query == file.as_uri()
    assert found.num_compared == NUM_IMAGES
    assert found.rows.num_rows == 3


@pytest.mark.parametrize(
    ("image", "options", "says"),
    [
        ("nowhere.jpg", {}, "is no known image, and no such file or object exists"),
        ("f" * 32, {}, "is not among the current images"),
        (made.image_id(4000), {}, "is not among the current images"),
        ("", {}, "is no URI and no path"),
        (made.uri(0), {"k": 0}, "-k 0 is not valid"),
        (made.uri(0), {"task": "objects"}, "is a classification task"),
        (made.uri(0), {"task": "alyke"}, "alyke"),
    ],
)
def test_a_wrong_call_says_what_is_valid(workspace: Workspace, image: str, options: dict[str, int], says: str) -> None:
    with pytest.raises(CallError, match=says):
        workspace.search(image, **options)


def test_a_file_that_is_no_image_is_a_wrong_call(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(CallError, match=r"text.jpg cannot be searched for: .*no image"):
        workspace.search(str(tmp_path / "text.jpg"))


def test_a_faulty_condition_shows_the_columns(workspace: Workspace) -> None:
    with pytest.raises(QueryError, match="current_images: image_id"):
        workspace.search(made.uri(0), where="colour = 'red'")


def test_without_vectors_it_says_what_to_run(tmp_path: Path) -> None:
    workspace = made.make_workspace(tmp_path)
    (tmp_path / "new.jpg").write_bytes(ws.small_jpeg(1))
    with pytest.raises(CallError, match="run `winnow predict --task alike` first"):
        workspace.search(str(tmp_path / "new.jpg"))


def test_the_command_writes_tables_json_files_and_a_contact_sheet(workspace: Workspace, tmp_path: Path) -> None:
    def call(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["--config", str(workspace.config_path), "search", made.uri(5), *arguments])
        assert done.exception is None, done.output
        return done.stdout

    rows = json.loads(call("-k", "2", "--json"))
    assert [row["image_id"] for row in rows] == expected(5, 2)
    assert call("-k", "2").splitlines()[0] == "rank\tsimilarity\turi\timage_id\tsplit"
    output, sheet = tmp_path / "alike.csv", tmp_path / "alike.png"
    call("-k", "2", "--output", str(output), "--sheet", str(sheet))
    assert [row["image_id"] for row in csv.DictReader(io.StringIO(output.read_text()))] == expected(5, 2)
    with Image.open(sheet) as picture:  # of grey tiles that say why: these objects do not exist
        assert picture.format == "PNG"
        assert picture.width > picture.height
