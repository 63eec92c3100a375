"""Listing, resuming and abandoning runs."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from winnow.batches import num_positions
from winnow.errors import CallError
from winnow.schemas import TABLES

if TYPE_CHECKING:
    from winnow_connectors.registry import Move
    from winnow_jobs.augment import AugmentResult
    from winnow_jobs.duplicates import DuplicatesResult
    from winnow_jobs.ingest import IngestResult
    from winnow_jobs.predict import PredictResult
    from winnow_jobs.selection import SelectResult
    from winnow_jobs.train import TrainResult
    from winnow_jobs.workspace import Workspace

_COLUMNS = (
    "run_id",
    "job",
    "status",
    "started_at",
    "finished_at",
    "num_asked",
    "num_answered",
    "num_failed",
    "images_per_s",
    "verdict",
)
_SCHEMA = pa.schema([TABLES["runs"].field(name).with_nullable(True) for name in _COLUMNS])


def list_runs(workspace: Workspace) -> pa.Table:
    """All runs, newest first. Open runs have status ``open`` and count what is safely written so far."""
    workspace.warehouse.check()
    rows = [_open_row(run) for run in workspace.warehouse.ledger.open_runs()]
    closed = workspace.warehouse.tables.dataset("runs").to_table(columns=list(_COLUMNS)).cast(_SCHEMA)
    table = pa.concat_tables([pa.Table.from_pylist(rows, schema=_SCHEMA), closed])
    return table.sort_by([("started_at", "descending")])


def _open_row(run: Any) -> dict[str, Any]:
    selection = run.select()
    asked = run.plan.config.get("num_asked", {})
    done = run.plan.num_planned - num_positions(selection.missing)
    written = f"{done:,} of {run.plan.num_planned:,} images written; " if run.plan.num_planned else ""
    verdict = f"{written}`winnow runs resume {run.run_id}` continues it"
    if run.num_stops():
        verdict = f"stopped for failures of access or storage; {verdict}"
    return {
        "run_id": run.run_id,
        "job": run.plan.job,
        "status": "open",
        "started_at": datetime.fromisoformat(run.plan.started_at),
        "num_asked": sum(asked.values()) if asked else run.plan.num_planned,
        "verdict": verdict,
    }


def show_run(workspace: Workspace, run_id: str) -> dict[str, Any]:
    """Everything known of one run.

    Raises:
        CallError: no such run.
    """
    workspace.warehouse.check()
    run = workspace.warehouse.ledger.load(run_id)
    if run.outcome() is not None:
        run.close()
        rows = workspace.warehouse.tables.dataset("runs").to_table().filter(pc.field("run_id") == run_id)
        row: dict[str, Any] = rows.to_pylist()[0]
        for name in ("counts", "failures", "seconds"):
            row[name] = dict(row[name] or [])
        return row
    plan = run.plan
    return {**_open_row(run), "digest": plan.digest, "host": plan.host, "code_version": plan.code_version}


def resume(
    workspace: Workspace, run_id: str
) -> PredictResult | AugmentResult | IngestResult | DuplicatesResult | SelectResult | TrainResult | Move:
    """Finish an open run with the options it was started with.

    Raises:
        CallError: no such run, or it is closed already.
    """
    from winnow_jobs import augment, duplicates, ingest, models, predict, selection, train

    workspace.warehouse.check()
    ledger = workspace.warehouse.ledger
    run = ledger.load(run_id)
    if run.outcome() is None and not ledger.claim(run):
        raise CallError(
            f"run {run_id} never began: another run claimed the same work first; run `winnow {run.plan.job}`"
        )
    outcome = run.outcome()
    if run.is_closed and outcome is not None:
        raise CallError(f"run {run_id} is {outcome['status']} already; there is nothing to resume")
    if run.plan.job in ("push", "pull", "accept", "evaluate"):
        command = run.plan.job if run.plan.job in ("accept", "evaluate") else f"review {run.plan.job}"
        raise CallError(f"run {run_id} wrote nothing that counts; `winnow {command}` does it anew")
    if run.plan.job == "ingest":
        return ingest.resume(workspace, run)
    if run.plan.job == "duplicates":
        return duplicates.resume(workspace, run)
    if run.plan.job == "select":
        return selection.resume(workspace, run)
    if run.plan.job in ("promote", "rollback"):
        return models.resume(workspace, run)
    if run.plan.job == "train":
        return train.work_off(workspace, run)
    if run.plan.job == "augment":
        return augment.resume(workspace, run)
    return predict.resume(workspace, run)


def abandon(workspace: Workspace, run_id: str) -> str:
    """Give a run up; its written batches will never count.

    Raises:
        CallError: no such run, or it is closed already.
    """
    workspace.warehouse.check()
    ledger = workspace.warehouse.ledger
    run = ledger.load(run_id)
    if run.is_closed:
        outcome = run.outcome() or {}
        raise CallError(f"run {run_id} is {outcome.get('status')} already; only an open run can be abandoned")
    status: str = ledger.abandon(run, "given up by hand")["status"]
    return status
