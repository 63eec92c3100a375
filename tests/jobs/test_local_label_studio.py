"""The local Label Studio, as a real process: install, start, stop, crash."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from winnow.errors import CallError, JobError
from winnow_connectors import label_studio, label_sync
from winnow_connectors.label_config import label_config
from winnow_connectors.label_studio import LabelStudio
from winnow_connectors.label_sync import TaskKey, sync
from winnow_connectors.label_tasks import class_result, prediction
from winnow_connectors.objects import Patience
from winnow_jobs import services
from winnow_jobs.daemons import start_mark
from winnow_jobs.local_label_studio import RELEASE, USER, LocalLabelStudio
from winnow_jobs.ports import find_free_port

pytestmark = [pytest.mark.label_studio, pytest.mark.timeout(1200)]


@pytest.fixture
def folder(label_studio_server: LocalLabelStudio, tmp_path: Path) -> Iterator[Path]:
    """A workspace with a Label Studio that is installed and was never started; it ends with the test."""
    path = tmp_path / "my work"
    home = path / ".winnow" / "services"
    shutil.copytree(label_studio_server.environment.parent / "blank", home)
    (home / "label-studio.json").unlink()
    (home / "label-studio-env").symlink_to(label_studio_server.environment)
    yield path
    LocalLabelStudio(home).kill9()


def _local(folder: Path) -> LocalLabelStudio:
    return LocalLabelStudio(folder / ".winnow" / "services")


def test_it_starts_once_keeps_everything_over_kill9_and_down_ends_it(folder: Path) -> None:
    assert services.status_label_studio(folder).detail == "never started"
    first = services.up_label_studio(folder)
    assert first.running
    assert services.up_label_studio(folder) == first
    assert services.status_label_studio(folder) == first
    assert first.config_section is None
    server = _local(folder)

    credentials = dict(line.split("=", 1) for line in first.credentials_file.read_text().splitlines())
    opened = LabelStudio.from_environment(credentials)
    assert opened.check().user == first.user == USER
    project = opened.create_project(
        "pets", config=label_config("classification", ["a"]), instructions="", in_order=True
    )

    pid = first.pid
    assert pid is not None
    process = psutil.Process(pid)
    connections = process.net_connections(kind="inet")
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    assert {c.raddr.ip for c in connections if c.raddr} <= {"127.0.0.1"}
    assert process.environ()["LABEL_STUDIO_COLLECT_ANALYTICS"] == "false"
    told = json.dumps(first.as_dict()) + repr(first) + " ".join(process.cmdline())
    assert server.token not in told
    assert server.password not in told
    home = folder / ".winnow" / "services"
    for name in ("label-studio.env", "label-studio.pid", "label-studio.out", "label-studio.json"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600, name
    for place in (home, first.data):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700

    with pytest.raises(CallError, match="already runs"):
        services.up_label_studio(folder, port=find_free_port())
    server.kill9()
    assert services.status_label_studio(folder).detail == "stopped"
    after = services.up_label_studio(folder)
    assert (after.address, after.running) == (first.address, True)
    assert after.pid != pid
    found = LabelStudio.from_environment(credentials).find_project("pets")
    assert found is not None
    assert found.project_id == project.project_id

    (home / "label-studio.pid").unlink()  # as if the start had been cut off
    assert services.up_label_studio(folder).pid == after.pid
    stopped = services.down_label_studio(folder)
    assert (stopped.running, stopped.pid, stopped.detail) == (False, None, "stopped")
    assert after.pid is not None
    assert not psutil.pid_exists(after.pid)
    assert services.down_label_studio(folder) == stopped


def test_a_push_and_a_pull_survive_kill9_of_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_sync, "_MAX_TASKS", 50)
    monkeypatch.setattr(label_studio, "_PAGE", 40)
    services.up_label_studio(folder)
    server = _local(folder)
    opened = LabelStudio(server.url, server.token, patience=Patience(60.0, 120.0))
    config = label_config("classification", ["a", "b"])
    project_id = opened.create_project("pets", config=config, instructions="", in_order=True).project_id
    ids = [f"{number:032x}" for number in range(400)]

    def make(keys: Sequence[TaskKey]) -> list[dict[str, Any]]:
        predictions = [prediction("pets@1", 1, class_result("a"))]
        return [
            {"data": {"image": f"s3://x/{image_id}", "image_id": image_id, "round": number}, "predictions": predictions}
            for image_id, number in keys
        ]

    def restart() -> None:
        server.kill9()
        server.start()

    restarts: list[threading.Thread] = []

    def on_progress(num_done: int) -> None:
        if num_done in (100, 250):
            restarts.append(threading.Timer(0.05, restart))  # while the next chunk is on its way
            restarts[-1].start()

    wanted = {(image_id, 1): "pets@1" for image_id in ids}
    done = sync(opened, project_id, wanted, make, on_progress=on_progress)
    for thread in restarts:
        thread.join()
    assert len(restarts) == 2
    assert done.num_new == 400
    tasks = list(opened.tasks(project_id))
    assert sorted(task.image_id for task in tasks) == ids
    assert all(task.models == {"pets@1"} for task in tasks)

    seen = []
    for number, task in enumerate(opened.changed_tasks(project_id, None)):
        seen.append(task.data["image_id"])
        if number == 100:
            restart()
    assert sorted(seen) == ids


def test_the_command_prints_how_to_log_in_and_no_secret(folder: Path) -> None:
    code = "from winnow_jobs.cli.main import main; main()"

    def winnow(*arguments: str) -> str:
        command = [sys.executable, "-c", code, "services", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = winnow("up", "--only", "label-studio")
    server = _local(folder)
    assert server.url in told
    assert USER in told
    assert "label-studio.env" in told
    assert server.token not in told
    assert server.password not in told
    assert str(server._files()) == str(folder / "warehouse" / "review")
    (service,) = json.loads(winnow("status", "--only", "label-studio", "--json"))["services"]
    assert service["running"]
    assert [service["name"] for service in json.loads(winnow("status", "--json"))["services"]] == ["s3", "label-studio"]
    assert "stopped" in winnow("down")
    assert not services.status_label_studio(folder).running


def test_a_taken_port_is_named(folder: Path) -> None:
    with socket.socket() as other:
        port = find_free_port()
        other.bind(("127.0.0.1", port))
        other.listen(1)
        with pytest.raises(CallError, match=rf"port {port} .* taken"):
            services.up_label_studio(folder, port=port)
    with pytest.raises(CallError, match="port 80 is not valid"):
        services.up_label_studio(folder, port=80)
    assert services.status_label_studio(folder).pid is None


def test_a_recycled_process_id_is_never_killed(folder: Path) -> None:
    server = _local(folder)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        try:
            for started in ("some other boot:1", start_mark(bystander.pid)):
                server._pid_file.write_text(json.dumps({"pid": bystander.pid, "started": started}))
                assert services.status_label_studio(folder).pid is None
                services.down_label_studio(folder)
                assert bystander.poll() is None
        finally:
            bystander.kill()


def test_lost_credentials_are_told_and_not_replaced(folder: Path) -> None:
    _local(folder).credentials_file.unlink()
    with pytest.raises(CallError, match=r"is missing, but .* has a user"):
        services.up_label_studio(folder)


def test_what_pip_says_is_told_and_half_an_environment_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        JobError, match=rf"(?s)could not be installed .*No matching distribution .*label-studio=={RELEASE}"
    ):
        services.up_label_studio(tmp_path)
    assert not services.has_label_studio(tmp_path)
    assert services.status_label_studio(tmp_path).detail == "never started"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for verb in (services.up_label_studio, services.down_label_studio, services.status_label_studio):
        with pytest.raises(CallError, match="is not a folder"):
            verb(tmp_path / "none")
