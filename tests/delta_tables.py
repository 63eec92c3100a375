"""Real Delta tables in a folder, filled by hand, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable, write_deltalake

from winnow.schemas import TABLES
from winnow_connectors.query import QueryEngine

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(minute: int) -> datetime:
    return START + timedelta(minutes=minute)


_DEFAULTS: dict[str, dict[str, Any]] = {
    "images": {
        "seen_at": at(0), "event": "added", "version": "v", "source": "s", "split": "train", "group": "g",
        "audit": False,
    },
    "outcomes": {"task": "kind", "model": "kind@1", "status": "answered", "at": at(0)},
    "predictions": {
        "task": "kind", "model": "kind@1", "confidence": 0.5, "margin": 0.1, "entropy": 1.0, "top5": [], "at": at(0),
    },
    "segments": {
        "task": "parts", "model": "parts@1", "area_share": 0.5, "confidence": 0.5, "entropy": 0.1,
        "box": [0.0, 0.0, 1.0, 1.0], "at": at(0),
    },
    "embeddings": {"task": "alike", "model": "alike@1", "at": at(0)},
    "queue": {
        "task": "kind", "round": 1, "model": "kind@1", "reason": "margin", "rank": 1, "policy": "default",
        "audit": False, "at": at(0),
    },
    "labels": {
        "task": "kind", "event": "created", "origin": "label_studio", "server": "ls", "project": 1, "updated_at": at(0),
    },
    "accepted": {
        "task": "kind", "model": "kind@1", "threshold": 0.9, "bound": 0.01, "audit_snapshot": "a", "at": at(0),
    },
    "models": {"task": "kind", "at": at(0)},
    "runs": {
        "job": "predict", "status": "finished", "started_at": at(0), "config": "{}", "digest": "d", "code_version": "0",
    },
}  # fmt: skip


class HandMade:
    """All tables. Rows belong to the run ``r1``, finished, if they name no other.

    Args:
        folder: for the tables.
        exist: they are there already, as those of a workspace are.
    """

    def __init__(self, folder: Path, *, exist: bool = False) -> None:
        self.folder = folder
        self.opened: list[str] = []
        self._annotation_ids = itertools.count(1)
        for name, schema in ({} if exist else TABLES).items():
            DeltaTable.create(folder / name, schema)
        self.run("r1", finished=1)

    def run(self, run_id: str, *, finished: int, status: str = "finished") -> None:
        self.add("runs", run_id=run_id, finished_at=at(finished), status=status)

    def add(self, table: str, **row: Any) -> None:
        self.add_rows(table, [row])

    def add_rows(self, table: str, rows: Iterable[dict[str, Any]]) -> None:
        """Many rows in one commit."""
        complete = [self._complete(table, row) for row in rows]
        write_deltalake(self.folder / table, pa.Table.from_pylist(complete, schema=TABLES[table]), mode="append")

    def _complete(self, table: str, row: dict[str, Any]) -> dict[str, Any]:
        row = {**_DEFAULTS[table], **row}
        if table != "runs":
            row.setdefault("run", "r1")
        if table == "images":
            row.setdefault("uri", f"file:///{row['image_id']}.jpg")
        if table == "labels" and row["origin"] == "label_studio":
            row.setdefault("annotation_id", next(self._annotation_ids))
        return row

    def dataset(self, name: str) -> ds.Dataset:
        self.opened.append(name)
        return DeltaTable(self.folder / name).to_pyarrow_dataset(schema=TABLES[name])

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        return [tuple(row.values()) for row in QueryEngine(self).sql(statement).to_pylist()]
