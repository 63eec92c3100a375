"""``winnow models``: which versions there are, and which of them answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from winnow.errors import CallError
from winnow.models.cards import check_task, parse_version
from winnow_connectors.ledger import Run
from winnow_connectors.registry import Move

if TYPE_CHECKING:
    from winnow_jobs.workspace import Workspace


def show_version(workspace: Workspace, name: str) -> dict[str, Any]:
    """Everything known of one version: its card, where it lies, what became of it.

    Raises:
        CallError: no such version.
        JobError: its card is gone or damaged.
    """
    import dataclasses

    workspace.warehouse.check()
    registry = workspace.warehouse.registry
    version = registry.version(name)
    card = dataclasses.asdict(registry.card(version))
    events = [
        {"event": row["event"], "at": row["at"].isoformat(), "run": row["run"]}
        for row in registry.history(version.task)
        if row["version"] == name
    ]
    return {**card, "location": version.location, "production": version.production, "events": events}


def promote(workspace: Workspace, name: str, *, force: bool = False) -> Move:
    """Let a model version answer its task from now on.

    Raises:
        CallError: no such version or task, it was not measured (unless ``force``), or it does not fit the task.
        JobError: its files are gone or damaged.
    """
    workspace.warehouse.check()
    task = workspace.config.task(parse_version(name)[0])
    registry = workspace.warehouse.registry
    if parse_version(name)[1] is not None:
        check_task(registry.card(registry.version(name)), task)
    return registry.promote(name, force=force)


def roll_back(workspace: Workspace, task: str, to: str | None = None) -> Move:
    """Let the version before answer again, or the one named: ``base``, a number or ``<task>@<n>``.

    Raises:
        CallError: no such version or task, or nothing to go back to.
        JobError: the files of that version are gone or damaged.
    """
    workspace.config.task(task)
    workspace.warehouse.check()
    return workspace.warehouse.registry.roll_back(task, to)


def resume(workspace: Workspace, run: Run) -> Move:
    """Finish a promotion or rollback that was cut short.

    Raises:
        CallError: it was abandoned meanwhile.
    """
    if workspace.warehouse.registry.finish_move(run) != "finished":
        raise CallError(f"run {run.run_id} is abandoned already; there is nothing to resume")
    row = run.plan.config
    return Move(row["task"], row["version"], row["detail"]["before"], run.run_id)
