"""Servers that outlive the command that started them: their process, their private files."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class ServiceStatus:
    """One service as it is now.

    Attributes:
        name: ``s3`` or ``label-studio``.
        running: its process lives and answers requests made with its keys.
        address: where it answers, such as ``http://127.0.0.1:20333``; None before the first start.
        pid: its process, also when it lives and does not answer; None when there is none.
        data: folder that holds its data.
        log: folder that holds its log.
        credentials_file: of ``s3`` in the style of AWS, ``profile`` names the section; of ``label-studio`` environment
            variables as lines NAME=VALUE.
        detail: the state in words.
        profile: section of the credentials file (``s3``).
        region: region that its addresses are signed for (``s3``).
        user: who can log in in the browser (``label-studio``); the password stands in the credentials file.
    """

    name: str
    running: bool
    address: str | None
    pid: int | None
    data: Path
    log: Path
    credentials_file: Path
    detail: str
    profile: str | None = None
    region: str | None = None
    user: str | None = None

    @property
    def config_section(self) -> str | None:
        """The section of winnow.toml that makes s3:// URLs go to this server; None for others, and before the start."""
        if self.address is None or self.profile is None:
            return None
        return "\n".join(
            [
                '[storage."s3://"]',
                f"endpoint = {json.dumps(self.address)}",
                f'region = "{self.region}"',
                f'profile = "{self.profile}"',
                f"credentials_file = {json.dumps(str(self.credentials_file))}",
                "",
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON; no secret in it."""
        return {
            "name": self.name,
            "running": self.running,
            "address": self.address,
            "pid": self.pid,
            "data": str(self.data),
            "log": str(self.log),
            "credentials_file": str(self.credentials_file),
            "profile": self.profile,
            "user": self.user,
            "detail": self.detail,
            "config": self.config_section,
        }


def spawn(arguments: Sequence[str], *, environment: dict[str, str], output: Path) -> int:
    """Start a program in a session of its own, so that it outlives this process and its terminal; its process id.

    Args:
        arguments: the program's absolute path, then what it is told.
        environment: all of its environment.
        output: file that takes what it writes to its terminal, emptied first.
    """
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        return os.posix_spawn(
            arguments[0],
            list(arguments),
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, file, 1),
                (os.POSIX_SPAWN_DUP2, file, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(file)


def command_line(pid: int) -> list[str]:
    """What a living process of this user was started with; empty for any other."""
    try:
        process = psutil.Process(pid)
        if process.uids().real != os.getuid():
            return []
        if process.status() == psutil.STATUS_ZOMBIE:
            _reap(pid)
            return []
        return list(process.cmdline())
    except psutil.Error:
        return []


def start_mark(pid: int) -> str | None:
    """What tells this process from a later one with the same id; None when it is gone.

    On Linux the boot and the clock ticks since (proc(5), ``stat`` field 22), which no change of the clock moves.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
        return f"{boot}:{stat.rpartition(')')[2].split()[19]}"
    except ProcessLookupError:
        return None
    except FileNotFoundError:  # gone, or no Linux
        try:
            return f"{psutil.Process(pid).create_time():.2f}"
        except psutil.Error:
            return None


def _reap(pid: int) -> None:
    """Let go of a dead child, when it was ours."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def is_alive(pid: int) -> bool:
    """True while the process runs; a dead child that nobody asked about does not count."""
    _reap(pid)
    try:
        process = psutil.Process(pid)
        # The threads of a killed process may outlive its first one for a moment, and hold its ports.
        return bool(process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.Error:
        return False


def wait_until_gone(pid: int, timeout_s: float) -> bool:
    """True as soon as the process has ended; False when it has not within the time."""
    deadline = time.monotonic() + timeout_s
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically; nobody else may read it at any moment."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What a state file holds; empty when it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
