"""Jobs submitted to a real Ray head with token authentication, over its real dashboard."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest

import workspaces as ws
from ray_nodes import RayCluster, Relay
from winnow import __version__
from winnow.config import parse_config
from winnow.errors import CallError
from winnow_jobs import Workspace, submit
from winnow_jobs.cli.submit import check_command
from winnow_jobs.ports import find_free_port

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {"AWS_SECRET_ACCESS_KEY": "s3cr3t-of-the-desk", "LABEL_STUDIO_API_KEY": "t0ken-of-the-desk"}

on_a_cluster = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(s3_server: Any) -> Iterator[RayCluster]:
    """A head that has keys to the storage, which the tests' own environment has not; its own jobs log JSON."""
    keys = {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key}
    with RayCluster({**keys, "WINNOW_LOG_FORMAT": "json"}) as cluster:
        cluster.start_head()
        yield cluster


@dataclass
class Desk:
    """The machine of somebody who submits jobs."""

    folder: Path
    bucket: str
    workspace: Workspace
    environment: dict[str, str]

    def winnow(self, *arguments: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [ws.WINNOW, *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert code is None or done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture
def desk(tmp_path: Path, cluster: RayCluster, s3_env: Any) -> Desk:
    """An initialised workspace on S3; its commands have keys that are wrong, and the cluster's token."""
    bucket = s3_env.make_bucket("submit")
    storage = f'[storage."s3://"]\nendpoint = "{s3_env.endpoint}"\nregion = "us-east-1"\n'
    config = ws.write_config(tmp_path, warehouse=f"s3://{bucket}/warehouse", storage=storage)
    workspace = Workspace(config)
    workspace.init()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    return Desk(tmp_path, bucket, workspace, environment | cluster.client_environment | SECRETS)


@pytest.fixture
def late_images(desk: Desk, s3_server: Any) -> Iterator[None]:
    """Images come one by one, each late, so that what is stopped is stopped in the middle of its work."""
    with Relay("127.0.0.1", int(s3_server.endpoint.rpartition(":")[2]), delay_s=0.04) as relay:
        config = desk.workspace.config_path
        text = config.read_text().replace(s3_server.endpoint, relay.endpoint)
        config.write_text(text.replace("[predict]", "[predict]\nfetch_concurrency = 1"))
        yield


class TestOnACluster:
    pytestmark = on_a_cluster

    def test_a_submitted_job_looks_as_it_does_here_and_tells_no_secret(self, desk: Desk, cluster: RayCluster) -> None:
        ws.fill(desk.workspace, f"s3://{desk.bucket}/images", 20)
        done = desk.winnow("submit", "ingest", f"s3://{desk.bucket}/images")
        assert done.stdout.startswith("listed     20\nadded      20\n"), done.stdout
        assert done.stderr.startswith("winnow: job winnow-ingest-"), done.stderr

        done = desk.winnow("submit", "predict", "--json")
        ws.check_conserved(desk.workspace, 20)
        job = json.loads(done.stdout)
        assert (job["status"], job["exit_code"], job["command"]) == ("SUCCEEDED", 0, "predict --json")
        assert (job["result"]["num_asked"], job["result"]["num_failed"]) == (20, 0)
        assert job["result"]["verdict"]
        runs = desk.workspace.query("SELECT DISTINCT code_version FROM runs").to_pylist()
        assert runs == [{"code_version": __version__}]

        again = desk.winnow("submit", "predict")
        local = ws.run(desk.workspace.config_path, "predict")
        assert again.stdout.splitlines()[-1] == local.strip().splitlines()[-1]
        assert "nothing to do" in local

        # All that Ray knows of the jobs: their records, their logs, the packages that it unpacked.
        listed = desk.winnow("jobs", "list", "--json").stdout
        logs = "".join(desk.winnow("jobs", "logs", each["job_id"]).stdout for each in json.loads(listed))
        files = b"".join(
            file.read_bytes()
            for file in cluster.folder.rglob("*")
            if file.is_file() and ("working_dir" in str(file) or file.suffix in (".log", ".json"))
        )
        records = json.dumps(_ask(cluster, "/api/jobs/"))
        assert "predict --json" in records
        keys = [value for name, value in cluster.environment.items() if name.startswith("AWS_")]
        for secret in (*SECRETS.values(), *keys, cluster.token):
            assert secret not in listed + logs + records
            assert secret.encode() not in files

    def test_what_is_sent_is_this_winnow_and_not_the_clusters(self, desk: Desk, tmp_path: Path) -> None:
        for package in ("platform/winnow", "connectors/winnow_connectors", "jobs/winnow_jobs"):
            shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        altered = tmp_path / "jobs" / "winnow_jobs" / "cli" / "main.py"
        altered.write_text(altered.read_text().replace("turns a bucket", "of this desk turns a bucket"))
        path = os.pathsep.join(str(tmp_path / floor) for floor in ("platform", "connectors", "jobs"))
        script = "import sys; from winnow_jobs.cli.main import main; sys.argv[0] = 'winnow'; main()"
        done = subprocess.run(
            [str(ws.WINNOW.with_name("python")), "-c", script, "submit", "runs", "--help-me"],
            cwd=desk.folder,
            env=desk.environment | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert "No such option" in done.stderr  # found here, not on the cluster
        code = (
            "import pathlib, sys\nfrom winnow_jobs.submit import Cluster\nfrom winnow_jobs.cli.submit import follow\n"
            "cluster = Cluster()\n"
            "follow(cluster, cluster.submit(['--help'], pathlib.Path('winnow.toml')))"
        )
        done = subprocess.run(
            [str(ws.WINNOW.with_name("python")), "-c", code],
            cwd=desk.folder,
            env=desk.environment | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert "Winnow of this desk turns a bucket of images" in done.stdout, done.stdout + done.stderr

    def test_ctrl_c_a_stop_and_a_killed_driver_lose_nothing(
        self, desk: Desk, cluster: RayCluster, late_images: None
    ) -> None:
        ws.fill(desk.workspace, f"s3://{desk.bucket}/images", 600)
        desk.workspace.ingest([f"s3://{desk.bucket}/images"])
        log = desk.folder / "log.txt"
        following = ws.start(desk.workspace.config_path, "submit", "predict", log=log, env=desk.environment)
        ws.wait_until(
            lambda: following.poll() is not None or bool(cluster.nodes[0].drivers()),
            timeout_s=240,
            what="the driver on the cluster",
        )
        assert following.poll() is None, log.read_text()
        following.send_signal(signal.SIGINT)
        assert following.wait(30) == 130
        assert "the job goes on" in log.read_text()
        job_id = log.read_text().split("winnow: job ")[1].split()[0]
        assert f"winnow jobs logs {job_id} --follow" in log.read_text()

        ws.wait_until(lambda: ws.num_markers(desk.workspace) >= 1, timeout_s=240, what="a written batch")
        assert json.loads(desk.winnow("jobs", "status", job_id, "--json").stdout)["status"] == "RUNNING"
        assert "is asked to stop" in desk.winnow("jobs", "stop", job_id).stdout
        stopped = desk.winnow("jobs", "logs", job_id, "--follow", code=130)
        assert "was stopped; the same command continues it" in stopped.stderr
        assert "had ended before" in desk.winnow("jobs", "stop", job_id).stdout

        again = desk.winnow("submit", "predict", "--retries", "1", "--detach").stdout.strip()
        ws.wait_until(
            lambda: len(cluster.nodes[0].drivers()) == 2, timeout_s=240, what="the driver below the one that watches it"
        )
        drivers = {process.pid: process for process in cluster.nodes[0].drivers()}
        (driver,) = [process for process in drivers.values() if process.ppid() in drivers]
        driver.kill()
        done = desk.winnow("jobs", "logs", again, "--follow")
        assert "was killed by signal 9; running it again" in done.stderr
        assert "finished" in done.stdout
        ws.check_conserved(desk.workspace, 600)
        assert [job["status"] for job in json.loads(desk.winnow("jobs", "list", "--json").stdout)][:2] == [
            "SUCCEEDED",
            "STOPPED",
        ]

    def test_a_failed_command_has_its_exit_code(self, desk: Desk) -> None:
        done = desk.winnow("submit", "predict", "--task", "garment", code=2)
        assert "winnow: task 'garment' is unknown; configured tasks: objects" in done.stderr
        assert "winnow: job winnow-predict-" in done.stderr

    def test_a_job_that_is_not_there(self, desk: Desk) -> None:
        for command in (("status",), ("logs",), ("logs", "--follow"), ("stop",)):
            said = desk.winnow("jobs", command[0], "winnow-lost", *command[1:], code=2).stderr
            assert "job winnow-lost is unknown at http://127.0.0.1" in said

    def test_tokens_that_are_missing_or_wrong_are_one_message(self, desk: Desk) -> None:
        for environment in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}):
            said = desk.winnow("jobs", "list", code=2, **environment).stderr
            assert "refuses the token, or wants one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in said
            assert len(said.splitlines()) == 1

    def test_a_token_may_lie_in_a_file_and_the_address_on_the_command_line(
        self, desk: Desk, cluster: RayCluster, tmp_path: Path
    ) -> None:
        file = tmp_path / "token"
        file.write_text(cluster.token)
        del desk.environment["RAY_AUTH_TOKEN"]
        address = desk.environment.pop("RAY_API_SERVER_ADDRESS")
        desk.environment["RAY_ADDRESS"] = f"127.0.0.1:{find_free_port()}"  # --address wins
        done = desk.winnow("jobs", "list", "--json", "--address", address, RAY_AUTH_TOKEN_PATH=str(file))
        assert isinstance(json.loads(done.stdout), list)


def _ask(cluster: RayCluster, path: str) -> Any:
    import urllib3

    return urllib3.request("GET", cluster.address + path, headers={"Authorization": f"Bearer {cluster.token}"}).json()


# ---------------------------------------------------------------------------------------------------- without a cluster


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """An HTTP server that answers with what the test puts here, and its address."""
    answers: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers.get(self.path, {})).encode()
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}")
    yield answers
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.mark.parametrize(
    ("ray_version", "python_version", "says"),
    [
        ("2.41.0", "", "runs Ray 2.41.0 and this machine "),
        ("", "3.9.1", "runs Python 3.9.1 and this machine "),
    ],
)
def test_other_versions_are_found_before_anything_is_sent(
    told: dict[str, Any], ray_version: str, python_version: str, says: str
) -> None:
    import platform

    import ray

    versions = {
        "rayVersion": ray_version or ray.__version__,
        "pythonVersion": python_version or platform.python_version(),
    }
    told["/api/version"] = {"ray_version": versions["rayVersion"], "version": "4"}
    told["/api/v0/cluster_metadata"] = {"data": versions}
    with pytest.raises(CallError, match=says):
        submit.Cluster()


def test_a_server_that_is_not_rays_is_one_message(tmp_path: Path, told: dict[str, Any]) -> None:
    said = ws.run(ws.write_config(tmp_path), "jobs", "list", code=1)
    assert len(said.splitlines()) == 1
    assert "404" in said


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:{port}", "no Ray cluster answers at http://127.0.0.1"),
        ("head", "names no host and port; write http://HEAD:8265"),
        ("http://[head", "names no host and port"),
        ("", "no cluster is named; add --address"),
    ],
)
def test_an_address_where_nobody_answers_is_one_message_at_once(
    address: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    with pytest.raises(CallError, match=says.replace("[", r"\[")):
        submit.Cluster(address.format(port=find_free_port()))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "arguments",
    [
        "predict --task objects --limit 3",
        "runs",
        "runs --json",
        "review push",
        "ingest s3://b/a /shared/b",
        "search abc",
    ],
)
def test_what_can_be_submitted(arguments: str) -> None:
    check_command(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("prdict", "No such command 'prdict'"),
        ("predict --limit many", "'many' is not a valid integer"),
        ("predict --frobnicate", "No such option"),
        ("review", "a job is missing"),
        ("services up", "`winnow services` is for this machine"),
        ("submit predict", "`winnow submit` is for this machine"),
        ("ingest Pictures", "sources Pictures: a path of this machine"),
        ("export results --to out.parquet", "--to out.parquet: a path of this machine"),
        ("query SELECT --output out.csv", "--output out.csv: a path of this machine"),
        ("search pyproject.toml", "image pyproject.toml: a path of this machine"),
    ],
)
def test_a_wrong_command_line_is_found_here(arguments: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((click.UsageError, CallError)) as raised:
        check_command(arguments.split())
    assert says in str(getattr(raised.value, "message", raised.value))


def test_paths_that_the_cluster_does_not_see_are_refused_at_once(tmp_path: Path) -> None:
    text = """
        [warehouse]
        uri = "./warehouse"
        [storage."s3://"]
        credentials_file = "keys"
        [tasks.a]
        model = "../a.safetensors"
        [tasks.b]
        model = "lost.pth"
        [tasks.c]
        model = "torchvision/mobilenet_v2"
    """
    with pytest.raises(CallError) as raised:
        submit._check_paths(parse_config(text), tmp_path)
    faults = str(raised.value).splitlines()
    assert [fault.split()[0] for fault in faults[1:]] == [
        "warehouse.uri",
        "storage.'s3://'.credentials_file",
        "tasks.a.model",
        "tasks.b.model",
    ]


def test_checkpoints_below_the_folder_go_with_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.pth").touch()
    text = '[warehouse]\nuri = "s3://b/w"\n[tasks.a]\nmodel = "./models/a.pth"\n[tasks.b]\nmodel = "/all/see/b.pth"\n'
    assert submit._check_paths(parse_config(text), tmp_path) == [Path("models/a.pth")]


def test_arguments_with_credentials_are_refused_and_not_shown() -> None:
    with pytest.raises(CallError, match="holds credentials") as raised:
        submit._check_secrets(["ingest", "https://ann:hunter2@example.org/a.jpg"])
    assert "hunter2" not in str(raised.value)
