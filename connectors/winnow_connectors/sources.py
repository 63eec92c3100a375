"""Sources of images: folders, prefixes, single objects and manifests, as one stream of Arrow batches.

No image is opened. Versions come with the listing; only where nobody tells them are objects asked for one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow import uris
from winnow.errors import CallError, FetchError, StorageError
from winnow_connectors.local_files import LocalFiles
from winnow_connectors.manifests import LISTING, SUFFIXES, Manifest, inventory_files
from winnow_connectors.object_store import ObjectStores
from winnow_connectors.objects import ObjectInfo

logger = logging.getLogger(__name__)

_BATCH_ROWS = 32_768
_STAT_CHUNK = 1000
_MAX_MANIFEST_BYTES = 1 << 30
"""Largest manifest file that is copied from elsewhere: it passes through memory. Local ones may have any size."""

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A place that images come from.

    Attributes:
        uri: canonical, without secrets.
        is_manifest: it lists objects, instead of holding them.
    """

    uri: str
    is_manifest: bool

    @property
    def name(self) -> str:
        """What stands in the table ``images``: the same with and without a slash at the end."""
        return self.uri.rstrip("/") if uris.split(self.uri)[2].strip("/") else self.uri


@dataclass(frozen=True)
class Listed:
    """A batch of listed objects.

    Attributes:
        origin: where its row numbers count: the manifest's or the source's name, for messages.
        rows: of the schema ``LISTING``.
    """

    origin: str
    rows: pa.RecordBatch


def parse_source(text: str, *, manifest: bool = False) -> Source:
    """A source as given on the command line. Files that end in ``SUFFIXES`` are manifests, and all with ``manifest``.

    Raises:
        CallError: no URI and no path, or one that holds a password or signature.
    """
    uri = uris.canonical(text)
    return Source(uri, manifest or (uri.lower().endswith(SUFFIXES) and not _is_local_folder(uri)))


def read_source(source: Source, stores: ObjectStores, scratch: Path) -> Iterator[Listed]:
    """Everything that a source lists, in batches. Memory holds a few batches.

    Args:
        source: what to list.
        stores: how to reach it.
        scratch: folder for the copy of a manifest from elsewhere, one at a time.

    Raises:
        CallError: the source does not exist, or its manifest cannot be read or has malformed rows.
        StorageError: storage refuses access or fails.
    """
    if not source.is_manifest:
        yield from _list(source, stores)
        return
    for manifest in _manifests(source, stores, scratch):
        for rows in manifest.batches():
            yield Listed(manifest.name, rows)


def ask_versions(rows: pa.RecordBatch, stores: ObjectStores, *, everywhere: bool) -> tuple[pa.RecordBatch, int, int]:
    """Fill in version, size and time where the version is not known, by asking storage for each such object.

    Args:
        rows: of the schema ``LISTING``.
        stores: how to reach the objects.
        everywhere: also over the network (one HEAD request each); local files are always asked.

    Returns:
        The rows without those whose object is missing, how many these were, and for how many storage gave no answer
        (they stay without version).
    """
    unknown = pc.is_null(rows.column("version"))
    if not everywhere:
        unknown = pc.and_(unknown, pc.starts_with(rows.column("uri"), "file:"))
    indices = np.flatnonzero(unknown.to_numpy(zero_copy_only=False))
    if not indices.size:
        return rows, 0, 0
    listed = rows.column("uri").take(pa.array(indices)).to_pylist()
    columns = {name: rows.column(name).to_pylist() for name in ("version", "size", "last_modified")}
    kept = np.ones(rows.num_rows, dtype=bool)
    num_unanswered = 0
    for index, info in zip(indices, _ask(listed, stores), strict=True):
        if isinstance(info, ObjectInfo):
            columns["version"][index] = None if info.version == uris.UNVERSIONED else info.version
            columns["size"][index] = info.size if info.size is not None else columns["size"][index]
            columns["last_modified"][index] = info.last_modified or columns["last_modified"][index]
        elif info.kind == "missing":
            kept[index] = False
        else:
            num_unanswered += 1
            if num_unanswered == 1:
                logger.warning("no version: %s", info)
    for name, values in columns.items():
        position = rows.schema.get_field_index(name)
        rows = rows.set_column(position, LISTING.field(name), pa.array(values, LISTING.field(name).type))
    return (rows if kept.all() else rows.filter(pa.array(kept))), int((~kept).sum()), num_unanswered


def _ask(listed: list[str], stores: ObjectStores) -> Iterator[ObjectInfo | FetchError]:
    """What storage says of each object, in order; many questions at once."""
    files = LocalFiles()

    async def ask(uri: str) -> ObjectInfo | FetchError:
        try:
            return await stores.stat(uri)
        except FetchError as error:
            return error

    async def ask_all(chunk: list[str]) -> list[ObjectInfo | FetchError]:
        return await asyncio.gather(*map(ask, chunk))

    for start in range(0, len(listed), _STAT_CHUNK):
        chunk = listed[start : start + _STAT_CHUNK]
        if all(uri.startswith("file:") for uri in chunk):  # not worth a thread each
            for uri in chunk:
                try:
                    yield files.stat(uri)
                except FetchError as error:
                    yield error
        else:
            yield from _wait_for(ask_all(chunk))


def _wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where an event loop is running already, as in a notebook."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _list(source: Source, stores: ObjectStores) -> Iterator[Listed]:
    row = 1
    pending: list[ObjectInfo] = []
    try:
        for infos in stores.list(source.uri):
            pending += infos
            if len(pending) >= _BATCH_ROWS:
                yield Listed(source.uri, _batch(pending, row))
                row += len(pending)
                pending = []
    except FetchError as error:
        raise _as_job_error(error) from None
    if pending:
        yield Listed(source.uri, _batch(pending, row))


def _batch(infos: list[ObjectInfo], row: int) -> pa.RecordBatch:
    versions = [info.version for info in infos]
    found: dict[str, pa.Array] = {
        "uri": pa.array([info.uri for info in infos], pa.string()),
        "version": pa.array([None if version == uris.UNVERSIONED else version for version in versions], pa.string()),
        "size": pa.array([info.size for info in infos], pa.int64()),
        "last_modified": pa.array([info.last_modified for info in infos], LISTING.field("last_modified").type),
        "path": pa.array([info.key for info in infos], pa.string()),
        "row": pa.array(np.arange(row, row + len(infos), dtype=np.int64)),
    }
    columns = [found.get(field.name, pa.nulls(len(infos), field.type)) for field in LISTING]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING)


def _manifests(source: Source, stores: ObjectStores, scratch: Path) -> Iterator[Manifest]:
    """The files of a manifest: itself, those of a folder, or those that an inventory names."""
    name = source.uri.lower()
    if name.endswith(".json"):
        with _local_copy(source.uri, stores, scratch) as copy:
            files, columns = inventory_files(copy.read_bytes(), uris.redact(source.uri))
        for uri in files:
            with _local_copy(uri, stores, scratch) as copy:
                yield Manifest(copy, _shown(uri), _folder(uri), columns, inventory=True)
        return
    chosen = [source.uri]
    if _is_local_folder(source.uri) or not (name.endswith(SUFFIXES) or uris.scheme_of(source.uri) == "file"):
        found = sorted(info.uri for infos in stores.list(source.uri) for info in infos)
        chosen = [
            uri for uri in found if uri.lower().endswith(SUFFIXES) and not uris.name_of(uri).startswith((".", "_"))
        ]
        if not chosen and found != [source.uri]:
            raise CallError(f"{_shown(source.uri)} holds no manifest; files that end in {', '.join(SUFFIXES)} are read")
        chosen = chosen or found
    for uri in chosen:
        with _local_copy(uri, stores, scratch) as copy:
            yield Manifest(copy, _shown(uri), _folder(uri))


@contextlib.contextmanager
def _local_copy(uri: str, stores: ObjectStores, scratch: Path) -> Iterator[Path]:
    """A file on this machine with the object's bytes, removed at the end unless it is the object itself."""
    if uris.scheme_of(uri) == "file":
        path = Path(uris.local_path(uri))
        if not path.is_file():
            raise CallError(f"{path} does not exist; give a manifest, a folder or a URI such as s3://bucket/folder")
        yield path
        return
    path = scratch / f"manifest{''.join(Path(uris.name_of(uri)).suffixes[-2:])}"
    try:
        path.write_bytes(_wait_for(stores.read(uri, version=uris.UNVERSIONED, max_bytes=_MAX_MANIFEST_BYTES)))
    except FetchError as error:
        if error.kind == "too_many_bytes":
            raise CallError(
                f"{_shown(uri)} is larger than {_MAX_MANIFEST_BYTES >> 30} GiB; split it and give its folder "
                "with --manifest, or copy it to this machine"
            ) from None
        raise _as_job_error(error) from None
    try:
        yield path
    finally:
        path.unlink()


def _as_job_error(error: FetchError) -> CallError | StorageError:
    """The failure of a place as a whole: a wrong call where nothing is there, else a fault of storage."""
    kind = CallError if error.kind == "missing" else StorageError
    return kind(error.message)


def _is_local_folder(uri: str) -> bool:
    return uris.scheme_of(uri) == "file" and Path(uris.local_path(uri)).is_dir()


def _folder(uri: str) -> str:
    return uri.rpartition("/")[0]


def _shown(uri: str) -> str:
    return uris.local_path(uri) if uris.scheme_of(uri) == "file" else uris.redact(uri)
