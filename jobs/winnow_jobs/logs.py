"""The log of a command: lines for people, or one JSON object per line for machines.

::

    {"time": "2026-01-31T09:45:12.345Z", "level": "INFO", "logger": "winnow_jobs.predict", "job": "predict",
     "run_id": "20260131-094512-predict-1f0c9a", "message": "predict: 1,200 of 20,000  84.1/s  3:43 left"}

``run_id`` and ``job`` are null before the command's run has begun. ``error`` follows where there is a traceback.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

FORMATS = ("text", "json")

PACKAGES = ("winnow", "winnow_connectors", "winnow_jobs")


logger = logging.getLogger(__name__)


class RunStamp(logging.Filter):
    """Gives every record the run at work: that of the last record with the attributes ``run_id`` and ``job``."""

    def __init__(self) -> None:
        super().__init__()
        self.run_id: str | None = None
        self.job: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        self.run_id, self.job = getattr(record, "run_id", self.run_id), getattr(record, "job", self.job)
        record.run_id, record.job = self.run_id, self.job
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {
            "time": at,
            "level": record.levelname,
            "logger": record.name,
            "job": getattr(record, "job", None),
            "run_id": getattr(record, "run_id", None),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(format: str, verbose: int = 0) -> None:
    """Send the log to standard error.

    Args:
        format: ``text`` or ``json``.
        verbose: 0 logs every phase, on a terminal (which shows progress instead) only warnings; 1 every phase; 2 all.
    """
    if format == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.addFilter(RunStamp())
        handler.setFormatter(JsonFormatter())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        quiet = logging.INFO  # the line that names the run is one of these
    else:
        logging.basicConfig(
            level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        quiet = logging.WARNING if sys.stderr.isatty() else logging.INFO
    for name in PACKAGES:
        logging.getLogger(name).setLevel([quiet, logging.INFO, logging.DEBUG][min(verbose, 2)])


def say_last(message: str, *, lead: str = "") -> None:
    """Why the command ends: in a log of JSON as one more of its lines, else as a sentence for people."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        logger.error(message)
    else:
        sys.stderr.write(f"{lead}winnow: {message}\n")
