"""Time search and duplicates over made vectors; or measure duplicates on photographs whose near-duplicates are known.

::

    python bench/similarity.py                      # 100,000 vectors of 512 numbers, a temporary folder
    python bench/similarity.py --rows 20000 --dimensions 1280
    python bench/similarity.py --photos FOLDER      # groups.csv (file, group, role, transform, level) and its images
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from winnow.perceptual_hash import as_integers
from winnow.schemas import TABLES
from winnow.similarity import Block, NearRule, compare_strip, components
from winnow_connectors.tables import Tables
from winnow_jobs import Workspace

CONFIG = '[tasks.alike]\nkind = "embedding"\nmodel = "torchvision/mobilenet_v2@IMAGENET1K_V1"\n'
FILE_ROWS = 20_000
NUM_QUERIES = 7
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--photos", type=Path, help="photographs whose near-duplicates are known")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        config = Path(folder, "winnow.toml")
        config.write_text(CONFIG)
        workspace = Workspace(config)
        workspace.init()
        if options.photos:
            measure_photographs(workspace, options.photos)
        else:
            measure_times(workspace, options.rows, options.dimensions)


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------------------------- times


def measure_times(workspace: Workspace, num_rows: int, num_dimensions: int) -> None:
    """Search and duplicates over random vectors, one in a hundred of them a near-duplicate."""
    start = time.perf_counter()
    fill(workspace.warehouse.tables, workspace.task_model("alike").id, num_rows, num_dimensions)
    say(f"{num_rows:,} vectors of {num_dimensions} numbers made in {time.perf_counter() - start:.1f} s")
    uris = [f"s3://photos/{number * 997 % num_rows:08d}.jpg" for number in range(NUM_QUERIES)]
    with Watch() as watch:
        seconds = [timed(lambda uri=uri: workspace.search(uri)) for uri in uris]
    say(
        f"search: first {seconds[0]:.2f} s, median {statistics.median(seconds[1:]):.2f} s, "
        f"{watch.cpu_s / len(uris):.2f} s of CPU; peak memory {watch.num_bytes / 1e9:.2f} GB"
    )
    with Watch() as watch:
        took = timed(workspace.duplicates)
    (row,) = workspace.query("SELECT verdict, seconds FROM runs WHERE job = 'duplicates'").to_pylist()
    say(f"duplicates: {took:.1f} s, of which comparing {dict(row['seconds'])['comparing']:.1f} s; {row['verdict']}")
    say(f"{watch.cpu_s:.0f} s of CPU; peak memory of all processes, shared memory once: {watch.num_bytes / 1e9:.2f} GB")
    say(f"duplicates again, nothing new: {timed(workspace.duplicates):.1f} s")


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Watch:
    """What this process and its children use meanwhile.

    Attributes:
        num_bytes: most memory at once: what is theirs alone, and Ray's shared memory.
        cpu_s: CPU seconds. Other work on the machine disturbs them less than the clock.
    """

    def __enter__(self) -> Watch:
        self.num_bytes = 0
        self._before_s = sum(psutil.Process().cpu_times()[:2])
        self._cpu_s: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.cpu_s = sum(self._cpu_s.values()) - self._before_s

    def _watch(self) -> None:
        shared_before = psutil.virtual_memory().shared
        while not self._ended.wait(0.2):
            total = max(0, psutil.virtual_memory().shared - shared_before)
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    memory = process.memory_info()
                    self._cpu_s[process.pid] = sum(process.cpu_times()[:2])
                except psutil.NoSuchProcess:
                    continue
                total += memory.rss - memory.shared
            self.num_bytes = max(self.num_bytes, total)


def fill(tables: Tables, model: str, num_rows: int, num_dimensions: int) -> None:
    """One ingest and one predict run over images whose vectors are random."""
    rng = np.random.default_rng(0)
    fragments: dict[str, list[Any]] = {name: [] for name in ("images", "outcomes", "embeddings")}
    for first in range(0, num_rows, FILE_ROWS):
        n = min(FILE_ROWS, num_rows - first)
        names = [hashlib.blake2b(str(first + i).encode(), digest_size=16).hexdigest() for i in range(n)]
        vectors = rng.standard_normal((n, num_dimensions), dtype=np.float32)
        vectors[99::100] = vectors[98::100][: len(vectors[99::100])] + 0.1 * vectors[99::100]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        ids = pa.array(names)
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * num_dimensions)
        rows = {
            "images": {
                "image_id": ids, "seen_at": NOW, "event": "added", "version": "etag", "source": "s3://photos/",
                "uri": pa.array([f"s3://photos/{first + i:08d}.jpg" for i in range(n)]),
                "split": "train", "group": ids, "audit": False, "run": "ingest",
            },
            "outcomes": {
                "image_id": ids, "task": "alike", "model": model, "run": "predict", "at": NOW, "status": "answered",
                "sha256": pa.array([2 * name for name in names]), "pixel_hash": ids,
                "phash": pa.array([name[:16] for name in names]), "width": 640, "height": 480,
            },
            "embeddings": {
                "image_id": ids, "task": "alike", "model": model, "run": "predict", "at": NOW,
                "vector": pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1))),
            },
        }  # fmt: skip
        for name, columns in rows.items():
            schema = TABLES[name]
            filled = {
                key: value if isinstance(value, pa.Array) else pa.repeat(pa.scalar(value, schema.field(key).type), n)
                for key, value in columns.items()
            }
            fragments[name].append(tables.write(name, pa.table(filled), folder="bench"))
    runs = {"run_id": ["ingest", "predict"], "job": ["ingest", "predict"], "status": ["finished"] * 2}
    constants = {name: ["x"] * 2 for name in ("config", "digest", "code_version")}
    times = {name: [NOW] * 2 for name in ("started_at", "finished_at")}
    fragments["runs"] = [tables.write("runs", pa.table(runs | constants | times), folder="bench")]
    for name, files in fragments.items():
        tables.commit(name, files, app_id="bench")


# --------------------------------------------------------------------------------------------------------- photographs


def measure_photographs(workspace: Workspace, folder: Path) -> None:
    """Recall by transform, precision, and false alarms, of the published groups and of simpler rules."""
    with (folder / "groups.csv").open() as file:
        known = {(folder / row["file"]).resolve().as_uri(): row for row in csv.DictReader(file)}
    workspace.ingest([str(folder / "images")])
    workspace.predict()
    say(workspace.duplicates().verdict)
    table = workspace.query(
        """
        SELECT i.uri, e.vector, o.phash, coalesce(d.group_id, image_id) AS found
        FROM current_images i JOIN embeddings e USING (image_id) JOIN latest_outcomes o USING (image_id)
        LEFT JOIN duplicate_groups d USING (image_id) ORDER BY i.uri
        """
    )
    images = [known[uri] for uri in table["uri"].to_pylist()]
    say(f"{len(images)} images, {sum(row['role'] == 'distractor' for row in images)} of them distractors\n")
    vectors, hashes = np.stack(table["vector"].to_pylist()).astype(np.float32), as_integers(table["phash"].to_pylist())
    _, published = np.unique(np.array(table["found"].to_pylist()), return_inverse=True)
    rule = NearRule()
    found = {
        f"cosine ≥ {rule.threshold:g}": grouped(vectors, hashes, NearRule(max_hamming=-1)),
        f"hash ≤ {rule.max_hamming} bits": grouped(vectors, hashes, NearRule(threshold=2.0, min_similarity=-1.0)),
        "both (published)": published,
    }
    say("\n".join(report(images, found)))


def grouped(vectors: np.ndarray, hashes: np.ndarray, rule: NearRule) -> np.ndarray:
    """Label of the group of each image under a rule."""
    block = Block(np.arange(len(vectors)), vectors, hashes)
    return components(len(vectors), *compare_strip([lambda: block], 1, rule).links)


def report(images: Sequence[dict[str, str]], found: dict[str, np.ndarray]) -> list[str]:
    """A Markdown table: recall of original and variant by transform; precision of pairs; distractors in a group."""
    originals = {row["group"]: number for number, row in enumerate(images) if row["role"] == "original"}
    variants: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, row in enumerate(images):
        if row["role"] == "variant":
            variants[row["level"], row["transform"]].append(number)
    lines = [f"| level | transform | pairs | {' | '.join(found)} |", f"|---|---|---{'|---' * len(found)}|"]

    def recall(labels: np.ndarray, numbers: Sequence[int]) -> str:
        together = [labels[number] == labels[originals[images[number]["group"]]] for number in numbers]
        return f"{np.mean(together):.3f}"

    order = ("exact", "easy", "medium", "hard")
    for (level, transform), numbers in sorted(variants.items(), key=lambda item: (order.index(item[0][0]), item[0])):
        cells = [recall(labels, numbers) for labels in found.values()]
        lines.append(f"| {level} | {transform} | {len(numbers)} | {' | '.join(cells)} |")
    everything = [number for numbers in variants.values() for number in numbers]
    cells = [recall(labels, everything) for labels in found.values()]
    lines.append(f"| all | | {len(everything)} | {' | '.join(cells)} |")
    truth = np.array([row["group"] or f"distractor {number}" for number, row in enumerate(images)])
    upper = np.triu_indices(len(images), 1)
    same = (truth[:, None] == truth[None, :])[upper]
    together = [(labels[:, None] == labels[None, :])[upper] for labels in found.values()]
    cells = [f"{same[pairs].mean():.4f}" for pairs in together]
    lines.append(f"| precision of all pairs in one group | | | {' | '.join(cells)} |")
    cells = [f"{pairs[same].mean():.3f}" for pairs in together]
    lines.append(f"| recall of all pairs of a picture | | {int(same.sum())} | {' | '.join(cells)} |")
    distractors = np.array([row["role"] == "distractor" for row in images])
    cells = [str(int((np.bincount(labels)[labels] > 1)[distractors].sum())) for labels in found.values()]
    lines.append(f"| distractors in a group | | {int(distractors.sum())} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
