"""``winnow review pull``: what people answered in Label Studio becomes events in the table ``labels``.

What changed since the last event stored is asked for, compared with what is stored, and committed at once: a pull that
is killed leaves nothing, and one without changes writes nothing. The same run sends images about which people disagree
back into the queue, as a new round.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from winnow.agreement import majority, majority_map
from winnow.errors import CallError, MaskError
from winnow.masks import encode_classes, unlabelled
from winnow_connectors.label_studio import ChangedTask, LabelStudio, round_of
from winnow_connectors.label_studio_http import NotThereError
from winnow_connectors.label_sync import TaskKey
from winnow_connectors.label_tasks import Annotation, Answer, class_columns, read_annotation, read_class, read_masks
from winnow_connectors.query import QueryEngine
from winnow_jobs.progress import Progress
from winnow_jobs.review import (
    FINISHED,
    MAX_ATTEMPTS,
    KnownProject,
    begin_anew,
    known_projects,
    model_answers,
    publish,
    reviewed_tasks,
)
from winnow_jobs.review_status import Preview, ReviewStatus, status_of
from winnow_jobs.selection import answerer_of
from winnow_jobs.vectors import quoted
from winnow_jobs.votes import is_mask, label_maps, vote

if TYPE_CHECKING:
    from winnow.config import Kind
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

TIE = "tie"
"""Reason and policy of the queue rows of images about which people disagree."""

CONSENSUS = "consensus"
"""Column ``origin`` of the labels that several people's masks make together."""

EVENTS = ("created", "changed", "deleted", "skipped")
"""What can become of an annotation."""

_GONE = ("deleted", "skipped")
_UNREADABLE = "unreadable"
_TICK = timedelta(microseconds=1)

Row = dict[str, Any]


@dataclass(frozen=True)
class PullResult:
    """What became of one task.

    Attributes:
        status: ``finished`` or ``nothing to do``.
        task: its name.
        run_id: of the run; None when nothing was written.
        server: address of Label Studio.
        num_created, num_changed, num_deleted, num_skipped: events of annotations.
        num_corrected: of those created and changed, answers that differ from the model's.
        num_unreadable: annotations whose masks cannot be read; kept with the reason as their value.
        num_ties: images about which people disagree, sent back into the queue.
        seconds: by stage.
    """

    status: str
    task: str
    run_id: str | None
    server: str
    num_created: int = 0
    num_changed: int = 0
    num_deleted: int = 0
    num_skipped: int = 0
    num_corrected: int = 0
    num_unreadable: int = 0
    num_ties: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


def pull(workspace: Workspace, *, task: str | None = None) -> list[PullResult]:
    """Bring what people answered since the last pull into the table ``labels``.

    The server is that of LABEL_STUDIO_URL, opened with LABEL_STUDIO_API_KEY.

    Args:
        workspace: configuration and warehouse.
        task: only this one; by default every task that people can answer.

    Raises:
        CallError: no such task, no server or no right to it.
        ReviewError: the server kept failing. Calling again goes on.
    """
    names = reviewed_tasks(workspace, task)
    workspace.warehouse.check()
    server = LabelStudio.from_environment()
    server.check()
    return [_pull(workspace, server, name) for name in names]


def _pull(workspace: Workspace, server: LabelStudio, task: str) -> PullResult:
    for _ in range(MAX_ATTEMPTS):
        started = time.monotonic()
        numbers = begin_anew(workspace, f"pull-{task}")
        puller = _Puller(workspace, server, task)
        events = puller.events()
        read = time.monotonic()
        if not events:
            return PullResult("nothing to do", task, None, server.url, seconds={"total": round(read - started, 3)})
        joint, ties = puller.together(events)
        counts = {event: sum(row["event"] == event for row in events) for event in EVENTS}
        counts["corrected"] = sum(bool(row["changed_by_person"]) for row in events)
        counts["unreadable"] = sum(f'"{_UNREADABLE}"' in (row["value"] or "") for row in events)
        counts["ties"] = len(ties)
        new = {"labels": [*events, *joint], "queue": ties}
        status = status_of(QueryEngine(Preview(workspace.warehouse.tables, new)), task)
        standing = {"done": status.num_done, "waiting": status.num_waiting, "by_several": status.agreement.num_images}
        seconds = {"reading": round(read - started, 3), "total": round(time.monotonic() - started, 3)}
        run_id = publish(
            workspace,
            "pull",
            numbers,
            {"task": task, "server": server.url},
            new,
            {"tasks": [task], "counts": counts | standing, "seconds": seconds, "verdict": _verdict(counts, status)},
        )
        if run_id is not None:
            named = {f"num_{name}": count for name, count in counts.items()}
            return PullResult("finished", task, run_id, server.url, **named, seconds=seconds)
    raise CallError(f"other pulls were faster {MAX_ATTEMPTS} times; run the command again when they are done")


def _verdict(counts: Mapping[str, int], status: ReviewStatus) -> str:
    events = ", ".join(f"{counts[event]:,} {event}" for event in EVENTS)
    left = "" if status.hours_left is None else f", {status.hours_left:,.1f} hours of one person left"
    agreement = "" if status.agreement.percent is None else f"; people agree on {status.agreement.percent:.1%}"
    return (
        f"{events}; {counts['corrected']:,} correct the model; {status.num_done:,} images done, "
        f"{status.num_waiting:,} waiting{left}{agreement}"
    )


class _Puller:
    """One task on one server, seen from one snapshot of the tables."""

    def __init__(self, workspace: Workspace, server: LabelStudio, task: str) -> None:
        self._workspace = workspace
        self._server = server
        self._task = task
        self._kind: Kind = workspace.config.tasks[task].kind
        self._classes: Sequence[str] = ()
        self._engine: QueryEngine = workspace.query_engine()
        self._of_task = f"task = {quoted(task)}"
        self._of_server = f"{self._of_task} AND server = {quoted(server.url)}"

    def events(self) -> list[Row]:
        """Rows of ``labels`` for everything that changed, oldest first."""
        projects = known_projects(self._engine, self._server.url, self._task)
        if not projects:
            return []
        self._classes = self._workspace.task_model(self._task).classes
        self._read_tables()
        annotators = self._server.annotators()
        found: list[tuple[ChangedTask | None, KnownProject, Annotation | Row, str]] = []
        with Progress(f"{self._task}: answers") as progress:
            for project in projects:
                try:
                    for task in self._server.changed_tasks(project.project_id, self._marks.get(project.project_id)):
                        found += ((task, project, *change) for change in self._changes(task, project, annotators))
                        progress.update(len(found))
                    found += ((None, project, known, "deleted") for known in self._vanished(project))
                except NotThereError:
                    logger.warning("project %d is gone from %s; its answers stay", project.project_id, self._server.url)
        answers = self._model_answers(
            [key for task, *_ in found if task is not None and (key := _key(task)) is not None]
        )
        rows = [self._row(task, project, change, event, answers) for task, project, change, event in found]
        return sorted(rows, key=lambda row: (row["updated_at"], row["annotation_id"]))

    def together(self, events: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """What several people say together about the images of these events.

        Returns:
            Rows of ``labels`` for masks that several people made, and rows of ``queue`` for ties.
        """
        images = sorted({row["image_id"] for row in events})
        known = self._engine.sql(
            f"""
            WITH {FINISHED}
            SELECT * FROM labels SEMI JOIN finished USING (run)
            WHERE {self._of_task} AND origin = 'label_studio' AND {_among(images)}
            """
        ).to_pylist()
        latest: dict[tuple[Any, ...], Row] = {}
        for row in sorted([*known, *events], key=lambda row: (row["updated_at"], row["event"] in _GONE)):
            latest[row["server"], row["project"], row["annotation_id"]] = row
        people: dict[str, dict[Any, Row]] = defaultdict(dict)
        for row in latest.values():
            if row["event"] not in _GONE:
                people[row["image_id"]][row["annotator"] or row["annotation_id"]] = row
        stored = self._stored_consensus(images) if self._kind == "segmentation" else {}
        joint: list[Row] = []
        tied: list[Row] = []
        for image_id in images:
            rows = list(people[image_id].values())
            masks = [row for row in rows if is_mask(row)]
            if self._kind == "segmentation":
                joint += self._joint_mask(image_id, masks, stored.get(image_id))
            if rows and majority([vote(row) for row in rows]) is None:
                tied.append(max(rows, key=lambda row: row["round"] or 0))
        return joint, self._tie_rows(tied)

    # -- what is stored --------------------------------------------------------------------------------------------

    def _read_tables(self) -> None:
        sql = self._engine.sql
        rows = sql(
            f"""
            SELECT project, annotation_id, image_id, round, event, updated_at, annotator, reason, audit, sha256
            FROM annotations WHERE {self._of_server}
            """
        ).to_pylist()
        self._known: dict[int, dict[int, Row]] = defaultdict(dict)
        self._of_key: dict[tuple[int, TaskKey], list[int]] = defaultdict(list)
        self._marks: dict[int, datetime] = {}
        for row in rows:
            project, number = row["project"], row["annotation_id"]
            self._known[project][number] = row
            self._of_key[project, (row["image_id"], row["round"])].append(number)
            self._marks[project] = max(self._marks.get(project, row["updated_at"]), row["updated_at"])
        self._sent: dict[TaskKey, list[tuple[datetime, str | None]]] = defaultdict(list)
        sent = f'SELECT image_id, round, model, "at" FROM pushes SEMI JOIN finished USING (run) WHERE {self._of_server}'
        for row in sql(f'WITH {FINISHED} {sent} ORDER BY "at"').to_pylist():
            self._sent[row["image_id"], row["round"]].append((row["at"], row["model"]))
        asked = sql(
            f"""
            WITH {FINISHED},
            hashes AS (
                SELECT image_id, max(sha256) AS sha256 FROM outcomes SEMI JOIN finished USING (run)
                WHERE status = 'answered' GROUP BY image_id
            )
            SELECT q.image_id, q.round, q.reason, q.audit, h.sha256
            FROM queue AS q SEMI JOIN finished USING (run) LEFT JOIN hashes AS h USING (image_id) WHERE {self._of_task}
            """
        ).to_pylist()
        self._asked: dict[TaskKey, Row] = {(row["image_id"], row["round"]): row for row in asked}

    def _changes(
        self, task: ChangedTask, project: KnownProject, annotators: Mapping[int, str]
    ) -> Iterator[tuple[Annotation | Row, str]]:
        """What became of the annotations of a task that are new, changed, skipped or gone."""
        key = _key(task)
        if key is None or key not in self._asked:
            return  # somebody else's task
        known = self._known[project.project_id]
        there = set()
        for data in task.annotations:
            annotation = read_annotation(data, annotators)
            there.add(annotation.annotation_id)
            before = known.get(annotation.annotation_id)
            if before is not None and before["updated_at"] >= annotation.updated_at and before["event"] != "deleted":
                continue
            event = "skipped" if annotation.skipped else "created" if before is None else "changed"
            yield annotation, event
        for number in self._of_key.get((project.project_id, key), ()):
            before = known[number]
            if number not in there and before["event"] != "deleted":
                yield dict(before, updated_at=max(task.updated_at, before["updated_at"] + _TICK)), "deleted"

    def _vanished(self, project: KnownProject) -> Iterator[Row]:
        """Annotations whose whole task was deleted, which no change tells."""
        if self._server.project(project.project_id).num_tasks >= project.num_tasks:
            return
        there = {(task.image_id, task.round) for task in self._server.tasks(project.project_id)}
        for row in self._known[project.project_id].values():
            if row["event"] != "deleted" and (row["image_id"], row["round"]) not in there:
                yield dict(row, updated_at=row["updated_at"] + _TICK)

    # -- rows ------------------------------------------------------------------------------------------------------

    def _shown_model(self, key: TaskKey, at: datetime) -> str | None:
        """The model whose answer was drawn in at that time."""
        sent = self._sent.get(key, [])
        before = [model for when, model in sent if when <= at]
        return before[-1] if before else sent[0][1] if sent else None

    def _model_answers(self, keys: Iterable[TaskKey]) -> Mapping[tuple[str, str], Any]:
        """What models answered to these images, by image and model."""
        images = sorted({image_id for image_id, _ in keys})
        return model_answers(self._engine, self._task, self._kind, _among(images)) if images else {}

    def _row(
        self,
        task: ChangedTask | None,
        project: KnownProject,
        change: Annotation | Row,
        event: str,
        answers: Mapping[tuple[str, str], Any],
    ) -> Row:
        """A row of ``labels``."""
        constant = {
            "task": self._task,
            "event": event,
            "origin": "label_studio",
            "server": self._server.url,
            "project": project.project_id,
        }
        nothing = dict.fromkeys(("label", "value", "seconds", "model", "model_label", "changed_by_person"))
        if isinstance(change, dict):
            names = ("image_id", "annotation_id", "annotator", "round", "reason", "audit", "sha256", "updated_at")
            return constant | nothing | {name: change[name] for name in names}
        assert task is not None
        key = _key(task)
        assert key is not None
        asked = self._asked[key]
        model = self._shown_model(key, change.created_at)
        shown = answers.get((key[0], model)) if model is not None else None
        model_label = None
        if self._kind == "classification" and shown is not None:
            shown = shown["classes"]
            model_label = next(filter(None, class_columns(shown)))
        answer = Answer(None, None, None) if change.skipped else self._read(change, task, shown)
        return constant | {
            "image_id": key[0],
            "annotation_id": change.annotation_id,
            "annotator": change.annotator,
            "seconds": change.seconds,
            "updated_at": change.updated_at,
            "label": answer.label,
            "value": answer.value,
            "sha256": asked["sha256"],
            "model": model,
            "model_label": model_label,
            "changed_by_person": answer.changed,
            "audit": asked["audit"],
            "reason": asked["reason"],
            "round": key[1],
        }

    def _read(self, annotation: Annotation, task: ChangedTask, shown: Any) -> Answer:
        if self._kind == "classification":
            return read_class(annotation.result, shown=shown)
        width, height = task.data.get("width"), task.data.get("height")
        try:
            if not isinstance(width, int) or not isinstance(height, int):
                raise MaskError("the task does not tell the size of its image")
            return read_masks(annotation.result, self._classes, width=width, height=height, shown=shown)
        except MaskError as error:
            logger.warning("annotation %d cannot be read: %s", annotation.annotation_id, error.message)
            return Answer(None, json.dumps({_UNREADABLE: error.message}), None)

    # -- several people --------------------------------------------------------------------------------------------

    def _stored_consensus(self, images: Sequence[str]) -> dict[str, str]:
        """Last event of the consensus of each image that has one."""
        rows = self._engine.sql(
            f"""
            WITH {FINISHED}
            SELECT image_id, arg_max(event, updated_at) AS event FROM labels SEMI JOIN finished USING (run)
            WHERE {self._of_task} AND origin = '{CONSENSUS}' AND {_among(images)} GROUP BY image_id
            """
        ).to_pylist()
        return {row["image_id"]: row["event"] for row in rows}

    def _joint_mask(self, image_id: str, masks: Sequence[Row], stored: str | None) -> list[Row]:
        """The mask that most people gave to each pixel; a deletion when fewer than two people's masks are left.

        Args:
            image_id: of the image.
            masks: one row of each person.
            stored: last event of the image's consensus; None without one.
        """
        constant = {"task": self._task, "origin": CONSENSUS, "image_id": image_id}
        if len(masks) < 2:
            gone = stored not in (None, "deleted")
            return [constant | {"event": "deleted", "updated_at": datetime.now(UTC)}] if gone else []
        names, maps = label_maps(masks, self._classes)
        if not maps:
            return []
        together_HW = majority_map(maps)
        void = unlabelled(together_HW)
        segments = [
            {"label": names[item.value], "rle": item.rle} for item in encode_classes(together_HW) if item.value != void
        ]
        newest = max(masks, key=lambda row: row["updated_at"])
        return [
            constant
            | {
                "event": "created" if stored is None else "changed",
                "value": json.dumps({"segments": segments}, separators=(",", ":"), ensure_ascii=False),
                "sha256": newest["sha256"],
                "audit": newest["audit"],
                "reason": newest["reason"],
                "round": newest["round"],
                "updated_at": datetime.now(UTC),
            }
        ]

    def _tie_rows(self, tied: Sequence[Row]) -> list[Row]:
        """Rows of the queue for images that nobody is asked about any more although people disagree."""
        if not tied:
            return []
        last = Counter[str]()
        for image_id, number in self._asked:
            last[image_id] = max(last[image_id], number)
        number = 1 + max(number for _, number in self._asked)
        model = answerer_of(self._workspace, self._task)
        again = [row for row in tied if (row["round"] or 0) >= last[row["image_id"]]]
        return [
            {
                "image_id": row["image_id"],
                "task": self._task,
                "round": number,
                "model": model,
                "reason": TIE,
                "rank": rank,
                "policy": TIE,
                "audit": bool(row["audit"]),
                "at": datetime.now(UTC),
            }
            for rank, row in enumerate(again, start=1)
        ]


# --------------------------------------------------------------------------------------------------------------- inside


def _key(task: ChangedTask) -> TaskKey | None:
    image_id = task.data.get("image_id")
    return (image_id, round_of(task.data)) if isinstance(image_id, str) else None


def _among(images: Sequence[str]) -> str:
    """SQL: one of these images."""
    return f"image_id IN ({', '.join(map(quoted, images))})"
