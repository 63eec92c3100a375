"""The command line as people meet it: help, wrong calls, exit codes, JSON, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import click
import psutil
import pytest

import workspaces as ws
from winnow.config import Config, parse_config
from winnow_jobs.cli.main import cli
from winnow_jobs.template import reference, template

ROOT = Path(__file__).resolve().parents[2]


def commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command and group with the words that call it."""
    found = [(path, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found += commands(below, (*path, name))
    return found


ALL = commands()


def winnow(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ws.WINNOW, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("path", "command"), ALL, ids=lambda value: " ".join(value) if type(value) is tuple else "")
def test_every_command_has_help_and_an_example_that_fits_its_options(
    path: tuple[str, ...], command: click.Command
) -> None:
    with click.Context(command, info_name=" ".join(("winnow", *path))) as context:
        text = command.get_help(context)
    assert (command.help or "").strip().endswith(".")
    if path:
        assert "Example" in text
    # Options that the examples name exist.
    examples = (command.epilog or "").replace("| jq", "#")
    options = {name for _, each in ALL for parameter in each.params for name in parameter.opts}
    assert set(re.findall(r"(?<!\S)--[a-z-]+", examples)) <= options


def test_help_needs_no_configuration_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
        import sys
        from winnow_jobs.cli.main import cli
        commands = "ingest predict augment search duplicates query runs doctor services demo"
        for command in commands.split():
            cli.main([command, "--help"], standalone_mode=False)
        print(sorted({"duckdb", "ray", "torch"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("prdict",), "No such command 'prdict'. Did you mean 'predict'?"),
        (("qwertyuiop",), "No such command 'qwertyuiop'."),
        (("predict", "--limit", "many"), "'many' is not a valid integer"),
        (("predict", "--frobnicate"), "No such option"),
        (("ingest",), "Missing argument"),
        (("query",), "Missing argument"),
        (("runs", "show"), "Missing argument"),
        (("services", "up", "--port", "80"), "80 is not in the range"),
        (("predict",), "winnow.toml does not exist; `winnow init` writes one"),
        (("--config", "other.toml", "runs"), "other.toml does not exist"),
    ],
)
def test_a_wrong_call_is_exit_code_2_and_one_message(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = winnow(tmp_path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_from_init_to_runs_with_json_at_every_step(tmp_path: Path) -> None:
    def call(*arguments: str) -> Any:
        done = winnow(tmp_path, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (tmp_path / "images").mkdir()
    assert call("init")["warehouse"] == (tmp_path / "warehouse").as_uri()
    before = (tmp_path / "winnow.toml").read_text()
    call("init")
    assert (tmp_path / "winnow.toml").read_text() == before
    empty = winnow(tmp_path, "ingest", "images")
    assert (empty.returncode, "nothing new" in empty.stdout) == (0, True)
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(ws.small_jpeg(number))
    first = call("ingest", "images")
    assert (first["num_added"], first["num_listed"]) == (3, 3)
    assert (call("ingest", "images")["num_added"], call("ingest", "images")["run_id"]) == (0, None)
    (run,) = call("runs")
    assert (run["run_id"], run["status"]) == (first["run_id"], "finished")
    assert call("runs", "show", run["run_id"])["job"] == "ingest"
    assert call("query", "SELECT count(*) AS n FROM images") == [{"n": 3}]
    assert call("export", "results", "--to", "out.parquet")["num_rows"] == 0


def test_a_faulty_configuration_names_every_fault_at_once(tmp_path: Path) -> None:
    (tmp_path / "winnow.toml").write_text('[tasks.a]\nmodle = "x"\n[predict]\nprecision = "int8"\nbatch_size = -1\n')
    done = winnow(tmp_path, "runs")
    assert done.returncode == 2
    assert "4 faults" in done.stderr
    for part in ("tasks.a.modle", "did you mean model?", "predict.precision = 'int8'", "predict.batch_size = -1"):
        assert part in done.stderr


def test_output_that_nobody_reads_on_is_no_error(tmp_path: Path) -> None:
    winnow(tmp_path, "init")
    done = subprocess.run(
        f'"{ws.WINNOW}" query "SELECT * FROM range(1000000)" | head -n 2; echo "${{PIPESTATUS[0]}}"',
        shell=True,
        executable="/bin/bash",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == ["range", "0", "1"]  # 1 is what click gives for a closed pipe
    assert done.stderr == ""


def test_the_template_lists_every_key_and_is_valid_with_all_of_them() -> None:
    text = template()
    assert parse_config(text).tasks.keys() == {"objects"}
    # Every commented key, taken at its default value, is valid as well.
    uncommented = re.sub(r"(?m)^# ([a-z_0-9]+ = (?!\"…\").*|\[.*\])$", r"\1", text)
    assert tomllib.loads(uncommented) != tomllib.loads(text)
    assert parse_config(uncommented).predict == Config().predict
    for section in Config.model_fields:
        assert f"[{section}" in text


def test_the_configuration_reference_is_up_to_date() -> None:
    told = "out of date; write it anew: python -m winnow_jobs.template > docs/configuration.md"
    assert (ROOT / "docs/configuration.md").read_text() == reference(), told


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for path, _ in ALL:
        if len(path) == 1:
            assert f"winnow {path[0]}" in text or f"make {path[0]}" in text, path
    known = {path[0] for path, _ in ALL if path}
    assert set(re.findall(r"(?m)(?:^|`)winnow ([a-z]+)", text)) <= known


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ctrl_c_stops_cleanly_and_the_same_command_continues(tmp_path: Path) -> None:
    config = ws.write_config(tmp_path)
    workspace = ws.ingested(config, 1_000)
    log = tmp_path / "log.txt"
    process = ws.start(config, "predict", log=log)
    try:
        ws.wait_until(
            lambda: ws.num_markers(workspace) > 0 or process.poll() is not None, timeout_s=120, what="a written batch"
        )
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()[-3000:]
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, f"left running: {alive}"
    finally:
        ws.kill_all_started()
    assert "Run the same command to continue" in log.read_text()
    assert "Traceback" not in log.read_text()
    (run,) = workspace.warehouse.ledger.open_runs()
    ws.run(config, "predict")
    ws.check_conserved(workspace, 1_000)
    assert workspace.warehouse.ledger.open_runs() == []
    assert run.run_id in ws.run(config, "runs", "--json")


@pytest.mark.parametrize(("statement", "code"), [("SELECT 1 AS n", 0), ("SELECT nothing", 2)])
def test_a_command_leaves_without_taking_python_down(tmp_path: Path, statement: str, code: int) -> None:
    """Threads of Arrow that outlive a scan abort a process whose Python is going down."""
    winnow(tmp_path, "init")
    script = """
        import atexit, os, sys
        from winnow_jobs.cli.main import main

        class Finalized:
            def __del__(self, write=os.write):
                write(1, b"Python was taken down")

        late = Finalized()
        sys.argv = ["winnow", *sys.argv[1:]]
        try:
            main()
        finally:
            atexit.register(print, "exit handlers ran")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), "query", statement, "--format", "csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code
    assert done.stdout == ("n\n1\n" if code == 0 else "") + "exit handlers ran\n"
