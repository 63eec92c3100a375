"""``winnow ingest``: make objects known as images, without reading any.

List (folders, prefixes, manifests), compare with what is known, claim, write, publish once. Runs in the calling
process; memory stays flat whatever the number of objects.

Nothing is decided before the files of all tables are written, so a run that was cut short is simply done again: the
same call joins it, lists anew and publishes under its id. Two calls at once compete for the one decision.
"""

from __future__ import annotations

import dataclasses
import logging
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow import __version__
from winnow.config import SplitsConfig
from winnow.errors import CallError
from winnow_connectors.changes import Changes, compare
from winnow_connectors.ledger import Plan, Run, digest_of, new_run_id
from winnow_connectors.sources import parse_source
from winnow_jobs.listing import IngestCall, Spool, Tally
from winnow_jobs.progress import Progress

if TYPE_CHECKING:
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

WORK = "ingest"
"""There is one open ingest at a time."""

FRAGMENT_ROWS = 250_000
"""Rows per written file, at most."""

_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class IngestResult:
    """What an ingest did. ``num_listed`` = added + changed + unchanged + all skipped.

    Attributes:
        run_id: None when there was nothing new, so that nothing was written.
        num_listed: objects that the sources listed.
        num_added, num_changed, num_vanished, num_unchanged: images.
        num_labels, num_masks: imported.
        num_unmatched: images whose path does not match the pattern; they came in without what it would have given.
        skipped: listed objects that are no images, by reason; ``listed_twice`` counts further rows of the same uri,
            ``unpublished_copy`` augmented copies of a run that is not finished.
        seconds: by stage.
        images_per_s: listed objects per second over all.
        verdict: the outcome in one sentence.
    """

    run_id: str | None
    num_listed: int
    num_added: int
    num_changed: int
    num_vanished: int
    num_unchanged: int
    num_labels: int
    num_masks: int
    num_unmatched: int
    skipped: Mapping[str, int]
    seconds: Mapping[str, float]
    images_per_s: float
    verdict: str


def ingest(
    workspace: Workspace,
    sources: Sequence[str],
    *,
    manifest: bool = False,
    pattern: str | None = None,
    task: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    vanish: bool = True,
    stat: bool = False,
) -> IngestResult:
    """Make the objects under the sources known: only what is new, changed or gone is written.

    Args:
        workspace: configuration and warehouse.
        sources: folders, files, prefixes or single objects as path or URI; manifests (``winnow_connectors.manifests``).
        manifest: take every source as a manifest, whatever its name; a folder or prefix then holds manifests.
        pattern: path pattern relative to the source, such as ``{split}/{label}/*``; ``label``, ``split`` and ``group``
            have their meaning, every other name becomes metadata.
        task: whose labels or masks come in; the only task of that kind in the configuration by default.
        include: globs; the configuration's by default.
        exclude: globs beside the configuration's.
        vanish: mark images of the same sources that are no longer listed as vanished.
        stat: ask storage (one request each) for objects of manifests without an ETag.

    Raises:
        CallError: the call cannot be carried out; nothing was written.
        OpenRunError: another ingest is open with other options.
        StorageError: a source or the warehouse cannot be reached.
    """
    config = workspace.config
    if not sources:
        raise CallError("nothing to ingest; give a folder, a manifest or a URI such as s3://bucket/folder")
    parsed = {source.name: source.uri for source in (parse_source(text, manifest=manifest) for text in sources)}
    call = IngestCall(
        sources=tuple(parsed.values()),
        manifest=manifest,
        pattern=pattern,
        task=task,
        include=tuple(include or config.ingest.include),
        exclude=(*config.ingest.exclude, *(exclude or ())),
        hidden=config.ingest.hidden,
        vanish=vanish,
        stat=stat,
        splits=config.splits.model_dump(),
    )
    return carry_out(workspace, call)


def resume(workspace: Workspace, run: Run) -> IngestResult:
    """Finish an open ingest with the options that it was started with."""
    return carry_out(workspace, IngestCall.from_dict(run.plan.config))


def carry_out(workspace: Workspace, call: IngestCall) -> IngestResult:
    """List, compare, publish. Raises what ``ingest`` raises."""
    started = time.monotonic()
    workspace.warehouse.check()
    ledger = workspace.warehouse.ledger
    digest = digest_of({"job": "ingest", **call.to_dict()})
    ledger.join([WORK], digest)  # refuses before anything is listed when a different ingest is open
    with tempfile.TemporaryDirectory(prefix="winnow-ingest-") as name:
        scratch = Path(name)
        spool = Spool(workspace, call, scratch)
        listed_at = datetime.now(UTC)
        tally = spool.fill()
        for attempt in range(_MAX_ATTEMPTS):
            # In this order: no ingest is open and none is published unseen between the numbers and the comparison.
            numbers = ledger.next_numbers([WORK])
            run = ledger.join([WORK], digest)
            before = time.monotonic()
            folder = scratch / f"attempt-{attempt}"
            folder.mkdir()
            changes = compare(
                spool.path,
                workspace.warehouse.tables,
                folder,
                listed_at=listed_at,
                sources=spool.source_names,
                vanish=call.vanish,
                task=tally.task,
                classes=workspace.config.task(tally.task).classes if tally.task else None,
                mask_task=tally.mask_task,
                shares=SplitsConfig(**call.splits),
            )
            tally.seconds["compare"] = time.monotonic() - before
            if changes.num_splits_kept:
                logger.warning(
                    "%s images keep the split that they have; the listing gives another", f"{changes.num_splits_kept:,}"
                )
            if changes.num_vanished and not tally.num_listed:
                logger.warning(
                    "nothing is listed there any more, so all %s images of it count as vanished; was it not "
                    "mounted? The next ingest that lists them brings them back with their answers",
                    f"{changes.num_vanished:,}",
                )
            is_own = run is None
            if run is None:
                if changes.is_empty:
                    return _result(tally, None, changes, started, "nothing new")
                run = ledger.begin(
                    Plan(
                        run_id=new_run_id("ingest"),
                        job="ingest",
                        claims=numbers,
                        digest=digest,
                        config=call.to_dict(),
                        num_planned=0,
                        started_at=datetime.now(UTC).isoformat(),
                        code_version=__version__,
                    )
                )
                if run is None:
                    continue  # another run claimed the same number; look again
            result = _publish(workspace, run, changes, tally, started, is_own=is_own)
            if result is not None:
                return result
    raise CallError(f"other ingests were faster {_MAX_ATTEMPTS} times; run the command again when they are done")


def _result(tally: Tally, run_id: str | None, changes: Changes, started: float, verdict: str = "") -> IngestResult:
    """What was done, in numbers and in words."""
    total = time.monotonic() - started
    further = {"listed_twice": changes.num_twice, "unpublished_copy": changes.num_unpublished}
    skipped = {**tally.skipped, **{reason: count for reason, count in further.items() if count}}
    parts = {
        "added": changes.num_added,
        "changed": changes.num_changed,
        "vanished": changes.num_vanished,
        "unchanged": changes.num_unchanged,
        "labels imported": changes.num_labels,
        "masks imported": changes.num_masks,
        "skipped": sum(skipped.values()),
    }
    counted = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count) or "no object listed"
    return IngestResult(
        run_id=run_id,
        num_listed=tally.num_listed,
        num_added=changes.num_added,
        num_changed=changes.num_changed,
        num_vanished=changes.num_vanished,
        num_unchanged=changes.num_unchanged,
        num_labels=changes.num_labels,
        num_masks=changes.num_masks,
        num_unmatched=tally.num_unmatched,
        skipped=dict(sorted(skipped.items())),
        seconds={name: round(value, 3) for name, value in {**tally.seconds, "total": total}.items()},
        images_per_s=round(tally.num_listed / total, 1) if total > 0 else 0.0,
        verdict=f"{verdict}: {counted}" if verdict else counted,
    )


def _publish(
    workspace: Workspace, run: Run, changes: Changes, tally: Tally, started: float, *, is_own: bool
) -> IngestResult | None:
    """Write the files, decide, commit. None when the run was abandoned meanwhile: then the changes count anew."""
    before = time.monotonic()
    num_rows = changes.num_added + 2 * changes.num_changed + changes.num_vanished
    num_rows += changes.num_labels + changes.num_masks
    fragments = []
    try:
        with Progress("write", num_rows) as progress:
            num_written = 0
            for table, chunks in (
                ("images", changes.images(run.run_id, chunk_rows=FRAGMENT_ROWS)),
                ("labels", changes.labels(run.run_id, tally.task, tally.mask_task, chunk_rows=FRAGMENT_ROWS)),
            ):
                for rows in chunks:
                    fragments.append(run.stage(table, rows))
                    num_written += rows.num_rows
                    progress.update(num_written)
        tally.seconds["write"] = time.monotonic() - before
        result = _result(tally, run.run_id, changes, started)
        is_mine = run.decide("finished", fragments, _summary(result))
    except KeyboardInterrupt:
        if is_own:  # or else the next ingest with other options would be refused; nothing of this run is of use to it
            workspace.warehouse.ledger.abandon(run, "stopped with Ctrl-C")
        raise
    before = time.monotonic()
    outcome = run.close()
    now = time.monotonic()
    seconds = {**tally.seconds, "publish": now - before, "total": now - started}
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    if is_mine:
        logger.info("run %s: %s in %.1f s", run.run_id, result.verdict, seconds["total"])
        return dataclasses.replace(result, seconds=seconds)
    if outcome["status"] != "finished":
        return None
    return _published_by_another(run.run_id, outcome["summary"], seconds)


def _published_by_another(run_id: str, summary: Mapping[str, Any], seconds: Mapping[str, float]) -> IngestResult:
    counts = dict(summary["counts"])
    named = {
        name: counts.get(name, 0)
        for name in ("listed", "added", "changed", "vanished", "unchanged", "labels", "masks", "unmatched")
    }
    return IngestResult(
        run_id=run_id,
        **{f"num_{name}": count for name, count in named.items()},
        skipped={name.removeprefix("skipped."): count for name, count in counts.items() if name.startswith("skipped.")},
        seconds=seconds,
        images_per_s=summary["images_per_s"],
        verdict=f"the same work was published by another driver: {summary['verdict']}",
    )


def _summary(result: IngestResult) -> dict[str, Any]:
    """Columns of the row in ``runs``."""
    counts = {
        name: getattr(result, f"num_{name}")
        for name in ("listed", "added", "changed", "vanished", "unchanged", "labels", "masks", "unmatched")
    }
    return {
        "counts": counts | {f"skipped.{reason}": count for reason, count in result.skipped.items()},
        "seconds": dict(result.seconds),
        "images_per_s": result.images_per_s,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "verdict": result.verdict,
    }
