"""What is wrong here, and how to mend it: every check runs whatever the others find, each within a limit of time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from winnow.config import Config, load_config
from winnow.errors import ConfigError
from winnow.uris import redact
from winnow_jobs.checks import Check, fail, label_studio, machine, ok, storage, warn

LIMIT_S = 10.0
"""Longest time for one check."""

IMPORT_LIMIT_S = 60.0
"""The same where torch has to be imported, which is slow from a cold disk."""

_CONFIG = "winnow.toml"


def diagnose(config_path: Path | None) -> list[Check]:
    """Check the machine, the configuration, the storage and the services.

    Changes nothing for good: one object is written to the warehouse and deleted. The checks run side by side, so all of
    them take as long as the slowest.

    Args:
        config_path: the winnow.toml; None when there is none, and then the checks that need it are left out.
    """
    base_dir = (config_path.parent if config_path is not None else Path()).absolute()
    config, read = _read_config(config_path)
    probes = [_Probe(name, run, limit_s) for name, run, limit_s in _plan(config, base_dir)]
    checks = [probe.result() for probe in probes]
    num_machine = sum(probe.is_machine for probe in probes)
    return [*checks[:num_machine], read, *checks[num_machine:]]


class _Probe:
    """One check in a thread of its own; a check that hangs is left behind and ends with the process."""

    def __init__(self, name: str, run: Callable[[], Check], limit_s: float) -> None:
        self._name = name
        self._run = run
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._found: Check | None = None
        self._thread = threading.Thread(target=self._work, name=f"check of {name}", daemon=True)
        self._thread.start()

    @property
    def is_machine(self) -> bool:
        """True for what needs no configuration."""
        return self._name in _MACHINE

    def _work(self) -> None:
        try:
            self._found = self._run()
        except Exception as error:  # noqa: BLE001  a check that breaks is a finding, and the others go on
            self._found = fail(
                self._name, redact(f"this check broke: {type(error).__name__}: {error}"), "report it, with this line"
            )

    def result(self) -> Check:
        """What was found; a failure when the time is up."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return self._found or fail(
            self._name,
            f"no answer within {self._limit_s:g} s",
            "look at the network or disk behind it; jobs would wait there too",
        )


_MACHINE: dict[str, tuple[Callable[[], Check], float]] = {
    "python": (machine.check_python, LIMIT_S),
    "packages": (machine.check_packages, LIMIT_S),
    "torch": (machine.check_torch, IMPORT_LIMIT_S),
    "ray": (machine.check_ray, LIMIT_S),
    "disk of ray": (machine.check_ray_disk, LIMIT_S),
    "memory": (machine.check_memory, LIMIT_S),
    "weights cache": (machine.check_weights_cache, LIMIT_S),
}


def _plan(config: Config | None, base_dir: Path) -> list[tuple[str, Callable[[], Check], float]]:
    """Name, function and limit in seconds of every check that can be made, those of the machine first."""
    plan = [(name, run, limit_s) for name, (run, limit_s) in _MACHINE.items()]
    if config is not None:
        for task, task_config in config.tasks.items():
            check = partial(machine.check_weights, task, task_config, base_dir)
            plan.append((f"weights of {task}", check, IMPORT_LIMIT_S))
        plan.append(("warehouse", partial(storage.check_warehouse, config, base_dir), LIMIT_S))
        if "://" not in config.warehouse.uri or config.warehouse.uri.startswith("file:"):
            plan.append(("disk of warehouse", partial(storage.check_warehouse_disk, config, base_dir), LIMIT_S))
        for prefix in config.storage:
            check = partial(storage.check_section, prefix, config, base_dir)
            plan.append((f'storage "{prefix}"', check, LIMIT_S))
    plan.append(("local s3", partial(storage.check_local_s3, config, base_dir), LIMIT_S))
    plan.append(("label studio", label_studio.check_label_studio, LIMIT_S))
    return plan


def _read_config(config_path: Path | None) -> tuple[Config | None, Check]:
    if config_path is None:
        return None, warn(_CONFIG, "none here; its tasks and storage are not checked", "winnow init")
    try:
        config = load_config(config_path)
    except ConfigError as error:
        return None, fail(_CONFIG, error.message, "mend it and run this again; its tasks and storage were not checked")
    if not config.tasks:
        return config, warn(_CONFIG, f"{config_path} is valid and has no task", "add a [tasks.NAME] section")
    return config, ok(_CONFIG, f"{config_path} is valid; tasks: {', '.join(config.tasks)}")
