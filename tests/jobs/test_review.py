"""``winnow review`` with a real Label Studio: what people see, what their answers become; killed and run again."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import urllib3
from click.testing import CliRunner
from numpy.testing import assert_array_equal
from PIL import Image

import workspaces as ws
from reviewed import HEIGHT, PARTS, SECRET, TASK, WIDTH, Reviewed, telling_jpeg
from winnow.errors import CallError
from winnow.mask_files import read_label
from winnow.masks import encode_classes
from winnow_connectors import label_sync
from winnow_connectors.label_tasks import Shape, class_result, mask_results
from winnow_connectors.ledger import Run
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli

if TYPE_CHECKING:
    from conftest import S3Server
    from winnow_connectors.label_studio import LabelStudio
    from winnow_jobs.local_label_studio import LocalLabelStudio

pytestmark = [pytest.mark.label_studio, pytest.mark.timeout(1200)]


def see(reviewed: Reviewed, url: str) -> bytes:
    """What a browser that is logged in gets for the image of a task."""
    api = reviewed.server._api
    headers = {"Authorization": f"Token {api._token}"}
    answer = urllib3.request("GET", url if "://" in url else reviewed.server.url + url, headers=headers, timeout=60)
    assert answer.status == 200, answer.data[:300]
    return answer.data


def check_nothing_is_told(reviewed: Reviewed, project: int) -> None:
    """Neither the tasks nor the images say where a picture came from."""
    tasks = reviewed.tasks(project)
    told = json.dumps(tasks)
    for secret in (SECRET, "0001", "Jones", "Telling", str(reviewed.images.uri)):
        assert secret not in told.replace("winnow@localhost", "")
    for image_id, task in list(tasks.items())[:3]:
        data = see(reviewed, task["data"]["image"])
        assert b"Telling" not in data
        assert b"Jones" not in data
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (WIDTH, HEIGHT)
            assert not image.getexif()
        assert image_id in task["data"]["image"] or "fileuri" in task["data"]["image"]


def test_from_the_queue_to_labels_and_back(reviewed: Reviewed) -> None:
    reviewed.add_images(8)
    reviewed.answer()
    reviewed.queue(reviewed.ids[:6][::-1])
    first = reviewed.push()
    assert (first.status, first.num_new, first.num_updated, first.num_known) == ("finished", 6, 0, 0)
    assert (first.num_failed, first.num_unanswered, first.audit_project) == (0, 0, None)
    check_nothing_is_told(reviewed, first.project)
    tasks = reviewed.tasks(first.project)
    assert set(tasks) == set(reviewed.ids[:6])
    assert tasks[reviewed.ids[2]]["data"]["reason"] == "margin"
    project = reviewed.server.project(first.project)
    assert project.model == reviewed.model
    assert reviewed.server._api.get(f"/api/projects/{first.project}/next")["data"]["image_id"] == reviewed.ids[5]
    (drawn,) = reviewed.server._api.get("/api/predictions/", task=tasks[reviewed.ids[2]]["id"])
    assert drawn["result"][0]["value"] == {"choices": ["cat"]}

    again = reviewed.push()
    assert (again.status, again.run_id, again.num_new, again.num_known) == ("nothing to do", None, 0, 6)
    assert reviewed.pull().status == "nothing to do"

    same = reviewed.annotate(first.project, reviewed.ids[0], class_result("ant"))
    changed = reviewed.annotate(first.project, reviewed.ids[1], class_result("dog"))
    unsure = reviewed.annotate(first.project, reviewed.ids[2], class_result("unsure"))
    reviewed.annotate(first.project, reviewed.ids[3], [], was_cancelled=True)
    pulled = reviewed.pull()
    assert (pulled.num_created, pulled.num_skipped, pulled.num_changed, pulled.num_deleted) == (3, 1, 0, 0)
    assert pulled.num_corrected == 2
    rows = {row["number"]: row for row in reviewed.labels()}
    assert [rows[n]["event"] for n in range(4)] == ["created", "created", "created", "skipped"]
    assert [rows[n]["label"] for n in range(4)] == ["ant", "dog", None, None]
    assert rows[2]["value"] == '{"answer":"unsure"}'
    assert [rows[n]["changed_by_person"] for n in range(4)] == [False, True, True, None]
    row = rows[1]
    assert (row["annotation_id"], row["annotator"], row["seconds"]) == (changed, "winnow@localhost", 4.0)
    assert (row["model"], row["model_label"], row["reason"], row["round"]) == (reviewed.model, "bee", "margin", 1)
    assert (row["audit"], row["server"], row["project"]) == (False, reviewed.server.url, first.project)
    assert row["sha256"] == f"{1:064x}"
    assert reviewed.current() == {0: "ant", 1: "dog", 2: None}
    assert reviewed.pull().status == "nothing to do"

    (run,) = reviewed.workspace.query("SELECT counts, verdict FROM runs WHERE job = 'pull'").to_pylist()
    counts = dict(run["counts"])
    assert (counts["created"], counts["done"], counts["waiting"]) == (3, 3, 2)
    assert "3 images done, 2 waiting" in run["verdict"]
    (status,) = reviewed.workspace.review_status(task=TASK)
    assert (status.num_waiting, status.num_unsent, status.num_done, status.num_skipped) == (2, 0, 3, 1)
    assert (status.num_corrected, status.num_unsure, status.num_ties) == (2, 1, 0)
    assert status.answers_per_hour == pytest.approx(900)
    assert status.hours_left == pytest.approx(2 / 900)
    assert [(person.name, person.num_answers) for person in status.annotators] == [("winnow@localhost", 4)]

    reviewed.server._api.patch(f"/api/annotations/{same}/", {"result": class_result("eel")})
    reviewed.server._api.delete(f"/api/annotations/{unsure}/")
    pulled = reviewed.pull()
    assert (pulled.num_created, pulled.num_changed, pulled.num_deleted, pulled.num_skipped) == (0, 1, 1, 0)
    assert reviewed.current() == {0: "eel", 1: "dog"}
    assert [row["event"] for row in reviewed.labels() if row["number"] == 0] == ["created", "changed"]
    assert reviewed.push().num_known == 3  # the one whose answer was deleted waits again, in its old task

    reviewed.server.delete_task(reviewed.tasks(first.project)[reviewed.ids[1]]["id"])
    pulled = reviewed.pull()
    assert (pulled.num_deleted, pulled.num_created) == (1, 0)
    assert reviewed.current() == {0: "eel"}
    assert reviewed.pull().status == "nothing to do"
    mended = reviewed.push()
    assert (mended.num_new, mended.num_known) == (1, 3)


def test_the_audit_is_blind_and_apart(reviewed: Reviewed) -> None:
    reviewed.add_images(6)
    reviewed.answer()
    reviewed.queue(reviewed.ids[:3])
    reviewed.queue(reviewed.ids[3:], audit=True)
    pushed = reviewed.push()
    assert (pushed.num_new, pushed.num_audit, pushed.num_unanswered) == (6, 3, 0)
    assert pushed.audit_project not in (None, pushed.project)
    for image_id, task in reviewed.tasks(pushed.audit_project).items():
        assert image_id in reviewed.ids[3:]
        assert set(task["data"]) == {"image", "image_id", "round", "width", "height"}
        assert reviewed.server._api.get("/api/predictions/", task=task["id"]) == []
    settings = reviewed.server._api.get(f"/api/projects/{pushed.audit_project}/")
    assert (settings["sampling"], settings["show_collab_predictions"]) == ("Uniform sampling", False)
    reviewed.annotate(pushed.audit_project, reviewed.ids[4], class_result("ant"))
    assert reviewed.pull().num_created == 1
    (row,) = reviewed.labels()
    assert (row["audit"], row["model"], row["changed_by_person"]) == (True, None, None)
    assert reviewed.push().status == "nothing to do"


def test_a_new_version_reaches_what_nobody_has_answered(reviewed: Reviewed, monkeypatch: pytest.MonkeyPatch) -> None:
    reviewed.add_images(5)
    reviewed.answer()
    reviewed.queue(reviewed.ids)
    pushed = reviewed.push()
    reviewed.annotate(pushed.project, reviewed.ids[0], class_result("ant"))
    reviewed.pull()
    monkeypatch.setattr("winnow_jobs.push.answerer_of", lambda workspace, task: "objects@2")
    assert reviewed.push().num_unanswered == 4
    reviewed.answer(model="objects@2", shift=1, minute=5)
    newer = reviewed.push()
    assert (newer.num_new, newer.num_updated, newer.num_known, newer.model) == (0, 4, 0, "objects@2")
    assert reviewed.server.project(pushed.project).model == "objects@2"
    assert reviewed.push().status == "nothing to do"
    reviewed.annotate(pushed.project, reviewed.ids[1], class_result("cat"))
    reviewed.pull()
    row = reviewed.labels()[-1]
    assert (row["model"], row["model_label"], row["changed_by_person"]) == ("objects@2", "cat", False)


def test_bad_images_become_failures_and_are_not_asked_again(reviewed: Reviewed) -> None:
    reviewed.add_images(4)
    reviewed.answer()
    broken = reviewed.workspace.query("SELECT image_id, uri FROM current_images ORDER BY uri LIMIT 2").to_pylist()
    path = Path(reviewed.workspace.stores.at(reviewed.images.uri).uri.removeprefix("file://")) / SECRET
    (path / "0000.jpg").write_bytes(b"no longer an image")
    (path / "0001.jpg").unlink()
    reviewed.queue(reviewed.ids)
    pushed = reviewed.push()
    assert (pushed.num_new, pushed.num_failed) == (2, 2)
    rows = reviewed.workspace.query("SELECT image_id, error FROM failures WHERE model = 'review'").to_pylist()
    assert {row["image_id"]: row["error"] for row in rows} == {
        broken[0]["image_id"]: "changed", broken[1]["image_id"]: "missing",
    }  # fmt: skip
    again = reviewed.push()
    assert (again.status, again.num_known, again.num_failed) == ("nothing to do", 2, 1)  # what is missing may come back


def test_people_who_disagree_are_asked_again(reviewed: Reviewed) -> None:
    reviewed.add_images(3)
    reviewed.answer()
    reviewed.queue(reviewed.ids)
    project = reviewed.push().project
    api = reviewed.server._api
    names = [f"{name}-{project}@example.org" for name in ("ann", "bob")]
    ann, bob = (
        api.post("/api/users/", {"email": name, "username": name, "password": "long enough 1"})["id"] for name in names
    )
    for image_id, answers in zip(reviewed.ids, (("ant", "bee"), ("bee", "bee"), ("cat", "cat")), strict=True):
        for person, label in zip((ann, bob), answers, strict=True):
            reviewed.annotate(project, image_id, class_result(label), completed_by=person)
    pulled = reviewed.pull()
    assert (pulled.num_created, pulled.num_ties) == (6, 1)
    assert {row["annotator"] for row in reviewed.labels()} == set(names)
    assert reviewed.current() == {1: "bee", 2: "cat"}  # no label where two say different things
    (row,) = reviewed.workspace.query("SELECT * FROM queue WHERE reason = 'tie'").to_pylist()
    assert (row["image_id"], row["round"], row["rank"]) == (reviewed.ids[0], 2, 1)
    (status,) = reviewed.workspace.review_status()
    assert (status.num_ties, status.num_waiting, status.agreement.num_images) == (1, 1, 3)
    assert status.agreement.percent == pytest.approx(2 / 3)
    assert list(status.agreement.cohen_kappa) == [" · ".join(names)]

    second = reviewed.push()
    assert (second.num_new, second.num_known) == (1, 0)
    tasks = api.get("/api/tasks/", project=project, fields="all")["tasks"]
    (task,) = [task for task in tasks if task["data"]["round"] == 2]
    api.post(f"/api/tasks/{task['id']}/annotations/", {"result": class_result("bee")})
    assert (reviewed.pull().num_ties, reviewed.current()) == (0, {0: "bee", 1: "bee", 2: "cat"})


def test_masks_go_and_come_back_pixel_by_pixel(reviewed: Reviewed) -> None:
    reviewed.add_images(2)
    rng = np.random.default_rng(0)
    answer_hw = np.kron(rng.integers(0, 3, (4, 5)), np.ones((8, 8))).astype(np.uint8)
    reviewed.answer()
    reviewed.add_masks(answer_hw)
    reviewed.queue(reviewed.ids, task="parts")
    workspace = reviewed.workspace
    (pushed,) = workspace.push(task="parts")
    assert (pushed.num_new, pushed.num_unanswered) == (2, 0)
    drawn = [
        reviewed.server._api.get("/api/predictions/", task=reviewed.tasks(pushed.project)[image_id]["id"])[0]["result"]
        for image_id in reviewed.ids
    ]
    reviewed.annotate(pushed.project, reviewed.ids[0], drawn[0])
    reviewed.annotate(pushed.project, reviewed.ids[1], drawn[1][:1])
    (pulled,) = workspace.pull(task="parts")
    assert (pulled.num_created, pulled.num_corrected, pulled.num_unreadable) == (2, 1, 0)
    rows = {row["number"]: row for row in reviewed.labels()}
    found = read_label(rows[0]["value"], PARTS, width=WIDTH, height=HEIGHT, read=lambda uri: b"")
    assert_array_equal(found, answer_hw)
    one_class = read_label(rows[1]["value"], PARTS, width=WIDTH, height=HEIGHT, read=lambda uri: b"")
    kept = PARTS.index(drawn[1][0]["value"]["brushlabels"][0])
    assert_array_equal(one_class, np.where(answer_hw == kept, kept, 0))
    assert [rows[n]["changed_by_person"] for n in range(2)] == [False, True]


def test_masks_of_several_people_are_put_to_the_vote(reviewed: Reviewed) -> None:
    reviewed.add_images(1)
    answer_hw = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    answer_hw[4:20, 4:20] = 1
    reviewed.answer()
    reviewed.add_masks(answer_hw)
    reviewed.queue(reviewed.ids, task="parts")
    workspace, api = reviewed.workspace, reviewed.server._api
    (pushed,) = workspace.push(task="parts")
    other_hw = np.zeros_like(answer_hw)
    other_hw[4:20, 12:28] = 1
    maps = [answer_hw, other_hw, answer_hw]
    people = [
        api.post(
            "/api/users/", {"email": f"{name}-{pushed.project}@example.org", "username": f"{name}{pushed.project}"}
        )["id"]
        for name in ("ann", "bob", "eve")
    ]
    made = []
    for person, labels_hw in zip(people, maps, strict=True):
        shapes = [Shape(PARTS[item.value], item.rle) for item in encode_classes(labels_hw)]
        result = mask_results(shapes, width=WIDTH, height=HEIGHT)
        made.append(reviewed.annotate(pushed.project, reviewed.ids[0], result, completed_by=person))
    (pulled,) = workspace.pull(task="parts")
    assert (pulled.num_created, pulled.num_ties) == (3, 0)

    def current() -> tuple[str, np.ndarray]:
        (row,) = workspace.query("SELECT * FROM current_labels WHERE task = 'parts'").to_pylist()
        return row["origin"], read_label(row["value"], PARTS, width=WIDTH, height=HEIGHT, read=lambda uri: b"")

    origin, together_hw = current()
    assert origin == "consensus"
    assert_array_equal(together_hw, answer_hw)  # two of three
    (status,) = workspace.review_status(task="parts")
    assert status.agreement.num_images == 1
    assert 0 < (status.agreement.percent or 0) < 1

    api.delete(f"/api/annotations/{made[0]}/")
    workspace.pull(task="parts")
    origin, together_hw = current()
    assert origin == "consensus"
    assert_array_equal(together_hw == 255, answer_hw != other_hw)  # one against one
    api.delete(f"/api/annotations/{made[2]}/")
    workspace.pull(task="parts")
    origin, together_hw = current()
    assert origin == "label_studio"
    assert_array_equal(together_hw, other_hw)


def test_several_classes_may_be_chosen_where_the_task_says_so(reviewed: Reviewed) -> None:
    config = reviewed.workspace.config_path
    config.write_text(config.read_text().replace(f"[tasks.{TASK}]", f"[tasks.{TASK}]\nmultiple_choice = true"))
    reviewed.workspace = Workspace(config)
    reviewed.add_images(2)
    reviewed.answer(classes=["dog", "ant"])
    reviewed.queue(reviewed.ids)
    project = reviewed.push().project
    assert 'choice="multiple"' in reviewed.server.project(project).config
    for task in reviewed.server._api.get("/api/tasks/", project=project, fields="all")["tasks"]:
        (drawn,) = task["predictions"]
        assert drawn["result"][0]["value"]["choices"] == ["dog", "ant"]
    reviewed.annotate(project, reviewed.ids[0], class_result("ant", "dog"))
    reviewed.annotate(project, reviewed.ids[1], class_result("dog"))
    reviewed.pull()
    rows = {row["image_id"]: row for row in reviewed.labels()}
    same, changed = (rows[image_id] for image_id in reviewed.ids)
    both = '{"choices":["ant","dog"]}'
    assert (same["label"], same["value"], same["model_label"], same["changed_by_person"]) == (None, both, both, False)
    assert (changed["label"], changed["value"], changed["changed_by_person"]) == ("dog", None, True)


def test_a_pull_cut_short_is_done_anew(reviewed: Reviewed, monkeypatch: pytest.MonkeyPatch) -> None:
    reviewed.add_images(2)
    reviewed.answer()
    reviewed.queue(reviewed.ids)
    project = reviewed.push().project
    for image_id in reviewed.ids:
        reviewed.annotate(project, image_id, class_result("dog"))
    with monkeypatch.context() as patched:
        patched.setattr(Run, "decide", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            reviewed.pull()
    assert reviewed.labels() == []
    assert len(reviewed.workspace.warehouse.ledger.open_runs()) == 1
    close = Run.close

    def killed_before_the_commit(run: Run) -> dict[str, Any]:
        if (run.outcome() or {})["status"] == "finished":
            raise SystemExit(9)
        return close(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "close", killed_before_the_commit)
        with pytest.raises(SystemExit):
            reviewed.pull()
    assert reviewed.labels() == []
    assert (reviewed.pull().status, len(reviewed.labels())) == ("nothing to do", 2)
    assert reviewed.workspace.warehouse.ledger.open_runs() == []


@pytest.mark.s3
def test_copies_in_a_bucket_are_seen(
    tmp_path: Path, label_studio: LabelStudio, label_studio_server: LocalLabelStudio, s3_env: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", label_studio_server.token)
    monkeypatch.delenv("LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT", raising=False)
    bucket = s3_env.make_bucket("review")
    reviewed = Reviewed(
        tmp_path,
        label_studio,
        warehouse=f"s3://{bucket}/warehouse",
        images=f"s3://{bucket}/photos",
        storage=f'[storage."s3://"]\nendpoint = "{s3_env.endpoint}"\nregion = "{s3_env.region}"\n',
    )
    reviewed.add_images(3)
    reviewed.answer()
    reviewed.queue(reviewed.ids[:2])
    pushed = reviewed.push()
    assert pushed.num_new == 2
    check_nothing_is_told(reviewed, pushed.project)
    assert reviewed.push().status == "nothing to do"

    config = reviewed.workspace.config_path
    config.write_text(config.read_text() + "\n[review]\nserve_originals = true\n")
    reviewed.workspace = Workspace(config)
    reviewed.queue(reviewed.ids[2:])
    output = run(reviewed.workspace, "review", "push", "--task", TASK).output
    assert f"{TASK}: 1 new, 0 updated, 2 known" in output
    assert "annotators see the original files" in output
    data = see(reviewed, reviewed.tasks(pushed.project)[reviewed.ids[2]]["data"]["image"])
    assert data == telling_jpeg(2)  # on request only


def test_originals_are_served_on_request_only(reviewed: Reviewed) -> None:
    reviewed.add_images(2)
    reviewed.answer()
    reviewed.queue(reviewed.ids)
    config = reviewed.workspace.config_path
    config.write_text(config.read_text() + "\n[review]\nserve_originals = true\n")
    with pytest.raises(CallError, match="shows only files in folders below"):
        Workspace(config).push(task=TASK)


@pytest.mark.parametrize(
    ("num", "moment"),
    [
        (150, 0.6),
        *(pytest.param(5_000, moment, marks=pytest.mark.chaos) for moment in (5.0, 15.0, 20.0, 25.0)),
    ],
)
def test_killed_and_run_again_nothing_is_lost_or_doubled(reviewed: Reviewed, num: int, moment: float) -> None:
    reviewed.add_images(num)
    reviewed.answer()
    reviewed.queue(reviewed.ids)
    log = reviewed.workspace.folder / "log.txt"
    copies = Path(reviewed.workspace.warehouse.store.uri.removeprefix("file://")) / "review" / "copies"
    process = ws.start(reviewed.workspace.config_path, "review", "push", "--task", TASK, log=log)
    ws.wait_until(lambda: copies.exists() or process.poll() is not None, timeout_s=60, what="the first copy")
    time.sleep(moment)
    ws.kill_driver(process)
    done = reviewed.push()
    assert done.num_new + done.num_known == num
    tasks = list(reviewed.server.tasks(done.project))
    assert sorted(task.image_id for task in tasks) == sorted(reviewed.ids)
    assert all(task.models == {reviewed.model} for task in tasks)
    (count,) = reviewed.workspace.query("SELECT count(*) AS n, count(DISTINCT image_id) AS d FROM pushes").to_pylist()
    assert (count["n"], count["d"]) == (num, num)
    assert reviewed.push().status == "nothing to do"


def test_the_server_restarts_while_people_are_sent_work(
    reviewed: Reviewed, label_studio_server: LocalLabelStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_sync, "_MAX_TASKS", 20)
    monkeypatch.setattr(label_sync, "_MADE_AT_ONCE", 20)
    reviewed.add_images(100)
    reviewed.answer()
    reviewed.queue(reviewed.ids)
    files = label_studio_server._files()

    def restart() -> None:
        ws.wait_until(lambda: bool(reviewed.server.find_project(f"{TASK}: review")), timeout_s=60, what="the project")
        label_studio_server.kill9()
        label_studio_server.start(files=files)

    thread = threading.Thread(target=restart)
    thread.start()
    pushed = reviewed.push()
    thread.join(300)
    assert pushed.num_new == 100
    tasks = list(reviewed.server.tasks(pushed.project))
    assert sorted(task.image_id for task in tasks) == sorted(reviewed.ids)
    assert all(task.models == {reviewed.model} for task in tasks)


# -- the command -------------------------------------------------------------------------------------------------------


def run(workspace: Workspace, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["--config", str(workspace.config_path), *arguments])


def test_the_commands_speak_to_people_and_machines(reviewed: Reviewed) -> None:
    assert "nothing waits in the queue" in run(reviewed.workspace, "review", "push").output
    assert f"{TASK}: nothing new" in run(reviewed.workspace, "review", "pull").output
    reviewed.add_images(3)
    reviewed.answer()
    reviewed.queue(reviewed.ids[:2])
    reviewed.queue(reviewed.ids[2:], audit=True)
    output = run(reviewed.workspace, "review", "push").output
    assert f"{TASK}: 3 new, 0 updated, 0 known" in output
    assert re.search(r"review http://127.0.0.1:\d+/projects/\d+/data", output)
    assert "(1 blind)" in output
    (again,) = json.loads(run(reviewed.workspace, "review", "push", "--json").output)
    assert (again["status"], again["num_known"]) == ("nothing to do", 3)
    reviewed.annotate(again["project"], reviewed.ids[0], class_result("dog"))
    assert (
        f"{TASK}: 1 new, 0 changed, 0 deleted, 0 skipped; 1 correct the model"
        in run(reviewed.workspace, "review", "pull").output
    )
    output = run(reviewed.workspace, "review", "status").output
    assert f"{TASK}: 1 done, 2 waiting" in output
    assert "900 answers an hour" in output
    (status,) = json.loads(run(reviewed.workspace, "review", "status", "--json").output)
    assert (status["num_done"], status["agreement"]["num_images"]) == (1, 0)


def test_a_second_push_of_the_same_workspace_is_refused(reviewed: Reviewed) -> None:
    import fcntl

    reviewed.workspace.cache_folder.mkdir(exist_ok=True)
    with (reviewed.workspace.cache_folder / "push.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CallError, match="another `winnow review push`"):
            reviewed.push()


def test_without_a_server_nothing_is_written(reviewed: Reviewed, monkeypatch: pytest.MonkeyPatch) -> None:
    reviewed.add_images(1)
    reviewed.answer()
    reviewed.queue(reviewed.ids)
    monkeypatch.delenv("LABEL_STUDIO_URL")
    before = sorted(info.key for info in reviewed.workspace.warehouse.store.list(""))
    for verb in ("push", "pull"):
        result = run(reviewed.workspace, "review", verb)
        assert "LABEL_STUDIO_URL is not set" in str(result.exception)
    assert sorted(info.key for info in reviewed.workspace.warehouse.store.list("")) == before
