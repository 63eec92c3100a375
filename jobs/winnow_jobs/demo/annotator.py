"""Who answers the demo's questions in Label Studio: a simulated annotator, or the person in front of the screen.

The simulated annotator is no model and looks at no picture: it knows what was drawn, and says so through the same API
that a browser uses. It makes no mistakes, is never unsure, and measures no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from winnow.config import Kind
from winnow.masks import encode_classes
from winnow_connectors.label_studio import LabelStudio
from winnow_connectors.label_tasks import Json, Shape, class_result, mask_results
from winnow_jobs.demo.surfaces import MASK_CLASSES, SIDE, Surface, mask_of
from winnow_jobs.progress import Progress

_POLL_S = 3.0


def answer_all(
    server: LabelStudio,
    project: int,
    kind: Kind,
    surfaces: Mapping[str, Surface],
    *,
    on_answer: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Answer every task of a project that nobody has answered yet; how many that were.

    Args:
        server: that has it.
        project: its number.
        kind: of the task: a class or masks.
        surfaces: what the images show, by image_id.
        on_answer: told how many are answered, and of how many.
    """
    open_tasks = [task for task in server.tasks(project) if not task.answered]
    for done, task in enumerate(open_tasks, start=1):
        server.annotate(task.task_id, answer_to(surfaces[task.image_id], kind))
        on_answer(done, len(open_tasks))
    return len(open_tasks)


def answer_to(surface: Surface, kind: Kind) -> list[Json]:
    """What is true of a surface, as Label Studio takes it."""
    if kind == "classification":
        return class_result(surface.label)
    shapes = [Shape(MASK_CLASSES[item.value], item.rle) for item in encode_classes(mask_of(surface))]
    return mask_results(shapes, width=SIDE, height=SIDE)


def wait_for_person(server: LabelStudio, projects: list[int]) -> int:
    """Wait until every task of the projects is answered or skipped; how many there are."""
    with Progress("answers") as progress:
        while True:
            answered = [task.answered for project in projects for task in server.tasks(project)]
            progress.total = len(answered)
            progress.update(sum(answered))
            if all(answered):
                return len(answered)
            time.sleep(_POLL_S)
