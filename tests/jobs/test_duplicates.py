"""``winnow duplicates``: groups, outliers and leaks, over vectors made by hand; killed, stopped and run twice."""

from __future__ import annotations

import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import made_vectors as made
import workspaces as ws
from winnow.errors import CallError, OpenRunError
from winnow_connectors.ledger import Plan
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli

NUM_IMAGES = 60
PHASH = "c3a5c3a5c3a5c3a5"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return made.make_workspace(tmp_path)


def spread(num: int, dimensions: int = 96, seed: int = 0) -> np.ndarray:
    """Vectors of which no two are alike."""
    return made.unit(np.random.default_rng(seed).standard_normal((num, dimensions)))


def near(vector: np.ndarray, cosine: float, seed: int = 1) -> np.ndarray:
    """A vector that has this cosine with another one."""
    other = np.random.default_rng(seed).standard_normal(len(vector))
    other -= (other @ vector) * vector
    other /= np.linalg.norm(other)
    return (cosine * vector + np.sqrt(1 - cosine**2) * other).astype(np.float32)


def groups(workspace: Workspace) -> dict[int, dict[str, Any]]:
    """Rows of the view by number of the image."""
    numbers = {made.image_id(number): number for number in range(10_000)}
    rows = workspace.query("FROM duplicate_groups").to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {
        numbers[row["image_id"]]: row
        | {"group": numbers[row["group_id"]], "representative": numbers[row["representative"]]}
        for row in rows
    }


def test_copies_and_near_duplicates_form_groups(workspace: Workspace) -> None:
    vectors = spread(NUM_IMAGES)
    vectors[1] = vectors[0]  # the same file
    vectors[2] = near(vectors[0], 0.95)  # by its vector
    vectors[3] = near(vectors[0], 0.93, 7)  # by nothing: below the threshold
    vectors[5] = near(vectors[4], 0.7)  # by its perceptual hash
    vectors[7] = near(vectors[6], 0.5)  # the same hash, and too far away
    vectors[9] = vectors[8]  # the same pixels in another file
    vectors[11], vectors[12] = near(vectors[10], 0.95, 2), near(vectors[10], 0.95, 3)  # with each other less than 0.94
    made.publish(
        workspace,
        vectors,
        sha256={0: "one", 1: "one"},
        pixel_hash={8: "p", 9: "p", 4: None, 5: None, 6: None, 7: None},
        phash={4: PHASH, 5: "c3a5c3a5c3a5c3a6", 6: PHASH[::-1], 7: PHASH[::-1], 20: "8" + 15 * "0", 21: "8" + 15 * "0"},
        width={5: 400},
    )
    result = workspace.duplicates()
    found = groups(workspace)
    assert {number: (row["group"], row["kind"]) for number, row in found.items()} == {
        0: (0, "bytes"),
        1: (0, "bytes"),
        2: (0, "near"),
        4: (5, "near"),  # the other one has more pixels
        5: (5, "near"),
        8: (8, "pixels"),
        9: (8, "pixels"),
        10: (10, "near"),
        11: (10, "near"),
        12: (10, "near"),
    }
    assert {number: row["num_images"] for number, row in found.items()} == {
        **dict.fromkeys((0, 1, 2, 10, 11, 12), 3),
        **dict.fromkeys((4, 5, 8, 9), 2),
    }
    assert all(row["group"] == row["representative"] for row in found.values())
    assert found[2]["similarity"] == pytest.approx(0.95, abs=1e-6)
    assert (found[0]["similarity"], found[1]["similarity"]) == (1.0, 1.0)
    assert (found[4]["hamming"], found[5]["hamming"], found[2]["hamming"]) == (2, 0, None)
    assert (result.num_groups, dict(result.num_members), result.largest) == (4, {"bytes": 1, "pixels": 1, "near": 4}, 3)
    assert result.num_leaks == result.num_quarantined == 0
    assert ws.one(workspace, "SELECT tasks, job, status FROM runs WHERE job = 'duplicates'") == {
        "tasks": ["alike"],
        "job": "duplicates",
        "status": "finished",
    }


def test_the_representative_has_most_pixels_then_is_the_first_then_the_largest_file(workspace: Workspace) -> None:
    same = {number: f"group-{number // 3}" for number in range(9)}
    first = dict.fromkeys(range(9), made.NOW)
    made.publish(
        workspace, spread(9), sha256=same, width={1: 41}, seen_at=first | {5: made.NOW - timedelta(1)},
        num_bytes={7: 1001},
    )  # fmt: skip
    workspace.duplicates()
    assert {row["representative"] for row in groups(workspace).values()} == {1, 5, 7}


def test_outliers_are_far_from_their_kth_neighbour_and_copies_count_once(workspace: Workspace) -> None:
    vectors = spread(NUM_IMAGES, dimensions=4)
    vectors[1] = vectors[2] = vectors[0]
    made.publish(workspace, vectors, sha256=dict.fromkeys((0, 1, 2), "one"))
    workspace.duplicates(k=3)
    rows = {row["image_id"]: row for row in workspace.query("FROM outliers").to_pylist()}
    distinct = [number for number in range(NUM_IMAGES) if number not in (1, 2)]
    for number in range(NUM_IMAGES):
        scores = sorted(
            (float(vectors[number] @ vectors[other]) for other in distinct if other != number), reverse=True
        )
        if number in (1, 2):
            scores.remove(max(scores))  # its own picture
        row = rows[made.image_id(number)]
        assert row["outlier_score"] == pytest.approx(1 - scores[2], abs=1e-5)
        assert row["k"] == 3
        best = 1.0 if number in (0, 1, 2) else scores[0]
        assert row["similarity"] == pytest.approx(best, abs=1e-6)
        nearest = next(other for other in range(NUM_IMAGES) if made.image_id(other) == row["nearest"])
        assert nearest != number
        assert float(vectors[number] @ vectors[nearest]) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("num", "num_pictures"), [(2, 2), (3, 1), (4, 3)])
def test_few_images_have_fewer_neighbours(workspace: Workspace, num: int, num_pictures: int) -> None:
    made.publish(workspace, spread(num), num_files=1, sha256=dict.fromkeys(range(num - num_pictures + 1), "one"))
    workspace.duplicates()
    rows = workspace.query("FROM outliers").to_pylist()
    assert [row["k"] for row in rows] == [num_pictures - 1] * num
    assert all(row["nearest"] != row["image_id"] for row in rows)
    assert all((row["outlier_score"] == 0.0) == (num_pictures == 1) for row in rows)


def test_of_a_picture_in_several_splits_the_earlier_ones_are_quarantined(workspace: Workspace) -> None:
    cases = [  # (split, audit, leaks into) of each member of a group
        [("train", False, "test"), ("test", False, None), ("train", False, "test"), ("val", False, "test")],
        [("train", False, "val"), ("val", False, None)],
        [("train", False, None), ("train", False, None)],
        [("train", False, "test"), ("train", True, None)],
        [("val", False, "test"), ("val", True, None), ("test", False, None)],
    ]
    members = [(group, *member) for group, case in enumerate(cases) for member in case]
    made.publish(
        workspace,
        spread(len(members)),
        sha256={number: f"group-{member[0]}" for number, member in enumerate(members)},
        split={number: member[1] for number, member in enumerate(members)},
        audit={number: member[2] for number, member in enumerate(members)},
    )
    result = workspace.duplicates()
    rows = {row["image_id"]: row for row in workspace.query("FROM quarantined").to_pylist()}
    assert {made.image_id(number): member[3] for number, member in enumerate(members) if member[3]} == {
        image_id: row["leaks_into"] for image_id, row in rows.items()
    }
    assert (result.num_leaks, result.num_quarantined) == (4, len(rows))
    assert "4 groups lie across splits" in result.verdict
    made.vanish(workspace, [1])  # the test image of the first group is gone, its val image is still there
    rows = {row["image_id"]: row["leaks_into"] for row in workspace.query("FROM quarantined").to_pylist()}
    assert (rows[made.image_id(0)], rows.get(made.image_id(3))) == ("val", None)


def test_augmented_copies_are_not_compared_and_share_the_fate_of_their_original(workspace: Workspace) -> None:
    vectors = spread(6)
    vectors[1], vectors[4], vectors[5] = vectors[0], vectors[0], vectors[2]
    parents = {4: made.image_id(0), 5: made.image_id(2)}
    made.publish(workspace, vectors, split={1: "test"}, parent=parents)
    result = workspace.duplicates()
    assert (result.num_images, result.num_groups) == (4, 1)
    quarantined = workspace.query("SELECT image_id FROM quarantined")["image_id"].to_pylist()
    assert sorted(quarantined) == sorted([made.image_id(0), made.image_id(4)])


def test_it_is_done_again_only_when_images_or_options_changed(workspace: Workspace) -> None:
    made.publish(workspace, spread(NUM_IMAGES), sha256={0: "one", 1: "one"})
    first = workspace.duplicates()
    again = workspace.duplicates()
    assert (again.status, again.run_id, again.num_groups) == ("nothing to do", first.run_id, 1)
    assert ws.one(workspace, "SELECT count(*) AS n FROM runs WHERE job = 'duplicates'") == {"n": 1}
    made.publish(workspace, spread(2, seed=1), start=100, num_files=1)
    second = workspace.duplicates()
    assert (second.status, second.num_images) == ("finished", NUM_IMAGES + 2)
    assert ws.one(workspace, "SELECT count(*) AS n FROM outliers") == {"n": NUM_IMAGES + 2}
    assert workspace.duplicates(threshold=0.99).status == workspace.duplicates(k=2).status == "finished"
    assert workspace.duplicates(k=2).status == "nothing to do"
    made.vanish(workspace, [100])
    assert workspace.duplicates(k=2).num_images == NUM_IMAGES + 1
    assert workspace.warehouse.ledger.open_runs() == []


def test_vectors_of_another_model_or_an_unfinished_run_are_not_compared(workspace: Workspace) -> None:
    made.publish(workspace, spread(5), num_files=1)
    made.publish(workspace, spread(5), start=100, num_files=1, status="open")
    made.publish(workspace, spread(5), start=200, num_files=1, model="another")
    result = workspace.duplicates()
    assert (result.num_images, result.num_groups) == (5, 0)


def test_a_single_image_has_nothing_to_be_compared_with(workspace: Workspace) -> None:
    made.publish(workspace, spread(1), num_files=1)
    assert workspace.duplicates().status == "nothing to do"
    assert ws.one(workspace, "SELECT count(*) AS n FROM runs WHERE job = 'duplicates'") == {"n": 0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "run `winnow predict --task alike` first"),
        ({"threshold": 1.5}, "--threshold 1.5 is not valid"),
        ({"threshold": 0.0}, "--threshold 0.0 is not valid"),
        ({"k": 0}, "--k 0 is not valid"),
        ({"task": "objects"}, "is a classification task"),
    ],
)
def test_a_wrong_call_says_what_is_valid(workspace: Workspace, options: dict[str, Any], says: str) -> None:
    with pytest.raises(CallError, match=says):
        workspace.duplicates(**options)


def test_a_run_cut_short_is_finished_by_the_same_call_or_by_resume(workspace: Workspace) -> None:
    made.publish(workspace, spread(NUM_IMAGES))
    for resume in (False, True):
        first = workspace.duplicates(k=3 if resume else 2)
        claims = workspace.warehouse.ledger.next_numbers(["duplicates-alike"])
        plan = workspace.warehouse.ledger.load(first.run_id or "").plan
        cut = Plan(**{**vars(plan), "run_id": f"cut-{resume}", "claims": claims})
        assert workspace.warehouse.ledger.begin(cut) is not None
        with pytest.raises(OpenRunError, match="runs resume"):
            workspace.duplicates(k=7)
        result: Any = workspace.resume(cut.run_id) if resume else workspace.duplicates(k=2)
        assert (result.status, result.run_id) == ("finished", cut.run_id)
        assert workspace.warehouse.ledger.open_runs() == []
    assert ws.one(workspace, "SELECT count(*) AS n, count(DISTINCT image_id) AS images FROM outliers") == {
        "n": NUM_IMAGES,
        "images": NUM_IMAGES,
    }


# ----------------------------------------------------------------------------------------------------- on a cluster


MANY = 5_000


@pytest.fixture
def many(workspace: Workspace) -> Workspace:
    """More images than one block holds; every tenth is a near-duplicate of the one before it."""
    vectors = spread(MANY, dimensions=16)
    for number in range(9, MANY, 10):
        vectors[number] = near(vectors[number - 1], 0.99, number)
    made.publish(workspace, vectors, num_files=3)
    return workspace


@pytest.mark.ray
def test_blocks_on_a_cluster_find_what_brute_force_finds(many: Workspace, ray_session: None) -> None:
    result = many.duplicates(threshold=0.98)
    table = many.query("SELECT image_id, vector FROM embeddings ORDER BY image_id")
    vectors = np.stack(table["vector"].to_pylist()).astype(np.float32)
    ids = table["image_id"].to_pylist()
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -1)
    rows = many.query("SELECT * FROM outliers ORDER BY image_id").to_pylist()
    assert [row["image_id"] for row in rows] == ids
    best = -np.sort(-scores, axis=1)[:, :5]
    np.testing.assert_allclose([row["similarity"] for row in rows], best[:, 0], atol=1e-5)
    np.testing.assert_allclose([row["outlier_score"] for row in rows], 1 - best[:, 4], atol=1e-5)
    members = many.query("SELECT image_id, representative, similarity FROM duplicate_groups").to_pylist()
    positions = {image_id: number for number, image_id in enumerate(ids)}
    assert {row["image_id"] for row in members} == {ids[n] for n in np.flatnonzero(best[:, 0] >= 0.98)}
    for row in members:
        one, other = positions[row["image_id"]], positions[row["representative"]]
        assert row["similarity"] == pytest.approx(float(vectors[one] @ vectors[other]), abs=1e-5)
    assert result.num_groups >= MANY // 10
    before = many.query('SELECT * EXCLUDE (run, "at") FROM duplicates ORDER BY image_id')
    many.duplicates(threshold=0.97)
    many.duplicates(threshold=0.98)
    after = many.query('SELECT * EXCLUDE (run, "at", uri, split, "current") FROM duplicate_groups ORDER BY image_id')
    assert after.select(before.column_names).equals(before)


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_stopped_it_is_done_again_and_nothing_is_doubled(
    many: Workspace, ray_session: None, how: signal.Signals
) -> None:
    log = many.folder / "log.txt"
    process = ws.start(many.config_path, "duplicates", log=log)
    try:
        ws.wait_until(lambda: bool(many.warehouse.ledger.open_runs()), timeout_s=120, what="an open run")
        if how == signal.SIGKILL:
            ws.kill_driver(process)
        else:
            process.send_signal(how)
            assert process.wait(60) == 130, log.read_text()[-3000:]
            assert many.warehouse.ledger.open_runs() == []
    finally:
        ws.kill_all_started()
    result = many.duplicates()
    assert (result.status, result.num_images) == ("finished", MANY)
    assert ws.one(many, "SELECT count(*) AS n, count(DISTINCT image_id) AS images FROM neighbours") == {
        "n": MANY,
        "images": MANY,
    }
    assert ws.one(many, "SELECT count(*) AS n FROM runs WHERE job = 'duplicates' AND status = 'finished'") == {"n": 1}
    assert many.warehouse.ledger.open_runs() == []


def test_the_command_counts_for_people(workspace: Workspace) -> None:
    from click.testing import CliRunner

    made.publish(workspace, spread(NUM_IMAGES), sha256={0: "one", 1: "one"}, split={0: "test"})
    done = CliRunner().invoke(cli, ["--config", str(workspace.config_path), "duplicates"])
    assert done.exception is None, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    for line in ("images compared 60", "same bytes 1", "groups across splits 1", "kept from training 1"):
        assert line.split() in lines
    assert "duplicate_groups" in done.stdout
