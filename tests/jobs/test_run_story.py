"""``winnow runs show``: what happened, for people and for machines. The answers are made here, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

import workspaces as ws
from winnow_connectors.ledger import Run
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli
from winnow_jobs.predict import PredictWork, work_off
from winnow_jobs.spec import PredictSpec
from winnow_jobs.stages import AnswerWriter, FetchDecode, Infer


def say_nothing(**_: object) -> None:
    """The report of a worker that nobody listens to."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = ws.ingested(ws.write_config(tmp_path), 4)
    for number in range(5):
        (tmp_path / "images" / f"bad{number}.jpg").write_bytes(b"no image at all")
    (tmp_path / "images" / "gone.jpg").write_bytes(ws.small_jpeg(9))
    workspace.ingest([str(tmp_path / "images")])
    (tmp_path / "images" / "gone.jpg").unlink()
    return workspace


def written(workspace: Workspace) -> Run:
    """A run whose images are all answered and written, by the stages themselves, and not yet published."""
    run = workspace.warehouse.ledger.load(ws.leave_open(workspace))
    spec = PredictSpec.from_dict(run.plan.config["spec"] | {"batch_size": 16})
    read = FetchDecode(spec, run, workspace.stores, say_nothing, num_decoders=1)
    infer = Infer(spec, workspace.stores, say_nothing, device="cpu", num_threads=1)
    chunk = pa.table({"chunk": [0], "starts": [[0]], "stops": [[run.plan.num_planned]]})
    writer = AnswerWriter(spec, run, say_nothing, attempt="here", generation=0)
    for table in read(chunk):
        writer.write(infer(table))
    return run


def told(workspace: Workspace, *arguments: str) -> str:
    done = CliRunner().invoke(cli, ["--config", str(workspace.config_path), "runs", "show", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_finished_run_tells_its_failures_with_examples(workspace: Workspace) -> None:
    run = written(workspace)
    work_off(workspace, run, PredictWork(PredictSpec.from_dict(run.plan.config["spec"])))

    lines = told(workspace, run.run_id).splitlines()
    assert lines[0] == f"run {run.run_id}: predict, finished"
    assert "10 asked, 4 answered, 6 failed" in lines
    failures = lines[lines.index("failures:") + 1 : lines.index("seconds:")]
    assert [line.split() for line in failures if "(" not in line] == [["5", "not_an_image"], ["1", "missing"]]
    assert sum("/images/bad" in line and "(objects, decode): no image format" in line for line in failures) == 3
    assert sum("/images/gone.jpg (objects, fetch): " in line for line in failures) == 1
    assert any(line.split()[:1] == ["decoding"] for line in lines)
    assert '  spec.tasks.objects.model.architecture "timm/test_resnet"' in lines
    assert lines[-1].startswith("verdict: ")

    row = json.loads(told(workspace, run.run_id, "--json"))
    assert row["failures"] == {"missing": 1, "not_an_image": 5}
    assert [example["error"] for example in row["examples"]] == ["missing", *3 * ["not_an_image"]]


def test_an_open_run_tells_what_is_written_and_why_it_stopped(workspace: Workspace) -> None:
    run = written(workspace)
    run.stop(0, "the bucket refused access")
    run.stop(1, "the bucket refused access again")
    lines = told(workspace, run.run_id).splitlines()
    assert lines[0] == f"run {run.run_id}: predict, open"
    assert [line for line in lines if line.startswith("stopped")] == [
        "stopped   the bucket refused access",
        "stopped   the bucket refused access again",
    ]
    assert "          5  not_an_image" in lines
    assert f"`winnow runs resume {run.run_id}` continues it" in lines[-1]


def test_an_abandoned_run_says_so(workspace: Workspace) -> None:
    run = workspace.warehouse.ledger.load(ws.leave_open(workspace))
    workspace.abandon(run.run_id)
    lines = told(workspace, run.run_id).splitlines()
    assert lines[0] == f"run {run.run_id}: predict, abandoned"
    assert lines[-1] == "verdict: abandoned: given up by hand"


def test_steering_characters_in_names_are_shown_as_text(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "images" / "\x1b[31mred.jpg").write_bytes(b"no image at all")
    for number in range(5):
        (tmp_path / "images" / f"bad{number}.jpg").unlink()
    workspace.ingest([str(tmp_path / "images")])
    run = written(workspace)
    work_off(workspace, run, PredictWork(PredictSpec.from_dict(run.plan.config["spec"])))
    assert "\x1b" not in told(workspace, run.run_id)
