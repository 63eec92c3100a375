"""A Label Studio server: its projects, storages, tasks and annotations.

Written for the community edition of 1.23. Only one process may write to a project at a time: with SQLite, parallel
imports answer that all went well and lose predictions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from winnow.errors import CallError, ReviewError
from winnow.uris import redact
from winnow_connectors.label_studio_http import Connection, NotThereError
from winnow_connectors.label_tasks import Json
from winnow_connectors.objects import Patience
from winnow_connectors.web import HttpFault

OLDEST_RELEASE = (1, 23)
"""The oldest that the tests were run with."""

_RIGHTS = frozenset(
    f"{thing}.{verb}"
    for thing, verbs in {
        "projects": ("view", "create", "change"),
        "tasks": ("view", "create", "change", "delete"),
        "annotations": ("view",),
        "predictions": ("any",),
        "storages": ("view", "change"),
    }.items()
    for verb in verbs
)
"""What a push and a pull need, by Label Studio's names."""

_PAGE = 2000
_OVERLAP = timedelta(seconds=60)
"""A change whose transaction was slow appears this much after its time at most."""

_ANNOTATION = "result,completed_by,created_at,was_cancelled,lead_time,ground_truth,parent_prediction"
_TITLE = (3, 50)


@dataclass(frozen=True)
class Server:
    """What a check finds.

    Attributes:
        release: such as ``1.23.2``.
        user: whose token it is.
    """

    release: str
    user: str


@dataclass(frozen=True)
class Project:
    """A project as it is on the server."""

    project_id: int
    title: str
    config: str
    model: str
    description: str = ""
    num_tasks: int = 0
    created: bool = False


@dataclass(frozen=True)
class S3Storage:
    """A bucket that a project may show images from. The server fetches them, and no browser needs access.

    Attributes:
        bucket: its name.
        prefix: only objects under it.
        endpoint: address of an S3-compatible server, as Label Studio reaches it; None for AWS.
        region: of the bucket.
        access_key: None where the server has a role of its own.
        secret_key: likewise.
        session_token: of temporary keys.
    """

    bucket: str
    prefix: str
    endpoint: str | None = None
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class KnownTask:
    """A task that the server has.

    Attributes:
        task_id: its number.
        image_id: of its image; empty for a task that is none of ours.
        round: of the queue row that it was made from; 0 for a task that is none of ours.
        models: versions whose predictions it has.
        answered: somebody annotated or skipped it.
    """

    task_id: int
    image_id: str
    round: int
    models: frozenset[str]
    answered: bool


@dataclass(frozen=True)
class ChangedTask:
    """A task whose annotations may have changed, with all that it has now.

    Attributes:
        task_id: its number.
        data: of the task.
        updated_at: time of the change: the watermark when all up to here is stored.
        annotations: as the API tells them, for ``label_tasks.read_annotation``; without those deleted.
    """

    task_id: int
    data: Json
    updated_at: datetime
    annotations: list[Json]


class LabelStudio:
    """A server, opened with a token."""

    def __init__(self, url: str, token: str, *, patience: Patience | None = None) -> None:
        """Nothing is asked yet.

        Args:
            url: address of the server.
            token: personal access token, or legacy token; empty opens nothing but ``release``.
            patience: how long to wait and to retry.

        Raises:
            CallError: no web address, or something that is no token.
        """
        if not url.startswith(("http://", "https://")):
            raise CallError(f"LABEL_STUDIO_URL={redact(url)!r} is no web address; set it to http://HOST:PORT")
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise CallError(f"LABEL_STUDIO_URL={redact(url)!r} holds a password; give the address without it")
        if not token.isascii() or not token.isprintable() or " " in token:
            raise CallError("LABEL_STUDIO_API_KEY is no token: it has blanks or control characters; copy it again")
        self._api = Connection(url, token, patience or Patience())

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, *, patience: Patience | None = None
    ) -> LabelStudio:
        """The server that LABEL_STUDIO_URL names, opened with LABEL_STUDIO_API_KEY.

        Raises:
            CallError: one of them is not set or cannot be right.
        """
        environment = os.environ if environment is None else environment
        url, token = (environment.get(name, "").strip() for name in ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"))
        if not url:
            raise CallError(
                "LABEL_STUDIO_URL is not set; set it to the address of Label Studio, or start one: `winnow services up`"
            )
        if not token:
            raise CallError("LABEL_STUDIO_API_KEY is not set; copy a token from Label Studio's Account & Settings page")
        return cls(url, token, patience=patience)

    def __repr__(self) -> str:
        return f"LabelStudio({self._api.shown!r}, token='***')"

    @property
    def url(self) -> str:
        """Address without a slash at its end and without secrets: how ``pushes`` and ``labels`` name the server."""
        return self._api.shown

    def release(self) -> str:
        """Its release, such as ``1.23.2``; needs no token.

        Raises:
            CallError: another server, or too old.
            ReviewError: it does not answer.
        """
        try:
            answer = self._api.ask_without_token("/api/version")
        except HttpFault as fault:
            if fault.passing:
                raise ReviewError(
                    f"Label Studio at {self.url} does not answer ({fault.detail}); start it, or mend LABEL_STUDIO_URL"
                ) from None
            raise _no_label_studio(self.url, fault.detail) from None
        release = answer.get("release") if isinstance(answer, Mapping) else None
        numbers = re.match(r"(\d+)\.(\d+)", release) if isinstance(release, str) else None
        if numbers is None:
            raise _no_label_studio(self.url, "no release in its answer")
        if (int(numbers[1]), int(numbers[2])) < OLDEST_RELEASE:
            oldest = ".".join(map(str, OLDEST_RELEASE))
            raise CallError(
                f"Label Studio at {self.url} is {release}, which is too old; upgrade it to {oldest} or newer"
            )
        return str(release)

    def check(self) -> Server:
        """Whether everything that a push or pull needs is there; changes nothing.

        Raises:
            CallError: another server, too old, a wrong token, or one without the rights.
            ReviewError: it does not answer.
        """
        release = self.release()
        user = self._api.authorize()
        name = str(user.get("email") or user.get("username") or "a user")
        rights = user.get("permissions")
        missing = _RIGHTS - set(rights) if isinstance(rights, list) else frozenset()
        if missing:
            raise CallError(
                f"{name} may not do everything in Label Studio at {self.url} that is needed (missing: "
                f"{', '.join(sorted(missing))}); use the token of a user who may manage projects"
            )
        return Server(release, name)

    def annotators(self) -> dict[int, str]:
        """Mail address of every user, by number."""
        return {int(user["id"]): str(user.get("email") or user["id"]) for user in self._api.get("/api/users/")}

    # -- projects ------------------------------------------------------------------------------------------------

    def find_project(self, title: str, *, description: str | None = None) -> Project | None:
        """The oldest project of exactly that title, and description if one is given; None when there is none."""
        found: list[int] = []
        page = 1
        while True:
            answer = self._api.get(
                "/api/projects/", title=title, include="id,title,description", page=page, page_size=100
            )
            found += [
                int(item["id"])
                for item in answer["results"]
                if item["title"] == title and description in (None, item["description"])
            ]
            if answer["next"] is None:
                break
            page += 1
        return self.project(min(found)) if found else None

    def project(self, project_id: int) -> Project:
        """A project by its number. Raises ReviewError where there is none."""
        return _project(self._api.get(f"/api/projects/{project_id}/"))

    def create_project(
        self, title: str, *, config: str, instructions: str, in_order: bool, description: str = ""
    ) -> Project:
        """A new project.

        Args:
            title: 3 to 50 characters.
            config: labeling configuration.
            instructions: HTML, shown before labeling.
            in_order: serve the tasks with the lowest prediction score first; else in random order.
            description: for the list of projects.

        Raises:
            CallError: a title that Label Studio does not take.
            UnsureError: no answer; look for it with ``find_project``.
            ReviewError: refused.
        """
        if not _TITLE[0] <= len(title) <= _TITLE[1]:
            shortest, longest = _TITLE
            raise CallError(
                f"{title!r} cannot be a project's title; Label Studio takes {shortest} to {longest} letters"
            )
        made = self._api.post(
            "/api/projects/",
            {
                "title": title,
                "description": description,
                "label_config": config,
                "expert_instruction": instructions,
                "show_instruction": True,
                "sampling": "Uncertainty sampling" if in_order else "Uniform sampling",
                "show_collab_predictions": in_order,
            },
        )
        return _project(made, created=True)

    def update_project(
        self, project_id: int, *, config: str | None = None, instructions: str | None = None, model: str | None = None
    ) -> Project:
        """Change what is given; the project as it is then.

        Args:
            project_id: of the project.
            config: labeling configuration.
            instructions: HTML.
            model: version whose predictions are shown and give the order; refused while there are none of it.
        """
        values = {"label_config": config, "expert_instruction": instructions, "model_version": model}
        changed = {name: value for name, value in values.items() if value is not None}
        return _project(self._api.patch(f"/api/projects/{project_id}/", changed))

    # -- storages ------------------------------------------------------------------------------------------------

    def connect_s3(self, project_id: int, storage: S3Storage) -> int:
        """Let a project show images of a bucket; the storage's number. The second time only brings it up to date."""
        values: Json = {
            "project": project_id,
            "title": f"winnow {storage.bucket}/{storage.prefix}"[:256],
            "bucket": storage.bucket,
            "prefix": storage.prefix,
            "s3_endpoint": storage.endpoint,
            "region_name": storage.region,
            "aws_access_key_id": storage.access_key,
            "aws_secret_access_key": storage.secret_key,
            "aws_session_token": storage.session_token,
            "use_blob_urls": True,
            "presign": False,  # the server hands the bytes on, so no browser needs to reach the bucket
        }
        return self._connect("s3", values, ("bucket", "prefix"))

    def connect_local(self, project_id: int, path: str) -> int:
        """Let a project show images of a folder of the server's machine; the number of the storage.

        Args:
            project_id: of the project.
            path: a folder *below* LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT, on the server's machine.
        """
        values: Json = {"project": project_id, "title": "winnow", "path": path, "use_blob_urls": True}
        return self._connect("localfiles", values, ("path",))

    def _connect(self, kind: str, values: Json, keys: Sequence[str]) -> int:
        for known in self._api.get(f"/api/storages/{kind}/", project=values["project"]):
            if all((known.get(key) or "") == (values[key] or "") for key in keys):
                self._api.patch(f"/api/storages/{kind}/{known['id']}", values)
                return int(known["id"])
        return int(self._api.post(f"/api/storages/{kind}/", values)["id"])

    # -- tasks ---------------------------------------------------------------------------------------------------

    def tasks(self, project_id: int) -> Iterator[KnownTask]:
        """Every task of a project, in the order of their numbers."""
        include = "id,data,predictions_model_versions,total_annotations,cancelled_annotations"
        query = json.dumps({"ordering": ["tasks:id"]})
        page = 1
        while True:
            try:
                answer = self._list(project_id, page=page, include=include, query=query)
            except NotThereError:  # the last page was full
                if page == 1:
                    raise
                return
            for task in answer["tasks"]:
                models = task.get("predictions_model_versions") or ""
                yield KnownTask(
                    task_id=int(task["id"]),
                    image_id=str(task["data"].get("image_id") or ""),
                    round=round_of(task["data"]),
                    models=frozenset(models.split(",") if isinstance(models, str) else models) - {""},
                    answered=bool(task.get("total_annotations") or task.get("cancelled_annotations")),
                )
            if len(answer["tasks"]) < _PAGE:
                return
            page += 1

    def annotate(self, task_id: int, result: Sequence[Json]) -> int:
        """Answer a task as the user of the token; the number of the annotation.

        Args:
            task_id: of the task.
            result: regions and choices, as of ``label_tasks.class_result`` or ``mask_results``.

        Raises:
            UnsureError: no answer: it was taken, or not, or still is.
            CallError, ReviewError: refused.
        """
        return int(self._api.post(f"/api/tasks/{task_id}/annotations/", {"result": list(result)})["id"])

    def import_tasks(self, project_id: int, tasks: bytes) -> list[int]:
        """Create tasks, with their predictions; their numbers, in the order given. Sending them again doubles them.

        Args:
            project_id: of the project.
            tasks: a JSON list of ``{"data": …, "predictions": […]}``, 250 MB at most.

        Raises:
            UnsureError: no answer: they were created, or not, or still are.
            ReviewError: refused.
        """
        answer = self._api.post(f"/api/projects/{project_id}/import", tasks, return_task_ids="true")
        return [int(number) for number in answer["task_ids"]]

    def import_predictions(self, project_id: int, predictions: bytes) -> int:
        """Add predictions to tasks; how many were added.

        Args:
            project_id: of the project.
            predictions: a JSON list of ``{"task": number, "model_version": …, "score": …, "result": […]}``.

        Raises:
            UnsureError: no answer.
            ReviewError: refused.
        """
        return int(self._api.post(f"/api/projects/{project_id}/import/predictions", predictions)["created"])

    def delete_task(self, task_id: int) -> None:
        """Delete a task with all that it has; does nothing when it is gone."""
        self._api.delete(f"/api/tasks/{task_id}/")

    # -- annotations ---------------------------------------------------------------------------------------------

    def changed_tasks(self, project_id: int, since: datetime | None) -> Iterator[ChangedTask]:
        """Every task with a change since then, oldest change first, with the annotations that it has now.

        Making, changing, deleting and skipping an annotation is a change of its task; so is its import. A little before
        ``since`` is told again, because slow transactions appear late. Tasks that were deleted are not told.

        Args:
            project_id: of the project.
            since: ``updated_at`` of the last task that was stored; None for all.
        """
        include = f"id,data,updated_at,annotations,{_ANNOTATION}"
        mark = None if since is None else _text(since - _OVERLAP)
        page, told = 1, set[tuple[int, str]]()
        while True:
            query = json.dumps(_changed_since(mark))
            try:
                tasks = self._list(project_id, page=page, include=include, query=query)["tasks"]
            except NotThereError:
                if page == 1:
                    raise
                return
            for task in tasks:
                if (key := (int(task["id"]), str(task["updated_at"]))) not in told:
                    told.add(key)
                    yield ChangedTask(
                        key[0], task["data"], datetime.fromisoformat(key[1]), list(task.get("annotations") or [])
                    )
            if len(tasks) < _PAGE:
                return
            # From the last one on: pages would shift while people work. Pages only where a whole one has the same time.
            last = _text(datetime.fromisoformat(tasks[-1]["updated_at"]))
            page, mark = (page + 1, mark) if last == mark else (1, last)

    def _list(self, project_id: int, **query: Any) -> Any:
        """A page of tasks. ``fields=all`` gives the predictions' versions; what ``include`` lacks is not computed."""
        return self._api.get(
            "/api/tasks/", project=project_id, fields="all", page_size=_PAGE, resolve_uri="false", **query
        )


def round_of(data: Mapping[str, Any]) -> int:
    """The round that a task's data tell; 0 when they tell none."""
    number = data.get("round")
    return number if isinstance(number, int) else 0


def _changed_since(mark: str | None) -> Json:
    query: Json = {"ordering": ["tasks:updated_at"]}
    if mark is not None:
        condition = {
            "filter": "filter:tasks:updated_at",
            "operator": "greater_or_equal",
            "type": "Datetime",
            "value": mark,
        }
        query["filters"] = {"conjunction": "and", "items": [condition]}
    return query


def _text(moment: datetime) -> str:
    """The one form that Label Studio's filters take."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _project(data: Mapping[str, Any], *, created: bool = False) -> Project:
    return Project(
        project_id=int(data["id"]),
        title=str(data["title"]),
        config=str(data["label_config"]),
        model=str(data.get("model_version") or ""),
        description=str(data.get("description") or ""),
        num_tasks=int(data.get("task_number") or 0),
        created=created,
    )


def _no_label_studio(url: str, detail: str) -> CallError:
    return CallError(
        f"{url} answers, but not as Label Studio does ({detail}); mend LABEL_STUDIO_URL: scheme, host, port"
    )
