"""The processes of ``infra/compose.yaml``, started by hand with its commands and settings, and jobs on them.

No container engine runs here: addresses, ports, paths and sizes are replaced by those of this machine, and PostgreSQL
is the one that this machine has. Ray's token authentication is on, as there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image

import workspaces as ws
from winnow_connectors.label_studio import LabelStudio
from winnow_connectors.label_tasks import class_result
from winnow_connectors.objects import Patience
from winnow_jobs import Workspace
from winnow_jobs.ports import find_free_port

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(600)]

INFRA = Path(__file__).resolve().parents[2] / "infra"
AGENT = {"dashboard-agent-listen": 52365, "metrics-export": 8080}
"""Ports of every node's agent, in the compose file."""

PROGRAMS = Path(sys.executable).parent


class Composed:
    """Services of the compose file as processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        example = re.findall(r"^(\w+)=(.*)$", (INFRA / "example.env").read_text(), re.MULTILINE)
        self.secrets = {
            # Label Studio takes tokens of 40 digits, as the file says.
            name: value or secrets.token_hex(20 if name == "LABEL_STUDIO_API_KEY" else 32)
            for name, value in example
        }
        text = re.sub(
            r"\$\{(\w+):\?[^}]*\}", lambda match: self.secrets[match[1]], (INFRA / "compose.yaml").read_text()
        )
        self.services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
        self.commands: dict[str, list[str]] = {}
        self.further: dict[str, dict[str, str]] = {}
        self.users: dict[str, str | None] = {}
        self.processes: dict[str, psutil.Popen] = {}
        self.family: set[psutil.Process] = set()
        self.ports: dict[str, int] = {}

    def port(self, name: str) -> int:
        """A free port of this machine for one inside the containers."""
        return self.ports.setdefault(name, find_free_port(taken=self.ports.values(), beside=10_000))

    def environment(self, service: str) -> dict[str, str]:
        """Exactly what the service is given, beside what every process of this machine needs."""
        given = {name: self.here(value, service) for name, value in self.services[service]["environment"].items()}
        machine = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH", "TMPDIR") if name in os.environ}
        return machine | given | {"WINNOW_CONFIG": str(self.folder / "winnow.toml")}

    def here(self, text: str, service: str) -> str:
        """Text of a service with this machine's addresses and ports."""
        text = text.replace("http://label-studio:8080", f"http://127.0.0.1:{self.port('label-studio 8080')}")
        text = text.replace("ray-head:6379", f"127.0.0.1:{self.port('ray-head 6379')}")
        text = text.replace("http://s3:8333", f"http://127.0.0.1:{self.port('s3 8333')}")
        return re.sub(r"127\.0\.0\.1:(\d+)", lambda match: f"127.0.0.1:{self._known(service, match[1])}", text)

    def _known(self, service: str, port: str) -> int:
        return int(port) if int(port) in self.ports.values() else self.port(f"{service} {port}")

    def start(self, service: str, replaced: dict[str, str], *further: str) -> None:
        """Start a service's command; every replaced option must be there, ``further`` options are added."""
        program = PROGRAMS / self.services[service]["entrypoint"][0]
        words = self.services[service]["command"].split()
        for option, value in replaced.items():
            index = next((i for i, word in enumerate(words) if word.split("=")[0] == option), None)
            assert index is not None, f"{service} has no {option}"
            words[index] = f"{option}={value}"
        self.run(service, [str(program), *(self.here(word, service) for word in words), *further])

    def run(self, service: str, command: list[str], environment: dict[str, str] | None = None, user: str = "") -> None:
        """Start a service by a command of this machine, with the environment of the compose file and more."""
        self.commands[service] = command
        self.further[service] = environment or {}
        self.users[service] = user or None
        self._run(service)

    def _run(self, service: str) -> None:
        with (self.folder / f"{service}.log").open("ab") as log:
            self.processes[service] = psutil.Popen(
                self.commands[service],
                cwd=self.folder,
                env=self.environment(service) | self.further[service],
                user=self.users[service],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_healthy(self, service: str) -> None:
        """Wait until the service's own health check passes; what ended is started again, as compose does.

        On a busy machine a node of Ray gives up when its agent takes more than half a minute to start.
        """
        assert self.services[service]["restart"] == "unless-stopped"
        _, program, *arguments = self.services[service]["healthcheck"]["test"]
        program = {"python": sys.executable, "python3": sys.executable}.get(program, program)
        command = [program, *(self.here(argument, service) for argument in arguments)]

        def is_healthy() -> bool:
            self._note_family()
            for each in [each for each, process in self.processes.items() if process.poll() is not None]:
                self._run(each)
            done = subprocess.run(
                command,
                env=self.environment(service) | self.further[service],
                capture_output=True,
                timeout=30,
                check=False,
            )
            return done.returncode == 0

        ws.wait_until(is_healthy, timeout_s=150, what=f"{service}; see {self.folder / f'{service}.log'}")

    def _note_family(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                self.family |= {process, *process.children(recursive=True)}

    def stop(self) -> None:
        """End all that was started, what a service that ended left behind included."""
        self._note_family()
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.family, timeout=20)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """S3 server, Ray head and Ray worker, each healthy by its own check."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra cluster")
    services = Composed(tmp_path_factory.mktemp("composed"))
    small = str(100_000_000)
    try:
        (services.folder / "s3-data").mkdir()
        services.start(
            "s3",
            {"-dir": "s3-data", "-ip": "127.0.0.1", "-ip.bind": "127.0.0.1", "-s3.port": str(services.port("s3 8333"))},
            *(f"-{name}.port={services.port(name)}" for name in ("master", "volume", "filer", "admin")),
        )
        head = {"--port": services.port("ray-head 6379"), "--dashboard-port": services.port("ray-head 8265")}
        head |= {f"--{name}-port": services.port(f"ray-head {port}") for name, port in AGENT.items()}
        services.start(
            "ray-head",
            {name: str(port) for name, port in head.items()}
            | {"--dashboard-host": "127.0.0.1", "--object-store-memory": small},
        )
        services.wait_until_healthy("s3")
        services.wait_until_healthy("ray-head")
        worker = {f"--{name}-port": services.port(f"ray-worker {port}") for name, port in AGENT.items()}
        services.start(
            "ray-worker",
            {name: str(port) for name, port in worker.items()} | {"--num-cpus": "2", "--object-store-memory": small},
        )
        services.wait_until_healthy("ray-worker")
        yield services
    finally:
        services.stop()


@pytest.fixture(scope="module")
def workspace(composed: Composed) -> Workspace:
    """The workspace of infra/winnow.toml, on the small model, with 40 images and a broken one in its bucket."""
    config = ws.write_config(composed.folder)
    given = (INFRA / "winnow.toml").read_text().split("[tasks.objects]")[0]
    config.write_text(composed.here(given, "s3") + config.read_text().split('uri = "./warehouse"')[1])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, composed.secrets[name])
        workspace = Workspace(config)
        ws.fill(workspace, "s3://images/", 40)
        workspace.stores.at("s3://images/").put("bad.jpg", b"no image at all")
    return workspace


def winnow(composed: Composed, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as ``docker compose exec ray-head winnow …`` runs it."""
    given = composed.environment("ray-head") | {"WINNOW_LOG_FORMAT": "json"} | environment
    return subprocess.run([ws.WINNOW, *arguments], env=given, capture_output=True, text=True, timeout=200, check=False)


def test_jobs_run_on_the_composed_services_and_tell_metrics_and_logs(composed: Composed, workspace: Workspace) -> None:
    for command in (["init"], ["ingest", "s3://images/", "--json"]):
        done = winnow(composed, *command)
        assert done.returncode == 0, done.stderr
    done = winnow(composed, "predict", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_asked"], result["num_answered"], result["num_failed"]) == (41, 40, 1)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, composed.secrets[name])
        ws.check_conserved(workspace, 41, num_failed=1)

    # Ray's C++ part says something of its own between.
    told = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert told[-1]["run_id"] == result["run_id"]
    assert told[-1]["job"] == "predict"

    assert "nothing to do" in winnow(composed, "predict").stdout
    check_metrics(composed.port("ray-head 8080"))


def check_metrics(port: int) -> None:
    """The driver ran on the head: its metrics stay there after its end."""

    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = {}
        for name, tags, value in re.findall(r"^ray_(winnow_\w+)\{(.*?)\} (\S+)$", text, re.MULTILINE):
            own = re.findall(r'(?:job|kind|stage|status|task)="\w+"', tags)
            found[f"{name} {' '.join(sorted(own))}"] = float(value)
        return found

    written = 'winnow_images_total job="predict" stage="written"'
    ws.wait_until(lambda: scrape().get(written) == 41, timeout_s=60, what="the metrics of the run")
    metrics = scrape()
    seconds = {name: metrics.pop(name) for name in list(metrics) if name.startswith("winnow_stage_seconds_total ")}
    assert metrics == {
        'winnow_answers_total job="predict" status="answered" task="objects"': 40,
        'winnow_answers_total job="predict" status="failed" task="objects"': 1,
        'winnow_failures_total job="predict" kind="not_an_image"': 1,
        'winnow_images_total job="predict" stage="answered"': 41,
        'winnow_images_total job="predict" stage="read"': 41,
        written: 41,
        'winnow_queue_length job="predict"': 0,
    }
    stages = {re.findall(r'stage="(\w+)"', name)[0] for name in seconds}
    assert stages == {"fetching", "decoding", "inference", "inference_cpu", "writing"}
    assert min(seconds.values()) > 0


# ------------------------------------------------------------------------------------------------------ Label Studio


def postgresql() -> Path:
    """Folder of PostgreSQL's programs; skips where it is not installed."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    if not found:
        pytest.skip("needs the server of PostgreSQL (Debian's package postgresql)")
    return max(found)


@pytest.fixture(scope="module")
def label_studio(composed: Composed, label_studio_cache: Path) -> Iterator[LabelStudio]:
    """Label Studio on PostgreSQL, as composed, healthy by their own checks."""
    programs = postgresql()
    given = composed.environment("postgres")
    owner = "postgres" if os.getuid() == 0 else ""  # it refuses to be root
    port = str(composed.port("postgres 5432"))
    with tempfile.TemporaryDirectory(prefix="winnow-pg-") as name:
        folder = Path(name)
        (folder / "password").write_text(given["POSTGRES_PASSWORD"])
        if owner:
            for path in (folder, folder / "password"):
                shutil.chown(path, owner)
        initdb = [programs / "initdb", "--pgdata", folder / "data", "--username", given["POSTGRES_USER"]]
        initdb += ["--pwfile", folder / "password", "--auth", "scram-sha-256", "--encoding", "UTF8"]
        subprocess.run(initdb, user=owner or None, cwd=folder, capture_output=True, check=True, timeout=120)
        where = {"PGHOST": "127.0.0.1", "PGPORT": port}
        command = [str(programs / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", port]
        composed.run("postgres", [*command, "-k", str(folder)], where, owner)
        # The image makes the database before its health check can pass.
        createdb = [programs / "createdb", f"--username={given['POSTGRES_USER']}", given["POSTGRES_DB"]]
        password = {"PGPASSWORD": given["POSTGRES_PASSWORD"]}

        def makes_database() -> bool:
            return subprocess.run(createdb, env={**where, **password}, capture_output=True, check=False).returncode == 0

        ws.wait_until(makes_database, timeout_s=60, what="PostgreSQL")
        composed.wait_until_healthy("postgres")
        data = composed.folder / "label-studio-data"
        label_studio_port = composed.port("label-studio 8080")
        composed.run(
            "label-studio",
            [
                str(label_studio_cache / "environment" / "bin" / "label-studio"),
                *("start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(label_studio_port)),
            ],
            {
                "POSTGRE_HOST": "127.0.0.1",
                "POSTGRE_PORT": port,
                "LABEL_STUDIO_BASE_DATA_DIR": str(data),
                "HOME": str(composed.folder),
            },
        )
        composed.wait_until_healthy("label-studio")
        yield LabelStudio(
            f"http://127.0.0.1:{label_studio_port}",
            composed.secrets["LABEL_STUDIO_API_KEY"],
            patience=Patience(60.0, 60.0),
        )
        composed.stop()  # before its folder goes


@pytest.mark.label_studio
def test_people_are_asked_by_the_composed_label_studio_on_postgresql(
    composed: Composed, workspace: Workspace, label_studio: LabelStudio
) -> None:
    for command in (
        ["init"],
        ["ingest", "s3://images/"],
        ["predict"],
        ["select", "--budget", "4", "--audit-share", "0"],
        ["review", "push"],
        ["review", "push"],
    ):
        done = winnow(composed, *command)
        assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, composed.secrets[name])
        pushed = workspace.query("SELECT image_id, project, task_id FROM pushes").to_pylist()
        assert len({row["image_id"] for row in pushed}) == len(pushed) == 4
        tasks = {task.task_id for task in label_studio.tasks(pushed[0]["project"])}
        assert tasks == {row["task_id"] for row in pushed}

        # A browser that is logged in gets the image by way of Label Studio, which fetches it from the S3 server.
        headers = {"Authorization": f"Token {composed.secrets['LABEL_STUDIO_API_KEY']}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{label_studio.url}/api/tasks/{pushed[0]['task_id']}", headers=headers), timeout=60
        ) as answer:
            shown = json.loads(answer.read())["data"]["image"]
        with (
            urllib.request.urlopen(
                urllib.request.Request(urllib.parse.urljoin(label_studio.url, shown), headers=headers), timeout=60
            ) as answer,
            Image.open(io.BytesIO(answer.read())) as image,
        ):
            assert image.size == (40, 32)

        label_studio.annotate(pushed[0]["task_id"], class_result("cat"))
        done = winnow(composed, "review", "pull")
        assert done.returncode == 0, done.stderr
        assert workspace.query("SELECT image_id, label FROM current_labels").to_pylist() == [
            {"image_id": pushed[0]["image_id"], "label": "cat"}
        ]
    # All of that lies in PostgreSQL.
    assert not list(composed.folder.rglob("*.sqlite3"))


# -------------------------------------------------------------------------------------------------------- strangers


def test_without_the_token_nobody_gets_in(composed: Composed, workspace: Workspace) -> None:
    done = winnow(composed, "predict", "--retry-failures=all", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode == 2
    assert "its token is missing or wrong" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert winnow(composed, "runs", "--json").stdout.count('"open"') == 0
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{composed.port('ray-head 8265')}/api/version", timeout=10)


def test_without_the_keys_the_storage_gives_nothing(composed: Composed) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"http://127.0.0.1:{composed.port('s3 8333')}/images/000001.jpg", timeout=10)
