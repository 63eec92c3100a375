"""The only place that starts or joins a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from winnow_jobs.resources import Node

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_cluster(*, num_cpus: int | None = None) -> Iterator[list[Node]]:
    """Join the cluster that ``RAY_ADDRESS`` names, else start Ray on this machine; yields its nodes.

    A cluster that was started here ends with the block; one that ran before is left as it was.

    Args:
        num_cpus: CPUs of a cluster started here; all of the machine's when None.
    """
    # Ray's own chatter goes to its session's log files; what matters reaches the user through our errors.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not os.environ.get("RAY_ADDRESS"):
            options |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        ray.init(**options)
    try:
        yield [
            Node(num_cpus=node["Resources"].get("CPU", 0.0), num_gpus=node["Resources"].get("GPU", 0.0))
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]
    finally:
        if ours:
            ray.shutdown()


def is_local() -> bool:
    """True when jobs run on a cluster of this machine alone, started by winnow itself."""
    return not os.environ.get("RAY_ADDRESS")
