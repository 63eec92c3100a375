"""Workspaces for tests: many small images, a small model with random weights, and what must hold afterwards."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from winnow_jobs import Workspace

WINNOW = Path(sys.executable).with_name("winnow")
CLASSES = ("ant", "bee", "cat", "dog", "eel")
TASK = "objects"
STARTED: list[subprocess.Popen[bytes]] = []


def small_jpeg(number: int) -> bytes:
    """A 40×32 JPEG whose pixels, and so whose hash, depend on the number."""
    pixels = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC).save(sink, "JPEG")
    return sink.getvalue()


def save_model(path: Path, *, architecture: str = "test_resnet", num_classes: int = len(CLASSES)) -> Path:
    """A small network with random weights by a fixed seed, as a safetensors checkpoint."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=num_classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def write_config(folder: Path, *, warehouse: str = "./warehouse", storage: str = "", predict: str = "") -> Path:
    """A winnow.toml with one classification task on the small model, which is made beside it."""
    checkpoint = folder / "small.safetensors"
    if not checkpoint.exists():
        save_model(checkpoint)
    path = folder / "winnow.toml"
    path.write_text(
        f"""
{storage}
[warehouse]
uri = {json.dumps(warehouse)}

[tasks.{TASK}]
model = "./small.safetensors"
architecture = "timm/test_resnet"
classes = {json.dumps(CLASSES)}

[predict]
fragment_rows = 256
{predict}
"""
    )
    return path


def storage_section(endpoint: str, credentials_file: Path, profile: str = "winnow-local") -> str:
    """The ``[storage]`` section of a local S3 server."""
    return (
        f'[storage."s3://"]\nendpoint = "{endpoint}"\nregion = "us-east-1"\n'
        f'profile = "{profile}"\ncredentials_file = "{credentials_file}"\n'
    )


def fill(workspace: Workspace, source: str, num_images: int) -> None:
    """Write small images under a source, 32 at a time."""
    from concurrent.futures import ThreadPoolExecutor

    place = workspace.stores.at(source)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: place.put(f"{number:06d}.jpg", small_jpeg(number)), range(num_images)))


def ingested(config: Path, num_images: int) -> Workspace:
    """A workspace of so many small images in a folder beside its configuration, ready for predict."""
    images = config.parent / "images"
    images.mkdir(exist_ok=True)
    workspace = Workspace(config)
    workspace.init()
    fill(workspace, images.as_uri(), num_images)
    workspace.ingest([str(images)])
    return workspace


def start(config: Path, *arguments: str, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a ``winnow`` command in a process group of its own."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [WINNOW, "--config", config, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    STARTED.append(process)
    return process


def kill_all_started() -> None:
    """End what ``start`` started and a failed test left running."""
    while STARTED:
        kill_driver(STARTED.pop())


def run(config: Path, *arguments: str, timeout_s: float = 240, code: int = 0) -> str:
    """Run a ``winnow`` command to its end; its standard output."""
    done = subprocess.run(
        [WINNOW, "--config", config, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == code, (
        f"exit code {done.returncode} instead of {code}\n{done.stdout}\n{done.stderr[-6000:]}"
    )
    return done.stdout if code == 0 else done.stderr


def kill_driver(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the driver alone; its workers go on for a moment, as they would."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=3)  # two idle agents of Ray outlive it by minutes
    for left in alive:
        left.kill()
    psutil.wait_procs(alive, timeout=10)


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Wait for a condition, a bounded time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def num_markers(workspace: Workspace) -> int:
    """Written batches of all runs so far."""
    return sum("/markers/" in info.key for info in workspace.warehouse.store.list("runs/"))


@contextmanager
def polling_reader(workspace: Workspace) -> Iterator[set[int]]:
    """Poll how many outcomes readers see, throughout the block."""
    seen: set[int] = set()
    failed: list[BaseException] = []
    ended = threading.Event()

    def poll() -> None:
        try:
            while not ended.wait(0.1):
                seen.add(workspace.warehouse.tables.open("outcomes").count())
        except BaseException as error:  # noqa: BLE001  shown by the test's thread
            failed.append(error)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join(30)
    assert not failed, failed


def check_conserved(workspace: Workspace, num_images: int, *, num_failed: int = 0) -> None:
    """Outcomes = images asked, none doubled, tables agreeing, one finished run."""
    counts = one(
        workspace,
        """
        SELECT (SELECT count(*) FROM current_images) AS images,
               (SELECT count(*) FROM outcomes) AS outcomes,
               (SELECT count(DISTINCT image_id) FROM outcomes) AS distinct_outcomes,
               (SELECT count(*) FROM outcomes WHERE status = 'failed') AS failed,
               (SELECT count(*) FROM predictions) AS predictions,
               (SELECT count(DISTINCT image_id) FROM predictions) AS distinct_predictions,
               (SELECT count(*) FROM outcomes o SEMI JOIN current_images i USING (image_id)) AS known,
               (SELECT count(*) FROM predictions p SEMI JOIN outcomes o
                ON p.image_id = o.image_id AND p.run = o.run AND o.status = 'answered') AS agreeing,
               (SELECT count(*) FROM runs WHERE job = 'predict' AND status = 'finished') AS finished,
               (SELECT sum(num_asked) FROM runs WHERE job = 'predict' AND status = 'finished') AS asked
        """,
    )
    answered = num_images - num_failed
    assert counts == {
        "images": num_images,
        "outcomes": num_images,
        "distinct_outcomes": num_images,
        "failed": num_failed,
        "predictions": answered,
        "distinct_predictions": answered,
        "known": num_images,
        "agreeing": answered,
        "finished": 1,
        "asked": num_images,
    }


def one(workspace: Workspace, statement: str) -> dict[str, Any]:
    """The only row of a query."""
    rows: list[dict[str, Any]] = workspace.query(statement).to_pylist()
    assert len(rows) == 1, rows
    return rows[0]


def leave_open(workspace: Workspace, limit: int | None = None) -> str:
    """What a driver leaves that dies right after its claim: a plan that nobody works on."""
    import pytest

    import winnow_jobs.predict as module

    class Died(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Died

    original, module.work_off = module.work_off, die  # type: ignore[assignment]
    try:
        with pytest.raises(Died):
            workspace.predict(limit=limit)
    finally:
        module.work_off = original
    return workspace.warehouse.ledger.open_runs()[-1].run_id
