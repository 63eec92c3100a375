"""Ingest: only what is new, changed or gone; splits that never change; labels; exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import S3Server
from winnow import uris
from winnow.errors import CallError, OpenRunError
from winnow_connectors.ledger import Plan, new_run_id
from winnow_jobs.ingest import IngestCall, IngestResult, ingest
from winnow_jobs.workspace import Workspace
from workspaces import kill_driver, storage_section

CONFIG = """
[tasks.animals]
model = "torchvision/mobilenet_v2"
"""


def make_workspace(folder: Path, config: str = CONFIG) -> Workspace:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "winnow.toml").write_text(config)
    workspace = Workspace(folder / "winnow.toml")
    workspace.init()
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for path in ("train/cat/1.jpg", "train/dog/2.jpg", "test/cat/3.jpg", "loose.jpg"):
        put(folder / path, path)
    return folder


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def csv(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def counts(result: IngestResult) -> tuple[int, int, int, int]:
    """added, changed, vanished, unchanged; and what must hold of every result."""
    found = (result.num_added, result.num_changed, result.num_vanished, result.num_unchanged)
    assert result.num_listed == found[0] + found[1] + found[3] + sum(result.skipped.values())
    return found


def events(workspace: Workspace, **equal: str) -> list[dict[str, Any]]:
    rows = workspace.query("SELECT * FROM images ORDER BY seen_at, uri, event").to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in equal.items())]


def current(workspace: Workspace) -> dict[str, dict[str, Any]]:
    rows = workspace.query("SELECT * FROM current_images").to_pylist()
    found = {row["uri"]: row for row in rows}
    assert len(found) == len(rows), "a uri is current twice"
    return found


def labels(workspace: Workspace) -> dict[str, str]:
    """Current label by file name."""
    rows = workspace.query(
        "SELECT i.uri, l.label, l.task, l.origin FROM current_labels l JOIN current_images i USING (image_id)"
    ).to_pylist()
    assert {(row["task"], row["origin"]) for row in rows} <= {("animals", "imported")}
    return {uris.name_of(row["uri"]): row["label"] for row in rows}


# ------------------------------------------------------------------------------------------------------ increments


def test_second_ingest_writes_only_what_is_new_changed_or_gone(workspace: Workspace, photos: Path) -> None:
    assert counts(workspace.ingest([str(photos)])) == (4, 0, 0, 0)
    again = workspace.ingest([str(photos)])
    assert (counts(again), again.run_id, again.verdict) == ((0, 0, 0, 4), None, "nothing new: 4 unchanged")
    before = current(workspace)

    put(photos / "train/cat/1.jpg", "another content")
    put(photos / "new.jpg", "new")
    (photos / "loose.jpg").unlink()
    result = workspace.ingest([str(photos)])
    assert counts(result) == (1, 1, 1, 2)
    assert Counter(row["event"] for row in events(workspace, run=result.run_id)) == {
        "added": 1,
        "changed": 1,
        "replaced": 1,
        "vanished": 1,
    }
    changed = uris.from_path(photos / "train/cat/1.jpg")
    now = current(workspace)
    assert uris.from_path(photos / "loose.jpg") not in now
    assert now[changed]["image_id"] != before[changed]["image_id"]
    assert now[changed]["image_id"] == uris.image_id(changed, now[changed]["version"])
    assert (now[changed]["split"], now[changed]["audit"]) == (before[changed]["split"], before[changed]["audit"])
    (replaced,) = events(workspace, event="replaced")
    assert replaced["image_id"] == before[changed]["image_id"]

    put(photos / "loose.jpg", "back again")
    assert counts(workspace.ingest([str(photos)])) == (1, 0, 0, 4)
    assert current(workspace)[uris.from_path(photos / "loose.jpg")]["event"] == "added"
    assert counts(workspace.ingest([str(photos)])) == (0, 0, 0, 5)


def test_runs_tell_what_was_done(workspace: Workspace, photos: Path) -> None:
    put(photos / ".DS_Store", "x")
    put(photos / "__MACOSX" / "1.jpg", "x")
    put(photos / "notes.json", "{}")
    result = workspace.ingest([str(photos)], pattern="{split}/{label}/*", exclude=["*.json"])
    assert result.skipped == {"system": 1, "archive": 1, "excluded": 1}
    assert (counts(result), result.num_unmatched, result.num_labels) == ((4, 0, 0, 0), 1, 3)
    (row,) = workspace.query("SELECT * FROM runs").to_pylist()
    assert (row["run_id"], row["job"], row["status"]) == (result.run_id, "ingest", "finished")
    assert dict(row["counts"]) == {
        "listed": 7,
        "added": 4,
        "changed": 0,
        "vanished": 0,
        "unchanged": 0,
        "labels": 3,
        "masks": 0,
        "unmatched": 1,
        "skipped.system": 1,
        "skipped.archive": 1,
        "skipped.excluded": 1,
    }
    assert row["verdict"] == "4 added, 3 labels imported, 3 skipped"
    assert row["peak_memory_bytes"] > 0
    assert {"list", "compare", "write"} <= set(dict(row["seconds"]))


def test_no_image_is_opened(workspace: Workspace, photos: Path) -> None:
    for path in photos.rglob("*.jpg"):
        path.chmod(0)
    accessed = {path: path.stat().st_atime_ns for path in photos.rglob("*.jpg")}
    assert counts(workspace.ingest([str(photos)])) == (4, 0, 0, 0)
    assert {path: path.stat().st_atime_ns for path in accessed} == accessed


def test_zero_byte_files_come_in_and_empty_folders_warn(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    result = workspace.ingest([str(tmp_path / "empty")])
    assert (counts(result), result.run_id) == ((0, 0, 0, 0), None)
    assert "lists no object" in caplog.text
    (tmp_path / "empty" / "zero.jpg").touch()
    assert counts(workspace.ingest([str(tmp_path / "empty")])) == (1, 0, 0, 0)
    (tmp_path / "empty" / "zero.jpg").unlink()
    assert counts(workspace.ingest([str(tmp_path / "empty")])) == (0, 0, 1, 0)


def test_single_files_come_in_whatever_their_name(workspace: Workspace, photos: Path) -> None:
    put(photos / ".hidden.jpg", "x")
    assert counts(workspace.ingest([str(photos / ".hidden.jpg"), str(photos / "loose.jpg")])) == (2, 0, 0, 0)


# ---------------------------------------------------------------------------------------------------------- sources


def test_images_vanish_only_from_the_source_that_they_came_from(workspace: Workspace, photos: Path) -> None:
    workspace.ingest([str(photos)])
    assert counts(workspace.ingest([str(photos / "train")])) == (0, 0, 0, 2)  # known from the folder above
    (photos / "train/cat/1.jpg").unlink()
    assert counts(workspace.ingest([str(photos / "train")])) == (0, 0, 0, 1)
    assert counts(workspace.ingest([f"{photos}/"], vanish=False)) == (0, 0, 0, 3)
    assert counts(workspace.ingest([f"{photos}/"])) == (0, 0, 1, 3)
    assert len(current(workspace)) == 3


def test_a_source_that_lists_nothing_any_more_is_remarked(
    workspace: Workspace, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace.ingest([str(photos)])
    answered = current(workspace)
    photos.rename(photos.with_name("unmounted"))
    photos.mkdir()
    assert counts(workspace.ingest([str(photos)])) == (0, 0, 4, 0)
    assert "nothing is listed there any more, so all 4 images of it count as vanished" in caplog.text
    photos.rmdir()
    photos.with_name("unmounted").rename(photos)
    caplog.clear()
    workspace.ingest([str(photos)])
    assert set(current(workspace)) == set(answered)
    assert "any more" not in caplog.text


def test_image_under_two_sources_of_one_call_is_one(workspace: Workspace, photos: Path) -> None:
    result = workspace.ingest([str(photos / "train"), str(photos)])
    assert (counts(result), result.skipped) == ((4, 0, 0, 0), {"listed_twice": 2})
    assert current(workspace)[uris.from_path(photos / "train/cat/1.jpg")]["source"] == uris.from_path(photos / "train")


def test_copies_keep_their_parent_and_those_of_an_unfinished_run_are_left_out(
    workspace: Workspace, photos: Path, tmp_path: Path
) -> None:
    workspace.ingest([str(photos)])
    parent = current(workspace)[uris.from_path(photos / "loose.jpg")]
    copies = tmp_path / "copies"
    for number in (1, 2):
        put(copies / f"{parent['image_id']}-0123456789ab-{number}.png", "pixels")
    put(copies / f"{'0' * 32}-0123456789ab-1.png", "a copy of an image that is not ours")
    result = workspace.ingest([str(copies)])
    assert (counts(result), result.skipped) == ((1, 0, 0, 0), {"unpublished_copy": 2})

    publish_copy(workspace, parent, copies / f"{parent['image_id']}-0123456789ab-1.png", copies)
    result = workspace.ingest([str(copies)])
    assert (counts(result), result.skipped) == ((0, 0, 0, 2), {"unpublished_copy": 1})
    uri = uris.from_path(copies / f"{parent['image_id']}-0123456789ab-1.png")
    put(Path(uris.local_path(uri)), "other pixels")
    assert counts(workspace.ingest([str(copies)])) == (0, 1, 0, 1)
    assert (current(workspace)[uri]["parent"], current(workspace)[uri]["group"]) == (
        parent["image_id"],
        parent["group"],
    )
    Path(uris.local_path(uri)).unlink()
    assert counts(workspace.ingest([str(copies)])) == (0, 0, 1, 1)
    assert uri not in current(workspace)


def publish_copy(workspace: Workspace, parent: dict[str, Any], path: Path, source: Path) -> None:
    """What `winnow augment` publishes of one copy."""
    uri = uris.from_path(path)
    version = workspace.stores.version(uri)
    ledger = workspace.warehouse.ledger
    run = ledger.begin(
        Plan(
            run_id=new_run_id("augment"),
            job="augment",
            claims=ledger.next_numbers(["augment-test"]),
            digest="",
            config={},
            num_planned=0,
            started_at=datetime.now(UTC).isoformat(),
            code_version="",
        )
    )
    assert run is not None
    row = {name: parent[name] for name in ("split", "group", "audit")} | {
        "image_id": uris.image_id(uri, version),
        "seen_at": datetime.now(UTC),
        "event": "added",
        "uri": uri,
        "version": version,
        "source": uris.from_path(source),
        "parent": parent["image_id"],
        "run": run.run_id,
    }
    run.decide("finished", [run.stage("images", pa.Table.from_pylist([row]))], {})
    run.close()


def test_manifest_names_images_once_with_metadata(workspace: Workspace, tmp_path: Path) -> None:
    manifest = csv(
        tmp_path / "list.csv",
        "uri,etag,size,camera",
        "s3://b/1.jpg,e1,5,north",
        "s3://b/2.jpg,,,",
        "s3://b/1.jpg,e9,5,south",
        "s3://b/.DS_Store,e,1,",
        "s3://b/folder/,e,0,",
    )
    result = workspace.ingest([manifest])
    assert (counts(result), result.skipped) == ((2, 0, 0, 0), {"directory": 1, "listed_twice": 1, "system": 1})
    found = current(workspace)
    assert (found["s3://b/1.jpg"]["version"], found["s3://b/1.jpg"]["metadata"]) == ("e1", [("camera", "north")])
    assert (found["s3://b/2.jpg"]["version"], found["s3://b/2.jpg"]["metadata"]) == ("unversioned", None)
    assert found["s3://b/1.jpg"]["source"] == uris.from_path(manifest)
    # A list without versions says nothing against a version that is known.
    assert counts(workspace.ingest([csv(tmp_path / "list.csv", "uri", "s3://b/1.jpg")])) == (0, 0, 1, 1)
    assert counts(workspace.ingest([csv(tmp_path / "list.csv", "uri,etag", "s3://b/1.jpg,e2")])) == (0, 1, 0, 0)


def test_missing_local_files_of_a_manifest_are_counted(workspace: Workspace, photos: Path) -> None:
    manifest = csv(photos / "list.txt", "loose.jpg", "gone.jpg")
    result = workspace.ingest([manifest])
    assert (counts(result), result.skipped) == ((1, 0, 0, 0), {"missing": 1})


def test_faults_of_the_call_stop_before_anything_is_written(workspace: Workspace, tmp_path: Path, photos: Path) -> None:
    bad_split = csv(tmp_path / "l.csv", "uri,split", "s3://b/1,train", "s3://b/2,vali")
    calls: list[tuple[str, list[str], dict[str, Any]]] = [
        ("nothing to ingest", [], {}),
        ("does not exist", [str(tmp_path / "nowhere")], {}),
        (r"split 'vali' is unknown; choose train, val or test \(row 2 of .*l.csv", [bad_split], {}),
        ("split 'loud' is unknown.*'loud/1.jpg'", [str(tmp_path / "s")], {"pattern": "{split}/*"}),
        ("task 'plants' is unknown; configured tasks: animals", [str(photos)], {"task": "plants"}),
        ("names nothing", [str(photos)], {"pattern": "*/*"}),
        ("has no column 'uri'", [csv(tmp_path / "u.csv", "url", "s3://b/1")], {}),
        ("holds a password", ["https://me:topsecret@host/x.jpg"], {}),
    ]
    put(tmp_path / "s" / "loud" / "1.jpg", "x")
    for message, sources, options in calls:
        with pytest.raises(CallError, match=message) as caught:
            workspace.ingest(sources, **options)
        assert "topsecret" not in str(caught.value)
    assert not list(workspace.warehouse.store.list("runs/"))
    assert not list(workspace.warehouse.store.list("claims/"))
    assert not events(workspace)


# ------------------------------------------------------------------------------------------- splits, groups, labels


def test_splits_and_audit_come_by_hash_and_never_change(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    lines = [f"s3://b/{number}.jpg,e{number}" for number in range(2000)]
    workspace.ingest([csv(tmp_path / "l.csv", "uri,etag", *lines)])
    before = current(workspace)
    shares = Counter(row["split"] for row in before.values())
    assert 1500 < shares["train"] < 1700
    assert 20 <= sum(row["audit"] for row in before.values()) <= 65
    assert all(row["group"] == uri for uri, row in before.items())

    other = make_workspace(tmp_path, f"{CONFIG}[splits]\ntrain = 0.0\nval = 0.0\ntest = 1.0\naudit = 1.0\n")
    # Every object changed, some are new, and the list now claims another split.
    lines = [f"s3://b/{number}.jpg,f{number},val" for number in range(2000)]
    lines += [f"s3://b/new-{number}.jpg,e," for number in range(10)]
    result = other.ingest([csv(tmp_path / "l.csv", "uri,etag,split", *lines)])
    assert counts(result) == (10, 2000, 0, 0)
    after = current(other)
    assert sides(after, before) == sides(before, before)
    fresh = [row for uri, row in after.items() if uri not in before]
    assert {(row["split"], row["audit"]) for row in fresh} == {("test", True)}
    # Gone and back again: still the same side.
    other.ingest([csv(tmp_path / "l.csv", "uri,etag", "s3://b/none.jpg,e")])
    other.ingest([csv(tmp_path / "l.csv", "uri,etag", *(f"s3://b/{number}.jpg,g" for number in range(2000)))])
    again = current(other)
    assert sides(again, before) == sides(before, before)


def sides(rows: dict[str, dict[str, Any]], of: Iterable[str]) -> list[tuple[str, bool]]:
    return [(rows[uri]["split"], rows[uri]["audit"]) for uri in of]


def test_groups_stay_on_one_side(workspace: Workspace, tmp_path: Path) -> None:
    lines = [f"s3://b/{number}.jpg,visit-{number // 10}" for number in range(400)]
    workspace.ingest([csv(tmp_path / "a.csv", "uri,group", *lines)])
    found_sides = {(row["group"], row["split"], row["audit"]) for row in current(workspace).values()}
    assert len(found_sides) == 40
    (test_group, *_) = sorted(group for group, split, _ in found_sides if split == "test")
    # New images of a known group follow it, also against the list; new groups follow the list.
    lines = [
        f"s3://b/late-1.jpg,{test_group},train",
        f"s3://b/late-2.jpg,{test_group},",
        "s3://b/x.jpg,x,val",
        "s3://b/y.jpg,x,",
    ]
    workspace.ingest([csv(tmp_path / "b.csv", "uri,group,split", *lines)])
    found = {uris.name_of(uri): row["split"] for uri, row in current(workspace).items()}
    assert [found[name] for name in ("late-1.jpg", "late-2.jpg", "x.jpg", "y.jpg")] == ["test", "test", "val", "val"]
    with pytest.raises(CallError, match="group 'g' has images with split 'test' and with split 'train'"):
        workspace.ingest([csv(tmp_path / "c.csv", "uri,group,split", "s3://c/1,g,train", "s3://c/2,g,test")])


def test_labels_come_from_the_pattern_and_are_not_repeated(workspace: Workspace, photos: Path) -> None:
    pattern = "{split}/{label}/*"
    assert workspace.ingest([str(photos)], pattern=pattern).num_labels == 3
    assert labels(workspace) == {"1.jpg": "cat", "2.jpg": "dog", "3.jpg": "cat"}
    assert workspace.ingest([str(photos)], pattern=pattern).run_id is None
    put(photos / "train/cat/1.jpg", "changed")
    result = workspace.ingest([str(photos)], pattern=pattern)
    assert (counts(result), result.num_labels) == ((0, 1, 0, 3), 1)
    assert labels(workspace) == {"1.jpg": "cat", "2.jpg": "dog", "3.jpg": "cat"}
    split = {uris.name_of(uri): row["split"] for uri, row in current(workspace).items()}
    assert (split["1.jpg"], split["3.jpg"]) == ("train", "test")


def test_labels_may_follow_later_and_be_mended(workspace: Workspace, tmp_path: Path) -> None:
    def ingest_list(*rows: str) -> IngestResult:
        return workspace.ingest([csv(tmp_path / "l.csv", "uri,etag,label", *rows)])

    ingest_list("s3://b/1.jpg,e,", "s3://b/2.jpg,e,")
    result = ingest_list("s3://b/1.jpg,e,cat", "s3://b/2.jpg,e,  ")
    assert (counts(result), result.num_labels) == ((0, 0, 0, 2), 1)
    for label in ("dog", "cat"):
        assert ingest_list(f"s3://b/1.jpg,e,{label}", "s3://b/2.jpg,e,").num_labels == 1
        assert labels(workspace) == {"1.jpg": label}
    assert ingest_list("s3://b/1.jpg,e,cat", "s3://b/2.jpg,e,").run_id is None
    # An object that returns to a former version is a former image: it keeps its labels, and gets no second one.
    assert ingest_list("s3://b/1.jpg,f,cat", "s3://b/2.jpg,e,").num_labels == 1
    result = ingest_list("s3://b/1.jpg,e,cat", "s3://b/2.jpg,e,")
    assert (counts(result), result.num_labels) == ((0, 1, 0, 1), 0)
    assert labels(workspace) == {"1.jpg": "cat"}


def test_labels_need_one_task_and_known_classes(tmp_path: Path, photos: Path) -> None:
    pattern = "{folder}/{label}/*"
    none = make_workspace(tmp_path / "none", "")
    assert counts(none.ingest([str(photos)])) == (4, 0, 0, 0)
    with pytest.raises(CallError, match="no task is configured"):
        none.ingest([str(photos)], pattern=pattern)
    task = 'model = "torchvision/mobilenet_v2"\nclasses = ["cat", "dog"]\n'
    two = make_workspace(tmp_path / "two", f"[tasks.a]\n{task}[tasks.b]\n{task}")
    with pytest.raises(CallError, match="--task: a, b"):
        two.ingest([csv(tmp_path / "l.csv", "uri,label", "s3://b/1,cat")])
    assert two.ingest([str(photos)], pattern=pattern, task="b").num_labels == 3
    assert set(two.query("SELECT task FROM labels").column("task").to_pylist()) == {"b"}
    metadata = {uris.name_of(uri): row["metadata"] for uri, row in current(two).items()}
    folders = {"1.jpg": "train", "2.jpg": "train", "3.jpg": "test"}
    assert metadata == {name: [("folder", folder)] for name, folder in folders.items()} | {"loose.jpg": None}
    put(photos / "train/cow/5.jpg", "moo")
    with pytest.raises(CallError, match=r"unknown to task 'a': 'cow' \(1 images\); its classes are 'cat', 'dog'"):
        two.ingest([str(photos)], pattern=pattern, task="a")


SEGMENTATION = """
[tasks.parts]
kind = "segmentation"
model = "torchvision/lraspp_mobilenet_v3_large"
"""


def masks(workspace: Workspace) -> dict[str, str]:
    """URI of the current mask by file name."""
    rows = workspace.query(
        "SELECT i.uri, l.* EXCLUDE image_id FROM current_labels l JOIN current_images i USING (image_id) "
        "WHERE l.task = 'parts'"
    ).to_pylist()
    assert {(row["event"], row["origin"], row["label"]) for row in rows} <= {("imported", "imported", None)}
    return {uris.name_of(row["uri"]): json.loads(row["value"])["mask"] for row in rows}


def test_masks_come_in_as_labels_of_the_segmentation_task_and_are_not_repeated(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, CONFIG + SEGMENTATION)

    def ingest_list(*rows: str) -> IngestResult:
        return workspace.ingest([csv(tmp_path / "l.csv", "uri,etag,Mask,label", *rows)])

    first = ingest_list("s3://b/1.jpg,e,masks/1 a.png,cat", "s3://b/2.jpg,e,S3://m/2.png,", "s3://b/3.jpg,e, ,dog")
    assert (counts(first), first.num_labels, first.num_masks) == ((3, 0, 0, 0), 2, 2)
    assert first.verdict == "3 added, 2 labels imported, 2 masks imported"
    expected = {"1.jpg": (tmp_path / "masks" / "1 a.png").as_uri(), "2.jpg": "s3://m/2.png"}
    assert masks(workspace) == expected
    images = workspace.query("SELECT DISTINCT metadata FROM images").to_pylist()
    assert images == [{"metadata": None}], "a mask is no metadata"
    rows = workspace.query("SELECT task, label FROM labels WHERE value IS NULL ORDER BY label").to_pylist()
    assert rows == [{"task": "animals", "label": "cat"}, {"task": "animals", "label": "dog"}]

    again = ingest_list("s3://b/1.jpg,e,./masks/1 a.png,cat", "s3://b/2.jpg,e,s3://m/2.png,", "s3://b/3.jpg,e,,dog")
    assert (again.run_id, again.num_masks) == (None, 0)
    other = ingest_list("s3://b/1.jpg,e,masks/new.png,cat", "s3://b/2.jpg,e,,", "s3://b/3.jpg,e,s3://m/3.png,dog")
    assert (counts(other), other.num_labels, other.num_masks) == ((0, 0, 0, 3), 0, 2)
    expected |= {"1.jpg": (tmp_path / "masks" / "new.png").as_uri(), "3.jpg": "s3://m/3.png"}
    assert masks(workspace) == expected
    # A changed object is a new image, and has its mask again.
    changed = ingest_list("s3://b/1.jpg,f,masks/new.png,cat")
    assert (changed.num_changed, changed.num_vanished, changed.num_labels, changed.num_masks) == (1, 2, 1, 1)
    assert masks(workspace) == {"1.jpg": expected["1.jpg"]}


def test_masks_need_a_segmentation_task(tmp_path: Path) -> None:
    listed = csv(tmp_path / "l.csv", "uri,etag,mask", "s3://b/1.jpg,e,s3://m/1.png")
    both = csv(tmp_path / "b.csv", "uri,etag,mask,label", "s3://b/1.jpg,e,s3://m/1.png,cat")
    none = make_workspace(tmp_path / "none")
    with pytest.raises(CallError, match="masks come in, but no task with kind = 'segmentation' is configured"):
        none.ingest([listed])
    with pytest.raises(CallError, match=r"masks come in, but task 'animals' is a classification task; .*--task"):
        none.ingest([listed], task="animals")
    two = make_workspace(tmp_path / "two", CONFIG + SEGMENTATION + SEGMENTATION.replace("parts", "others"))
    with pytest.raises(CallError, match=r"masks come in, but for which task.*--task: others, parts"):
        two.ingest([listed])
    labels_only = csv(tmp_path / "o.csv", "uri,label", "s3://b/1.jpg,cat")
    with pytest.raises(CallError, match="labels of images come in, but task 'parts' is a segmentation task"):
        two.ingest([labels_only], task="parts")
    assert two.query("SELECT count(*) AS n FROM images").to_pylist() == [{"n": 0}]
    found = two.ingest([both], task="parts")
    assert (found.num_labels, found.num_masks) == (1, 1)
    assert masks(two) == {"1.jpg": "s3://m/1.png"}


def test_a_malformed_mask_is_named_with_its_row(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, SEGMENTATION)
    with pytest.raises(CallError, match=r"l.csv has malformed rows:\n  row 2: .*password"):
        workspace.ingest([csv(tmp_path / "l.csv", "uri,mask", "s3://b/1,", "s3://b/2,https://me:secret@server/2.png")])
    assert workspace.query("SELECT count(*) AS n FROM images").to_pylist() == [{"n": 0}]


# ------------------------------------------------------------------------------------------------------- exactly once


def big_manifest(folder: Path, num_rows: int = 60_000) -> str:
    path = folder / "big.parquet"
    table = pa.table(
        {
            "uri": [f"s3://b/{number}.jpg" for number in range(num_rows)],
            "etag": [f"e{number}" for number in range(num_rows)],
            "label": [f"class-{number % 3}" for number in range(num_rows)],
        }
    )
    pq.write_table(table, path)
    return str(path)


def start(workspace: Workspace, *arguments: str) -> subprocess.Popen[bytes]:
    code = "from winnow_jobs.cli.main import main; main()"
    command = [sys.executable, "-c", code, "--config", str(workspace.config_path), "ingest", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def check_exact(workspace: Workspace, num_rows: int) -> None:
    (found,) = workspace.query(
        "SELECT count(*) AS images, count(DISTINCT image_id) AS ids, (SELECT count(*) FROM labels) AS labels, "
        "(SELECT count(*) FROM runs WHERE status = 'finished') AS runs FROM images"
    ).to_pylist()
    assert found == {"images": num_rows, "ids": num_rows, "labels": num_rows, "runs": 1}


def test_rerun_after_kill_publishes_every_row_once(workspace: Workspace, tmp_path: Path) -> None:
    manifest = big_manifest(tmp_path)
    driver = start(workspace, manifest)
    # The plan is written; files of each table are written; the outcome is decided and not yet published.
    for stage in ("runs/", "tables/images/", "tables/labels/", "tables/images/", "runs/*/outcome.json"):
        before = _files(workspace, stage)
        deadline = time.monotonic() + 60
        while driver.poll() is None and _files(workspace, stage) == before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kill_driver(driver)
        assert driver.stdout is not None
        driver.stdout.close()
        if not _files(workspace, "runs/*/outcome.json"):
            assert not events(workspace)
        driver = start(workspace, manifest)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output.decode()
    check_exact(workspace, 60_000)
    assert workspace.ingest([manifest]).run_id is None
    check_exact(workspace, 60_000)


def _files(workspace: Workspace, prefix: str) -> set[str]:
    """Keys under a prefix, without the tables' logs; ``*`` in it stands for a run."""
    folder, star, rest = prefix.partition("*")
    keys = (info.key for info in workspace.warehouse.store.list(folder))
    return {key for key in keys if "_delta_log" not in key and (not star or key.endswith(rest))}


def test_two_ingests_at_once_publish_once(workspace: Workspace, tmp_path: Path) -> None:
    manifest = big_manifest(tmp_path, 20_000)
    drivers = [start(workspace, manifest, "--json") for _ in range(2)]
    outputs = [driver.communicate(timeout=120)[0].decode() for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    check_exact(workspace, 20_000)
    results = [json.loads(output[output.index('{"run_id"') :]) for output in outputs]
    finished = {result["run_id"] for result in results} - {None}
    assert len(finished) == 1
    for result in results:
        assert result["num_added"] + result["num_unchanged"] == 20_000


def test_driver_that_loses_the_decision_reports_what_was_published(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other driver decides while this one has written its files and not yet decided."""
    from winnow_connectors.ledger import Run

    decide = Run.decide
    other: list[IngestResult] = []

    def late(run: Run, *arguments: Any) -> bool:
        monkeypatch.setattr(Run, "decide", decide)
        other.append(Workspace(workspace.config_path).ingest([str(photos)]))
        return decide(run, *arguments)

    monkeypatch.setattr(Run, "decide", late)
    result = workspace.ingest([str(photos)])
    assert result.run_id == other[0].run_id
    assert counts(result) == counts(other[0]) == (4, 0, 0, 0)
    assert result.verdict == "the same work was published by another driver: 4 added"
    assert len(events(workspace)) == 4


def test_open_run_is_joined_by_the_same_call_and_refuses_another(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from winnow_connectors.ledger import Run

    class Crash(BaseException):
        pass

    def crash(run: Run, *arguments: Any) -> bool:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Run, "decide", crash)
        with pytest.raises(Crash):
            workspace.ingest([str(photos)])
    (run,) = workspace.warehouse.ledger.open_runs()
    assert not events(workspace)
    with pytest.raises(OpenRunError, match=f"winnow runs abandon {run.run_id}"):
        workspace.ingest([str(photos)], vanish=False)
    assert IngestCall.from_dict(run.plan.config).sources == (uris.from_path(photos),)
    (photos / "loose.jpg").unlink()
    result = workspace.resume(run.run_id)
    assert isinstance(result, IngestResult)
    assert (result.run_id, counts(result)) == (run.run_id, (3, 0, 0, 0))
    assert workspace.warehouse.ledger.open_runs() == []
    assert len(events(workspace)) == 3


def test_open_run_with_nothing_left_to_do_is_finished(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from winnow_connectors.ledger import Run

    folder = tmp_path / "one"
    put(folder / "1.jpg", "x")

    def crash(run: Run, *arguments: Any) -> bool:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Run, "decide", crash)
        with pytest.raises(SystemExit):
            workspace.ingest([str(folder)])
    (folder / "1.jpg").unlink()
    result = workspace.ingest([str(folder)])
    assert result.run_id is not None
    assert counts(result) == (0, 0, 0, 0)
    assert workspace.warehouse.ledger.open_runs() == []


@pytest.mark.parametrize("moment", ["comparing", "writing"])
def test_ctrl_c_leaves_nothing_visible_and_no_open_run(
    workspace: Workspace, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = big_manifest(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    driver = start(workspace, manifest)
    deadline = time.monotonic() + 60
    while driver.poll() is None:
        if any(scratch.rglob("compare.duckdb")) if moment == "comparing" else _files(workspace, "claims/"):
            break
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(driver.pid, signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert workspace.warehouse.ledger.open_runs() == []
    assert not list(scratch.iterdir())
    if driver.returncode == 0:  # it was quicker than the signal
        check_exact(workspace, 60_000)
        return
    assert driver.returncode == 130, output.decode()
    assert b"Traceback" not in output
    assert not events(workspace)
    workspace.ingest([manifest], vanish=False)
    check_exact(workspace, 60_000)


def test_times_of_events_rise_even_when_clocks_do_not(
    workspace: Workspace, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime

    from winnow_connectors import changes

    class Slow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(2020, 1, 1, tzinfo=UTC)

    workspace.ingest([str(photos)])
    monkeypatch.setattr(changes, "datetime", Slow)
    put(photos / "loose.jpg", "changed")
    assert counts(workspace.ingest([str(photos)])) == (0, 1, 0, 3)
    assert counts(workspace.ingest([str(photos)])) == (0, 0, 0, 4)
    assert len(current(workspace)) == 4


# ---------------------------------------------------------------------------------------------------- names, command


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_awkward_names_survive_or_are_counted(
    tmp_path: Path, shared_data: Path, place: str, request: pytest.FixtureRequest
) -> None:
    with tarfile.open(shared_data / "hostile" / "awkward_names.tar") as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        objects = {member.name.removeprefix("./"): b"x" * member.size for member in members}
    more = ("new\nline.jpg", "a+b %20.jpg", "#1?.jpg", "deep/.DS_Store", "zero/real.jpg", "._r.jpg")
    objects |= dict.fromkeys(more, b"x")
    objects["zero/real.jpg"] = b""
    storage = ""
    if place == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        storage = storage_section(server.endpoint, server.credentials_file)
        source = f"s3://{server.make_bucket('awkward')}/in"
        objects["/".join(["k" * 200] * 4) + "/" + "l" * 189 + ".jpg"] = b"long"
        assert any(len(f"in/{name}") == 1000 for name in objects)
        objects["folder/"] = b""
        objects["k#?/" + "%25" * 60 + ".jpg"] = b"x"
    else:
        source = str(tmp_path / "in # %20")
    workspace = make_workspace(tmp_path / "workspace", f"{CONFIG}\n{storage}")
    target = workspace.stores.at(source)
    root = workspace.stores.canonical(source)
    for name, data in objects.items():
        if place == "s3" and ("\n" in name or name.endswith("/")):
            _put_by_boto(server, f"{root}/{name}", data)
        else:
            target.put(name, data)
    result = workspace.ingest([source])
    junk = {".DS_Store": "system", "Thumbs.db": "system", "._r.jpg": "system", ".hidden.jpg": "hidden", "": "directory"}
    skipped = Counter(junk[name.rpartition("/")[2]] for name in objects if name.rpartition("/")[2] in junk)
    assert result.skipped == skipped
    assert counts(result) == (len(objects) - sum(skipped.values()), 0, 0, 0)
    found = current(workspace)
    kept = {uris.join(root, name): data for name, data in objects.items() if name.rpartition("/")[2] not in junk}
    assert found.keys() == kept.keys()
    assert all(found[uri]["size"] == len(data) for uri, data in kept.items())
    assert workspace.ingest([f"{source}/"]).run_id is None


def _put_by_boto(server: S3Server, uri: str, data: bytes) -> None:
    """obstore cannot name keys with control characters, or that end in a slash."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    _, bucket, key = uris.split(uri)
    client.put_object(Bucket=bucket, Key=key, Body=data)
    client.close()


def test_command_prints_counts_and_json(workspace: Workspace, photos: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from winnow_jobs.cli.main import cli

    runner = CliRunner()
    arguments = ["--config", str(workspace.config_path), "ingest", str(photos), "--pattern", "{split}/{label}/*"]
    shown = runner.invoke(cli, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[:7] == [
        "listed               4",
        "added                4",
        "changed              0",
        "vanished             0",
        "unchanged            0",
        "labels imported      3",
        "path does not match  1",
    ]
    found = json.loads(runner.invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert (found["run_id"], found["num_unchanged"], found["num_unmatched"]) == (None, 4, 1)


def test_works_where_an_event_loop_runs_already(workspace: Workspace, tmp_path: Path) -> None:
    """As in a notebook."""
    import asyncio

    from faulty_http import FaultyHttp

    async def cell(manifest: str) -> IngestResult:
        return ingest(workspace, [manifest], stat=True)

    with FaultyHttp() as server:
        server.put("/1.jpg", b"abc")
        result = asyncio.run(cell(csv(tmp_path / "l.txt", f"{server.url}/1.jpg", f"{server.url}/2.jpg")))
    assert (counts(result), result.skipped) == ((1, 0, 0, 0), {"missing": 1})
