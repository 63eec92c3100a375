"""What push, pull and status share: which tasks people answer, where their projects are, and how rows get published."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from winnow import __version__
from winnow.schemas import TABLES
from winnow_connectors.label_tasks import Shape
from winnow_connectors.ledger import Plan, digest_of, new_run_id
from winnow_jobs.selection import reviewed_task
from winnow_jobs.vectors import quoted

if TYPE_CHECKING:
    from winnow.config import Kind
    from winnow_connectors.query import QueryEngine
    from winnow_jobs.workspace import Workspace

MAX_ATTEMPTS = 20
"""How often another process may be faster before we give up."""

FINISHED = "finished AS (SELECT run_id AS run FROM runs WHERE status = 'finished')"
"""A common table expression: runs whose rows count."""

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows by table, without the column ``run``."""


def reviewed_tasks(workspace: Workspace, task: str | None) -> list[str]:
    """The task named, or all that people can answer.

    Raises:
        CallError: no such task, or none that people can answer.
    """
    if task is not None:
        return [reviewed_task(workspace.config, task)]
    names = [name for name, config in workspace.config.tasks.items() if config.kind != "embedding"]
    return names or [reviewed_task(workspace.config, None)]


@dataclass(frozen=True)
class KnownProject:
    """A project that something was pushed to.

    Attributes:
        project_id: its number on the server.
        audit: it holds the images of the audit reserve.
        num_tasks: rows of the queue that were pushed to it.
    """

    project_id: int
    audit: bool
    num_tasks: int


def known_projects(engine: QueryEngine, server: str, task: str) -> list[KnownProject]:
    """The projects of a task on a server, the one used last first."""
    rows = engine.sql(
        f"""
        WITH {FINISHED},
        sent AS (
            SELECT DISTINCT p.project, p.image_id, p.round, max(p."at") OVER (PARTITION BY p.project) AS last
            FROM pushes AS p SEMI JOIN finished USING (run)
            WHERE p.server = {quoted(server)} AND p.task = {quoted(task)}
        )
        SELECT s.project, bool_or(q.audit) AS audit, count(DISTINCT (s.image_id, s.round)) AS num_tasks
        FROM sent AS s JOIN (queue SEMI JOIN finished USING (run)) AS q
            ON q.image_id = s.image_id AND q.round = s.round AND q.task = {quoted(task)}
        GROUP BY s.project ORDER BY max(s.last) DESC, s.project DESC
        """
    )
    return [KnownProject(int(row["project"]), row["audit"], row["num_tasks"]) for row in rows.to_pylist()]


def begin_anew(workspace: Workspace, work: str) -> tuple[tuple[str, int], ...]:
    """The claim that a run of this work needs; a run that was cut short is given up, because nothing of it counts."""
    ledger = workspace.warehouse.ledger
    while True:
        # In this order: a run that claims the number meanwhile makes our claim fail, and we look again.
        numbers = ledger.next_numbers([work])
        left = ledger.open_run(work)
        if left is None:
            return numbers
        ledger.abandon(left, "cut short; done anew by the next one")


def model_answers(engine: QueryEngine, task: str, kind: Kind, where: str) -> dict[tuple[str, str], Any]:
    """The newest answers of models: classes with a confidence, or the shapes of a mask, by image and model.

    Args:
        engine: SQL over the warehouse.
        task: its name.
        kind: of the task.
        where: SQL over ``image_id`` and ``model``: which answers.
    """
    table, more = (
        ("segments", "rle") if kind == "segmentation" else ("predictions", "coalesce(classes, [label]) AS classes")
    )
    rows = engine.sql(
        f"""
        WITH finished AS (SELECT run_id AS run, finished_at FROM runs WHERE status = 'finished')
        SELECT image_id, model, label, confidence, {more} FROM {table} JOIN finished USING (run)
        WHERE task = {quoted(task)} AND {where}
        QUALIFY rank() OVER (PARTITION BY image_id, model ORDER BY finished_at DESC, run) = 1
        ORDER BY image_id, model, label
        """
    ).to_pylist()
    if kind == "classification":
        return {(row["image_id"], row["model"]): row for row in rows}
    shapes: dict[tuple[str, str], Any] = defaultdict(list)
    for row in rows:
        shapes[row["image_id"], row["model"]].append(Shape(row["label"], row["rle"], row["confidence"]))
    return shapes


def publish(
    workspace: Workspace,
    job: str,
    numbers: tuple[tuple[str, int], ...],
    config: Mapping[str, Any],
    rows: Rows,
    summary: Mapping[str, Any],
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> str | None:
    """Claim, write and commit rows that were computed since ``numbers`` were read.

    Args:
        workspace: where.
        job: ``push``, ``pull`` or ``accept``.
        numbers: from ``begin_anew``.
        config: what the run did, for its row in ``runs``.
        rows: to be added.
        summary: further columns of that row.
        files: to lie beside the plan of the run, by name.

    Returns:
        The run's id; None when another run of the same work was faster: compute the rows again.
    """
    ledger = workspace.warehouse.ledger
    plan = Plan(
        run_id=new_run_id(job),
        job=job,
        claims=numbers,
        digest=digest_of({"job": job, **config}),
        config=config,
        num_planned=0,
        started_at=datetime.now(UTC).isoformat(),
        code_version=__version__,
    )
    run = ledger.begin(plan)
    if run is None:
        return None
    try:
        for name, data in files.items():
            run.store.put(run.key(name), data)
        fragments = []
        for table, found in rows.items():
            if found:
                values = [dict.fromkeys(TABLES[table].names) | dict(row, run=run.run_id) for row in found]
                fragments.append(run.stage(table, pa.Table.from_pylist(values, schema=TABLES[table])))
        run.decide("finished", fragments, summary)
    except KeyboardInterrupt:
        ledger.abandon(run, "stopped with Ctrl-C")
        raise
    return run.run_id if run.close()["status"] == "finished" else None
