"""``winnow review push``: bring what waits in the queue to people in Label Studio.

Each task has a project, and one more for the images of the audit reserve. What a project has is read from the server,
and only what it lacks is sent, so a push that was cut short is simply done again; at its end the table ``pushes`` is
told what lies where. One process of a workspace writes at a time.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from winnow.errors import CallError, ImageError
from winnow_connectors.label_config import add_classes, instructions, label_config
from winnow_connectors.label_studio import LabelStudio, Project
from winnow_connectors.label_studio_http import NotThereError, UnsureError
from winnow_connectors.label_sync import Synced, TaskKey, sync
from winnow_connectors.label_tasks import (
    Json,
    ReviewItem,
    class_result,
    mask_results,
    prediction,
    task_data,
)
from winnow_jobs.progress import Progress
from winnow_jobs.review import (
    FINISHED,
    MAX_ATTEMPTS,
    begin_anew,
    known_projects,
    model_answers,
    publish,
    reviewed_tasks,
)
from winnow_jobs.review_images import Prepared, ReviewImages
from winnow_jobs.selection import answerer_of
from winnow_jobs.vectors import quoted

if TYPE_CHECKING:
    from winnow.config import Kind
    from winnow_connectors.query import QueryEngine
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

SHOWING = "review"
"""Column ``model`` of the outcomes of images that cannot be shown to people."""

_TITLE_LETTERS = 41
"""Of a task's name: a project's title has 50 at most."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PushResult:
    """What became of one task's queue.

    Attributes:
        status: ``finished`` or ``nothing to do``.
        task: its name.
        run_id: of the run; None when nothing was written into the tables.
        model: whose answers are drawn in.
        server: address of Label Studio.
        project, audit_project: their numbers there; None where nothing waits.
        num_new: tasks that were made.
        num_updated: unanswered tasks that got the answer of another model version.
        num_known: tasks that were there as they should be.
        num_audit: of all these, tasks of the audit reserve.
        num_doubles: second tasks of an image that were deleted.
        num_failed: images that cannot be shown; see the view ``failures``.
        num_unanswered: images that ``model`` has not answered yet: nothing is drawn in.
        seconds: by stage.
    """

    status: str
    task: str
    run_id: str | None
    model: str
    server: str
    project: int | None = None
    audit_project: int | None = None
    num_new: int = 0
    num_updated: int = 0
    num_known: int = 0
    num_audit: int = 0
    num_doubles: int = 0
    num_failed: int = 0
    num_unanswered: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


def push(workspace: Workspace, *, task: str | None = None) -> list[PushResult]:
    """Bring what waits in the queue to Label Studio, the most useful first.

    The server is that of LABEL_STUDIO_URL, opened with LABEL_STUDIO_API_KEY.

    Args:
        workspace: configuration and warehouse.
        task: only this one; by default every task that people can answer.

    Raises:
        CallError: no such task, no server or no right to it, Label Studio cannot show the images, or another push of
            this workspace is at it.
        ReviewError: the server kept failing. Calling again goes on.
    """
    names = reviewed_tasks(workspace, task)
    workspace.warehouse.check()
    images = ReviewImages(workspace)
    server = LabelStudio.from_environment()
    server.check()
    with _alone(workspace):
        return [_push(workspace, server, images, name) for name in names]


@contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """One push of a workspace at a time; the lock ends with the process."""
    workspace.cache_folder.mkdir(parents=True, exist_ok=True)
    with (workspace.cache_folder / "push.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CallError(
                "another `winnow review push` of this workspace is running; wait until it is done"
            ) from None
        yield


def _push(workspace: Workspace, server: LabelStudio, images: ReviewImages, task: str) -> PushResult:
    for _ in range(MAX_ATTEMPTS):
        started = time.monotonic()
        numbers = begin_anew(workspace, f"push-{task}")
        pusher = _Pusher(workspace, server, images, task)
        rows = pusher.waiting()
        with Progress(f"{task}: images", len(rows)) as progress:
            prepared = images.prepare(rows, progress.update)
        pictured = time.monotonic()
        for audit in (False, True):
            pusher.send([row for row in rows if row["audit"] == audit], prepared, audit=audit)
        counts = pusher.counts(rows, prepared)
        seconds = {
            "images": round(pictured - started, 3),
            "sending": round(time.monotonic() - pictured, 3),
            "total": round(time.monotonic() - started, 3),
        }
        new = {"pushes": pusher.new_pushes(), "outcomes": pusher.failures(rows, prepared)}
        run_id = None
        if any(new.values()):
            run_id = publish(
                workspace,
                "push",
                numbers,
                {"task": task, "model": pusher.model, "server": server.url},
                new,
                {"tasks": [task], "counts": counts, "seconds": seconds, "verdict": _verdict(counts)},
            )
            if run_id is None:
                continue
        return PushResult(
            status="nothing to do" if run_id is None else "finished",
            task=task,
            run_id=run_id,
            model=pusher.model,
            server=server.url,
            project=pusher.projects.get(False),
            audit_project=pusher.projects.get(True),
            seconds=seconds,
            **{f"num_{name}": count for name, count in counts.items()},
        )
    raise CallError(f"other pushes were faster {MAX_ATTEMPTS} times; run the command again when they are done")


def _verdict(counts: Mapping[str, int]) -> str:
    return f"{counts['new']:,} new, {counts['updated']:,} updated, {counts['known']:,} known in Label Studio"


class _Pusher:
    """One task on one server, seen from one snapshot of the tables.

    Attributes:
        model: whose answers are drawn in.
        projects: their numbers, by whether they are for the audit.
    """

    def __init__(self, workspace: Workspace, server: LabelStudio, images: ReviewImages, task: str) -> None:
        self._workspace = workspace
        self._server = server
        self._images = images
        self._task = task
        self._kind: Kind = workspace.config.tasks[task].kind
        self._multiple = workspace.config.tasks[task].multiple_choice
        self._classes = workspace.task_model(task).classes
        self._engine: QueryEngine = workspace.query_engine()
        self.model = answerer_of(workspace, task)
        # Label Studio tells a task's versions as one text with commas between them.
        self._version = self.model.replace(",", ";")
        self.projects: dict[bool, int] = {}
        self._synced: list[Synced] = []
        self._num_unanswered = 0
        self._pushed: list[Row] = []

    def waiting(self) -> list[Row]:
        """What nobody has answered, of every image its last round, the most useful first.

        Images that cannot be shown, as an earlier push found, are left out unless that may have passed.
        """
        table = self._engine.sql(
            f"""
            WITH {FINISHED},
            sizes AS (
                SELECT image_id, max(width) AS width, max(height) AS height FROM outcomes SEMI JOIN finished USING (run)
                WHERE status = 'answered' GROUP BY image_id
            )
            SELECT q.image_id, q.round, q.rank, q.reason, q.audit, i.uri, i.version, i.size, s.width, s.height
            FROM queue_waiting AS q JOIN current_images AS i USING (image_id) LEFT JOIN sizes AS s USING (image_id)
            WHERE q.task = {quoted(self._task)} AND q.current AND NOT EXISTS (
                FROM failures AS f WHERE f.image_id = q.image_id AND f.task = q.task
                    AND f.model = {quoted(SHOWING)} AND NOT f.retryable
            )
            QUALIFY row_number() OVER (PARTITION BY q.image_id ORDER BY q.round DESC) = 1
            ORDER BY q.audit, q.rank, q.round, q.image_id
            """
        )
        return list(table.to_pylist())

    def send(self, rows: Sequence[Row], prepared: Prepared, *, audit: bool) -> None:
        """Bring a project to have these tasks; rows whose image cannot be shown are left out."""
        items = {
            (row["image_id"], row["round"]): ReviewItem(
                image_id=row["image_id"],
                round=row["round"],
                rank=row["rank"],
                reason=row["reason"],
                audit=audit,
                url=self._images.address(shown),
                width=shown.width,
                height=shown.height,
            )
            for row in rows
            if (shown := prepared.shown.get(row["image_id"])) is not None
        }
        if not items:
            return
        project = self._project(audit)
        self.projects[audit] = project.project_id
        self._images.addresses.connect(self._server, project.project_id)
        answers: Mapping[str, Any] = {} if audit else self._answers()
        wanted = {key: self._version if key[0] in answers else None for key in items}

        def make(keys: Sequence[TaskKey]) -> list[Json]:
            made = []
            for key in keys:
                item, found = items[key], answers.get(key[0])
                drawn = [] if found is None else [prediction(self._version, item.rank, self._drawn(item, found))]
                made.append({"data": task_data(item), "predictions": drawn})
            return made

        with Progress(f"{self._task}: tasks", len(items)) as progress:
            synced = sync(self._server, project.project_id, wanted, make, on_progress=progress.update)
        if any(wanted.values()) and project.model != self._version:
            self._server.update_project(project.project_id, model=self._version)
        self._synced.append(synced)
        if not audit:
            self._num_unanswered = sum(model is None for model in wanted.values())
        self._pushed += [
            {
                "image_id": key[0],
                "task": self._task,
                "round": key[1],
                "server": self._server.url,
                "project": project.project_id,
                "task_id": task_id,
                "model": self.model if wanted[key] else None,
            }
            for key, task_id in synced.task_ids.items()
        ]

    def counts(self, rows: Sequence[Row], prepared: Prepared) -> dict[str, int]:
        return {
            "new": sum(synced.num_new for synced in self._synced),
            "updated": sum(synced.num_updated for synced in self._synced),
            "known": sum(synced.num_known for synced in self._synced),
            "audit": sum(row["audit"] and row["image_id"] in prepared.shown for row in rows),
            "doubles": sum(synced.num_doubles for synced in self._synced),
            "failed": len(prepared.failed),
            "unanswered": self._num_unanswered,
        }

    def new_pushes(self) -> list[Row]:
        """Rows of ``pushes`` for what was sent, without those that say what the last one says."""
        known = self._engine.sql(
            f"""
            WITH {FINISHED}
            SELECT image_id, round, project, task_id, model FROM pushes SEMI JOIN finished USING (run)
            WHERE task = {quoted(self._task)} AND server = {quoted(self._server.url)}
            QUALIFY row_number() OVER (PARTITION BY image_id, round ORDER BY "at" DESC) = 1
            """
        ).to_pylist()
        names = ("image_id", "round", "project", "task_id", "model")
        told = {tuple(row[name] for name in names) for row in known}
        now = datetime.now(UTC)
        return [dict(row, at=now) for row in self._pushed if tuple(row[name] for name in names) not in told]

    def failures(self, rows: Sequence[Row], prepared: Prepared) -> list[Row]:
        """Rows of ``outcomes`` for images that cannot be shown, without those that stand there already."""
        if not prepared.failed:
            return []
        known = self._engine.sql(
            f"SELECT image_id, error FROM failures WHERE task = {quoted(self._task)} AND model = {quoted(SHOWING)}"
        ).to_pylist()
        told = {(row["image_id"], row["error"]) for row in known}
        now = datetime.now(UTC)

        def row_of(image_id: str, error: ImageError) -> Row:
            return {
                "image_id": image_id,
                "task": self._task,
                "model": SHOWING,
                "status": "failed",
                "stage": error.stage,
                "error": error.kind,
                "message": error.message,
                "retryable": error.retryable,
                "at": now,
            }

        failed = prepared.failed
        return [row_of(key, failed[key]) for key in sorted(failed) if (key, failed[key].kind) not in told]

    # -- inside ----------------------------------------------------------------------------------------------------

    def _project(self, audit: bool) -> Project:
        """The project of the task, made when there is none, offering all classes of the task."""
        what = "audit" if audit else "review"
        title = f"{self._task[:_TITLE_LETTERS]}: {what}"
        description = f"winnow: {what} of {self._task}, warehouse {self._workspace.warehouse.identity}"
        project = self._find_project(title, description, audit)
        told = instructions(self._task, self._kind, self._classes, blind=audit, multiple=self._multiple)
        if project is None:
            config = label_config(self._kind, self._classes, multiple=self._multiple)
            try:
                return self._server.create_project(
                    title, config=config, instructions=told, in_order=not audit, description=description
                )
            except UnsureError:
                project = self._server.find_project(title, description=description)
                if project is None:
                    raise
        config, added = add_classes(project.config, self._kind, self._classes)
        if added:
            logger.info("project %d gets the classes %s", project.project_id, ", ".join(added))
            project = self._server.update_project(project.project_id, config=config, instructions=told)
        return project

    def _find_project(self, title: str, description: str, audit: bool) -> Project | None:
        """The project used last, whatever it is called by now; else the one that a push that was cut short made."""
        for known in known_projects(self._engine, self._server.url, self._task):
            if known.audit == audit:
                try:
                    return self._server.project(known.project_id)
                except NotThereError:
                    logger.warning(
                        "project %d is gone from %s; looking for another", known.project_id, self._server.url
                    )
        return self._server.find_project(title, description=description)

    def _answers(self) -> Mapping[str, Any]:
        """What the model answered, by image."""
        waiting = f"SELECT image_id FROM queue_waiting WHERE task = {quoted(self._task)}"
        where = f"model = {quoted(self.model)} AND image_id IN ({waiting})"
        found = model_answers(self._engine, self._task, self._kind, where)
        return {image_id: answer for (image_id, _), answer in found.items()}

    def _drawn(self, item: ReviewItem, answer: Any) -> list[Json]:
        if self._kind == "classification":
            return class_result(*answer["classes"], confidence=answer["confidence"])
        return mask_results(answer, width=item.width, height=item.height)
