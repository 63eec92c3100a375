"""What a run does, as metrics of Ray, for Prometheus and whatever draws its graphs. docs/operations.md lists them.

The driver records them from the tally of its workers: one process, twice a second, whatever the number of images. Where
no agent of Ray collects them (a Ray that winnow itself started has none), they go nowhere. They count work: what a
killed worker did and another did again counts twice. The tables count results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge

if TYPE_CHECKING:
    from winnow_jobs.pipeline import Tally

IMAGES = "winnow_images"
"""Counter: images that passed a ``stage``: ``read`` (fetched and decoded, or failed), ``answered``, ``written``."""

ANSWERS = "winnow_answers"
"""Counter: rows of ``outcomes`` that were written, by ``task`` and ``status``, ``answered`` or ``failed``."""

FAILURES = "winnow_failures"
"""Counter: failed rows of ``outcomes`` that were written, by ``kind`` of failure."""

STAGE_SECONDS = "winnow_stage_seconds"
"""Counter: seconds of work of the images that were written, by ``stage``, summed over all workers."""

QUEUE_LENGTH = "winnow_queue_length"
"""Gauge: images of the run that wait for their answer."""


class RunMetrics:
    """Metrics of one pass over a run's images.

    Args:
        job: such as ``predict``; a tag of every metric.
        num_images: images that this pass asks.
    """

    def __init__(self, job: str, num_images: int) -> None:
        self._job = job
        self._num_images = num_images
        self._seen: dict[tuple[str, tuple[str, ...]], float] = {}
        self._images = Counter(IMAGES, "Images that passed a stage.", ("job", "stage"))
        self._answers = Counter(ANSWERS, "Rows of outcomes that were written.", ("job", "task", "status"))
        self._failures = Counter(FAILURES, "Failed rows of outcomes that were written.", ("job", "kind"))
        self._seconds = Counter(STAGE_SECONDS, "Seconds of work of written images.", ("job", "stage"))
        self._queue = Gauge(QUEUE_LENGTH, "Images that wait for their answer.", ("job",))

    def update(self, tally: Tally) -> None:
        """Record what the workers did since the last call."""
        for stage in ("read", "answered", "written"):
            self._count(self._images, getattr(tally, stage), stage=stage)
        for key, count in tally.counts.items():
            status, _, name = key.partition(".")
            if status == "error":
                self._count(self._failures, count, kind=name)
            else:
                self._count(self._answers, count, task=name, status=status)
        for stage, seconds in tally.seconds.items():
            self._count(self._seconds, seconds, stage=stage)
        self._queue.set(max(0, self._num_images - tally.answered), {"job": self._job})

    def close(self) -> None:
        """Nothing waits any more."""
        self._queue.set(0, {"job": self._job})

    def _count(self, counter: Counter, total: float, **tags: str) -> None:
        """Raise a counter to the total of this pass."""
        series = (counter.info["name"], tuple(tags.values()))
        if (more := total - self._seen.get(series, 0.0)) > 0:
            self._seen[series] = total
            counter.inc(more, {"job": self._job, **tags})
