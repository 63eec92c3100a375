"""Every image is answered exactly once, whatever is killed: real processes, real Ray, a real S3 server.

Each scenario ends with outcomes = images asked, none doubled, and tables that agree; a reader that polls throughout
sees none or all of the run. ``make test`` asks 800 images each; ``make test-chaos`` 20,000, and local disk too.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import workspaces as ws
from winnow_jobs import Workspace
from winnow_jobs.local_s3 import LocalS3

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(1500)]

SIZES = [pytest.param(800, id="800"), pytest.param(20_000, id="20000", marks=pytest.mark.chaos)]


@dataclass(frozen=True)
class Place:
    """An ingested workspace, ready for predict."""

    config: Path
    workspace: Workspace
    num_images: int
    log: Path
    server: LocalS3 | None


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    ws.kill_all_started()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalS3]:
    """An S3 server of the test's own, because some tests kill it."""
    server = LocalS3(tmp_path / "s3")
    server.start()
    try:
        yield server
    finally:
        server.kill9()  # a gentle end takes up to 10 s


def make_place(folder: Path, num_images: int, server: LocalS3 | None) -> Place:
    folder.mkdir()
    if server is None:
        source, warehouse, storage = str(folder / "images"), "./warehouse", ""
        (folder / "images").mkdir()
    else:
        server.create_bucket("photos")
        source, warehouse = "s3://photos/images", "s3://photos/warehouse"
        storage = ws.storage_section(server.endpoint, server.credentials_file)
    config = ws.write_config(folder, warehouse=warehouse, storage=storage)
    workspace = Workspace(config)
    workspace.init()
    ws.fill(workspace, source if server else Path(source).as_uri(), num_images)
    workspace.ingest([source])
    return Place(config, workspace, num_images, folder / "log.txt", server)


@pytest.fixture(params=[pytest.param("local", marks=pytest.mark.chaos), "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, num_images: int) -> Place:
    """The same work on S3, and on local disk with ``make test-chaos``."""
    server = request.getfixturevalue("server") if request.param == "s3" else None
    return make_place(tmp_path / "workspace", num_images, server)


@pytest.fixture
def s3_place(tmp_path: Path, num_images: int, server: LocalS3) -> Place:
    return make_place(tmp_path / "workspace", num_images, server)


def wait_for_batches(place: Place, process: subprocess.Popen[bytes], num_batches: int) -> None:
    """Wait until so many batches are written in all, or the driver has ended."""
    ws.wait_until(
        lambda: ws.num_markers(place.workspace) >= num_batches or process.poll() is not None,
        timeout_s=240,
        what=f"a written batch; see {place.log}",
    )


def finish(place: Place) -> None:
    """Run predict to its end, then once more: the second run writes nothing."""
    ws.run(place.config, "predict", timeout_s=900)
    ws.check_conserved(place.workspace, place.num_images)
    before = sorted(info.key for info in place.workspace.warehouse.store.list(""))
    ws.run(place.config, "predict", timeout_s=60)
    assert sorted(info.key for info in place.workspace.warehouse.store.list("")) == before


@pytest.mark.parametrize("num_images", SIZES)
def test_driver_killed_again_and_again(place: Place, num_images: int) -> None:
    rng = random.Random(7)
    with ws.polling_reader(place.workspace) as seen:
        for _ in range(2 if num_images < 10_000 else 3):
            before = ws.num_markers(place.workspace)
            process = ws.start(place.config, "predict", log=place.log)
            wait_for_batches(place, process, before + rng.randint(1, max(1, num_images // 1000)))
            time.sleep(rng.random())
            ws.kill_driver(process)
        finish(place)
    assert seen <= {0, num_images}


def busy_workers(driver: subprocess.Popen[bytes], role: str) -> list[psutil.Process]:
    """Worker processes of a driver that are at a task of that role."""
    found = []
    for child in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            title = " ".join(child.cmdline()).rstrip()
            if title.startswith("ray::") and role in title and title.endswith(".submit"):
                found.append(child)
    return found


@pytest.mark.parametrize("num_images", SIZES)
def test_workers_and_storage_server_killed(s3_place: Place, num_images: int) -> None:
    assert s3_place.server is not None
    process = ws.start(s3_place.config, "predict", log=s3_place.log)
    for role in ("FetchDecode", "Infer"):
        ws.wait_until(
            lambda role=role: process.poll() is not None or bool(busy_workers(process, role)),
            timeout_s=120,
            what=f"a worker at {role}",
        )
        assert process.poll() is None, s3_place.log.read_text()[-4000:]
        busy_workers(process, role)[0].kill()
    wait_for_batches(s3_place, process, 1)
    s3_place.server.kill9()
    time.sleep(8)
    s3_place.server.restart()
    assert process.wait(900) == 0, s3_place.log.read_text()[-4000:]
    assert s3_place.log.read_text().count("A worker died or was killed") >= 2
    finish(s3_place)


@pytest.mark.parametrize("num_images", SIZES)
def test_two_drivers_at_once(place: Place, num_images: int) -> None:
    logs = [place.log.with_name(f"driver-{number}.txt") for number in range(2)]
    with ws.polling_reader(place.workspace) as seen:
        drivers = [ws.start(place.config, "predict", log=log) for log in logs]
        codes = [driver.wait(900) for driver in drivers]
        assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
        finish(place)
    assert seen <= {0, num_images}


@pytest.mark.parametrize("num_images", [pytest.param(800, id="800")])
def test_killed_while_publishing(tmp_path: Path, num_images: int) -> None:
    """All batches are written; publishing them is killed after a random number of milliseconds, again and again."""
    place = make_place(tmp_path / "workspace", num_images, None)
    folder = place.config.parent
    process = ws.start(place.config, "predict", log=place.log)
    store = place.workspace.warehouse.store
    run_id = ""

    def decided() -> bool:
        nonlocal run_id
        keys = [info.key for info in store.list("runs/")]
        run_id = next((key.split("/")[1] for key in keys if key.endswith("outcome.json") and "-predict-" in key), "")
        return bool(run_id)

    ws.wait_until(lambda: decided() or process.poll() is not None, timeout_s=240, what="the decision")
    ws.kill_driver(process)
    assert place.workspace.warehouse.ledger.load(run_id).select().is_complete
    rng = random.Random(3)
    killed = 0
    for attempt in range(6):
        copy = tmp_path / f"copy-{attempt}"
        shutil.copytree(folder, copy)
        rewind(copy, run_id)
        config = copy / "winnow.toml"
        workspace = Workspace(config)
        driver = ws.start(config, "predict", log=place.log)
        ws.wait_until(
            lambda found=copy / "warehouse" / "runs" / run_id / "outcome.json": found.exists(),
            timeout_s=60,
            what="the decision",
        )
        time.sleep(rng.uniform(0, 0.15))
        killed += driver.poll() is None
        ws.kill_driver(driver)
        assert workspace.warehouse.tables.open("outcomes").count() in (0, num_images)
        ws.run(config, "predict", timeout_s=120)
        ws.check_conserved(workspace, num_images)
    assert killed >= 2, "the kills came too late to test anything"


def rewind(folder: Path, run_id: str) -> None:
    """Undo decision and commits of a run in a local warehouse: what is left is a run whose batches are all written."""
    warehouse = folder / "warehouse"
    for name in ("outcome.json", "closed.json"):
        (warehouse / "runs" / run_id / name).unlink(missing_ok=True)
    for table in (warehouse / "tables").iterdir():
        for commit in (table / "_delta_log").glob("*.json"):
            if run_id in commit.read_text():
                commit.unlink()
