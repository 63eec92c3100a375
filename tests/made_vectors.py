"""Workspaces whose images, outcomes and vectors were made by hand: no image is read and no model asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import workspaces as ws
from winnow.schemas import TABLES
from winnow_jobs import Workspace

TASK = "alike"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
_SECTION = f"""
[tasks.{TASK}]
kind = "embedding"
model = "./small.safetensors"
architecture = "timm/test_resnet"
"""


def make_workspace(folder: Path) -> Workspace:
    """An empty warehouse, and an embedding task beside the classification task."""
    config = ws.write_config(folder)
    config.write_text(config.read_text() + _SECTION)
    workspace = Workspace(config)
    workspace.init()
    return workspace


def image_id(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


def uri(number: int) -> str:
    return f"s3://photos/{number:06d}.jpg"


def unit(vectors_ND: Any) -> np.ndarray:
    vectors_ND = np.asarray(vectors_ND, dtype=np.float64)
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


def publish(
    workspace: Workspace,
    vectors_ND: np.ndarray,
    *,
    start: int = 0,
    status: str = "finished",
    model: str | None = None,
    num_files: int = 2,
    **columns: Mapping[int, Any],
) -> None:
    """Publish images ``start``, ``start + 1``, … with these vectors, as one run each of ingest and predict would.

    Args:
        workspace: where to.
        vectors_ND: one per image.
        start: number of the first image.
        status: of the predict run; ``open`` for one that is not in ``runs``.
        model: the task's by default.
        num_files: that each table gets.
        columns: of ``images`` and ``outcomes``, by number of the image, where they differ from the default.
    """
    tables = workspace.warehouse.tables
    model = model or workspace.task_model(TASK).id
    ingest_run, predict_run = f"ingest-{start}-{status}", f"predict-{start}-{status}-{model}"
    fragments: dict[str, list[Any]] = {name: [] for name in ("images", "outcomes", "embeddings")}
    for part in np.array_split(np.arange(len(vectors_ND)), num_files):
        numbers = [start + int(row) for row in part]
        fixed = {"image_id": [image_id(number) for number in numbers]}
        varied: dict[str, list[Any]] = {
            "uri": [uri(number) for number in numbers],
            "group": fixed["image_id"],
            "seen_at": [NOW + timedelta(seconds=number) for number in numbers],
            "sha256": [f"sha-{number}" for number in numbers],
            "pixel_hash": [f"pixels-{number}" for number in numbers],
        }
        for name, values in columns.items():
            default = {"split": "train", "audit": False, "width": 40, "height": 30, "num_bytes": 1000}.get(name)
            base = varied.setdefault(name, [default] * len(numbers))
            varied[name] = [values.get(number, value) for number, value in zip(numbers, base, strict=True)]
        constant = {
            "images": {
                "seen_at": NOW, "event": "added", "version": "v", "source": "s3://photos/", "split": "train",
                "audit": False, "run": ingest_run,
            },
            "outcomes": {
                "task": TASK, "model": model, "run": predict_run, "at": NOW, "status": "answered", "width": 40,
                "height": 30,
            },
            "embeddings": {"task": TASK, "model": model, "run": predict_run, "at": NOW},
        }  # fmt: skip
        for name, values in constant.items():
            schema = TABLES[name]
            rows = {**{key: [value] * len(numbers) for key, value in values.items()}, **fixed}
            rows |= {key: value for key, value in varied.items() if key in schema.names}
            if name == "embeddings":
                rows["vector"] = list(vectors_ND[part])
            table = pa.table({key: pa.array(value, schema.field(key).type) for key, value in rows.items()})
            fragments[name].append(tables.write(name, table, folder="made"))
    for name, files in fragments.items():
        tables.commit(name, files, app_id=f"{predict_run}-{name}")
    finish(workspace, ingest_run, "ingest")
    if status != "open":
        finish(workspace, predict_run, "predict", status=status)


def finish(workspace: Workspace, run_id: str, job: str, *, status: str = "finished") -> None:
    """A row in ``runs``."""
    row = {"run_id": run_id, "job": job, "status": status, "started_at": NOW, "finished_at": NOW, "config": "{}"}
    row |= {"digest": "d", "code_version": "0"}
    schema = pa.schema([TABLES["runs"].field(name) for name in row])
    fragment = workspace.warehouse.tables.write("runs", pa.Table.from_pylist([row], schema), folder="made")
    workspace.warehouse.tables.commit("runs", [fragment], app_id=run_id)


def vanish(workspace: Workspace, numbers: Sequence[int]) -> None:
    """An ingest that no longer finds these images."""
    run_id = f"vanish-{'-'.join(map(str, numbers))}"
    rows = [
        {
            "image_id": image_id(number), "seen_at": NOW + timedelta(days=1), "event": "vanished", "uri": uri(number),
            "version": "v", "source": "s3://photos/", "split": "train", "group": "g", "audit": False, "run": run_id,
        }
        for number in numbers
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, TABLES["images"])
    fragment = workspace.warehouse.tables.write("images", table, folder="made")
    workspace.warehouse.tables.commit("images", [fragment], app_id=run_id)
    finish(workspace, run_id, "ingest")
