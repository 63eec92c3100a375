"""The processes of ``infra/compose.yaml``, started by hand with its commands and settings, and two jobs on them.

No container engine runs here: addresses, ports, paths and sizes are replaced by those of this machine; Label Studio and
PostgreSQL are left out. Ray's token authentication is on, as there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import workspaces as ws
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
        self.secrets = {name: value or secrets.token_hex(32) for name, value in example}
        text = re.sub(
            r"\$\{(\w+):\?[^}]*\}", lambda match: self.secrets[match[1]], (INFRA / "compose.yaml").read_text()
        )
        self.services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
        self.commands: dict[str, list[str]] = {}
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
        words = [*(self.here(word, service) for word in words), *further]
        self.commands[service] = [str(program), *words]
        self._run(service)

    def _run(self, service: str) -> None:
        with (self.folder / f"{service}.log").open("ab") as log:
            self.processes[service] = psutil.Popen(
                self.commands[service],
                cwd=self.folder,
                env=self.environment(service),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_healthy(self, service: str) -> None:
        """Wait until the service's own health check passes; what ended is started again, as compose does.

        On a busy machine a node of Ray gives up when its agent takes more than half a minute to start.
        """
        assert self.services[service]["restart"] == "unless-stopped"
        _, python, *arguments = self.services[service]["healthcheck"]["test"]
        assert python == "python"
        command = [sys.executable, *(self.here(argument, service) for argument in arguments)]

        def is_healthy() -> bool:
            self._note_family()
            for each in [each for each, process in self.processes.items() if process.poll() is not None]:
                self._run(each)
            return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0

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


def test_without_the_token_nobody_gets_in(composed: Composed, workspace: Workspace) -> None:
    done = winnow(composed, "predict", "--retry-failures=all", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode == 2
    assert "its token is missing or wrong" in done.stderr
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{composed.port('ray-head 8265')}/api/version", timeout=10)


def test_without_the_keys_the_storage_gives_nothing(composed: Composed) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"http://127.0.0.1:{composed.port('s3 8333')}/images/000001.jpg", timeout=10)
