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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from winnow import __version__, uris
from winnow.config import SplitsConfig
from winnow.errors import CallError
from winnow.patterns import FIELDS, PathFilter, PathPattern
from winnow.splits import SPLITS
from winnow_connectors.changes import SPOOL, Changes, compare
from winnow_connectors.ledger import Plan, Run, digest_of, new_run_id
from winnow_connectors.manifests import LISTING
from winnow_connectors.sources import Listed, Source, ask_versions, parse_source, read_source
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
class IngestCall:
    """What was asked for; part of the plan.

    Attributes:
        sources: canonical URIs.
        manifest: take every source as a manifest.
        pattern: path pattern that gives label, split, group and metadata, such as ``{split}/{label}/*``.
        task: whose labels come in.
        include, exclude, hidden: which paths are images.
        vanish: mark known images of the sources that are no longer listed.
        stat: ask storage for each object whose version is not told.
        splits: shares of splits and audit reserve.
    """

    sources: tuple[str, ...]
    manifest: bool = False
    pattern: str | None = None
    task: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    hidden: bool = False
    vanish: bool = True
    stat: bool = False
    splits: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = dict(data)
        return cls(**values | {name: tuple(values[name]) for name in ("sources", "include", "exclude")})


@dataclass(frozen=True)
class IngestResult:
    """What an ingest did. ``num_listed`` = added + changed + unchanged + all skipped.

    Attributes:
        run_id: None when there was nothing new, so that nothing was written.
        num_listed: objects that the sources listed.
        num_added, num_changed, num_vanished, num_unchanged: images.
        num_labels: imported.
        num_unmatched: images whose path does not match the pattern; they came in without what it would have given.
        skipped: listed objects that are no images, by reason; ``listed_twice`` counts further rows of the same uri.
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
        task: whose labels come in; the only task of the configuration by default.
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
        spool = _Spool(workspace, call, scratch)
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
                sources=spool.source_names,
                vanish=call.vanish,
                task=tally.task,
                classes=workspace.config.task(tally.task).classes if tally.task else None,
                shares=SplitsConfig(**call.splits),
            )
            tally.seconds["compare"] = time.monotonic() - before
            if changes.num_splits_kept:
                logger.warning(
                    "%s images keep the split that they have; the listing gives another", f"{changes.num_splits_kept:,}"
                )
            is_own = run is None
            if run is None:
                if changes.is_empty:
                    return tally.result(None, changes, started, "nothing new")
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


class _Spool:
    """The listing of all sources, filtered and named by the pattern, in one local file."""

    def __init__(self, workspace: Workspace, call: IngestCall, scratch: Path) -> None:
        self._stores = workspace.stores
        self._scratch = scratch
        self._call = call
        self._sources = [parse_source(uri, manifest=call.manifest) for uri in call.sources]
        self.source_names = [source.name for source in self._sources]
        self._pattern = PathPattern(call.pattern) if call.pattern is not None else None
        self._config = workspace.config
        if call.task is not None:
            self._config.task(call.task)
        elif self._pattern is not None and "label" in self._pattern.names:
            self._only_task()
        self.path = scratch / "listing.parquet"

    def fill(self) -> _Tally:
        """List everything.

        Raises:
            CallError: a source is missing or malformed, a split is unknown, or labels belong to no task.
        """
        tally = _Tally()
        started = time.monotonic()
        with pq.ParquetWriter(self.path, SPOOL) as writer, Progress("list") as progress:
            for source in self._sources:
                before = tally.num_listed
                paths = PathFilter(
                    self._call.include, self._call.exclude, hidden=self._call.hidden, whole_path=not source.is_manifest
                )
                for listed in read_source(source, self._stores, self._scratch):
                    rows = self._prepare(listed, source, paths, tally)
                    if rows.num_rows:
                        writer.write_batch(rows)
                    progress.update(tally.num_listed)
                if tally.num_listed == before:
                    logger.warning("%s lists no object; is the name right?", uris.redact(source.uri))
        if tally.num_with_label:
            tally.task = self._call.task or self._only_task()
        tally.seconds["list"] = time.monotonic() - started
        if tally.num_unversioned:
            logger.warning(
                "%s objects have no version: their changes will not be noticed; give an etag column, or --stat",
                f"{tally.num_unversioned:,}",
            )
        logger.info("listed %s objects in %.1f s", f"{tally.num_listed:,}", tally.seconds["list"])
        return tally

    def _prepare(self, listed: Listed, source: Source, paths: PathFilter, tally: _Tally) -> pa.RecordBatch:
        rows = listed.rows
        tally.num_listed += rows.num_rows
        if source.is_manifest or rows.column("path")[0].as_py() != uris.name_of(source.uri) or rows.num_rows > 1:
            kept, skipped = paths.judge(rows.column("path"))
            tally.skipped.update(skipped)
            rows = rows.filter(kept) if skipped else rows
        if source.is_manifest:
            rows, num_missing, _ = ask_versions(rows, self._stores, everywhere=self._call.stat)
            tally.skipped.update({"missing": num_missing} if num_missing else {})
        found = {name: rows.column(name) for name in LISTING.names}
        if self._pattern is not None:
            self._apply_pattern(found, tally)
        _check_splits(found["split"], found["path"], found["row"], listed.origin)
        tally.num_with_label += rows.num_rows - found["label"].null_count
        tally.num_unversioned += found["version"].null_count
        found["number"] = pa.array(np.arange(tally.num_kept, tally.num_kept + rows.num_rows, dtype=np.int64))
        tally.num_kept += rows.num_rows
        found["source"] = pa.repeat(pa.scalar(source.name), rows.num_rows)
        return pa.RecordBatch.from_arrays([found[name] for name in SPOOL.names], schema=SPOOL)

    def _apply_pattern(self, found: dict[str, pa.Array], tally: _Tally) -> None:
        """What a manifest's columns say wins over what the path says."""
        assert self._pattern is not None
        matched, named = self._pattern.extract(found["path"])
        tally.num_unmatched += len(matched) - (pc.sum(matched).as_py() or 0)
        for name in FIELDS:
            if name in named:
                found[name] = pc.coalesce(found[name], named.pop(name))
        if named:
            found["metadata"] = _merged(found["metadata"], named)

    def _only_task(self) -> str:
        names = sorted(name for name, task in self._config.tasks.items() if task.kind == "classification")
        if len(names) == 1:
            return names[0]
        if not names:
            raise CallError("labels come in, but no task is configured; add a [tasks.NAME] section to winnow.toml")
        raise CallError(f"labels come in, but for which task? Name it with --task: {', '.join(names)}")


@dataclass
class _Tally:
    """Counts while listing, and the result made from them."""

    num_listed: int = 0
    num_kept: int = 0
    num_unmatched: int = 0
    num_with_label: int = 0
    num_unversioned: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    task: str | None = None

    def result(self, run_id: str | None, changes: Changes, started: float, verdict: str = "") -> IngestResult:
        total = time.monotonic() - started
        skipped = {**self.skipped, **({"listed_twice": changes.num_twice} if changes.num_twice else {})}
        parts = {
            "added": changes.num_added,
            "changed": changes.num_changed,
            "vanished": changes.num_vanished,
            "unchanged": changes.num_unchanged,
            "labels imported": changes.num_labels,
            "skipped": sum(skipped.values()),
        }
        counted = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count) or "no object listed"
        return IngestResult(
            run_id=run_id,
            num_listed=self.num_listed,
            num_added=changes.num_added,
            num_changed=changes.num_changed,
            num_vanished=changes.num_vanished,
            num_unchanged=changes.num_unchanged,
            num_labels=changes.num_labels,
            num_unmatched=self.num_unmatched,
            skipped=dict(sorted(skipped.items())),
            seconds={name: round(value, 3) for name, value in {**self.seconds, "total": total}.items()},
            images_per_s=round(self.num_listed / total, 1) if total > 0 else 0.0,
            verdict=f"{verdict}: {counted}" if verdict else counted,
        )


def _publish(
    workspace: Workspace, run: Run, changes: Changes, tally: _Tally, started: float, *, is_own: bool
) -> IngestResult | None:
    """Write the files, decide, commit. None when the run was abandoned meanwhile: then the changes count anew."""
    before = time.monotonic()
    num_rows = changes.num_added + 2 * changes.num_changed + changes.num_vanished + changes.num_labels
    fragments = []
    try:
        with Progress("write", num_rows) as progress:
            num_written = 0
            for table, chunks in (
                ("images", changes.images(run.run_id, chunk_rows=FRAGMENT_ROWS)),
                ("labels", changes.labels(run.run_id, tally.task, chunk_rows=FRAGMENT_ROWS)),
            ):
                for rows in chunks:
                    fragments.append(run.stage(table, rows))
                    num_written += rows.num_rows
                    progress.update(num_written)
        tally.seconds["write"] = time.monotonic() - before
        result = tally.result(run.run_id, changes, started)
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
        for name in ("listed", "added", "changed", "vanished", "unchanged", "labels", "unmatched")
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
        for name in ("listed", "added", "changed", "vanished", "unchanged", "labels", "unmatched")
    }
    return {
        "counts": counts | {f"skipped.{reason}": count for reason, count in result.skipped.items()},
        "seconds": dict(result.seconds),
        "images_per_s": result.images_per_s,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "verdict": result.verdict,
    }


def _check_splits(splits: pa.Array, paths: pa.Array, rows: pa.Array, origin: str) -> None:
    """Refuse unknown splits, naming the first."""
    wrong = pc.and_kleene(pc.is_valid(splits), pc.invert(pc.is_in(splits, pa.array(SPLITS))))
    first = pc.index(wrong, True).as_py()
    if first >= 0:
        raise CallError(
            f"split {splits[first].as_py()!r} is unknown; choose {', '.join(SPLITS[:-1])} or {SPLITS[-1]} "
            f"(row {rows[first].as_py():,} of {uris.redact(origin)}: {paths[first].as_py()!r})"
        )


def _merged(metadata: pa.Array, named: Mapping[str, pa.Array]) -> pa.Array:
    """Metadata with further entries; what is there already wins."""
    kind = metadata.type
    values = {name: column.to_pylist() for name, column in named.items()}
    merged = []
    for index, entries in enumerate(metadata.to_pylist()):
        found = {name: column[index] for name, column in values.items() if column[index] is not None} | dict(
            entries or ()
        )
        merged.append(list(found.items()) or None)
    return pa.array(merged, kind)
