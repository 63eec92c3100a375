"""The local S3 server, as a real process: start, stop, crash, and two commands at once."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
import psutil
import pytest
from obstore.exceptions import AlreadyExistsError, PermissionDeniedError
from obstore.store import S3Store

from winnow.config import parse_config
from winnow.errors import CallError
from winnow_jobs import services
from winnow_jobs.daemons import start_mark
from winnow_jobs.local_s3 import LocalS3
from winnow_jobs.ports import find_free_port

if TYPE_CHECKING:
    from conftest import S3Server

pytestmark = [pytest.mark.s3, pytest.mark.timeout(120)]


def _local(folder: Path) -> LocalS3:
    return LocalS3(folder / ".winnow" / "services")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A workspace whose server ends with the test."""
    path = tmp_path / "my work"
    path.mkdir()
    yield path
    _local(path).kill9()


def _store(server: LocalS3, bucket: str, *, secret_key: str | None = None) -> S3Store:
    return S3Store(
        bucket,
        endpoint=server.endpoint,
        access_key_id=server.access_key,
        secret_access_key=secret_key or server.secret_key,
        region="us-east-1",
        client_options={"allow_http": True},
    )


def test_up_starts_once_creates_buckets_and_down_ends_it(folder: Path) -> None:
    assert services.status(folder).detail == "never started"
    first = services.up(folder, buckets=["images", "tables.v1"])
    assert first.running
    assert services.up(folder, buckets=["images"]) == first
    assert services.status(folder) == first
    server = _local(folder)
    obstore.put(_store(server, "images"), "a b/ü?.txt", b"hello")
    obstore.put(_store(server, "tables.v1"), "x", b"1")
    with pytest.raises(FileNotFoundError):  # a bucket that was not created must not appear by writing to it
        obstore.put(_store(server, "imagse"), "x", b"1")
    with pytest.raises(PermissionDeniedError):
        obstore.get(_store(server, "images", secret_key="wrong"), "a b/ü?.txt")

    stopped = services.down(folder)
    assert (stopped.running, stopped.pid, stopped.detail) == (False, None, "stopped")
    assert first.pid is not None
    assert not psutil.pid_exists(first.pid)
    assert services.down(folder) == stopped


def test_it_comes_back_after_kill9_with_the_same_address_keys_and_objects(folder: Path) -> None:
    before = services.up(folder, buckets=["images"])
    server = _local(folder)
    for number in range(20):
        obstore.put(_store(server, "images"), f"{number}.bin", bytes([number]) * 60_000)
    keys = server.access_key, server.secret_key
    server.kill9()
    assert not services.status(folder).running

    after = services.up(folder)
    assert after.running
    assert after.address == before.address
    assert after.pid != before.pid
    assert (server.access_key, server.secret_key) == keys
    for number in range(20):
        assert bytes(obstore.get(_store(server, "images"), f"{number}.bin").bytes()) == bytes([number]) * 60_000
    obstore.put(_store(server, "images"), "new", b"1")


def test_it_listens_on_this_machine_only(folder: Path) -> None:
    pid = services.up(folder).pid
    assert pid is not None
    num_ports = len(json.loads((folder / ".winnow/services/s3.ports").read_text())) + 1  # and the admin's second
    deadline = time.monotonic() + 20
    while True:
        connections = psutil.Process(pid).net_connections(kind="inet")
        listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
        if len(listening) >= num_ports or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert len(listening) == num_ports
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert not [c for c in connections if c.type == socket.SOCK_DGRAM]


def test_keys_are_random_and_private(folder: Path, tmp_path: Path) -> None:
    status = services.up(folder)
    server = _local(folder)
    home = folder / ".winnow" / "services"
    for name in ("credentials", "s3.json", "s3.pid", "s3.out"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(status.data.stat().st_mode) == 0o700
    assert server.secret_key not in json.dumps(status.as_dict()) + repr(status)
    assert server.secret_key not in " ".join(psutil.Process(status.pid).cmdline())

    other = LocalS3(tmp_path / "other")
    other._prepare_files()
    assert other.access_key != server.access_key
    assert other.secret_key != server.secret_key


def test_printed_section_is_valid_configuration(folder: Path) -> None:
    status = services.up(folder)
    assert status.config_section is not None
    storage = parse_config(status.config_section).storage["s3://"]
    assert storage.endpoint == status.address
    assert storage.profile == "winnow-local"
    assert storage.credentials_file == str(status.credentials_file)


def test_it_outlives_the_command_and_two_commands_at_once_start_one(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from winnow_jobs.services import up; print(up(Path(sys.argv[1])).pid)"
    commands = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    pids = {int(command.communicate(timeout=60)[0]) for command in commands}
    assert [command.returncode for command in commands] == [0, 0]
    assert len(pids) == 1
    pid = pids.pop()
    status = services.status(folder)
    assert status.running
    assert status.pid == pid
    assert os.getsid(pid) == pid  # no Ctrl-C and no closing terminal reaches it


def test_a_recycled_process_id_is_never_killed(folder: Path) -> None:
    server = _local(folder)
    server._prepare_files()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        try:
            for started in ("some other boot:1", start_mark(bystander.pid)):
                server._pid_file.write_text(json.dumps({"pid": bystander.pid, "started": started}))
                assert services.status(folder).pid is None
                services.down(folder)
                assert bystander.poll() is None
        finally:
            bystander.kill()


def test_a_start_that_was_cut_off_is_found_again(folder: Path) -> None:
    pid = services.up(folder).pid
    (folder / ".winnow/services/s3.pid").unlink()
    assert services.up(folder).pid == pid
    services.down(folder)
    assert pid is not None
    assert not psutil.pid_exists(pid)


def test_a_taken_port_is_named(folder: Path) -> None:
    with socket.socket() as other:
        port = find_free_port()
        other.bind(("127.0.0.1", port))
        other.listen(1)
        with pytest.raises(CallError, match=f"port {port} .* taken"):
            services.up(folder, port=port)
    assert services.status(folder).pid is None


@pytest.mark.parametrize("port", [0, 80, 70_000])
def test_an_impossible_port_is_refused(folder: Path, port: int) -> None:
    with pytest.raises(CallError, match=f"port {port} is not valid"):
        services.up(folder, port=port)


@pytest.mark.parametrize("name", ["a", "Images", "my_bucket", "-x-", "a/b", "x" * 64])
def test_a_wrong_bucket_name_is_refused_before_anything_starts(folder: Path, name: str) -> None:
    with pytest.raises(CallError, match="bucket name"):
        services.up(folder, buckets=[name])
    assert not (folder / ".winnow").exists()


def test_without_the_program_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(CallError, match=r"pip install 'winnow-vision\[local\]'"):
        services.up(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for verb in (services.up, services.down, services.status):
        with pytest.raises(CallError, match="is not a folder"):
            verb(tmp_path / "none")


def test_session_server_makes_fresh_buckets(s3_env: S3Server) -> None:
    names = [s3_env.make_bucket("fresh") for _ in range(2)]
    assert len(set(names)) == 2
    store = S3Store(names[0], endpoint=s3_env.endpoint, client_options={"allow_http": True})  # keys: environment
    obstore.put(store, "a", b"1", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "a", b"2", mode="create")
