"""Progress for people: a bar on a terminal, plain log lines elsewhere. Always on standard error."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0


class Progress:
    """Images done, rate, time left and failures.

    Args:
        description: what is going on, such as ``predict``.
        total: images expected, or None when unknown.
    """

    def __init__(self, description: str, total: int | None = None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.failed = 0
        self.note = ""
        self._first_done: int | None = None
        self._started = time.monotonic()
        self._logged = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, line="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, failed: int = 0, note: str = "") -> None:
        """Say how many images are done so far, how many of them failed, and what else is worth showing."""
        self.note = note
        if self._first_done is None and done:
            # The rate counts from the first answer on, so that start-up does not spoil the time left.
            self._first_done, self._started = done, time.monotonic()
        self.done, self.failed = done, failed
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, line=self.line())
        elif time.monotonic() - self._logged >= _LOG_INTERVAL_S:
            self._logged = time.monotonic()
            logger.info("%s: %s", self.description, self.line())

    def line(self) -> str:
        """Such as ``1,200 of 20,000  84.1/s  3:43 left  2 failed``."""
        parts = [f"{self.done:,} of {self.total:,}" if self.total is not None else f"{self.done:,}"]
        elapsed = time.monotonic() - self._started
        rate = (self.done - (self._first_done or 0)) / elapsed if elapsed > 0 else 0.0
        if rate > 0:
            parts.append(f"{rate:,.1f}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{_clock((self.total - self.done) / rate)} left")
        elif not self.done:
            parts.append("starting")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.note:
            parts.append(self.note)
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
