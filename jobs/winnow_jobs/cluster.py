"""The only place that starts or joins a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from winnow.errors import CallError, JobError
from winnow_jobs.resources import Node

_CONNECT_TIMEOUT_S = 5.0

_CHATTER = re.compile(rb"\[[\d-]+ [\d:,]+ [A-Z] \d+ \d+\] (\(\w+\) )?\w+\.cc:\d+: ")
"""A line of Ray's C++ part: ``[2026-01-31 09:45:12,345 W 123 123] gcs_client.cc:210: …``."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_cluster(*, num_cpus: int | None = None) -> Iterator[list[Node]]:
    """Join the cluster that ``RAY_ADDRESS`` names, else start Ray on this machine; yields its nodes.

    A cluster that was started here ends with the block; one that ran before is left as it was.

    Args:
        num_cpus: CPUs of a cluster started here; all of the machine's when None.

    Raises:
        CallError: the cluster that ``RAY_ADDRESS`` names cannot be joined.
        JobError: Ray does not start on this machine.
    """
    # Ray's own chatter goes to its session's log files; what matters reaches the user through our errors.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray of ours reports to nobody
    import ray

    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if is_local():
            options |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        else:
            _check_address()
        try:
            with _without_chatter():
                ray.init(**options)
        except ConnectionError as error:
            raise _cannot_join(error) from None
        except Exception as error:
            if type(error) is not Exception:  # what Ray raises when its own processes do not come up
                raise
            raise JobError(
                f"Ray could not be started on this machine: {str(error).splitlines()[0]} See the newest folder in "
                "/tmp/ray; is the machine overloaded, or out of memory or disk? Run the same command again"
            ) from None
    try:
        yield [
            Node(
                num_cpus=node["Resources"].get("CPU", 0.0),
                num_gpus=node["Resources"].get("GPU", 0.0),
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
            )
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]
    finally:
        if ours:
            ray.shutdown()


def quieten_ray(*names: str) -> None:
    """Keep messages of parts of Ray in their log files; what they raise reaches the user through our errors.

    Only handlers of Ray's own making: it also hands its messages to those of others, which have more to tell.

    Args:
        names: of loggers, such as ``ray.data``.
    """
    for name in names:
        for handler in logging.getLogger(name).handlers:
            is_rays = type(handler).__module__.startswith("ray.")
            if is_rays and isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Leave out what Ray's C++ part writes to standard error, such as twenty lines about one wrong token.

    It writes to the file descriptor itself, at first without heeding any level. All else is shown after the block.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        shown = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)
            held.seek(0)
            for line in held:
                if not _CHATTER.match(line):
                    os.write(2, line)


def _exists(path: Path) -> bool:
    return path.exists()


def _cannot_join(error: BaseException) -> CallError:
    """Ray says the reason at the end of a chain of errors and of a long text."""
    text = f"{error} {error.__cause__ or ''}"
    if "auth" in text.lower() and "token" in text.lower():
        reason = "its token is missing or wrong; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
    else:
        reason = f"{str(error).splitlines()[0]}; start it, mend RAY_ADDRESS, or unset it to run on this machine"
    return CallError(f"the Ray cluster at {os.environ.get('RAY_ADDRESS')} cannot be joined: {reason}")


def check_all_nodes_see(folder: Path, nodes: Sequence[Node]) -> None:
    """Refuse a local folder that is not the same on every node of the cluster that was joined.

    Raises:
        CallError: some node does not see what this process writes there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = folder / f"probe-{secrets.token_hex(8)}"
    probe.touch()
    try:
        sees = ray.remote(num_cpus=0)(_exists)
        asked = [
            sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(probe)
            for node in nodes
        ]
        found = ray.get(asked, timeout=120)
    finally:
        probe.unlink()
    blind = [node.address for node, seen in zip(nodes, found, strict=True) if not seen]
    if blind:
        raise CallError(
            f"{folder} is a local folder that {len(blind)} of {len(nodes)} nodes do not see as this "
            f"machine does ({', '.join(blind[:3])}); put it on object storage or on a file system that all nodes share"
        )


def is_local() -> bool:
    """True when jobs run on a cluster of this machine alone, started by winnow itself."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def _check_address() -> None:
    """Refuse an address where nothing listens: Ray would try for more than ten minutes.

    Raises:
        CallError: ``RAY_ADDRESS`` is no address, or nothing answers there.
    """
    if fault := address_fault():
        raise CallError("; ".join(fault))


def address_fault() -> tuple[str, str] | None:
    """What is wrong with ``RAY_ADDRESS`` and how to mend it; None when something answers there."""
    address = os.environ["RAY_ADDRESS"]
    if address == "auto":
        return None
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        return f"RAY_ADDRESS={address!r} names no host and port", "set it to HOST:6379, or unset it"
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        mend = "start it (`ray start --head`), mend RAY_ADDRESS, or unset it to run on this machine"
        return f"no Ray cluster answers at {host}:{port} ({error})", mend
    return None
