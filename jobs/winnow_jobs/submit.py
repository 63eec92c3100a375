"""Jobs of a Ray cluster elsewhere, through Ray's Job Submission API.

A submitted job is the same ``winnow`` command line, run on the cluster's head by ``winnow_jobs.entrypoint``. With it go

- the sources of this very Winnow, as Ray's ``py_modules``: packages, not the wheel, because Ray would let pip install a
  wheel with all its dependencies, PyTorch among them, on every node. They are named by their content: what the cluster
  has already is not sent again.
- ``winnow.toml`` and the checkpoints that it names by relative paths, as ``working_dir``.

Secrets go nowhere: the cluster has its own, in the environment of its nodes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from winnow import __version__
from winnow.config import Config, load_config
from winnow.errors import CallError, JobError
from winnow.models.checkpoints import SUFFIXES
from winnow.uris import redact

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_CONNECT_TIMEOUT_S = 5.0
_STARTING_TIMEOUT_S = 60.0
_ENDING_TIMEOUT_S = 60.0
_PACKAGES = ("winnow", "winnow_connectors", "winnow_jobs")
_MARK = "winnow_command"
"""Key of a job's metadata: the command line. What has it was submitted by Winnow."""
_RAYS_LINE = re.compile(r"Running entrypoint for job |\S+ \S+\tINFO job_manager\.py:|\[[^]]+\] logging\.cc:")
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True)
class SubmittedJob:
    """A job as the cluster knows it now.

    Attributes:
        job_id: as ``winnow jobs`` takes it.
        status: Ray's word: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
        command: the command line, without ``winnow``.
        started_at, ended_at: ISO 8601 in UTC; None before.
        exit_code: of the command; None while it runs, and when it never came to an end of its own.
        message: Ray's, on why the job failed.
    """

    job_id: str
    status: str
    command: str
    started_at: str | None
    ended_at: str | None
    exit_code: int | None
    message: str

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


class Cluster:
    """The jobs of one cluster.

    Args:
        address: such as ``http://head:8265``; by default RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.

    Raises:
        CallError: no address, nobody answers there, the token is missing or wrong, or it runs another Ray or Python.
    """

    def __init__(self, address: str | None = None) -> None:
        names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
        self.address = address or next((os.environ[name] for name in names if os.environ.get(name)), "")
        if not self.address:
            raise CallError("no cluster is named; add --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
        self._check_reachable()
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # Ray lets this variable win over the address that its client is called with.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._told():
            self._client: JobSubmissionClient = JobSubmissionClient()
            self._check_versions()

    def submit(self, arguments: Sequence[str], config_path: Path, *, retries: int = 0, log_format: str = "text") -> str:
        """Start a command on the cluster and return at once; the job's id.

        Args:
            arguments: the command line after ``winnow``.
            config_path: the ``winnow.toml`` that goes with it.
            retries: how often the cluster runs the command again when its driver dies or the job fails.
            log_format: ``text`` or ``json``, whatever the cluster's own jobs write.

        Raises:
            CallError: the configuration or an argument cannot hold on the cluster.
        """
        config = load_config(config_path)
        folder = config_path.absolute().parent
        _check_secrets(arguments)
        checkpoints = _check_paths(config, folder)
        now = datetime.now(UTC)
        with tempfile.TemporaryDirectory(prefix="winnow-submit-") as scratch, self._told():
            working_dir, modules = Path(scratch) / "workspace", Path(scratch) / "modules"
            for relative in checkpoints:
                (working_dir / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / relative, working_dir / relative)
            working_dir.mkdir(exist_ok=True)
            shutil.copyfile(config_path, working_dir / "winnow.toml")
            # Every word is safe for the shell that runs it; `exec` leaves no shell between Ray and the command.
            command = ["python", "-m", "winnow_jobs.entrypoint", str(retries), "--config", "winnow.toml", *arguments]
            job = {
                "entrypoint": f"exec {shlex.join(command)}",
                "submission_id": f"winnow-{arguments[0]}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
                "runtime_env": {
                    "working_dir": str(working_dir),
                    "py_modules": _modules(modules),
                    "env_vars": {"WINNOW_LOG_FORMAT": log_format},
                },
                "metadata": {_MARK: shlex.join(arguments), "winnow_version": __version__},
            }
            return self._send(job)

    def _send(self, job: dict[str, Any]) -> str:
        """Start a job; a cluster that is just starting refuses for a while."""
        deadline = time.monotonic() + _STARTING_TIMEOUT_S
        while True:
            try:
                job_id: str = self._client.submit_job(**job)
                return job_id
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def jobs(self) -> list[SubmittedJob]:
        """All jobs that Winnow submitted, the newest first."""
        with self._told():
            found = [info for info in self._client.list_jobs() if _MARK in (info.metadata or {})]
        return [_job(info) for info in sorted(found, key=lambda info: -(info.start_time or 0))]

    def job(self, job_id: str) -> SubmittedJob:
        """One job. Raises CallError when there is none of that id."""
        with self._told(job_id):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> Iterator[str]:
        """The lines that a job wrote so far, without line ends."""
        self.job(job_id)
        with self._told(job_id):
            yield from _own_lines(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, show: Callable[[str], None]) -> SubmittedJob:
        """Show each line that a job writes, from its first on, until it ends; the job then.

        Raises:
            JobError: the connection broke; the job goes on.
        """
        self.job(job_id)
        with self._told(job_id):
            asyncio.run(self._tail(job_id, show))
        deadline = time.monotonic() + _ENDING_TIMEOUT_S
        while not (job := self.job(job_id)).has_ended:
            if time.monotonic() > deadline:
                raise JobError(f"job {job_id} wrote its last line and is {job.status}; see winnow jobs status {job_id}")
            time.sleep(0.3)
        return job

    async def _tail(self, job_id: str, show: Callable[[str], None]) -> None:
        rest = ""
        async for text in self._client.tail_job_logs(job_id):
            *lines, rest = (rest + text).split("\n")
            for line in _own_lines("\n".join(lines)):
                show(line)
        for line in _own_lines(rest):
            show(line)

    def stop(self, job_id: str) -> bool:
        """Ask a job to end. False when it had ended before."""
        self.job(job_id)
        with self._told(job_id):
            return bool(self._client.stop_job(job_id))

    # -- what can be wrong -------------------------------------------------------------------------------------------

    def _check_reachable(self) -> None:
        """One message at once: Ray's client sets no time limit."""
        try:
            parts = urlsplit(self.address if "://" in self.address else f"//{self.address}")
            host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError:
            host, port = None, None
        if not host or not port:
            raise CallError(f"the address {self.address!r} names no host and port; write http://HEAD:8265")
        try:
            socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise CallError(
                f"no Ray cluster answers at {self.address} ({error}); start it, mend the address, or open a way to its "
                "head (`ssh -L 8265:127.0.0.1:8265 HEAD`, `kubectl port-forward`)"
            ) from None

    def _check_versions(self) -> None:
        import platform

        import ray

        # What Ray's state API asks too; its client has no method for the versions.
        answer = self._client._do_request("GET", "/api/v0/cluster_metadata")
        answer.raise_for_status()
        found = answer.json()["data"]
        theirs, ours = found["rayVersion"], ray.__version__
        if theirs != ours:
            raise CallError(
                f"the cluster at {self.address} runs Ray {theirs} and this machine {ours}; install ray=={theirs} here, "
                "or renew the cluster's image"
            )
        theirs, ours = found["pythonVersion"], platform.python_version()
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise CallError(
                f"the cluster at {self.address} runs Python {theirs} and this machine {ours}; use a Python "
                f"{'.'.join(theirs.split('.')[:2])} here, or renew the cluster's image"
            )

    @contextmanager
    def _told(self, job_id: str | None = None) -> Iterator[None]:
        """Ray's errors in our words."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise CallError(
                f"the cluster at {self.address} refuses the token, or wants one; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's"
            ) from None
        except aiohttp.WSServerHandshakeError as error:
            raise JobError(f"the cluster at {self.address} does not show its log: {error.message}") from None
        except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
            raise JobError(
                f"the cluster at {self.address} no longer answers as Ray's: {error}{_again(job_id)}"
            ) from None
        except RuntimeError as error:
            text = str(error)
            if job_id and "404" in text:
                raise CallError(f"job {job_id} is unknown at {self.address}; `winnow jobs list` lists them") from None
            raise JobError(f"the cluster at {self.address}: {text}{_again(job_id)}") from None


def _again(job_id: str | None) -> str:
    return f"; the job goes on: `winnow jobs logs {job_id} --follow`" if job_id else ""


def _job(info: JobDetails) -> SubmittedJob:
    metadata: Mapping[str, str] = info.metadata or {}
    status = str(getattr(info.status, "value", info.status))
    return SubmittedJob(
        job_id=info.submission_id or info.job_id or "",
        status=status,
        command=metadata.get(_MARK, info.entrypoint),
        started_at=_time(info.start_time),
        ended_at=_time(info.end_time),
        exit_code=info.driver_exit_code,
        message=(info.message or "") if status == "FAILED" else "",
    )


def _time(ms: int | None) -> str | None:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds") if ms else None


def _own_lines(text: str) -> Iterator[str]:
    """The lines of a log that the command wrote; Ray puts some before them."""
    return (line for line in text.splitlines() if not _RAYS_LINE.match(line))


def _modules(folder: Path) -> list[str]:
    """The folders that make Winnow importable on the cluster as it is here, version included."""
    metadata = folder / "winnow_vision-0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: winnow-vision\nVersion: {__version__}\n")
    return [*(str(_folder_of(package)) for package in _PACKAGES), str(metadata.parent)]


def _folder_of(package: str) -> Path:
    import importlib

    file: Any = importlib.import_module(package).__file__
    return Path(file).parent


def _check_secrets(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if redact(argument) != argument:
            raise CallError(
                f"{redact(argument)} holds credentials, which everyone who may see the cluster's jobs would see; take "
                "them from the environment of the cluster"
            )


def _check_paths(config: Config, folder: Path) -> list[Path]:
    """Refuse what the cluster cannot see; the checkpoints that must go with the configuration, relative to it.

    Raises:
        CallError: every fault in one message.
    """
    faults = []
    checkpoints = []
    if "://" not in (uri := config.warehouse.uri) and not Path(uri).expanduser().is_absolute():
        faults.append(
            f"  warehouse.uri = {uri!r}: a folder of this machine, which the cluster does not see; give an object "
            "store, or an absolute path that all nodes share"
        )
    for name, storage in config.storage.items():
        file = storage.credentials_file
        if file is not None and not Path(file).expanduser().is_absolute():
            faults.append(
                f"  storage.{name!r}.credentials_file = {file!r}: secrets stay where they are; give the nodes keys by "
                "their environment, or an absolute path that exists on each"
            )
    for name, task in config.tasks.items():
        if "://" in task.model or not task.model.endswith(SUFFIXES) or Path(task.model).expanduser().is_absolute():
            continue
        if (folder / task.model).resolve().is_relative_to(folder.resolve()) and (folder / task.model).is_file():
            checkpoints.append(Path(os.path.normpath(task.model)))
        else:
            faults.append(f"  tasks.{name}.model = {task.model!r}: no file in or below the folder of winnow.toml")
    if faults:
        raise CallError("\n".join(["winnow.toml cannot hold on the cluster:", *faults]))
    return sorted(set(checkpoints))
