"""`winnow train` of a whole network, killed or stopped at any moment: the same weights, and nothing twice."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

import workspaces as ws
from coloured import MANY, again_in, labelled, recipe, sha256
from winnow.errors import OpenRunError
from winnow_connectors.registry import train_work

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def test_a_killed_driver_costs_nothing_and_a_killed_worker_neither(tmp_path: Path) -> None:
    options = {"epochs": 4, "patience": 0, "checkpoint_s": 0.001}
    workspace = recipe(labelled(tmp_path, splits=MANY), **options)
    workspace.train("colour")
    expected = sha256(workspace, "colour@1")
    workspace = again_in(workspace, "killed")

    def checkpoints() -> int:
        run = workspace.warehouse.ledger.last_claim(train_work("colour"))
        folder = workspace.folder / "killed" / "runs" / (run[1] if run else "-") / "checkpoints"
        return max((int(path.stem) for path in folder.glob("*.safetensors")), default=0)

    def has_more_than(steps: int, process: Any) -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        return checkpoints() > steps

    driver = ws.start(workspace.config_path, "train", "colour", log=tmp_path / "log")
    ws.wait_until(lambda: has_more_than(1, driver), timeout_s=250, what="a checkpoint")
    ws.kill_driver(driver)
    reached = checkpoints()
    # Another call with other labels is refused while it is open, and says what to do.
    with pytest.raises(OpenRunError, match="runs abandon"):
        workspace.train("colour", seed=7)
    driver = ws.start(workspace.config_path, "train", "colour", log=tmp_path / "log")
    ws.wait_until(lambda: has_more_than(reached, driver), timeout_s=250, what="a further checkpoint")
    family = psutil.Process(driver.pid).children(recursive=True)
    workers = [
        process
        for process in family
        if process.status() != psutil.STATUS_ZOMBIE and any("RayTrainWorker" in part for part in process.cmdline())
    ]
    assert len(workers) == 1
    workers[0].kill()
    assert driver.wait(300) == 0, (tmp_path / "log").read_text()
    assert "workers died (attempt 1 of 4)" in (tmp_path / "log").read_text()
    assert sha256(workspace, "colour@1") == expected
    assert [version.name for version in workspace.models("colour")] == ["colour@1"]
    assert ws.one(workspace, "SELECT count(*) AS n FROM runs WHERE job = 'train'")["n"] == 1


def test_ctrl_c_leaves_the_run_open_for_the_same_call(tmp_path: Path) -> None:
    workspace = recipe(labelled(tmp_path, splits=MANY), epochs=500, patience=0, checkpoint_s=0.001)
    process = ws.start(workspace.config_path, "train", "colour", log=tmp_path / "log")
    ledger = workspace.warehouse.ledger

    def has_checkpoint() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        claimed = ledger.last_claim(train_work("colour"))
        return claimed is not None and any(workspace.warehouse.store.list(f"runs/{claimed[1]}/checkpoints/"))

    ws.wait_until(has_checkpoint, timeout_s=250, what="a checkpoint")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "same command" in said
    assert "Traceback" not in said
    assert ledger.open_run(train_work("colour")) is not None
