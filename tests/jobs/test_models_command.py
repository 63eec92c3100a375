"""`winnow models` and `winnow predict --model` as people meet them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import workspaces as ws
from model_versions import begin, make_card, make_version
from winnow.errors import CallError
from winnow_connectors.registry import alias_work
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli

TASK = ws.TASK


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(ws.write_config(tmp_path))
    made.init()
    return made


def make(workspace: Workspace, num_versions: int = 1, **changes: Any) -> None:
    weights = Path(workspace.folder / "small.safetensors").read_bytes()
    for _ in range(num_versions):
        make_version(workspace.warehouse.registry, workspace.warehouse.ledger, TASK, weights, **changes)


def call(workspace: Workspace, *arguments: str) -> Any:
    return json.loads(ws.run(workspace.config_path, *arguments, "--json"))


def test_from_the_first_version_to_a_rollback_with_json_at_every_step(workspace: Workspace) -> None:
    assert call(workspace, "models", "list") == []
    assert "no model version yet" in ws.run(workspace.config_path, "models", "list")
    make(workspace, 2)
    listed = call(workspace, "models", "list", "--task", TASK)
    assert [(row["name"], row["production"]) for row in listed] == [("objects@2", False), ("objects@1", False)]
    moved = call(workspace, "models", "promote", "objects@2", "--force")  # there are no images to compare on
    assert (moved["production"], moved["before"]) == ("objects@2", "objects@base")
    assert moved["run_id"] in ws.run(workspace.config_path, "runs", "--json")
    assert call(workspace, "models", "promote", "objects@2")["run_id"] is None
    card = call(workspace, "models", "show", "objects@2")
    assert card["production"]
    assert [(event["event"], event["force"]) for event in card["events"]] == [("promoted", True)]
    assert call(workspace, "models", "rollback", TASK)["production"] == "objects@base"
    assert call(workspace, "models", "rollback", TASK, "--to", "1")["production"] == "objects@1"


def test_people_read_tables_and_sentences(workspace: Workspace) -> None:
    make(workspace, metrics={"val": {"n": 0}, "test": {"n": 4, "accuracy": 0.75, "classes": {"ant": {"f1": None}}}})
    assert "accuracy\t0.75\t4" in ws.run(workspace.config_path, "models", "list")
    shown = ws.run(workspace.config_path, "models", "show", "objects@1")
    for part in ("objects@1  classification, not in production", "timm/test_resnet", "val: measured on no image"):
        assert part in shown
    assert "test, 4 images: accuracy 0.7500" in shown
    promoted = ws.run(workspace.config_path, "models", "promote", "objects@1", "--force")
    assert "objects@1 is in production; before, it was objects@base" in promoted
    assert "next: winnow predict --task objects" in promoted
    assert "nothing to do: objects@1" in ws.run(workspace.config_path, "models", "promote", "objects@1")


WRONG = [
    (("models", "show", "objects"), "write TASK@NUMBER"),
    (("models", "show", "objects@7"), "objects@7 does not exist; versions of objects: objects@1"),
    (("models", "show", "objects@base"), "is the model that winnow.toml names"),
    (("models", "list", "--task", "hats"), "task 'hats' is unknown; configured tasks: objects"),
    (("models", "promote", "hats@1"), "task 'hats' is unknown"),
    (
        ("models", "promote", "objects@1"),
        "objects@1 is not promoted: no image of the test split has a label for objects",
    ),
    (("models", "promote", "objects@8"), "objects@8 does not exist; versions of objects: objects@1"),
    (("models", "promote", "objects@base"), "winnow models rollback objects --to base"),
    (("models", "rollback", "objects"), "there is nothing to roll back"),
    (("models", "rollback", "objects", "--to", "x"), "write TASK@NUMBER"),
    (("predict", "--model", "objects"), "write TASK@NUMBER"),
    (("predict", "--model", "objects@4"), "objects@4 does not exist"),
    (("predict", "--model", "hats@1"), "'hats' is not among the tasks asked: objects"),
    (("predict", "--model", "objects@1", "--model", "objects@base"), "names two versions of objects"),
]


def test_wrong_calls_are_refused_in_one_message_that_says_what_is_valid(workspace: Workspace) -> None:
    make(workspace)
    for arguments, says in WRONG:
        with pytest.raises(CallError) as caught:
            cli.main(["--config", str(workspace.config_path), *arguments], standalone_mode=False)
        assert says in caught.value.message, arguments
    assert WRONG[0][1] in ws.run(workspace.config_path, *WRONG[0][0], code=2)


def test_a_tampered_version_is_neither_promoted_nor_asked(workspace: Workspace) -> None:
    make(workspace, 2)
    registry = workspace.warehouse.registry
    registry.promote("objects@1")
    for name in ("objects@1", "objects@2"):
        key = f"{registry.version(name).location}/weights.safetensors"
        workspace.warehouse.store.put(key, workspace.warehouse.store.get(key)[:-100])
    assert "objects@2 cannot be used" in ws.run(workspace.config_path, "models", "promote", "objects@2", code=1)
    assert registry.production(TASK) == "objects@1"


def test_a_version_with_other_classes_than_winnow_toml_is_refused(workspace: Workspace) -> None:
    make(workspace, classes=("ant", "bee", "gnu"))
    with pytest.raises(CallError, match=r"answers classes that tasks.objects.classes does not have: gnu"):
        workspace.promote("objects@1")
    with pytest.raises(CallError, match="gnu"):
        workspace.task_model(TASK, "objects@1")


def test_the_version_in_production_answers_unless_told_otherwise(workspace: Workspace) -> None:
    make(workspace, 2)
    assert workspace.task_model(TASK).id.startswith("small.safetensors#")
    workspace.promote("objects@1", force=True)
    assert workspace.task_model(TASK).id == "objects@1"
    assert workspace.task_model(TASK, "objects@2").id == "objects@2"
    assert workspace.task_model(TASK, "objects@base").id.startswith("small.safetensors#")
    assert workspace.predict(dry_run=True).models == {TASK: "objects@1"}
    assert workspace.predict(models=["objects@2"], dry_run=True).models == {TASK: "objects@2"}


def test_resume_and_abandon_know_promotions(workspace: Workspace) -> None:
    make(workspace)
    registry, ledger = workspace.warehouse.registry, workspace.warehouse.ledger
    run = begin(ledger, TASK)
    assert workspace.abandon(run.run_id) == "abandoned"
    moved = registry.promote("objects@1")
    assert moved.run_id is not None
    with pytest.raises(CallError, match="is finished already"):
        workspace.resume(moved.run_id)
    assert ledger.last_claim(alias_work(TASK)) == (1, moved.run_id)


@pytest.mark.parametrize("delay_s", [0.6, 1.2])
def test_promote_killed_at_any_time_and_run_again_ends_with_one_promotion(
    workspace: Workspace, tmp_path: Path, delay_s: float
) -> None:
    make(workspace)
    process = ws.start(workspace.config_path, "models", "promote", "objects@1", "--force", log=tmp_path / "log")
    time.sleep(delay_s)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    ws.run(workspace.config_path, "models", "promote", "objects@1", "--force")
    assert workspace.warehouse.registry.production(TASK) == "objects@1"
    assert len(workspace.warehouse.registry.history(TASK)) == 1
    assert workspace.warehouse.ledger.open_runs() == []


def test_a_card_that_is_swapped_for_another_is_refused(workspace: Workspace) -> None:
    make(workspace)
    version = workspace.warehouse.registry.version("objects@1")
    other = make_card(TASK, 1, b"other", classes=("bee", "ant", "cat", "dog", "eel"))
    workspace.warehouse.store.put(f"{version.location}/card.json", other.to_json())
    assert "card.json is damaged or was changed" in ws.run(workspace.config_path, "models", "show", "objects@1", code=1)
