"""A real Label Studio over HTTP: what is checked first, that nothing is lost or doubled, and that changes are found."""

from __future__ import annotations

import io
import json
import logging
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import obstore
import pytest
import urllib3
from obstore.store import S3Store
from PIL import Image

from flaky_proxy import Fault, FlakyProxy
from winnow.errors import CallError, ReviewError
from winnow.mask_files import read_label
from winnow.masks import encode
from winnow_connectors import label_studio as module
from winnow_connectors import label_sync
from winnow_connectors.label_config import add_classes, instructions, label_config
from winnow_connectors.label_studio import LabelStudio, Project, S3Storage
from winnow_connectors.label_sync import Synced, sync
from winnow_connectors.label_tasks import (
    Json,
    ReviewItem,
    Shape,
    class_result,
    mask_results,
    prediction,
    read_annotation,
    read_class,
    read_masks,
    task_data,
)
from winnow_connectors.objects import Patience

if TYPE_CHECKING:
    from conftest import S3Server
    from winnow_jobs.local_label_studio import LocalLabelStudio

TOKEN = "5ec2e7" * 6 + "abcd"
SHORT = Patience(silence_s=10.0, retry_s=0.5)
CLASSES = ["cat", "dog"]
needs_server = [pytest.mark.label_studio, pytest.mark.timeout(1200)]


def _ids(num: int, start: int = 0) -> list[str]:
    return [f"{number:032x}" for number in range(start, start + num)]


def _make(image_ids: Sequence[str], *, model: str | None = "pets@1", label: str = "cat") -> list[Json]:
    tasks = []
    for image_id in image_ids:
        rank = int(image_id, 16)
        item = ReviewItem(image_id, 1, rank, "margin", False, f"s3://review/{image_id}.jpg", 8, 6)
        predictions = [] if model is None else [prediction(model, rank, class_result(label, confidence=0.5))]
        tasks.append({"data": task_data(item), "predictions": predictions})
    return tasks


def _sync(
    server: LabelStudio, project_id: int, image_ids: Sequence[str], make: Any, *, model: str | None, **options: Any
) -> Synced:
    """As ``sync``, of one round: with image ids for keys."""
    wanted = {(image_id, 1): model for image_id in image_ids}
    synced = sync(server, project_id, wanted, lambda keys: make([image_id for image_id, _ in keys]), **options)
    return replace(synced, task_ids={image_id: number for (image_id, _), number in synced.task_ids.items()})


def _project(server: LabelStudio, kind: Any = "classification") -> Project:
    return server.create_project(
        f"winnow {uuid.uuid4().hex[:12]}",
        config=label_config(kind, CLASSES),
        instructions=instructions("pets", kind, CLASSES),
        in_order=True,
    )


def _annotate(server: LabelStudio, task_id: int, result: list[Json], **more: Any) -> int:
    answer = server._api.post(f"/api/tasks/{task_id}/annotations/", {"result": result, "lead_time": 2.5, **more})
    return int(answer["id"])


# -- what is checked first ---------------------------------------------------------------------------------------------


class _Pretender(BaseHTTPRequestHandler):
    """A server that answers the two calls of a check as another Label Studio would."""

    release: ClassVar[Any] = {"release": "1.23.2"}
    permissions: ClassVar[list[str]] = []
    moved: ClassVar[str | None] = None
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if self.moved is not None:
            self.send_response(302)
            self.send_header("Location", self.moved)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        is_version = self.path == "/api/version"
        data = json.dumps(self.release if is_version else {"email": "ann@example.org", "permissions": self.permissions})
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _pretend(**attributes: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Pretender", (_Pretender,), {"seen": [], **attributes}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "LABEL_STUDIO_URL is not set"),
        ({"LABEL_STUDIO_URL": "http://127.0.0.1:9"}, "LABEL_STUDIO_API_KEY is not set"),
        ({"LABEL_STUDIO_URL": "localhost:8080", "LABEL_STUDIO_API_KEY": TOKEN}, "no web address"),
        ({"LABEL_STUDIO_URL": "http://a:hunter2@h", "LABEL_STUDIO_API_KEY": TOKEN}, "holds a password"),
        ({"LABEL_STUDIO_URL": "http://h", "LABEL_STUDIO_API_KEY": f"{TOKEN}\nX: y"}, "is no token"),
    ],
)
def test_a_wrong_environment_is_told_without_its_secrets(environment: dict[str, str], message: str) -> None:
    with pytest.raises(CallError, match=message) as caught:
        LabelStudio.from_environment(environment)
    assert TOKEN not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_unreachable_server_is_told() -> None:
    with pytest.raises(ReviewError, match=r"http://127.0.0.1:9 does not answer .*mend LABEL_STUDIO_URL"):
        LabelStudio("http://127.0.0.1:9", TOKEN, patience=SHORT).check()


@pytest.mark.parametrize("release", [{"release": "1.22.9"}, {"release": "0.9"}])
def test_a_server_that_is_too_old_is_told(release: Json) -> None:
    with _pretend(release=release) as url, pytest.raises(CallError, match=r"too old; upgrade it to 1\.23 or newer"):
        LabelStudio(url, TOKEN, patience=SHORT).check()


@pytest.mark.parametrize("release", [[], {"release": None}, {"version": "1.23.2"}])
def test_a_server_that_is_no_label_studio_is_told(release: Any) -> None:
    with _pretend(release=release) as url, pytest.raises(CallError, match="not as Label Studio does"):
        LabelStudio(url, TOKEN, patience=SHORT).check()


def test_missing_rights_are_named() -> None:
    rights = sorted(module._RIGHTS - {"projects.create", "storages.change"})
    with (
        _pretend(permissions=rights) as url,
        pytest.raises(CallError, match=r"ann@example.org may not .* \(missing: projects.create, storages.change\)"),
    ):
        LabelStudio(url, TOKEN, patience=SHORT).check()
    with _pretend(permissions=[*rights, "projects.create", "storages.change"]) as url:
        assert LabelStudio(url, TOKEN, patience=SHORT).check().user == "ann@example.org"


def test_the_token_follows_no_redirect() -> None:
    with (
        _pretend() as elsewhere,
        _pretend(moved=f"{elsewhere}/api/version") as url,
        pytest.raises(CallError, match="not as Label Studio does"),
    ):
        LabelStudio(url, TOKEN, patience=SHORT).check()


class TestServer:
    pytestmark = needs_server

    def test_a_check_finds_release_and_user(
        self, label_studio: LabelStudio, label_studio_server: LocalLabelStudio
    ) -> None:
        found = label_studio.check()
        assert found.release == "1.23.2"
        assert found.user == "winnow@localhost"
        assert label_studio.url == label_studio_server.url
        assert "winnow@localhost" in label_studio.annotators().values()

    def test_a_wrong_token_is_told_and_no_token_stands_anywhere(
        self, label_studio: LabelStudio, label_studio_server: LocalLabelStudio, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        with pytest.raises(CallError, match="refuses the token in LABEL_STUDIO_API_KEY") as caught:
            LabelStudio(label_studio.url, TOKEN, patience=SHORT).check()
        with pytest.raises(CallError, match="refuses the token"):
            LabelStudio(label_studio.url, TOKEN, patience=SHORT).find_project("pets")
        label_studio.check()
        told = repr(label_studio) + repr(label_studio._api) + repr(caught.value) + caplog.text
        assert TOKEN not in told
        assert label_studio_server.token not in told

    def test_a_personal_access_token_opens_it_too_and_is_renewed(self, label_studio: LabelStudio) -> None:
        personal = label_studio._api.post("/api/token/", {})["token"]
        opened = LabelStudio(label_studio.url, personal, patience=SHORT)
        assert opened.check().user == "winnow@localhost"
        opened._api._authorization = "Bearer ran.out.meanwhile"
        assert opened.annotators()

    def test_a_project_is_found_by_its_exact_title_and_the_oldest_counts(self, label_studio: LabelStudio) -> None:
        made = _project(label_studio)
        assert made.created
        assert label_studio.find_project(made.title[:-1]) is None
        label_studio.create_project(made.title, config=made.config, instructions="", in_order=False)
        found = label_studio.find_project(made.title)
        assert found is not None
        assert (found.project_id, found.config) == (made.project_id, made.config)

    @pytest.mark.parametrize("title", ["ab", "x" * 51])
    def test_an_impossible_title_is_refused(self, label_studio: LabelStudio, title: str) -> None:
        with pytest.raises(CallError, match="cannot be a project's title"):
            label_studio.create_project(title, config="<View/>", instructions="", in_order=True)

    def test_what_the_server_refuses_is_told_with_its_reason(self, label_studio: LabelStudio) -> None:
        with pytest.raises(ReviewError, match=r"refuses POST /api/projects/.*label_config"):
            label_studio.create_project("pets", config="<View><Nonsense", instructions="", in_order=True)
        with pytest.raises(ReviewError, match="was it deleted"):
            label_studio.project(10**6)

    @pytest.mark.parametrize("kind", ["classification", "segmentation"])
    def test_classes_are_added_to_a_project_that_has_answers(self, label_studio: LabelStudio, kind: Any) -> None:
        project = _project(label_studio, kind)
        label_studio.import_tasks(project.project_id, json.dumps(_make(_ids(1), model=None)).encode())
        (task,) = label_studio.tasks(project.project_id)
        shape = Shape("cat", encode(np.eye(6, 8, dtype=np.bool_)))
        _annotate(
            label_studio,
            task.task_id,
            class_result("cat") if kind == "classification" else mask_results([shape], width=8, height=6),
        )
        config, added = add_classes(project.config, kind, ["bird & <co>", "dog"])
        assert added == ["bird & <co>"]
        label_studio.update_project(project.project_id, config=config, instructions="<p>new</p>")
        now = label_studio.project(project.project_id)
        assert add_classes(now.config, kind, ["cat", "dog", "bird & <co>"])[1] == []
        assert now.model == ""


# -- push --------------------------------------------------------------------------------------------------------------


def _assert_once(server: LabelStudio, project_id: int, image_ids: list[str], model: str = "pets@1") -> None:
    tasks = list(server.tasks(project_id))
    assert sorted(task.image_id for task in tasks) == sorted(image_ids)
    assert all(task.models == {model} for task in tasks)


class TestSync:
    pytestmark = needs_server

    @pytest.fixture(autouse=True)
    def _small_chunks_and_short_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(label_sync, "_MAX_TASKS", 10)
        monkeypatch.setattr(label_sync, "_MADE_AT_ONCE", 7)
        monkeypatch.setattr(label_sync, "_PAUSES_S", (0.1,) * 5 + (1.0,))
        monkeypatch.setattr(module, "_PAGE", 12)

    def test_the_second_time_sends_nothing(self, label_studio: LabelStudio) -> None:
        project_id = _project(label_studio).project_id
        ids = _ids(25)
        told: list[int] = []
        first = _sync(label_studio, project_id, ids, _make, model="pets@1", on_progress=told.append)
        assert (first.num_new, first.num_updated, first.num_known, first.num_doubles) == (25, 0, 0, 0)
        assert told == [10, 20, 25]
        _assert_once(label_studio, project_id, ids)

        def make_nothing(image_ids: Sequence[str]) -> list[Json]:
            raise AssertionError("nothing is to be made")

        again = _sync(label_studio, project_id, ids, make_nothing, model="pets@1")
        assert (again.num_new, again.num_updated, again.num_known) == (0, 0, 25)
        assert again.task_ids == first.task_ids
        more = _sync(label_studio, project_id, _ids(30), _make, model="pets@1")
        assert (more.num_new, more.num_known) == (5, 25)
        assert _sync(label_studio, project_id, [], make_nothing, model="pets@1").task_ids == {}

    @pytest.mark.parametrize(
        "faults",
        [["lost"], ["reset"], [502], [503, "lost"], ["late"], ["lost", "reset", 500, "late", "lost"]],
        ids=lambda faults: "+".join(map(str, faults)),
    )
    def test_no_task_is_lost_or_doubled_when_answers_fail(self, label_studio: LabelStudio, faults: list[Fault]) -> None:
        project_id = _project(label_studio).project_id
        ids = _ids(35)
        with FlakyProxy(label_studio.url) as proxy:
            flaky = LabelStudio(proxy.url, label_studio._api._token, patience=Patience(20.0, 20.0))
            flaky.check()
            proxy.faults["POST"] = list(faults)
            proxy.faults["GET"] = [502, "reset"]
            done = _sync(flaky, project_id, ids, _make, model="pets@1")
            assert not proxy.faults["POST"]
        assert done.num_new == 35
        _assert_once(label_studio, project_id, ids)

    def test_a_server_that_keeps_failing_is_given_up_and_the_next_call_goes_on(self, label_studio: LabelStudio) -> None:
        project_id = _project(label_studio).project_id
        with FlakyProxy(label_studio.url) as proxy:
            flaky = LabelStudio(proxy.url, label_studio._api._token, patience=Patience(20.0, 1.0))
            flaky.check()
            proxy.faults["POST"] = ["lost", *[502] * 50]
            with pytest.raises(ReviewError, match="502"):
                _sync(flaky, project_id, _ids(25), _make, model="pets@1")
        assert _sync(label_studio, project_id, _ids(25), _make, model="pets@1").num_known == 10
        _assert_once(label_studio, project_id, _ids(25))

    def test_a_new_version_reaches_only_what_nobody_has_answered(self, label_studio: LabelStudio) -> None:
        project_id = _project(label_studio).project_id
        ids = _ids(15)
        task_ids = _sync(label_studio, project_id, ids, _make, model="pets@1").task_ids
        _annotate(label_studio, task_ids[ids[0]], class_result("dog"))
        _annotate(label_studio, task_ids[ids[1]], [], was_cancelled=True)
        newer = _sync(
            label_studio, project_id, ids, lambda some: _make(some, model="pets@2", label="dog"), model="pets@2"
        )
        assert (newer.num_new, newer.num_updated, newer.num_known) == (0, 13, 2)
        models = {task.image_id: task.models for task in label_studio.tasks(project_id)}
        assert [models[image_id] for image_id in ids] == [{"pets@1"}] * 2 + [{"pets@1", "pets@2"}] * 13

    def test_lost_predictions_and_doubled_tasks_are_mended(self, label_studio: LabelStudio) -> None:
        project_id = _project(label_studio).project_id
        ids = _ids(6)
        task_ids = _sync(label_studio, project_id, ids, _make, model="pets@1").task_ids
        label_studio.import_tasks(project_id, json.dumps(_make(ids[:3])).encode())
        label_studio.import_tasks(project_id, json.dumps([{"data": {"image": "s3://x/y"}}]).encode())  # not ours
        doubles = [task.task_id for task in label_studio.tasks(project_id) if task.task_id not in task_ids.values()]
        _annotate(label_studio, doubles[0], class_result("dog"))
        for lost in label_studio._api.get("/api/predictions/", task=task_ids[ids[4]]):
            label_studio._api.delete(f"/api/predictions/{lost['id']}/")
        mended = _sync(label_studio, project_id, ids, _make, model="pets@1")
        assert (mended.num_new, mended.num_updated, mended.num_doubles) == (0, 1, 3)
        assert mended.task_ids == {**task_ids, ids[0]: doubles[0]}  # the one that somebody answered stays
        tasks = [task for task in label_studio.tasks(project_id) if task.image_id]
        assert sorted(task.image_id for task in tasks) == ids
        assert all(task.models == {"pets@1"} for task in tasks)

    def test_the_most_useful_comes_first(self, label_studio: LabelStudio) -> None:
        project_id = _project(label_studio).project_id
        task_ids = _sync(label_studio, project_id, _ids(9)[::-1], _make, model="pets@1").task_ids
        assert label_studio.update_project(project_id, model="pets@1").model == "pets@1"
        assert label_studio._api.get(f"/api/projects/{project_id}/next")["id"] == task_ids[_ids(1)[0]]


# -- pull --------------------------------------------------------------------------------------------------------------


class TestChanges:
    pytestmark = needs_server

    @pytest.mark.parametrize("page", [2, 3, 2000])
    def test_makes_edits_deletions_and_skips_are_found_once(
        self, label_studio: LabelStudio, page: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_PAGE", page)
        monkeypatch.setattr(module, "_OVERLAP", module._OVERLAP * 0)
        project_id = _project(label_studio).project_id
        ids = _ids(7)
        task_ids = _sync(label_studio, project_id, ids, _make, model="pets@1").task_ids
        everything = list(label_studio.changed_tasks(project_id, None))
        assert [task.data["image_id"] for task in everything] == ids
        since = everything[-1].updated_at

        made = [_annotate(label_studio, task_ids[image_id], class_result("dog")) for image_id in ids[:4]]
        _annotate(label_studio, task_ids[ids[5]], class_result("dog"), was_cancelled=True)
        found = {task.data["image_id"]: task for task in label_studio.changed_tasks(project_id, since)}
        assert set(found) == {*ids[:4], ids[5], ids[6]}  # the last one of before is told again
        users = label_studio.annotators()
        first = read_annotation(found[ids[0]].annotations[0], users)
        assert (first.annotation_id, first.annotator, first.seconds) == (made[0], "winnow@localhost", 2.5)
        assert read_class(first.result, shown=["cat"]).label == "dog"
        assert read_annotation(found[ids[5]].annotations[0], users).skipped
        since = max(task.updated_at for task in found.values())

        label_studio._api.patch(f"/api/annotations/{made[1]}/", {"result": class_result("cat")})
        label_studio._api.delete(f"/api/annotations/{made[2]}/")
        found = {task.data["image_id"]: task for task in label_studio.changed_tasks(project_id, since)}
        assert set(found) - {ids[5]} == {ids[1], ids[2]}
        edited = read_annotation(found[ids[1]].annotations[0], users)
        assert edited.annotation_id == made[1]
        assert edited.updated_at > edited.created_at
        assert read_class(edited.result, shown=["cat"]).label == "cat"
        assert found[ids[2]].annotations == []

    def test_many_changes_at_one_time_are_all_found(
        self, label_studio: LabelStudio, label_studio_server: LocalLabelStudio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sqlite3

        monkeypatch.setattr(module, "_PAGE", 2)
        project_id = _project(label_studio).project_id
        ids = _ids(7)
        _sync(label_studio, project_id, ids, _make, model="pets@1")
        with sqlite3.connect(label_studio_server.data / "label_studio.sqlite3", timeout=20) as database:
            same = (f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}", project_id)
            database.execute("UPDATE task SET updated_at = ? WHERE project_id = ?", same)
        database.close()
        found = [task.data["image_id"] for task in label_studio.changed_tasks(project_id, None)]
        assert sorted(found) == ids

    def test_a_restart_while_reading_is_waited_for(self, label_studio: LabelStudio) -> None:
        project_id = _project(label_studio).project_id
        _sync(label_studio, project_id, _ids(3), _make, model="pets@1")
        with FlakyProxy(label_studio.url) as proxy:
            flaky = LabelStudio(proxy.url, label_studio._api._token, patience=Patience(20.0, 20.0))
            proxy.faults["GET"] = ["reset", 502, 503, "lost"]
            assert len(list(flaky.changed_tasks(project_id, None))) == 3

    def test_masks_come_back_pixel_by_pixel(self, label_studio: LabelStudio) -> None:
        project_id = _project(label_studio, "segmentation").project_id
        rng = np.random.default_rng(0)
        labels = np.kron(rng.integers(0, 3, (6, 8)), np.ones((7, 5))).astype(np.uint8)
        shapes = [Shape(name, encode(labels == number), 0.75) for number, name in enumerate(["background", *CLASSES])]
        item = ReviewItem("ab" * 16, 1, 0, "entropy", False, "s3://review/ab.png", 83, 97)
        result = mask_results(shapes, width=83, height=97)
        make = {"data": task_data(item), "predictions": [prediction("parts@1", 0, result)]}
        (task_id,) = _sync(
            label_studio, project_id, [item.image_id], lambda some: [make], model="parts@1"
        ).task_ids.values()
        (drawn,) = label_studio._api.get("/api/predictions/", task=task_id)
        assert drawn["result"] == result
        _annotate(label_studio, task_id, drawn["result"], parent_prediction=drawn["id"])
        (task,) = label_studio.changed_tasks(project_id, None)
        (annotation,) = task.annotations
        answer = read_masks(annotation["result"], ["background", *CLASSES], width=83, height=97, shown=shapes)
        assert answer.changed is False
        found = read_label(answer.value or "", ["background", *CLASSES], width=83, height=97, read=lambda uri: b"")
        rows, columns = (np.arange(97) * 2 + 1) * 42 // 194, (np.arange(83) * 2 + 1) * 40 // 166
        assert np.array_equal(found, labels[rows][:, columns])


# -- storages ----------------------------------------------------------------------------------------------------------


def _fetch(server: LabelStudio, task_id: int) -> bytes:
    """The image as an annotator's browser gets it."""
    url = server._api.get(f"/api/tasks/{task_id}/")["data"]["image"]
    headers = {"Authorization": f"Token {server._api._token}"}
    response = urllib3.request("GET", url if "://" in url else server.url + url, headers=headers)
    assert response.status == 200, (url, response.data[:300])
    return response.data


def _picture(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(stream, "PNG")
    return stream.getvalue()


class TestStorages:
    pytestmark = needs_server

    @pytest.mark.s3
    def test_annotators_see_the_images_of_a_bucket(self, label_studio: LabelStudio, s3_env: S3Server) -> None:
        bucket = s3_env.make_bucket("review")
        store = S3Store(bucket, endpoint=s3_env.endpoint, client_options={"allow_http": True})
        obstore.put(store, "review/pets/a.png", _picture("red"))
        project_id = _project(label_studio).project_id
        storage = S3Storage(bucket, "review/pets", s3_env.endpoint, s3_env.region, s3_env.access_key, s3_env.secret_key)
        assert s3_env.secret_key not in repr(storage)
        number = label_studio.connect_s3(project_id, storage)
        assert label_studio.connect_s3(project_id, storage) == number
        body = [{"data": {"image": f"s3://{bucket}/review/pets/a.png", "image_id": "a"}}]
        (task_id,) = label_studio.import_tasks(project_id, json.dumps(body).encode())
        assert _fetch(label_studio, task_id) == _picture("red")

    def test_annotators_see_the_images_of_a_folder(
        self, label_studio: LabelStudio, label_studio_server: LocalLabelStudio
    ) -> None:
        folder = label_studio_server._files() / "pets"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.png").write_bytes(_picture("blue"))
        project_id = _project(label_studio).project_id
        number = label_studio.connect_local(project_id, str(folder))
        assert label_studio.connect_local(project_id, str(folder)) == number
        body = [{"data": {"image": "/data/local-files/?d=pets/a.png", "image_id": "a"}}]
        (task_id,) = label_studio.import_tasks(project_id, json.dumps(body).encode())
        assert _fetch(label_studio, task_id) == _picture("blue")
