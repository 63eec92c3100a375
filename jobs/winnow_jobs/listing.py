"""What an ingest is asked for, and its listing: all sources in one local file, filtered and named."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from winnow import uris
from winnow.config import Kind
from winnow.errors import CallError
from winnow.patterns import FIELDS, PathFilter, PathPattern
from winnow.splits import SPLITS
from winnow_connectors.changes import SPOOL
from winnow_connectors.manifests import LISTING
from winnow_connectors.sources import Listed, Source, ask_versions, parse_source, read_source
from winnow_jobs.progress import Progress

if TYPE_CHECKING:
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestCall:
    """What was asked for; part of the plan.

    Attributes:
        sources: canonical URIs.
        manifest: take every source as a manifest.
        pattern: path pattern that gives label, split, group and metadata, such as ``{split}/{label}/*``.
        task: whose labels come in, or whose masks.
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


@dataclass
class Tally:
    """What listing came to.

    Attributes:
        num_listed, num_kept: objects listed; of these not skipped.
        num_unmatched: of these with a path that the pattern does not match.
        num_with_label, num_with_mask, num_unversioned: of these with a label; with a mask; without a version.
        skipped: counts by reason.
        seconds: by stage.
        task: whose labels come in; None when there are none.
        mask_task: whose masks come in; None when there are none.
    """

    num_listed: int = 0
    num_kept: int = 0
    num_unmatched: int = 0
    num_with_label: int = 0
    num_with_mask: int = 0
    num_unversioned: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    task: str | None = None
    mask_task: str | None = None


class Spool:
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
            self._task_of("classification")
        self.path = scratch / "listing.parquet"

    def fill(self) -> Tally:
        """List everything.

        Raises:
            CallError: a source is missing or malformed, a split is unknown, or labels belong to no task.
        """
        tally = Tally()
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
        self._choose_tasks(tally)
        tally.seconds["list"] = time.monotonic() - started
        if tally.num_unversioned:
            logger.warning(
                "%s objects have no version: their changes will not be noticed; give an etag column, or --stat",
                f"{tally.num_unversioned:,}",
            )
        logger.info("listed %s objects in %.1f s", f"{tally.num_listed:,}", tally.seconds["list"])
        return tally

    def _prepare(self, listed: Listed, source: Source, paths: PathFilter, tally: Tally) -> pa.RecordBatch:
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
        tally.num_with_mask += rows.num_rows - found["mask"].null_count
        tally.num_unversioned += found["version"].null_count
        found["number"] = pa.array(np.arange(tally.num_kept, tally.num_kept + rows.num_rows, dtype=np.int64))
        tally.num_kept += rows.num_rows
        found["source"] = pa.repeat(pa.scalar(source.name), rows.num_rows)
        return pa.RecordBatch.from_arrays([found[name] for name in SPOOL.names], schema=SPOOL)

    def _apply_pattern(self, found: dict[str, pa.Array], tally: Tally) -> None:
        """What a manifest's columns say wins over what the path says."""
        assert self._pattern is not None
        matched, named = self._pattern.extract(found["path"])
        tally.num_unmatched += len(matched) - (pc.sum(matched).as_py() or 0)
        for name in FIELDS:
            if name in named:
                found[name] = pc.coalesce(found[name], named.pop(name))
        if named:
            found["metadata"] = _merged(found["metadata"], named)

    def _choose_tasks(self, tally: Tally) -> None:
        """Whose labels and masks come in: the task named where it is of that kind, else the only one of the kind."""
        found: dict[Kind, int] = {"classification": tally.num_with_label, "segmentation": tally.num_with_mask}
        if self._call.task is not None and any(found.values()):
            kind = self._config.task(self._call.task).kind
            if not found.get(kind):
                there, wanted = (
                    ("labels of images", "classification") if found["classification"] else ("masks", "segmentation")
                )
                raise CallError(
                    f"{there} come in, but task {self._call.task!r} is a {kind} task; name a {wanted} task with --task"
                )
        if tally.num_with_label:
            tally.task = self._task_of("classification")
        if tally.num_with_mask:
            tally.mask_task = self._task_of("segmentation")

    def _task_of(self, kind: Kind) -> str:
        if self._call.task is not None and self._config.task(self._call.task).kind == kind:
            return self._call.task
        names = sorted(name for name, task in self._config.tasks.items() if task.kind == kind)
        if len(names) == 1:
            return names[0]
        what = "masks" if kind == "segmentation" else "labels"
        if not names:
            other = f" with kind = {kind!r}" if kind == "segmentation" else ""
            raise CallError(
                f"{what} come in, but no task{other} is configured; add a [tasks.NAME] section to winnow.toml"
            )
        raise CallError(f"{what} come in, but for which task? Name it with --task: {', '.join(names)}")


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
