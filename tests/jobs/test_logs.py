from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

import workspaces as ws
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli
from winnow_jobs.logs import JsonFormatter, RunStamp


def lines_of(text: str) -> list[dict[str, str | None]]:
    """Every line is one JSON object."""
    return [json.loads(line) for line in text.splitlines()]


def winnow(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [ws.WINNOW, "--config", config, "--log-format", "json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_lines_of_a_run_carry_its_id(tmp_path: Path) -> None:
    config = tmp_path / "winnow.toml"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.jpg").write_bytes(ws.small_jpeg(1))
    config.write_text('[warehouse]\nuri = "./warehouse"\n')
    Workspace(config).init()
    done = winnow(config, "ingest", str(tmp_path / "images"), "--json")
    assert done.returncode == 0, done.stderr
    run_id = json.loads(done.stdout)["run_id"]
    lines = lines_of(done.stderr)
    assert {line["run_id"] for line in lines} == {None, run_id}
    first = next(number for number, line in enumerate(lines) if line["run_id"])
    assert {(line["run_id"], line["job"]) for line in lines[first:]} == {(run_id, "ingest")}
    assert {"time", "level", "logger", "job", "run_id", "message"} == set(lines[0])


def test_the_reason_why_a_command_ends_is_a_line_too(tmp_path: Path) -> None:
    config = tmp_path / "winnow.toml"
    config.write_text('[warehouse]\nuri = "./warehouse"\n')
    Workspace(config).init()
    done = winnow(config, "runs", "show", "nope")
    assert done.returncode == 2
    (line,) = lines_of(done.stderr)
    assert (line["level"], line["message"]) == ("ERROR", "run 'nope' is unknown; `winnow runs` lists them")


def test_an_unknown_format_is_refused() -> None:
    done = CliRunner().invoke(cli, ["--log-format", "xml", "runs"])
    assert done.exit_code == 2
    assert "'xml' is not one of 'text', 'json'" in done.stderr


def test_line_breaks_and_tracebacks_stay_on_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("winnow", logging.ERROR, __file__, 1, "a\n%s", ("b",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert told["message"] == "a\nb"
    assert told["error"].endswith("ValueError: two\nlines")


def test_records_belong_to_the_last_run_that_was_named() -> None:
    stamp, seen = RunStamp(), []
    for extra in ({}, {"run_id": "r1", "job": "predict"}, {}, {"run_id": "r2", "job": "train"}, {}):
        record = logging.makeLogRecord({"msg": "x", **extra})
        stamp.filter(record)
        seen.append((record.run_id, record.job))  # type: ignore[attr-defined]
    assert seen == [(None, None), *2 * [("r1", "predict")], *2 * [("r2", "train")]]
