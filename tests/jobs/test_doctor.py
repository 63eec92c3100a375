"""``winnow doctor``: every fault is found and said, nothing is left behind, and no secret is told."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import obstore
import pytest
from click.testing import CliRunner
from obstore.store import S3Store

from winnow.config import Config, TaskConfig, parse_config
from winnow_connectors.object_store import ObjectStores
from winnow_jobs import doctor, services
from winnow_jobs.checks import Check, label_studio, machine, storage
from winnow_jobs.cli.doctor import command
from winnow_jobs.cli.main import Call
from winnow_jobs.local_s3 import LocalS3

if TYPE_CHECKING:
    from conftest import S3Server

TOKEN = "5ec2e7" * 6 + "abcd"


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def _by_name(checks: list[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks), "every name once"
    assert all((check.mend is None) == (check.status == "ok") for check in checks), "every fault says how to mend it"
    return found


@contextmanager
def _serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_without_configuration_the_machine_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = _by_name(doctor.diagnose(None))
    assert {"python", "packages", "torch", "ray", "memory", "weights cache", "winnow.toml", "local s3"} <= set(found)
    assert found["winnow.toml"].status == "warn"
    assert found["python"].status == found["packages"].status == found["torch"].status == "ok"
    assert "duckdb" in found["packages"].detail
    assert "not configured" in found["label studio"].detail
    assert list(tmp_path.iterdir()) == []


def test_a_broken_configuration_is_told_whole_and_the_other_checks_go_on(tmp_path: Path) -> None:
    path = tmp_path / "winnow.toml"
    path.write_text('[predict]\nbatch_sise = 3\nprecision = "int3"\n')
    found = _by_name(doctor.diagnose(path))
    assert found["winnow.toml"].status == "fail"
    assert "batch_size" in found["winnow.toml"].detail
    assert "precision" in found["winnow.toml"].detail
    assert found["torch"].status == "ok"
    assert "warehouse" not in found


def test_a_configuration_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    found = _by_name(doctor.diagnose(tmp_path / "none" / "winnow.toml"))
    assert found["winnow.toml"].status == "fail"
    assert found["local s3"].status == "ok"


def test_a_check_that_never_ends_is_cut_off_and_one_that_breaks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down() -> Check:
        raise RuntimeError("https://user:hunter2@example.org went wrong")

    monkeypatch.setattr(doctor, "LIMIT_S", 0.3)
    over = threading.Event()
    monkeypatch.setattr(doctor.label_studio, "check_label_studio", over.wait)
    monkeypatch.setitem(doctor._MACHINE, "python", (break_down, 5.0))
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    found = _by_name(doctor.diagnose(None))
    over.set()
    assert time.monotonic() - start < 30
    assert found["label studio"].status == "fail"
    assert "no answer within" in found["label studio"].detail
    assert "RuntimeError" in found["python"].detail
    assert "hunter2" not in found["python"].detail


# -- storage -----------------------------------------------------------------------------------------------------------


def _config(uri: str, endpoint: str | None = None, section: str = "s3://", more: str = "") -> Config:
    text = f"[warehouse]\nuri = {json.dumps(uri)}\n"
    if endpoint is not None:
        text += f"[storage.{json.dumps(section)}]\nendpoint = {json.dumps(endpoint)}\n{more}"
    return parse_config(text)


def test_a_local_warehouse_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    config = _config("./warehouse")
    assert storage.check_warehouse(config, tmp_path).mend == "winnow init"
    assert not (tmp_path / "warehouse").exists()
    ObjectStores({}, tmp_path).at("warehouse").put("warehouse.json", b"{}")
    check = storage.check_warehouse(config, tmp_path)
    assert check.status == "ok"
    assert "create-only" in check.detail
    assert [path.name for path in (tmp_path / "warehouse").rglob("*")] == ["warehouse.json"]
    assert storage.check_warehouse_disk(config, tmp_path).status in ("ok", "warn")


@pytest.mark.s3
def test_an_s3_warehouse_is_probed_and_left_as_it_was(s3_env: S3Server, tmp_path: Path) -> None:
    bucket = s3_env.make_bucket("doctor")
    config = _config(f"s3://{bucket}/lab", s3_env.endpoint, f"s3://{bucket}")
    assert storage.check_warehouse(config, tmp_path).mend == "winnow init"
    store = S3Store(bucket, endpoint=s3_env.endpoint, client_options={"allow_http": True})
    obstore.put(store, "lab/warehouse.json", b"{}")
    assert storage.check_warehouse(config, tmp_path).status == "ok"
    assert [meta["path"] for meta in obstore.list(store).collect()] == ["lab/warehouse.json"]
    section = storage.check_section(f"s3://{bucket}", config, tmp_path)
    assert section.status == "ok"
    assert "listing works" in section.detail


@pytest.mark.s3
def test_wrong_keys_and_wrong_buckets_are_failures(
    s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = _config("s3://no-such-bucket/lab", s3_env.endpoint, "s3://no-such-bucket")
    assert storage.check_warehouse(missing, tmp_path).status == "fail"
    assert storage.check_section("s3://no-such-bucket", missing, tmp_path).status == "fail"

    bucket = s3_env.make_bucket("doctor")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not" + s3_env.secret_key)
    config = _config(f"s3://{bucket}/lab", s3_env.endpoint, f"s3://{bucket}")
    for check in (
        storage.check_warehouse(config, tmp_path),
        storage.check_section(f"s3://{bucket}", config, tmp_path),
    ):
        assert check.status == "fail"
        assert s3_env.secret_key not in repr(check)


def test_storage_that_ignores_conditions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(BaseHTTPRequestHandler):
        """S3 as some servers have it: a PUT always wins."""

        objects: ClassVar[dict[str, bytes]] = {}

        def do_PUT(self) -> None:
            self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, b"")

        def do_GET(self) -> None:
            data = self.objects.get(self.path)
            self._answer(404 if data is None else 200, data or b"")

        do_HEAD = do_GET

        def do_POST(self) -> None:  # DeleteObjects
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            for key in re.findall("<Key>(.*?)</Key>", body):
                self.objects.pop(f"/bucket/{key}", None)
            self._answer(200, b"<DeleteResult/>")

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"x"')
            self.send_header("Last-Modified", self.date_time_string())
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with _serve(Careless) as url:
        check = storage.check_warehouse(_config("s3://bucket/lab", url), tmp_path)
    assert check.status == "fail"
    assert check.mend is not None
    assert "conditional PUT" in check.mend
    assert Careless.objects == {}


def test_an_address_that_speaks_no_http_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)

        def speak() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(10_000)
                    connection.sendall(b"220 mail.example.org ESMTP\r\n")

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("LABEL_STUDIO_URL", url)
        assert "does not answer" in label_studio.check_label_studio().detail
        config = _config("./warehouse", url, "s3://", "anonymous = true\n")
        assert "does not answer" in storage.check_section("s3://", config, tmp_path).detail
        thread.join(20)


def test_a_section_that_leads_nowhere_is_a_failure_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    config = _config("s3://bucket/lab", "http://127.0.0.1:9", "s3://")
    start = time.monotonic()
    section = storage.check_section("s3://", config, tmp_path)
    warehouse = storage.check_warehouse(config, tmp_path)
    assert time.monotonic() - start < 2 * doctor.LIMIT_S
    assert (section.status, warehouse.status) == ("fail", "fail")
    named = _config("s3://bucket/lab", "http://127.0.0.1:9", "s3://", 'profile = "nobody"\n')
    assert "nobody" in storage.check_section("s3://", named, tmp_path).detail


@pytest.mark.s3
def test_a_stopped_local_server_that_is_needed_is_a_failure(tmp_path: Path) -> None:
    server = LocalS3(tmp_path / ".winnow" / "services")
    try:
        status = services.up(tmp_path)
        config = parse_config(status.config_section or "")
        assert storage.check_local_s3(config, tmp_path).status == "ok"
        assert storage.check_section("s3://", config, tmp_path).status == "ok"
    finally:
        server.kill9()
    assert storage.check_local_s3(config, tmp_path).mend == "winnow services up"
    assert storage.check_local_s3(None, tmp_path).status == "ok"


# -- weights and Ray ---------------------------------------------------------------------------------------------------


def _weights(model: str, folder: Path) -> Check:
    return machine.check_weights("objects", TaskConfig(model=model), folder)


def test_cached_weights_are_found_and_damaged_ones_too(
    torch_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "in the cache" in _weights("torchvision/mobilenet_v2@IMAGENET1K_V1", tmp_path).detail
    copy = tmp_path / "torch"
    shutil.copytree(torch_home, copy)
    monkeypatch.setenv("TORCH_HOME", str(copy))
    path = copy / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    check = _weights("torchvision/mobilenet_v2@IMAGENET1K_V1", tmp_path)
    assert check.status == "fail"
    assert check.mend == f"delete it: rm {path}"


def test_absent_weights_name_their_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    check = _weights("torchvision/resnet18", tmp_path)
    assert check.status in ("ok", "warn")  # whether the host can be reached from here
    assert str(urlsplit(ResNet18_Weights.DEFAULT.url).hostname) in check.detail
    assert machine.check_weights_cache().status in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []


def test_wrong_model_references_are_failures_with_a_way_out(tmp_path: Path) -> None:
    assert "resnet18" in (_weights("torchvision/resnet81", tmp_path).mend or "")
    assert "IMAGENET1K_V1" in (_weights("torchvision/resnet18@IMAGENET", tmp_path).mend or "")
    assert _weights("missing.safetensors", tmp_path).status == "fail"


def test_an_unreachable_cluster_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "127.0.0.1:9" in machine.check_ray().detail
    assert machine.check_ray().status == "fail"
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert machine.check_ray().status == "fail"


# -- Label Studio ------------------------------------------------------------------------------------------------------


class _LabelStudio(BaseHTTPRequestHandler):
    """The three calls of Label Studio's API that the doctor makes, as version 1.23 answers them."""

    form = "Token"
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        if self.path == "/api/version":
            self._answer(200, {"release": "1.23.2", "edition": "Community"})
        elif self.path == "/api/current-user/whoami":
            right = "Bearer short-lived" if self.form == "personal" else f"{self.form} {TOKEN}"
            self._answer(*((200, {"email": "ann@example.org"}) if given == right else (401, {"detail": "Invalid"})))
        elif self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._answer(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = self.form == "personal" and self.path == "/api/token/refresh" and body == {"refresh": TOKEN}
        self._answer(*((200, {"access": "short-lived"}) if right else (401, {})))

    def _answer(self, code: int, value: dict[str, str]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("form", ["Token", "Bearer", "personal"])
def test_label_studio_is_opened_with_every_form_of_token(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_LabelStudio, "form", form)
    with _serve(_LabelStudio) as url:
        monkeypatch.setenv("LABEL_STUDIO_URL", url + "/")
        without = label_studio.check_label_studio()
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
        check = label_studio.check_label_studio()
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN[:-1])
        wrong = label_studio.check_label_studio()
    assert without.status == "warn"
    assert check.status == "ok"
    assert "1.23.2" in check.detail
    assert "ann@example.org" in check.detail
    assert wrong.status == "fail"
    assert TOKEN[:-1] not in repr([without, check, wrong])


def test_the_token_follows_no_redirect_and_stands_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
    with _serve(_LabelStudio) as url:
        monkeypatch.setenv("LABEL_STUDIO_URL", f"{url}/moved")
        assert label_studio.check_label_studio().status == "fail"
        monkeypatch.setenv("LABEL_STUDIO_URL", url)
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", f"{TOKEN}\nX: y")
        check = label_studio.check_label_studio()
    assert check.status == "fail"
    assert TOKEN not in repr(check)
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://ann:hunter2@127.0.0.1:9")
    check = label_studio.check_label_studio()
    assert check.status == "fail"
    assert "hunter2" not in repr(check)


# -- the command -------------------------------------------------------------------------------------------------------


def _winnow(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from winnow_jobs.cli.main import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_prints_marks_and_exits_1_on_a_failure(tmp_path: Path) -> None:
    (tmp_path / "winnow.toml").write_text("[predict]\nbatch_size = -1\n")
    plain = _winnow(tmp_path, "doctor")
    assert plain.returncode == 1
    assert "✗  winnow.toml" in plain.stdout
    assert "→ mend it" in plain.stdout
    assert "\x1b" not in plain.stdout


def test_before_init_the_command_exits_0_and_a_named_file_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, ["--json"], obj=Call(Path("winnow.toml")))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ok"] is True
    assert CliRunner().invoke(command, ["--json"], obj=Call(tmp_path / "lab.toml")).exit_code == 1


@pytest.mark.s3
def test_services_commands_speak_json(tmp_path: Path) -> None:
    try:
        up = _winnow(tmp_path, "services", "up", "--only", "s3", "--bucket", "photos", "--json")
        assert up.returncode == 0, up.stderr
        (service,) = json.loads(up.stdout)["services"]
        assert service["running"]
        again = _winnow(tmp_path, "services", "status", "--only", "s3", "--json")
        assert json.loads(again.stdout)["services"] == [service]
        assert '[storage."s3://"]' in _winnow(tmp_path, "services", "up", "--only", "s3").stdout
        down = _winnow(tmp_path, "services", "down", "--json")
        assert [service["running"] for service in json.loads(down.stdout)["services"]] == [False, False]
        wrong = _winnow(tmp_path, "services", "up", "--bucket", "NO")
        assert wrong.returncode == 2
        assert "bucket name 'NO'" in wrong.stderr
    finally:
        LocalS3(tmp_path / ".winnow" / "services").kill9()
