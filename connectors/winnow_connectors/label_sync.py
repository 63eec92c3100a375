"""Bring a Label Studio project to have one task per row of the queue, each with the model's prediction.

A row is known by its image and round, and so is its task: an image comes back in a later round only when people
disagreed about it.

What the server has is read first; only what is missing is sent, in chunks, by one writer. A request without an answer
may have been carried out, so after each such failure the server is read again. At the end it is read once more: what it
lost is sent again, what it doubled is deleted.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from winnow.errors import ReviewError
from winnow_connectors.label_studio import KnownTask, LabelStudio
from winnow_connectors.label_studio_http import UnsureError
from winnow_connectors.label_tasks import Json

logger = logging.getLogger(__name__)

TaskKey = tuple[str, int]
"""image_id and round."""

Make = Callable[[Sequence[TaskKey]], Sequence[Json]]
"""Gives, for some keys, ``{"data": …, "predictions": […]}`` each; with no or one prediction."""

_MAX_TASKS = 1000
_MAX_BYTES = 32_000_000
_MADE_AT_ONCE = 100
_MAX_ROUNDS = 10
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)


@dataclass(frozen=True)
class Synced:
    """What was done.

    Attributes:
        task_ids: number of the task of every key asked for.
        num_new: tasks that were not there.
        num_updated: unanswered tasks that got a prediction of the model beside older ones.
        num_known: tasks that were there as they should be.
        num_doubles: second tasks of a key that were deleted.
    """

    task_ids: dict[TaskKey, int]
    num_new: int
    num_updated: int
    num_known: int
    num_doubles: int


def sync(
    server: LabelStudio,
    project_id: int,
    wanted: Mapping[TaskKey, str | None],
    make: Make,
    *,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> Synced:
    """Bring a project to have one task for each key, with the prediction that it is to have.

    Tasks that somebody answered are left as they are, and so are tasks of other keys.

    Args:
        server: where.
        project_id: of the project; no other process may write to it.
        wanted: by key, the model version whose prediction ``make`` gives, or None where it gives none; in the order in
            which tasks are created.
        make: makes the tasks, for at most ``_MADE_AT_ONCE`` keys a call.
        on_progress: told how many tasks were sent so far.

    Raises:
        ReviewError: the server kept failing or kept losing what was sent. Calling again goes on.
    """
    first = known = _known(server, project_id)
    unsure, num_sent = 0, 0
    for _ in range(_MAX_ROUNDS):
        missing = [key for key in wanted if key not in known]
        outdated = [key for key, model in wanted.items() if _lacks(known.get(key), model)]
        if not missing and not outdated:
            break
        try:
            for body, num in _chunks(missing, make, None):
                server.import_tasks(project_id, body)
                num_sent += num
                on_progress(num_sent)
            for body, num in _chunks(outdated, make, known):
                server.import_predictions(project_id, body)
                num_sent += num
                on_progress(num_sent)
        except UnsureError as error:
            if unsure == len(_PAUSES_S):
                raise
            logger.warning("%s; looking what arrived in %g s", error, _PAUSES_S[unsure])
            time.sleep(_PAUSES_S[unsure])  # the server may still be at it
            unsure += 1
        known = _known(server, project_id)
    else:
        raise ReviewError(
            f"Label Studio at {server.url} accepted all tasks, but still lacks {len(missing):,} of them and "
            f"{len(outdated):,} predictions; let nothing else write to project {project_id}, and run this again"
        )
    num_doubles = sum(_delete_doubles(server, known[key]) for key in wanted)
    num_new = sum(key not in first for key in wanted)
    num_updated = sum(_lacks(first.get(key), model) for key, model in wanted.items())
    return Synced(
        task_ids={key: _kept(known[key]).task_id for key in wanted},
        num_new=num_new,
        num_updated=num_updated,
        num_known=len(wanted) - num_new - num_updated,
        num_doubles=num_doubles,
    )


def _known(server: LabelStudio, project_id: int) -> dict[TaskKey, list[KnownTask]]:
    """The tasks of every key, oldest first."""
    found: dict[TaskKey, list[KnownTask]] = {}
    for task in server.tasks(project_id):
        if task.image_id:
            found.setdefault((task.image_id, task.round), []).append(task)
    return found


def _kept(tasks: list[KnownTask]) -> KnownTask:
    """Of several tasks of a key the one that stays: the first that somebody answered, else the first."""
    return min(tasks, key=lambda task: (not task.answered, task.task_id))


def _lacks(tasks: list[KnownTask] | None, model: str | None) -> bool:
    """True for a task that is there, waits for its answer, and has no prediction of the model."""
    if tasks is None or model is None:
        return False
    task = _kept(tasks)
    return not task.answered and model not in task.models


def _delete_doubles(server: LabelStudio, tasks: list[KnownTask]) -> int:
    kept = _kept(tasks)
    doubles = [task for task in tasks if task is not kept and not task.answered]
    for task in doubles:
        server.delete_task(task.task_id)
    return len(doubles)


def _chunks(
    keys: Sequence[TaskKey], make: Make, known: dict[TaskKey, list[KnownTask]] | None
) -> Iterator[tuple[bytes, int]]:
    """JSON lists of tasks, or of predictions for the tasks that are known, and how many are in each."""
    waiting: list[bytes] = []
    num_bytes = 0
    for start in range(0, len(keys), _MADE_AT_ONCE):
        some = keys[start : start + _MADE_AT_ONCE]
        for key, made in zip(some, make(some), strict=True):
            values = [made]
            if known is not None:
                values = [{"task": _kept(known[key]).task_id, **value} for value in made["predictions"]]
            for value in values:
                data = json.dumps(value, separators=(",", ":")).encode()
                if waiting and (len(waiting) == _MAX_TASKS or num_bytes + len(data) > _MAX_BYTES):
                    yield b"[" + b",".join(waiting) + b"]", len(waiting)
                    waiting, num_bytes = [], 0
                waiting.append(data)
                num_bytes += len(data) + 1
    if waiting:
        yield b"[" + b",".join(waiting) + b"]", len(waiting)
