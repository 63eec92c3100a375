"""Time ``winnow select`` over made predictions and vectors: seconds by stage and peak memory of the command.

::

    python bench/selection.py                       # 1,000,000 predictions, 100,000 vectors of 1280 numbers
    python bench/selection.py --rows 100000 --vectors 20000 --budget 500
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.schemas import TABLES
from winnow_connectors.tables import Tables
from winnow_jobs import Workspace

CONFIG = """
[tasks.objects]
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
[tasks.alike]
kind = "embedding"
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
[policies.sure]
margin = 0.8
random = 0.2
"""
FILE_ROWS = 50_000
NUM_CLASSES = 1000
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images, all predicted")
    parser.add_argument("--vectors", type=int, default=100_000, help="images of them that have a vector")
    parser.add_argument("--dimensions", type=int, default=1280)
    parser.add_argument("--labels", type=int, default=2_000, help="images of them that are labelled")
    parser.add_argument("--budget", type=int, default=1_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        config = Path(folder, "winnow.toml")
        config.write_text(CONFIG)
        workspace = Workspace(config)
        workspace.init()
        start = time.perf_counter()
        fill(workspace, options)
        say(
            f"{options.rows:,} predictions, {options.vectors:,} vectors of {options.dimensions} numbers and "
            f"{options.labels:,} labels made in {time.perf_counter() - start:.0f} s"
        )
        for policy in ("default", "default", "sure"):
            measure(workspace, options.budget, policy)


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def measure(workspace: Workspace, budget: int, policy: str) -> None:
    """One round, by the command in a process of its own."""
    options = ["--budget", str(budget), "--task", "objects", "--policy", policy, "--json"]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("winnow")), "--config", str(workspace.config_path), "select", *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.05)
        took = time.perf_counter() - start
        log.seek(0)
        if process.returncode or process.stdout is None:
            sys.exit(log.read())
        result: dict[str, Any] = json.load(process.stdout)
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["seconds"].items())
    say(f"policy {policy}, budget {budget:,}: {took:.1f} s ({stages}); peak memory {peak / 1e9:.2f} GB")
    say(f"  {result['verdict']}; {result['reasons']}")


def peak_bytes(pid: int) -> int:
    """Peak memory of a process so far. Its own ``ru_maxrss`` begins with what the process that started it had."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:
        return 0
    return int(found[1]) * 1024 if found else 0


def fill(workspace: Workspace, options: argparse.Namespace) -> None:
    """One ingest, one predict and some labels. Vectors lie around a thousand centres; one in fifty is a repetition."""
    rng = np.random.default_rng(0)
    tables = workspace.warehouse.tables
    models = {task: workspace.task_model(task).id for task in ("objects", "alike")}
    centers = rng.standard_normal((1000, options.dimensions), dtype=np.float32)
    fragments: dict[str, list[Any]] = {
        name: [] for name in ("images", "outcomes", "predictions", "embeddings", "labels")
    }
    for first in range(0, options.rows, FILE_ROWS):
        num = min(FILE_ROWS, options.rows - first)
        names = [hashlib.blake2b(str(first + i).encode(), digest_size=16).hexdigest() for i in range(num)]
        ids = pa.array(names)
        split, audit = rng.random(num), rng.random(num) < 0.02
        confidence = rng.beta(3, 1, num).astype(np.float32)
        margin = (confidence * rng.random(num)).astype(np.float32)
        answer = {"image_id": ids, "run": "predict", "at": NOW}
        rows: dict[str, dict[str, Any]] = {
            "images": {
                "image_id": ids, "seen_at": NOW, "event": "added", "version": "etag", "source": "s3://photos/",
                "uri": pa.array([f"s3://photos/{first + i:08d}.jpg" for i in range(num)]),
                "split": pa.array(np.where(split < 0.8, "train", np.where(split < 0.9, "val", "test"))),
                "group": ids, "audit": pa.array(audit), "run": "ingest",
            },
            "outcomes": {
                **answer, "task": "objects", "model": models["objects"], "status": "answered",
                "sha256": pa.array([2 * name for name in names]), "pixel_hash": ids,
                "phash": pa.array([name[:16] for name in names]),
            },
            "predictions": {
                **answer, "task": "objects", "model": models["objects"],
                "label": pa.array([f"class {c}" for c in rng.zipf(1.3, num) % NUM_CLASSES]),
                "confidence": pa.array(confidence), "margin": pa.array(margin), "entropy": pa.array(1 - confidence),
                "top5": pa.nulls(num, TABLES["predictions"].field("top5").type).fill_null([]),
            },
        }  # fmt: skip
        num_vectors = max(0, min(num, options.vectors - first))
        if num_vectors:
            vectors = centers[rng.integers(0, 1000, num_vectors)]
            vectors += 1.2 * rng.standard_normal(vectors.shape, dtype=np.float32)
            vectors[49::50] = vectors[48::50][: len(vectors[49::50])] + 0.1 * vectors[49::50]
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            offsets = pa.array(np.arange(num_vectors + 1, dtype=np.int32) * options.dimensions)
            rows["embeddings"] = {
                **answer, "image_id": ids[:num_vectors], "task": "alike", "model": models["alike"],
                "vector": pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1))),
            }  # fmt: skip
        num_labels = max(0, min(num_vectors, options.labels - first))
        if num_labels:
            rows["labels"] = {
                "image_id": ids[:num_labels], "task": "objects", "event": "imported", "origin": "imported",
                "label": rows["predictions"]["label"][:num_labels], "updated_at": NOW, "run": "ingest",
            }  # fmt: skip
        for name, columns in rows.items():
            fragments[name].append(tables.write(name, as_table(name, columns), folder="bench"))
    for name, files in fragments.items():
        tables.commit(name, files, app_id=f"bench-{name}")
    for run_id in ("ingest", "predict"):
        finish(tables, run_id)


def as_table(name: str, columns: dict[str, Any]) -> pa.Table:
    """Columns in the table's types; single values are repeated."""
    schema, num = TABLES[name], len(columns["image_id"])
    return pa.table(
        {
            key: value.cast(schema.field(key).type)
            if isinstance(value, pa.Array)
            else pa.repeat(pa.scalar(value, schema.field(key).type), num)
            for key, value in columns.items()
        }
    )


def finish(tables: Tables, run_id: str) -> None:
    """A row in ``runs``."""
    row = {"run_id": run_id, "job": run_id, "status": "finished", "started_at": NOW, "finished_at": NOW}
    row |= {"config": "{}", "digest": "d", "code_version": "0"}
    schema = pa.schema([TABLES["runs"].field(name) for name in row])
    tables.commit("runs", [tables.write("runs", pa.Table.from_pylist([row], schema), folder="bench")], app_id=run_id)


if __name__ == "__main__":
    main()
