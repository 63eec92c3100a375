"""A Label Studio on this machine, for trying things out, for the demo and for tests.

It is installed with pip into an environment of its own, because it pins versions that Winnow cannot live with. One
folder holds all of it::

    label-studio-env/     the virtual environment, about 1 GB; made at the first start
    label-studio.env      address, token, user and password as NAME=VALUE; made once, mode 0600
    label-studio.json     the port and the folder of files chosen at the first start, used again at the next
    label-studio.pid      the process id and the time it started, so that a recycled id is never taken for it
    label-studio.out      what the server wrote to its terminal at the last start
    label-studio.install.out   what pip wrote
    label-studio-data/    its database
    label-studio-files/   its subfolders can be shown in projects, where no other folder was named

The server listens on 127.0.0.1 only, reports nothing to anyone, lets nobody sign up, and goes on running when the
command ends.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import subprocess
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
from winnow_jobs.signing import http_request

logger = logging.getLogger(__name__)

RELEASE = "1.23.2"  # pinned: newer ones were not tested, and its database is migrated forward only
"""Release that is installed."""

USER = "winnow@localhost"
"""Who logs in in the browser."""

_START_TIMEOUT_S = 300.0  # the first start migrates the database: half a minute, several on a busy machine
_STOP_TIMEOUT_S = 15.0
_INSTALL_TIMEOUT_S = 1800.0
_PORTS = range(1024, 65_536)


class LocalLabelStudio:
    """A Label Studio whose environment, credentials, data and port live in ``home``.

    Not guarded against two callers at once; ``up_label_studio`` and ``down_label_studio`` are.
    """

    def __init__(self, home: Path, *, environment: Path | None = None) -> None:
        """Nothing is started.

        Args:
            home: the folder of all files.
            environment: virtual environment to use or make instead of the one in ``home``.
        """
        self.home = home.absolute()
        self.environment = environment or self.home / "label-studio-env"
        self.data = self.home / "label-studio-data"
        self.credentials_file = self.home / "label-studio.env"
        self.out_file = self.home / "label-studio.out"
        self._install_file = self.home / "label-studio.install.out"
        self._state_file = self.home / "label-studio.json"
        self._pid_file = self.home / "label-studio.pid"

    @property
    def url(self) -> str:
        """Such as ``http://127.0.0.1:20444``. Raises CallError before the first start."""
        port = self._port()
        if port is None:
            raise CallError(f"the Label Studio in {self.home} was never started; start it first")
        return f"http://127.0.0.1:{port}"

    @property
    def token(self) -> str:
        """Opens its API."""
        return self._credentials()["LABEL_STUDIO_API_KEY"]

    @property
    def password(self) -> str:
        """Of ``USER``."""
        return self._credentials()["LABEL_STUDIO_PASSWORD"]

    @property
    def is_installed(self) -> bool:
        """The environment is whole and of the release that is pinned."""
        mark = self._mark()
        return mark.is_file() and mark.read_text().strip() == RELEASE

    def install(self) -> None:
        """Make the environment; does nothing when it is there. One that was cut off is made again.

        Raises:
            JobError: pip could not; the message has its last words.
        """
        if self.is_installed:
            return
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        start = time.monotonic()
        shutil.rmtree(self.environment, ignore_errors=True)
        python = self.environment / "bin" / "python"
        pip = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            f"label-studio=={RELEASE}",
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_"))}
        with self._install_file.open("wb") as output:
            for command in ([sys.executable, "-m", "venv", str(self.environment)], pip):
                try:
                    subprocess.run(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        timeout=_INSTALL_TIMEOUT_S,
                        check=True,
                    )
                except (OSError, subprocess.SubprocessError):
                    tail = "\n".join(self._install_file.read_text(errors="replace").strip().splitlines()[-5:])
                    raise JobError(
                        f"Label Studio {RELEASE} could not be installed into {self.environment}; mend what pip says in "
                        f"{self._install_file} and run this again; its last words:\n{tail}"
                    ) from None
        self._mark().write_text(RELEASE)
        logger.info("Label Studio %s installed in %.0f s", RELEASE, time.monotonic() - start)

    def start(self, *, port: int | None = None, files: Path | None = None) -> None:
        """Start the server and wait until it answers; does nothing when it runs.

        Args:
            port: where it shall answer; else the port of last time, else a free one.
            files: folder whose subfolders projects may show; else that of last time, else one in ``home``.

        Raises:
            CallError: the port is not valid or taken, or it runs with other settings.
            JobError: it could not be installed or did not start.
        """
        if port is not None and port not in _PORTS:
            raise CallError(f"port {port} is not valid for Label Studio; choose {_PORTS.start} to {_PORTS.stop - 1}")
        files = self._files() if files is None else files.absolute()
        if (pid := self._find_process()) is not None:
            if (port is not None and port != self._port()) or files != self._files():
                raise CallError(
                    f"Label Studio already runs at {self.url}, with files in {self._files()}; "
                    "end it first (`winnow services down`) to change that"
                )
            if self._wait_until_ready(pid):
                return
        self.install()
        self._prepare_files()
        for _ in range(3):  # another program can take a port between the choice and the start
            self._choose_port(port, files)
            pid = self._launch(files)
            if self._wait_until_ready(pid):
                logger.info("Label Studio answers at %s (process %d)", self.url, pid)
                return
            self.kill9()
        raise JobError(f"Label Studio found its port taken three times; see {self.out_file}")

    def stop(self) -> None:
        """End the server, gently first; does nothing when it does not run.

        Raises:
            JobError: the process survives SIGKILL.
        """
        if (pid := self._find_process()) is not None:
            os.kill(pid, signal.SIGTERM)
            if not wait_until_gone(pid, _STOP_TIMEOUT_S):
                logger.warning("Label Studio (process %d) did not end in %g s; killing it", pid, _STOP_TIMEOUT_S)
                self._kill(pid)
            self._pid_file.unlink(missing_ok=True)

    def kill9(self) -> None:
        """End the server as a power cut would; does nothing when it does not run."""
        if (pid := self._find_process()) is not None:
            self._kill(pid)
            self._pid_file.unlink(missing_ok=True)

    def status(self) -> ServiceStatus:
        """The server as it is now; changes nothing."""
        port, pid = self._port(), self._find_process()
        answers = port is not None and pid is not None and self._answers()
        if answers:
            detail = "running"
        elif pid is not None:
            detail = f"process {pid} lives but does not answer; `winnow services down`, then up, or see {self.out_file}"
        else:
            detail = "never started" if port is None else "stopped"
        return ServiceStatus(
            name="label-studio",
            running=answers,
            address=None if port is None else self.url,
            pid=pid,
            data=self.data,
            log=self.out_file,
            credentials_file=self.credentials_file,
            detail=detail,
            user=USER,
        )

    # -- files ---------------------------------------------------------------------------------------------------

    def _mark(self) -> Path:
        return self.environment / "winnow-release"

    def _prepare_files(self) -> None:
        for folder in (self.home, self.data):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        write_private(self.home / ".gitignore", "*\n")
        if not self.credentials_file.exists():
            if any(self.data.iterdir()):
                raise CallError(
                    f"{self.credentials_file} is missing, but {self.data} has a user whose password stood in it; "
                    "put the file back, or remove the folder to begin anew"
                )
            self._write_credentials(secrets.token_hex(20), secrets.token_urlsafe(18))

    def _write_credentials(self, token: str, password: str) -> None:
        address = "" if self._port() is None else self.url
        values = {
            "LABEL_STUDIO_URL": address,
            "LABEL_STUDIO_API_KEY": token,
            "LABEL_STUDIO_USERNAME": USER,
            "LABEL_STUDIO_PASSWORD": password,
            "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": shlex.quote(str(self._files())),
        }
        write_private(self.credentials_file, "".join(f"{name}={value}\n" for name, value in values.items()))

    def _credentials(self) -> dict[str, str]:
        try:
            lines = self.credentials_file.read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        values = {name: value for name, _, value in (line.partition("=") for line in lines)}
        if not values.get("LABEL_STUDIO_API_KEY") or not values.get("LABEL_STUDIO_PASSWORD"):
            raise CallError(f"{self.credentials_file} has no token and password of the local Label Studio; put it back")
        return values

    def _port(self) -> int | None:
        port = read_json(self._state_file).get("port")
        return port if isinstance(port, int) and port in _PORTS else None

    def _files(self) -> Path:
        folder = read_json(self._state_file).get("files")
        return Path(folder) if isinstance(folder, str) else self.home / "label-studio-files"

    def _choose_port(self, port: int | None, files: Path) -> None:
        """The kept port where it is free, else a new one; it only changes on request, because bookmarks hold it."""
        wanted = port or self._port()
        if wanted is None:
            wanted = find_free_port()
        elif not is_free(wanted):
            raise CallError(
                f"port {wanted} of the local Label Studio is taken by another program; end that program, or choose "
                "another port with `winnow services up --label-studio-port PORT`"
            )
        credentials = self._credentials()
        write_private(self._state_file, json.dumps({"port": wanted, "files": str(files)}))
        self._write_credentials(credentials["LABEL_STUDIO_API_KEY"], credentials["LABEL_STUDIO_PASSWORD"])

    # -- process -------------------------------------------------------------------------------------------------

    def _launch(self, files: Path) -> int:
        """Start the server in a session of its own, so that it outlives this process and its terminal."""
        files.mkdir(parents=True, exist_ok=True)
        arguments = [
            str(self.environment / "bin" / "python"),
            str(self.environment / "bin" / "label-studio"),
            "start",
            "--no-browser",
            "--internal-host",
            "127.0.0.1",
            "--port",
            str(self._port()),
            "--data-dir",
            str(self.data),
        ]
        # A bare environment: the server would take settings from the user's.
        environment = {
            "PATH": os.defpath,
            "HOME": str(self.data),
            **{f"XDG_{kind}_HOME": str(self.data / "home") for kind in ("CONFIG", "DATA", "CACHE")},
            "LABEL_STUDIO_BASE_DATA_DIR": str(self.data),
            "LABEL_STUDIO_HOST": self.url,
            "LABEL_STUDIO_USERNAME": USER,
            "LABEL_STUDIO_PASSWORD": self.password,
            "LABEL_STUDIO_USER_TOKEN": self.token,
            # Acts only at the very first start, when the organization is made.
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
            # It calls nobody: no analytics, crash reports, version checks, remote flags, downloads.
            "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
            "LABEL_STUDIO_LATEST_VERSION_CHECK": "false",
            "LABEL_STUDIO_FEATURE_FLAGS_OFFLINE": "true",
            "LABEL_STUDIO_CONVERTER_DOWNLOAD_RESOURCES": "false",
            # The S3 server of this workspace has a private address.
            "LABEL_STUDIO_SSRF_PROTECTION_ENABLED": "false",
            "LABEL_STUDIO_ML_BLOCK_LOCAL_IP": "false",
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
            "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(files),
            "PYTHONUNBUFFERED": "1",  # that its port was taken is read while it runs
        }
        pid = spawn(arguments, environment=environment, output=self.out_file)
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
        return str(self.data) in command and any(Path(part).name == "label-studio" for part in command[:2])

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        if not wait_until_gone(pid, _STOP_TIMEOUT_S):
            raise JobError(f"process {pid} of Label Studio does not end; end it by hand and look at the disk")

    def _wait_until_ready(self, pid: int) -> bool:
        """True when it answers; False when its port was taken, and it looked for another one."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if not is_alive(pid):
                tail = "\n".join(self.out_file.read_text(errors="replace").strip().splitlines()[-5:])
                raise JobError(f"Label Studio ended while it started; its last words:\n{tail}")
            if self._answers():
                return True
            if f"* Port {self._port()}" in self.out_file.read_text(errors="replace"):
                return False
            time.sleep(0.1)
        raise JobError(
            f"Label Studio (process {pid}) did not answer within {_START_TIMEOUT_S:g} s; see {self.out_file}, "
            "and end it with `winnow services down`"
        )

    def _answers(self) -> bool:
        """True when our token opens it: another program on the port knows it not."""
        try:
            headers = {"Authorization": f"Token {self.token}"}
            return http_request("GET", f"{self.url}/api/current-user/whoami", headers)[0] == 200
        except (OSError, ValueError):
            return False
