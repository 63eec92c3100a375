from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from winnow.errors import CallError, QueryError
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an empty warehouse."""
    path = tmp_path_factory.mktemp("workspace") / "winnow.toml"
    path.write_text('[tasks.kind]\nmodel = "torchvision/mobilenet_v2"\n')
    Workspace(path).init()
    return path


def call(config: Path, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["--config", str(config), *arguments], input=stdin)


def test_rows_come_as_tabs_json_or_csv(config: Path) -> None:
    statement = "SELECT 1 AS one, 'x' AS two"
    assert call(config, "query", statement).output == "one\ttwo\n1\tx\n"
    assert json.loads(call(config, "query", statement, "--json").output) == [{"one": 1, "two": "x"}]
    assert call(config, "query", statement, "--format", "csv").output.splitlines() == ["one,two", "1,x"]
    assert call(config, "query", "-", stdin=statement).output == "one\ttwo\n1\tx\n"


def test_the_name_of_the_output_says_the_format(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    assert call(config, "query", "FROM results", "--output", str(out)).exit_code == 0
    assert "source" in pq.read_schema(out).names
    again = call(config, "query", "FROM results", "--output", str(out))
    assert isinstance(again.exception, CallError)
    assert call(config, "query", "FROM results", "--output", str(out), "--overwrite").exit_code == 0


def test_contradicting_formats_are_a_wrong_call(config: Path) -> None:
    result = call(config, "query", "SELECT 1", "--json", "--format", "csv")
    assert result.exit_code == 2
    assert "contradict" in result.output


def test_results_are_exported(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    result = call(config, "export", "results", "--to", str(out), "--format", "csv", "--json")
    assert json.loads(result.output) == {
        "uri": out.as_uri(), "format": "csv", "num_rows": 0, "num_bytes": out.stat().st_size,
    }  # fmt: skip
    assert isinstance(call(config, "export", "results", "--to", str(out)).exception, CallError)


def test_functions_do_what_the_commands_do(config: Path, tmp_path: Path) -> None:
    workspace = Workspace(config)
    assert workspace.query("SELECT 1 AS one").to_pylist() == [{"one": 1}]
    assert workspace.query_reader("FROM results").read_all().num_rows == 0
    assert workspace.export_results(str(tmp_path / "out"), format="coco").num_rows == 0
    with pytest.raises(QueryError):
        workspace.query("FROM nothing")


def test_a_wrong_query_is_one_message_with_exit_code_2(config: Path) -> None:
    command = [Path(sys.executable).with_name("winnow"), "--config", config, "query", "SELECT lable FROM results"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "results: image_id, uri, split, task, label" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_examples(config: Path) -> None:
    for arguments in (["query"], ["export"], ["export", "results"]):
        assert "Example" in call(config, *arguments, "--help").output
