"""Time ``winnow review push`` and ``pull`` against a real Label Studio: tasks per second, the first time and again.

Starts a Label Studio of its own (installed below ``--environment`` when it is not there yet, about 1 GB), makes small
photographs with predictions, and answers a part of them through the API.

::

    python bench/review.py                          # 10,000 tasks of a classification task
    python bench/review.py --tasks 2000 --answers 200 --environment ~/label-studio-env
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from click import echo
from PIL import Image

from winnow_connectors.label_studio import LabelStudio
from winnow_connectors.label_tasks import class_result
from winnow_jobs import Workspace
from winnow_jobs.local_label_studio import LocalLabelStudio
from winnow_jobs.review import begin_anew, publish
from winnow_jobs.selection import answerer_of

CLASSES = ("ant", "bee", "cat", "dog", "eel")
CONFIG = """
[tasks.kind]
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
"""


def photograph(number: int) -> bytes:
    """A JPEG of 320 x 240 that no other is like."""
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=88)
    return sink.getvalue()


def make(folder: Path, num: int) -> Workspace:
    """A workspace with images, predictions and a queue of all of them."""
    (folder / "winnow.toml").write_text(CONFIG)
    workspace = Workspace(folder / "winnow.toml")
    workspace.init()
    images = workspace.stores.at((folder / "images").as_uri())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: images.put(f"{number:06d}.jpg", photograph(number)), range(num)))
    workspace.ingest([images.uri])
    ids = workspace.query("SELECT image_id FROM current_images ORDER BY uri")["image_id"].to_pylist()
    now, model = datetime.now(UTC), answerer_of(workspace, "kind")
    constant = {"task": "kind", "model": model, "at": now}
    answer = {"confidence": 0.5, "margin": 0.1, "entropy": 1.0, "top5": []}
    known = {"status": "answered", "width": 320, "height": 240, "format": "JPEG"}
    asked = {"round": 1, "reason": "margin", "policy": "made", "audit": False}
    classes = workspace.task_model("kind").classes
    rows: dict[str, list[dict[str, Any]]] = {"predictions": [], "outcomes": [], "queue": []}
    for rank, image_id in enumerate(ids, start=1):
        rows["predictions"].append({"image_id": image_id, "label": classes[rank % 1000], **constant, **answer})
        rows["outcomes"].append({"image_id": image_id, **constant, **known})
        rows["queue"].append({"image_id": image_id, "rank": rank, **constant, **asked})
    publish(workspace, "made", begin_anew(workspace, "made"), {}, rows, {"tasks": ["kind"]})
    return workspace


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--answers", type=int, default=300, help="answered through the API before the second pull")
    parser.add_argument("--environment", type=Path, help="of Label Studio; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as name:
        folder = Path(name)
        server = LocalLabelStudio(folder / "server", environment=options.environment or folder / "environment")
        server.start(files=folder / "warehouse" / "review")
        try:
            os.environ |= {
                "LABEL_STUDIO_URL": server.url,
                "LABEL_STUDIO_API_KEY": server.token,
                "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(folder / "warehouse" / "review"),
            }
            measure(make(folder, options.tasks), options.tasks, options.answers)
        finally:
            server.stop()


def measure(workspace: Workspace, num_tasks: int, num_answers: int) -> None:
    """Push, push again, pull, answer, pull, pull again."""
    echo("| | tasks | seconds | tasks/s |\n|---|---|---|---|")

    def timed(what: str, num: int, call: Any) -> Any:
        started = time.monotonic()
        (result,) = call()
        seconds = time.monotonic() - started
        echo(f"| {what} | {num:,} | {seconds:.1f} | {num / seconds:,.0f} |")
        return result

    first = timed("push", num_tasks, workspace.push)
    echo(f"| of which review copies | {num_tasks:,} | {first.seconds['images']:.1f} | |")
    again = timed("push again, nothing new", num_tasks, workspace.push)
    assert (first.num_new, again.num_new, again.num_known) == (num_tasks, 0, num_tasks)
    server = LabelStudio.from_environment()
    tasks = list(server.tasks(first.project))
    assert len(tasks) == num_tasks, "as many tasks as images"
    assert all(task.models for task in tasks), "every task has its prediction"
    started = time.monotonic()
    for task in tasks[:num_answers]:
        body = {"result": class_result("tench"), "lead_time": 3.0}
        server._api.post(f"/api/tasks/{task.task_id}/annotations/", body)
    echo(f"| answers through the API | {num_answers:,} | {time.monotonic() - started:.1f} | |")
    pulled = timed("pull, the first", num_tasks, workspace.pull)
    assert pulled.num_created == num_answers
    assert timed("pull again, nothing new", num_tasks, workspace.pull).status == "nothing to do"
    echo("\n" + json.dumps({"release": server.release()}))


if __name__ == "__main__":
    main()
